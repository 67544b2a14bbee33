"""Exact curvature along given directions, accumulated from rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from laplace_debiased.curvature.bases import rotated
from laplace_debiased.curvature.factors import (
    Contributions,
    Totals,
    is_joint,
    squared_norms,
    with_bias_column,
)
from laplace_debiased.curvature.jacobians import rotated_jacobians
from laplace_debiased.curvature.kronecker import Kronecker, Spectrum
from laplace_debiased.rows.chunks import at_once
from laplace_debiased.rows.layers import Layer, join_positions
from laplace_debiased.rows.one_hot import OneHotRows

# what fits into a processor's cache
_CHUNK_ENTRIES = 2**20


class DirectionalCurvatures:
    r"""Exact curvature of each layer's GGN block along given directions.

    For :math:`u = u_{G,i} \otimes u_{A,j}` it is :math:`u^\top H u = \sum_n w_n
    \sum_k (\sum_s (u_{G,i}^\top g_{nks}) (u_{A,j}^\top x_{ns}))^2`: the ``ggn``
    magnitudes, EKFAC's eigenvalue correction (George et al., 2018, arXiv 1806.03884)
    if directions and data are its own.

    Without weight sharing (``S = 1``) the square of the product is the product of the
    squares, one matrix product for the batch. Otherwise the rotated per-example
    gradients ``[batch, d_out, d_in]`` are formed, a chunk of examples at a time.

    Args:
        layers: The layers.
        directions: The directions of each.
        joint: Whether a bias is a further column of its layer's matrix.
    """

    takes_inputs = True

    def __init__(
        self,
        layers: Sequence[Layer],
        directions: Sequence[Kronecker],
        joint: bool = False,
    ):
        self._layers, self._joint = layers, joint
        self._directions = {
            layer.name: own for layer, own in zip(layers, directions, strict=True)
        }
        self._inputs: dict[str, list[Tensor | OneHotRows]] = {}
        self._spectra = {layer.name: self._zeros(layer) for layer in layers}
        self.contributions = Contributions(layers)
        self.squared_inputs = Contributions(layers)
        self.num_rows = Contributions(layers)

    def _zeros(self, layer: Layer) -> Spectrum:
        basis, inputs = self._bases(layer)
        matrix = None if inputs is None else basis.new_zeros(len(basis), len(inputs))
        has_vector = layer.vector is not None and not is_joint(layer, self._joint)
        return Spectrum(matrix, basis.new_zeros(len(basis)) if has_vector else None)

    def _bases(self, layer: Layer) -> tuple[Tensor, Tensor | None]:
        own = self._directions[layer.name]
        assert own.gradients is not None
        return own.gradients, own.inputs

    def start_batch(self, weights: Tensor) -> None:
        """Forget the last batch; its weights come with the gradient rows."""
        self._inputs.clear()
        for own in (self.contributions, self.squared_inputs, self.num_rows):
            own.start_batch(weights)

    def add_inputs(self, layer: Layer, rows: Tensor | OneHotRows) -> None:
        """Rotate and keep a batch of input rows ``[batch, S, groups, features]``."""
        self.num_rows.add(layer, rows.shape[1])
        _, basis = self._bases(layer)
        assert basis is not None
        if isinstance(rows, OneHotRows):
            kept = rows.to(basis.dtype)
            self.squared_inputs.add(layer, kept.squared_lengths())
            self._inputs.setdefault(layer.name, []).append(kept)
            return
        rows = rows.to(basis.dtype)
        self.squared_inputs.add(layer, squared_norms(rows.flatten(2)))
        if is_joint(layer, self._joint):
            rows = with_bias_column(rows)
        self._inputs.setdefault(layer.name, []).append(rotated(rows, basis))

    def add_gradients(self, layer: Layer, rows: Tensor) -> None:
        """Add a batch of gradient rows, which carry the square root of the weights."""
        basis, _ = self._bases(layer)
        rows = rows.to(basis.dtype)
        spectrum = self._spectra[layer.name]
        if spectrum.matrix is not None:
            inputs = join_positions(self._inputs[layer.name])
            self._inputs[layer.name] = [inputs]  # the next column's too
            if isinstance(inputs, OneHotRows):
                squares = _add_one_hot(spectrum.matrix, rows, inputs, basis)
            else:
                curvature, squares = _squared_gradients(rows, inputs, basis)
                spectrum.matrix.add_(curvature)
            self.contributions.add(layer, squares)
        if spectrum.vector is not None:
            # [batch, S, d_out] -> [batch, d_out]
            squared = rotated(rows.flatten(2).sum(1), basis) ** 2
            spectrum.vector.add_(squared.sum(0))
            self.contributions.add(layer, squared.sum(1))

    def per_example(self) -> dict[str, Tensor]:
        """Return what is known of each example, by its name in a sweep's summary."""
        return {
            "contributions": self.contributions.matrix(),
            "squared_inputs": self.squared_inputs.matrix(),
            "num_rows": self.num_rows.matrix(),
        }

    def add_up(self, totals: Totals) -> None:
        """Add what others have seen, who have accumulators of the same directions.

        Args:
            totals: Adds tensors of all.
        """
        for name, own in self._spectra.items():
            self._spectra[name] = own.map(lambda sums: totals([sums])[0])

    def spectra(self) -> list[Spectrum]:
        """Return the curvatures of each layer, in the directions' dtype."""
        return [self._spectra[layer.name] for layer in self._layers]


def _squared_gradients(
    gradients: Tensor, inputs: Tensor, basis: Tensor
) -> tuple[Tensor, Tensor]:
    """Sum the squares of the rotated per-example gradients.

    Args:
        gradients: Gradient rows ``[batch, S, groups, d_out / groups]``.
        inputs: Input rows ``[batch, S, groups, d_in]``, rotated already.
        basis: Eigenvectors ``[d_out, d_out]`` for the gradients.

    Returns:
        The sums over the batch ``[d_out, d_in]``, and over the gradient ``[batch]``.
    """
    if inputs.shape[1:3] == (1, 1):
        rows = rotated(gradients.flatten(1), basis)
        g, x = (own**2 for own in (rows, inputs.flatten(1)))
        # [batch, d_out], [batch, d_in] -> [d_out, d_in]
        return g.T @ x, g.sum(1) * x.sum(1)

    total = inputs.new_zeros(len(basis), inputs.shape[3])
    of_examples = []
    size = max(1, at_once(_CHUNK_ENTRIES, total.device) // total.numel())
    for g, x in zip(gradients.split(size), inputs.split(size), strict=True):
        # [batch, d_out, d_in]
        squares = rotated_jacobians(g[:, None], x, basis).squeeze(1).square_()
        total += squares.sum(0)
        of_examples.append(squares.sum((1, 2)))
    return total, torch.cat(of_examples)


def _add_one_hot(
    total: Tensor, gradients: Tensor, inputs: OneHotRows, basis: Tensor
) -> Tensor:
    """Add the squares of rotated per-example gradients where inputs are one-hot.

    Args:
        total: What to add to ``[d_out, d_in]``.
        gradients: Gradient rows ``[batch, S, 1, d_out]``.
        inputs: Input rows.
        basis: Eigenvectors ``[d_out, d_out]`` for the gradients.

    Returns:
        The squares' sums over the gradient ``[batch]``.
    """
    of_examples = []
    entries = at_once(_CHUNK_ENTRIES, total.device)
    size = max(1, entries // (len(total) * inputs.shape[1]))
    for g, own in zip(gradients.split(size), inputs.split(size), strict=True):
        rows, numbers = own.compressed()
        curvature, squares = _squared_gradients(g, rows, basis)
        total.index_add_(1, numbers, curvature)
        of_examples.append(squares)
    return torch.cat(of_examples)
