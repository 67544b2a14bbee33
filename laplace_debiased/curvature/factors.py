"""Kronecker factors, accumulated from rows.

An accumulator sees a layer's input rows once, and its gradient rows once for each
column of the output curvature's square root (:mod:`laplace_debiased.rows.sweep`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from laplace_debiased.curvature.kronecker import Kronecker
from laplace_debiased.curvature.symmetric_products import Sums
from laplace_debiased.rows.checks import check_choice
from laplace_debiased.rows.layers import Layer, join_positions
from laplace_debiased.rows.one_hot import OneHotRows

# curvlinops' names of what is done with rows of several positions
EXPAND = "expand"
APPROXIMATIONS = (EXPAND, "reduce")

# adds tensors of several processes, and may change them
Totals = Callable[[Sequence[Tensor]], list[Tensor]]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half precision is summed in single precision."""
    return torch.promote_types(dtype, torch.float32)


def with_bias_column(rows: Tensor) -> Tensor:
    """Append a one to each row: the bias as a weight of a constant input."""
    return torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], dim=-1)


class Contributions:
    """A number for each example and layer, such as its part of a trace.

    Args:
        layers: The layers.
    """

    def __init__(self, layers: Sequence[Layer]):
        self._columns = {layer.name: k for k, layer in enumerate(layers)}
        self._batches: list[Tensor] = []

    def start_batch(self, weights: Tensor) -> None:
        """Begin a batch of examples with weights ``[batch]``."""
        self._batches.append(weights.new_zeros(len(weights), len(self._columns)))

    def add(self, layer: Layer, values: Tensor | float) -> None:
        """Add to the numbers of a layer ``[batch]``."""
        self._batches[-1][:, self._columns[layer.name]] += values

    def matrix(self) -> Tensor:
        """Return all numbers ``[examples, layers]``."""
        return torch.cat(self._batches)


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
        layers: The layers.
        params: Parameters, in which the layers have their positions.
        kfac_approx: ``"expand"`` or ``"reduce"``.
        joint: Whether a bias is a further column of its layer's matrix.
        takes_inputs: Whether there will be input rows.
        takes_gradients: Whether there will be gradient rows.

    Attributes:
        contributions: Each example's part of tr G, which carries its weight.
        squared_inputs: Sum of the squared entries of its input rows.
        num_rows: Number of its input rows.

    Raises:
        ValueError: If ``kfac_approx`` is not supported.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        params: Sequence[Tensor],
        kfac_approx: str = EXPAND,
        joint: bool = False,
        takes_inputs: bool = True,
        takes_gradients: bool = True,
    ):
        check_choice("kfac_approx", kfac_approx, APPROXIMATIONS)
        self.takes_inputs, self.takes_gradients = takes_inputs, takes_gradients
        self._layers, self._expand, self._joint = layers, kfac_approx == EXPAND, joint
        self._dtype = accumulation_dtype(params[0].dtype) if layers else torch.float32
        # factors are large: they are allocated when the first rows come
        self._inputs, self._gradients = Sums(), Sums()
        self._devices = {
            layer.name: params[layer.parameters[0]].device for layer in layers
        }
        self._row_weights: dict[str, Tensor] = {}
        self._calls: dict[str, tuple[Layer, list[Tensor]]] = {}
        self.contributions = Contributions(layers)
        self.squared_inputs = Contributions(layers)
        self.num_rows = Contributions(layers)

    def start_batch(self, weights: Tensor) -> None:
        """Begin a batch of examples with weights ``[batch]``."""
        self._reduce_calls()
        for own in (self.contributions, self.squared_inputs, self.num_rows):
            own.start_batch(weights)
        self._weights = weights

    def add_inputs(self, layer: Layer, rows: Tensor | OneHotRows) -> None:
        """Add a batch of input rows ``[batch, S, groups, features]``."""
        if isinstance(rows, OneHotRows):
            self._add_counts(layer, rows.to(accumulation_dtype(rows.values.dtype)))
            return
        rows = rows.to(accumulation_dtype(rows.dtype))
        rows = rows.squeeze(2) if rows.shape[2] == 1 else rows.mean(2)
        if self._expand:
            self._add_covariance(layer, rows)
        else:  # the mean is over the positions of all calls
            self._calls.setdefault(layer.name, (layer, []))[1].append(rows)

    def _reduce_calls(self) -> None:
        """Add the last batch's mean rows."""
        for layer, calls in self._calls.values():
            mean = join_positions(calls).mean(1, keepdim=True)  # [batch, 1, features]
            self._add_covariance(layer, mean)
        self._calls.clear()

    def _add_covariance(self, layer: Layer, rows: Tensor) -> None:
        weights = self._weights.to(rows.dtype)
        self._count(layer, squared_norms(rows), rows.shape[1], weights)
        if is_joint(layer, self._joint):
            rows = with_bias_column(rows)
        weighted = (rows * weights[:, None, None].sqrt()).flatten(0, 1)
        self._inputs.add_outer_products(layer.name, weighted)

    def _add_counts(self, layer: Layer, rows: OneHotRows) -> None:
        """Add one-hot rows, whose covariance is diagonal, each as a row of its own."""
        lengths = rows.squared_lengths()  # number of rows that are not padding
        weights = self._weights.to(lengths.dtype)
        self._count(layer, lengths, rows.shape[1], weights)
        self._inputs.add(layer.name, rows.covariance(weights))

    def _count(
        self, layer: Layer, squares: Tensor, num_rows: int, weights: Tensor
    ) -> None:
        """Count the rows of each example, and add up their squares ``[batch]``."""
        counted = weights > 0  # the others have no part in the mean
        self.squared_inputs.add(layer, counted * squares)
        self.num_rows.add(layer, counted * num_rows)
        total = self._row_weights.get(layer.name, 0.0)
        self._row_weights[layer.name] = total + num_rows * weights.sum()

    def add_gradients(self, layer: Layer, rows: Tensor) -> None:
        """Add a batch of gradient rows, which carry the square root of the weights."""
        rows = rows.to(accumulation_dtype(rows.dtype)).flatten(2)  # [batch, S, d_out]
        if layer.is_diagonal or not self._expand:
            rows = rows.sum(1, keepdim=True)
        self.contributions.add(layer, squared_norms(rows))
        if layer.is_diagonal:
            self._gradients.add(layer.name, rows.squeeze(1).square().sum(0))
            return
        _, positions, size = rows.shape
        if rows.stride(2) != 1 and 2 * positions >= size:
            # those of convolutions, whose positions are neighbours: copying is slower
            self._gradients.add(layer.name, (rows.mT @ rows).sum(0))
        else:
            self._gradients.add_outer_products(layer.name, rows.flatten(0, 1))

    def per_example(self) -> dict[str, Tensor]:
        """Return what is known of each example, by its name in a sweep's summary."""
        self._reduce_calls()
        own = {}
        if self.takes_gradients:
            own["contributions"] = self.contributions.matrix()
        if self.takes_inputs:
            own["squared_inputs"] = self.squared_inputs.matrix()
            own["num_rows"] = self.num_rows.matrix()
        return own

    def add_up(self, totals: Totals) -> None:
        """Add what others have seen, who have accumulators of the same layers.

        Args:
            totals: Adds tensors of all.
        """
        self._reduce_calls()
        if self.takes_gradients:
            shapes = {own.name: own.gradient_shape for own in self._layers}
            self._add_up(self._gradients.tensors(), shapes, totals)
        if not self.takes_inputs:
            return
        shapes = {
            own.name: own.input_shape(is_joint(own, self._joint))
            for own in self._layers
            if own.has_inputs
        }
        self._add_up(self._inputs.tensors(), shapes, totals)
        weights = [
            torch.as_tensor(self._row_weights.get(name, 0.0)).to(
                self._devices[name], torch.float64
            )
            for name in shapes
        ]
        self._row_weights = dict(zip(shapes, totals(weights), strict=True))

    def _add_up(
        self, sums: dict[str, Tensor], shapes: dict[str, list[int]], totals: Totals
    ) -> None:
        """Add others' sums to those of each layer, which may have none yet."""
        for name, shape in shapes.items():
            if name not in sums:
                device = self._devices[name]
                sums[name] = torch.zeros(shape, dtype=torch.float64, device=device)
        sums.update(zip(shapes, totals([sums[name] for name in shapes]), strict=True))

    def factors(self) -> list[Kronecker]:
        """Return the factors of each layer.

        Returns:
            G and A in the parameters' dtype. Factors of parameters in half precision,
            which cannot hold sums over all data, are in single precision.
        """
        self._reduce_calls()
        return [
            Kronecker(
                self._gradient_covariance(layer),
                self._input_covariance(layer) if layer.has_inputs else None,
            )
            for layer in self._layers
        ]

    def gradients(self) -> list[Kronecker]:
        """Return the gradient covariances alone, as :meth:`factors` does."""
        return [Kronecker(self._gradient_covariance(layer)) for layer in self._layers]

    def inputs(self) -> list[Kronecker]:
        """Return the input covariances alone, as :meth:`factors` does."""
        self._reduce_calls()
        return [
            Kronecker(None, self._input_covariance(layer) if layer.has_inputs else None)
            for layer in self._layers
        ]

    def _gradient_covariance(self, layer: Layer) -> Tensor:
        sums = self._gradients.tensors()
        if layer.name in sums:
            return sums[layer.name].to(self._dtype)
        return self._zeros(layer, layer.gradient_shape)

    def _input_covariance(self, layer: Layer) -> Tensor:
        sums = self._inputs.tensors()
        if layer.name in sums:
            total = self._row_weights[layer.name]
            mean = sums[layer.name] / (total if total > 0 else 1.0)
            return mean.to(self._dtype)
        return self._zeros(layer, layer.input_shape(is_joint(layer, self._joint)))

    def _zeros(self, layer: Layer, shape: list[int]) -> Tensor:
        """The covariance of a layer that these examples do not use."""
        device = self._devices[layer.name]
        return torch.zeros(shape, dtype=self._dtype, device=device)


def squared_norms(rows: Tensor) -> Tensor:
    """Return the squared norm of each example's rows ``[batch, S, features]``."""
    return torch.linalg.vector_norm(rows, dim=(1, 2)).square()


def is_joint(layer: Layer, joint: bool) -> bool:
    """Whether a layer's bias is a further column of its matrix."""
    return joint and layer.matrix is not None and layer.vector is not None
