"""What this library takes from curvlinops, all in one place.

Version 3.0.1, on which laplace-torch 0.3 runs, has no operators for Kronecker products
or for block diagonals, and exports no base class: ours is its `PyTorchLinearOperator`.
From version 4 on,

- operators take the network's parameters as a dictionary, and functions of them;
- trace, determinant, log determinant and norm are methods, not properties;
- there are public operators for block diagonals of eigendecomposed Kronecker products,
  of which :class:`EigenbasisLinearOperator` can then be composed.

This file is to change then, and no other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from curvlinops import GGNLinearOperator, HessianLinearOperator
from curvlinops._torch_base import PyTorchLinearOperator as LinearOperator
from torch import Tensor, nn

from laplace_debiased.curvature.eigenbasis import from_eigenbasis, to_eigenbasis
from laplace_debiased.curvature.kronecker import Kronecker
from laplace_debiased.rows.checks import check_choice
from laplace_debiased.rows.inputs import Batch, num_examples, on_device
from laplace_debiased.rows.layers import Layer
from laplace_debiased.rows.output_curvature import Loss
from laplace_debiased.rows.separation import check_no_hidden_uses
from laplace_debiased.rows.substitution import Substituted

_OPERATORS = {"ggn": GGNLinearOperator, "hessian": HessianLinearOperator}
CURVATURES = tuple(_OPERATORS)
# laplace-torch's default of the inputs' key in mappings
_KEY = "input_ids"


def curvature_operator(
    curvature: str,
    model_func: nn.Module,
    loss_func: Loss,
    params: Sequence[Tensor],
    data: Iterable[Batch],
) -> LinearOperator:
    """Build curvlinops' operator of a curvature.

    Args:
        curvature: ``"ggn"`` or ``"hessian"``.
        model_func: The neural network.
        loss_func: The loss.
        params: The parameters.
        data: Batches ``(X, y)``, iterated over several times.

    Returns:
        The operator ``[D, D]``.

    Raises:
        ValueError: If the curvature is not known, or parameters cannot be replaced.
    """
    check_choice("curvature", curvature, _OPERATORS)
    for X, y in data:
        X = on_device(X, params[0].device)
        check_no_hidden_uses(model_func, params, X, len(y))
        break
    operator = _OPERATORS[curvature]
    return operator(
        Substituted(model_func),
        loss_func,
        list(params),
        data,
        check_deterministic=False,
        batch_size_fn=lambda X: num_examples(X, _KEY),
    )


class EigenbasisLinearOperator(LinearOperator):
    """A symmetric operator, given by its eigendecomposition.

    Args:
        params: The parameters it acts on.
        layers: The layers, whose blocks are on its diagonal.
        eigenvectors: Eigenvectors of each block.
        spectra: Eigenvalues of each block, of its shape ``[d_out, d_in]`` or
            ``[d_out]``. A layer has one block if its bias is a further column of its
            matrix, and else one for each parameter.
    """

    SELF_ADJOINT = True

    def __init__(
        self,
        params: Sequence[Tensor],
        layers: Sequence[Layer],
        eigenvectors: Sequence[Kronecker],
        spectra: Sequence[Sequence[Tensor]],
    ):
        shapes = [tuple(param.shape) for param in params]
        super().__init__(shapes, shapes)
        self._device, self._dtype = params[0].device, params[0].dtype
        self._blocks = [
            (layer, positions, vectors, values)
            for layer, vectors, own in zip(layers, eigenvectors, spectra, strict=True)
            for positions, values in zip(
                block_positions(layer, len(own) == 1), own, strict=True
            )
        ]

    def _matmat(self, M: list[Tensor]) -> list[Tensor]:
        product: list[Tensor | None] = [None] * len(M)
        for layer, positions, vectors, values in self._blocks:
            parts = [M[position].movedim(-1, 0) for position in positions]
            # [columns, d_out, d_in], the bias as a further column, or [columns, d_out]
            columns = [
                layer.as_matrix(part)
                if position == layer.matrix
                else part.reshape(len(part), *values.shape[:-1], -1)
                for position, part in zip(positions, parts, strict=True)
            ]
            matrix = torch.cat(columns, dim=-1)
            basis = vectors.tensors()[: values.ndim]
            matrix = from_eigenbasis(to_eigenbasis(matrix, basis) * values, basis)
            columns = list(matrix.split([c.shape[-1] for c in columns], dim=-1))
            for position, part, column in zip(positions, parts, columns, strict=True):
                if position == layer.matrix:
                    column = layer.as_stored(column)
                product[position] = column.reshape(part.shape).movedim(0, -1)
        return cast("list[Tensor]", product)

    @property
    def device(self) -> torch.device:
        """The operator's device."""
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """The operator's dtype."""
        return self._dtype


def block_positions(layer: Layer, joint: bool) -> list[tuple[int, ...]]:
    """Return the positions of the parameters in each block of a layer.

    Args:
        layer: The layer.
        joint: Whether a bias is a further column of the layer's matrix.

    Returns:
        Positions, the matrix's block first.
    """
    if joint:
        return [layer.parameters]
    return [(position,) for position in layer.parameters]
