"""Kronecker factors and directional curvatures, accumulated from rows.

Both accumulators see a layer's input rows once and its gradient rows once for each
column of the output curvature's square root (:mod:`laplace_debiased.rows.sweep`).
"""

from __future__ import annotations

import torch
from curvlinops import KFACType
from torch import Tensor

from laplace_debiased.curvature.eigenbasis import Factors
from laplace_debiased.rows.layers import Block, Layer, join_positions

_CHUNK_ENTRIES = 2**24


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half precision is summed in single precision."""
    return torch.promote_types(dtype, torch.float32)


def _zeros(block: Block, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Return zeros to accumulate in, where the block's parameters live."""
    parameter = next(block.layer.module.parameters())
    dtype = dtype or _accumulation_dtype(parameter.dtype)
    return torch.zeros(*shape, dtype=dtype, device=parameter.device)


def _with_bias_column(rows: Tensor) -> Tensor:
    """Append a one to each row: the bias as a weight of a constant input."""
    return torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], dim=-1)


class Contributions:
    """What each example contributes to the trace of each layer's curvature.

    Args:
        layers: Names of the layers.
    """

    def __init__(self, layers: list[str]):
        self.layers = layers
        self._batches: list[Tensor] = []

    def start_batch(self, weights: Tensor) -> None:
        """Begin a batch of examples with weights ``[batch]``."""
        self._batches.append(weights.new_zeros(len(weights), len(self.layers)))

    def add(self, layer: str, squares: Tensor) -> None:
        """Add the squares of a layer ``[batch]``, which carry the weights."""
        self._batches[-1][:, self.layers.index(layer)] += squares

    def matrix(self) -> Tensor:
        """Return all contributions ``[examples, layers]``."""
        return torch.cat(self._batches)


def _layer_names(blocks: list[Block]) -> list[str]:
    return list(dict.fromkeys(block.layer.name for block in blocks))


class KroneckerFactors:
    r"""K-FAC's factors: input covariance A and gradient covariance G of each layer.

    With rows :math:`x_{ns}, g_{ns}` and weights :math:`w_n`,

    - *expand*: :math:`A = \sum_{ns} w_n x_{ns} x_{ns}^\top / \sum_{ns} w_n`,
      :math:`G = \sum_{ns} w_n g_{ns} g_{ns}^\top`;
    - *reduce*: rows are first averaged (inputs) or summed (gradients) over positions.

    The positions s are those of all calls of a layer in a forward pass.

    Source: Eschenhagen et al., 2023 (arXiv 2311.00636), Sections 3.2 and 3.3. Groups of
    a convolution are averaged in A, as curvlinops does.

    Batches are summed in double precision. The output curvature of cross-entropy has a
    null vector; in single precision, the sum over many batches turns it so far towards
    others that exact curvature along it is no longer small.

    Args:
        blocks: The curvature blocks.
        kfac_approx: ``"expand"`` or ``"reduce"``.

    Raises:
        ValueError: If ``kfac_approx`` is not supported.
    """

    def __init__(self, blocks: list[Block], kfac_approx: str = KFACType.EXPAND):
        if kfac_approx not in KFACType:
            raise ValueError(
                f"`kfac_approx` must be 'expand' or 'reduce', got {kfac_approx!r}."
            )
        self._blocks = blocks
        self._expand = kfac_approx == KFACType.EXPAND
        self._joint: dict[str, bool] = {}
        self._input_covariances: dict[str, Tensor] = {}
        self._gradient_covariances: dict[str, Tensor] = {}
        for block in blocks:
            d_out, *d_in = block.shape
            name = block.layer.name
            self._gradient_covariances[name] = _zeros(
                block, d_out, d_out, dtype=torch.float64
            )
            if block.has_inputs:
                self._joint[name] = block.is_joint
                self._input_covariances[name] = _zeros(
                    block, *d_in, *d_in, dtype=torch.float64
                )
        self.contributions = Contributions(_layer_names(blocks))
        self._row_weights = dict.fromkeys(self._joint, 0.0)
        self._calls: dict[str, list[Tensor]] = {}

    def start_batch(self, weights: Tensor) -> None:
        """Take note of the examples' weights ``[batch]``."""
        self._reduce_calls()
        self.contributions.start_batch(weights)
        self._weights = weights

    def add_inputs(self, layer: Layer, rows: Tensor) -> None:
        """Add a batch of input rows ``[batch, S, groups, features]``."""
        if layer.name not in self._joint:
            return
        rows = rows.to(_accumulation_dtype(rows.dtype))
        rows = rows.squeeze(2) if rows.shape[2] == 1 else rows.mean(2)
        if self._expand:
            self._add_covariance(layer.name, rows)
        else:  # the mean is over the positions of all calls
            self._calls.setdefault(layer.name, []).append(rows)

    def _reduce_calls(self) -> None:
        """Add the last batch's mean rows."""
        for name, calls in self._calls.items():
            mean = join_positions(calls).mean(1, keepdim=True)
            self._add_covariance(name, mean)
        self._calls.clear()

    def _add_covariance(self, name: str, rows: Tensor) -> None:
        if self._joint[name]:
            rows = _with_bias_column(rows)
        weights = self._weights[:, None].expand(rows.shape[:2]).to(rows.dtype)
        weighted = rows * weights.unsqueeze(2)
        self._input_covariances[name] += weighted.flatten(0, 1).T @ rows.flatten(0, 1)
        self._row_weights[name] = self._row_weights[name] + weights.sum()

    def add_gradients(self, layer: Layer, rows: Tensor) -> None:
        """Add a batch of gradient rows, which carry the square root of the weights."""
        rows = rows.to(_accumulation_dtype(rows.dtype)).flatten(2)
        self.contributions.add(layer.name, rows.square().sum((1, 2)))
        rows = rows.flatten(0, 1) if self._expand else rows.sum(1)
        self._gradient_covariances[layer.name] += rows.T @ rows

    def kfacs(self, dtype: torch.dtype) -> list[Factors]:
        """Return the factors of each block.

        Args:
            dtype: The parameters' dtype. Factors of parameters in half precision, which
                cannot hold sums over all data, are in single precision.

        Returns:
            ``[G, A]`` for each block with a weight, ``[G]`` for a bias. A weight and
            its bias hold the same G.
        """
        self._reduce_calls()
        dtype = _accumulation_dtype(dtype)
        inputs = {
            name: (covariance / self._row_weights[name]).to(dtype)
            for name, covariance in self._input_covariances.items()
        }
        gradients = {
            name: covariance.to(dtype)
            for name, covariance in self._gradient_covariances.items()
        }
        return [
            [gradients[block.layer.name], inputs[block.layer.name]]
            if block.has_inputs
            else [gradients[block.layer.name]]
            for block in self._blocks
        ]


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
        blocks: The curvature blocks.
        eigenvectors: The directions ``[U_G, U_A]`` or ``[U_G]`` of each block.
    """

    def __init__(self, blocks: list[Block], eigenvectors: list[Factors]):
        self._blocks = blocks
        self._eigenvectors = eigenvectors
        self._inputs: dict[int, list[Tensor]] = {}
        self._curvatures = [_zeros(block, *block.shape) for block in blocks]
        self.contributions = Contributions(_layer_names(blocks))

    def _blocks_of(self, layer: Layer) -> list[tuple[int, Block]]:
        return [
            (index, block)
            for index, block in enumerate(self._blocks)
            if block.layer is layer
        ]

    def start_batch(self, weights: Tensor) -> None:
        """Forget the last batch; its weights come with the gradient rows."""
        self._inputs.clear()
        self.contributions.start_batch(weights)

    def add_inputs(self, layer: Layer, rows: Tensor) -> None:
        """Rotate and keep a batch of input rows ``[batch, S, groups, features]``."""
        for index, block in self._blocks_of(layer):
            if block.has_inputs:
                own = rows.to(_accumulation_dtype(rows.dtype))
                own = _with_bias_column(own) if block.is_joint else own
                rotated = own @ self._eigenvectors[index][1]
                self._inputs.setdefault(index, []).append(rotated)

    def add_gradients(self, layer: Layer, rows: Tensor) -> None:
        """Add a batch of gradient rows, which carry the square root of the weights."""
        rows = rows.to(_accumulation_dtype(rows.dtype))
        for index, block in self._blocks_of(layer):
            basis = self._eigenvectors[index][0]
            if block.has_inputs:
                inputs = join_positions(self._inputs[index])
                self._inputs[index] = [inputs]  # the next column's too
                curvature, squares = _squared_gradients(rows, inputs, basis)
            else:
                squared = (rows.flatten(2).sum(1) @ basis) ** 2
                curvature, squares = squared.sum(0), squared.sum(1)
            self._curvatures[index] += curvature
            self.contributions.add(layer.name, squares)

    def eigenvalues(self, dtype: torch.dtype) -> list[Factors]:
        """Return the curvatures of each block.

        Args:
            dtype: The parameters' dtype, as in :meth:`KroneckerFactors.kfacs`.

        Returns:
            ``[matrix]`` of shape ``[d_out, d_in]``, or ``[vector]`` for a bias.
        """
        dtype = _accumulation_dtype(dtype)
        return [[curvature.to(dtype)] for curvature in self._curvatures]


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
    _, positions, groups, d_in = inputs.shape
    if groups == 1:
        gradients = gradients @ basis
        if positions == 1:
            g, x = (rows.flatten(1) ** 2 for rows in (gradients, inputs))
            return g.T @ x, g.sum(1) * x.sum(1)

    total = inputs.new_zeros(len(basis), d_in)
    of_examples = []
    size = max(1, _CHUNK_ENTRIES // total.numel())
    # [batch, groups, positions, features]: one matrix product for an example and group
    gradients, inputs = gradients.transpose(1, 2), inputs.transpose(1, 2)
    for g, x in zip(gradients.split(size), inputs.split(size), strict=True):
        products = (g.mT @ x).flatten(1, 2)
        if groups > 1:
            products = basis.T @ products
        squares = products**2
        total += squares.sum(0)
        of_examples.append(squares.sum((1, 2)))
    return total, torch.cat(of_examples)
