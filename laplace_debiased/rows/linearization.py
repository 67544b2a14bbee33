"""The Jacobians of a network, as rows of its layers.

An output's Jacobian in a layer's weight is a sum over positions of outer products of
gradient rows and input rows, so that both together hold it in far less memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from laplace_debiased.rows.inputs import Inputs
from laplace_debiased.rows.layers import Layer, join_positions
from laplace_debiased.rows.one_hot import OneHotRows
from laplace_debiased.rows.separation import check_examples_are_separate
from laplace_debiased.rows.substitution import run
from laplace_debiased.rows.tape import Tape, record_rows


@dataclass(frozen=True)
class Linearization:
    """Output and Jacobian of a batch.

    Args:
        output: The network's output ``[batch, C]``.
        inputs: Input rows ``[batch, S, groups, d_in]``, dense or one-hot, of each layer
            that has inputs, by its name.
        tape: What gives gradient rows.
        differentiable: Whether gradients flow to the inputs.
    """

    output: Tensor
    inputs: dict[str, Tensor | OneHotRows]
    tape: Tape
    differentiable: bool = False

    @cached_property
    def gradients(self) -> dict[str, Tensor]:
        """Gradient rows of all outputs at once, see :meth:`backward`."""
        ((_, rows),) = self.backward(self.output.shape[1])
        return rows

    def backward(self, count: int) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        """Run the network backward once for each output.

        Args:
            count: Number of outputs, c, whose rows are held at once.

        Yields:
            Some outputs after the others, and their gradient rows ``[batch, c, S,
            groups, d_out / groups]``, of each layer that influences the output.
        """
        columns = torch.eye(self.output.shape[1], dtype=self.output.dtype)
        columns = columns.to(self.output.device)
        for start in range(0, len(columns), count):
            some = slice(start, start + count)
            gradients: dict[str, list[Tensor]] = {}
            for column in columns[some]:
                for layer, rows in self._backward(column):
                    gradients.setdefault(layer.name, []).append(rows)
            yield some, {name: _stacked(own) for name, own in gradients.items()}

    @torch.enable_grad()
    def _backward(self, column: Tensor) -> list[tuple[Layer, Tensor]]:
        return self.tape.gradient_rows(
            self.output,
            column.expand_as(self.output),
            retain_graph=True,
            create_graph=self.differentiable,
        )

    def dense_inputs(self, layer: Layer) -> Tensor:
        """Return a layer's input rows ``[batch, S, groups, d_in]``, if not one-hot."""
        rows = self.inputs[layer.name]
        assert isinstance(rows, Tensor)
        return rows


@torch.enable_grad()
def linearize(
    model: nn.Module,
    params: Sequence[Tensor],
    layers: Sequence[Layer],
    X: Inputs,
    batch_size: int,
    differentiable: bool = False,
    check: bool = False,
    bases: Mapping[str, Tensor] | None = None,
) -> Linearization:
    """Run a network forward once, so that it may run backward once for each output.

    Args:
        model: The network.
        params: Parameters, in which the layers have their positions.
        layers: The layers.
        X: Inputs, a tensor or a mapping.
        batch_size: Number of examples.
        differentiable: Whether gradients flow to the inputs.
        check: Whether to refuse networks that mix examples, which is always done where
            layers have other numbers of rows than when they were found.
        bases: Bases by the layers' names, in which input rows are given; None for those
            of the features.

    Returns:
        Output and rows.

    Raises:
        ValueError: If the network's output is not a matrix, a layer cannot be recorded,
            or the network mixes examples.
    """
    calls: dict[str, list[Any]] = {}

    def keep(layer: Layer, rows: Tensor | OneHotRows) -> None:
        calls.setdefault(layer.name, []).append(rows)

    with record_rows(
        model, params, layers, batch_size, keep, differentiable, bases=bases
    ) as tape:
        output = run(model, X)
    if output.ndim != 2:
        raise ValueError(
            "The model's output must have shape [batch, outputs], got "
            f"{tuple(output.shape)}."
        )
    if check or not tape.runs_as_found(layers):
        check_examples_are_separate(tape, output)
    inputs = {name: join_positions(rows) for name, rows in calls.items()}
    return Linearization(output, inputs, tape, differentiable)


def _stacked(rows: list[Tensor]) -> Tensor:
    """Stack rows ``[batch, S, ...]`` along a new second axis, in their own layout."""
    if len(rows) == 1:
        return rows[0].unsqueeze(1)
    if rows[0].stride(1) == 1:  # those of convolutions: positions are neighbours
        return torch.stack([own.movedim(1, -1) for own in rows], 1).movedim(-1, 2)
    return torch.stack(rows, 1)


def rows_per_example(layers: Sequence[Layer], num_outputs: int) -> int:
    """Count the entries of an example's linearization.

    Args:
        layers: The layers, whose numbers of positions are taken from them.
        num_outputs: Number of network outputs, C.

    Returns:
        Number of entries in all rows, with the gradient rows twice: they are stacked,
        and both they and the stack are there at once.
    """
    inputs = sum(
        layer.num_positions * layer.groups * (1 if layer.is_embedding else layer.d_in)
        for layer in layers
    )
    gradients = sum(layer.num_positions * layer.d_out for layer in layers)
    return inputs + 2 * num_outputs * gradients


def contract_positions(gradients: Tensor, inputs: Tensor) -> Tensor:
    """Compute the Jacobian in a layer's weight.

    Args:
        gradients: Gradient rows ``[batch, C, S, groups, d_out / groups]``.
        inputs: Input rows ``[batch, S, groups, d_in]``.

    Returns:
        The Jacobian ``[batch, C, d_out, d_in]``.
    """
    if gradients.shape[3] > 1:
        jacobians = torch.einsum("ncsgo,nsgi->ncgoi", gradients, inputs)
        return jacobians.flatten(2, 3)
    transposed = gradients.squeeze(3).mT
    batch, num_outputs, d_out, positions = transposed.shape
    # one matrix product for an example: its outputs share the inputs
    flat = transposed.reshape(batch, num_outputs * d_out, positions)
    return (flat @ inputs.squeeze(2)).view(batch, num_outputs, d_out, -1)


def changes_by_matrix(
    gradients: Tensor, inputs: Tensor, directions: Tensor, memory_limit: int
) -> Tensor:
    """Compute the changes of the output along directions of a layer's matrix.

    Args:
        gradients: Gradient rows ``[batch, C, S, groups, d_out / groups]``.
        inputs: Input rows ``[batch, S, groups, d_in]``.
        directions: Directions ``[d_out * d_in, K]``.
        memory_limit: Bytes that intermediate results may take.

    Returns:
        Changes ``[batch, C, K]``.
    """
    multiply, entries = _cheaper_product(gradients, inputs, directions.shape[1])
    size = max(1, memory_limit // (3 * entries * inputs.element_size()))
    return torch.cat(
        [
            multiply(*examples, directions)
            for examples in zip(gradients.split(size), inputs.split(size), strict=True)
        ]
    )


def _cheaper_product(
    gradients: Tensor, inputs: Tensor, num_directions: int
) -> tuple[Callable[[Tensor, Tensor, Tensor], Tensor], int]:
    """Choose how a layer's changes of the output are computed.

    Args:
        gradients: Gradient rows ``[batch, C, S, groups, d_out / groups]``.
        inputs: Input rows ``[batch, S, groups, d_in]``.
        num_directions: Number of directions, K.

    Returns:
        A function of gradients, inputs and directions ``[d_out * d_in, K]`` to changes
        ``[batch, C, K]``, and how many entries it forms for an example.
    """
    _, num_outputs, positions, groups, d_out = gradients.shape
    d_in = inputs.shape[-1]
    by_jacobians = num_outputs * (positions + num_directions) * d_in
    by_positions = positions * num_directions * (d_in + num_outputs)
    if groups == 1 and by_positions < by_jacobians:
        return _through_positions, positions * d_out * num_directions
    return _through_jacobians, num_outputs * groups * d_out * d_in


def _through_jacobians(gradients: Tensor, inputs: Tensor, directions: Tensor) -> Tensor:
    return contract_positions(gradients, inputs).flatten(2) @ directions


def _through_positions(gradients: Tensor, inputs: Tensor, directions: Tensor) -> Tensor:
    d_in, num_directions = inputs.shape[-1], directions.shape[1]
    # [d_in, d_out * K], so that products are those of one matrix
    flat = directions.reshape(-1, d_in, num_directions).transpose(0, 1).flatten(1)
    products = (inputs.squeeze(2) @ flat).view(len(inputs), -1, num_directions)
    return gradients.flatten(2) @ products
