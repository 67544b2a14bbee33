"""The Jacobians of a network, as rows of its layers.

An output's Jacobian in a layer's weight is a sum over positions of outer products of
gradient rows and input rows, so that both together hold it in far less memory.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from laplace_debiased.rows.capture import capture_rows
from laplace_debiased.rows.layers import Layer, join_positions
from laplace_debiased.rows.sweep import Inputs, check_examples_are_separate


@dataclass(frozen=True)
class Linearization:
    """Output and Jacobian of a batch.

    Args:
        output: The network's output ``[batch, C]``.
        inputs: Input rows ``[batch, S, groups, d_in]`` of each layer that has inputs,
            by its name.
        gradients: Gradient rows ``[batch, C, S, groups, d_out / groups]`` of each layer
            that influences the output.
    """

    output: Tensor
    inputs: dict[str, Tensor]
    gradients: dict[str, Tensor]


@torch.enable_grad()
def linearize(
    model: nn.Module,
    layers: list[Layer],
    X: Inputs,
    batch_size: int,
    differentiable: bool = False,
    check: bool = False,
) -> Linearization:
    """Run a network forward once, and backward once for each output.

    Args:
        model: The network.
        layers: Its layers.
        X: Inputs, a tensor or a mapping.
        batch_size: Number of examples.
        differentiable: Whether gradients flow to the inputs.
        check: Whether to refuse networks that mix examples.

    Returns:
        Output and rows.

    Raises:
        ValueError: If the network's output is not a matrix, a layer cannot be recorded,
            or the network mixes examples.
    """
    calls: dict[str, list[Tensor]] = {}

    def keep(layer: Layer, rows: Tensor) -> None:
        calls.setdefault(layer.name, []).append(rows)

    detached = {name: p.detach() for name, p in model.named_parameters()}
    with capture_rows(layers, batch_size, keep, differentiable) as tape:
        output = functional_call(model, detached, (X,))
    if output.ndim != 2:
        raise ValueError(
            "The model's output must have shape [batch, outputs], got "
            f"{tuple(output.shape)}."
        )
    if check:
        check_examples_are_separate(tape, output)
    gradients: dict[str, list[Tensor]] = {}
    for column in torch.eye(output.shape[1], dtype=output.dtype).unbind():
        column = column.to(output.device).expand_as(output)
        for layer, rows in tape.gradient_rows(
            output, column, retain_graph=True, create_graph=differentiable
        ):
            gradients.setdefault(layer.name, []).append(rows)
    return Linearization(
        output,
        {name: join_positions(rows) for name, rows in calls.items()},
        {name: torch.stack(rows, 1) for name, rows in gradients.items()},
    )


@dataclass(frozen=True)
class ExampleEntries:
    """What the linearization of one example takes.

    Args:
        inputs: Number of entries in the input rows.
        gradients: Number of entries in the gradient rows of an output.
        positions: Number of input rows of each layer, by its name.
        output: The output ``[1, C]``.
    """

    inputs: int
    gradients: int
    positions: Counter[str]
    output: Tensor


@torch.no_grad()
def example_entries(model: nn.Module, layers: list[Layer], X: Inputs) -> ExampleEntries:
    """Count, by a forward pass, what an example's linearization takes.

    Args:
        model: The network.
        layers: Its layers.
        X: Inputs of one example.

    Returns:
        The counts.
    """
    entries, positions = 0, Counter()

    def count(layer: Layer, rows: Tensor) -> None:
        nonlocal entries
        entries += rows.numel()
        positions[layer.name] += rows.shape[1] * rows.shape[2]

    with capture_rows(layers, 1, count) as tape:
        output = model(X)
    return ExampleEntries(entries, tape.num_entries, positions, output)


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
