"""One pass over a data source: a forward pass a batch, a backward pass a column."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from laplace.utils import select_rows
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.nn import CrossEntropyLoss
from tqdm import tqdm

from laplace_debiased.rows.capture import Tape, capture_rows
from laplace_debiased.rows.layers import Layer
from laplace_debiased.rows.output_curvature import OutputCurvature, example_losses

Inputs = Tensor | MutableMapping[str, Any]


class Accumulator(Protocol):
    """What a sweep feeds with rows."""

    def start_batch(self, weights: Tensor) -> None:
        """Begin a batch of examples with weights ``[batch]``."""

    def add_inputs(self, layer: Layer, rows: Tensor) -> None:
        """Take input rows ``[batch, S, groups, d_in / groups]``."""

    def add_gradients(self, layer: Layer, rows: Tensor) -> None:
        """Take the gradient rows ``[batch, S, groups, d_out / groups]`` of a column."""


@dataclass(frozen=True)
class SweepSummary:
    """What a sweep saw.

    Args:
        num_data: Number of examples.
        total_weight: Sum of their weights.
        loss: Weighted sum of their losses, a scalar tensor.
        num_outputs: Number of network outputs.
        losses: Each example's loss ``[num_data]``, unweighted; None, as all that
            follows, if a backend does not tell.
        traces: Trace of each example's output curvature ``[num_data]``, unweighted.
        classes: Each example's class ``[num_data]``; None if targets are no classes.
        contributions: Each example's weighted contribution to the traces of the layers'
            curvature, ``[num_data, layers]``.
    """

    num_data: int
    total_weight: float
    loss: Tensor
    num_outputs: int
    losses: Tensor | None = None
    traces: Tensor | None = None
    classes: Tensor | None = None
    contributions: Tensor | None = None


def sweep(
    model: nn.Module,
    layers: list[Layer],
    data: Iterable[tuple[Inputs, Tensor]],
    output_curvature: OutputCurvature,
    accumulator: Accumulator,
    *,
    weights: Tensor | None = None,
    backward: bool = True,
    seed: int = 0,
    progress_bar: bool = False,
    description: str = "Curvature",
) -> SweepSummary:
    """Feed the rows of a data source to an accumulator.

    The model is called functionally on detached parameters, so that neither its
    gradients nor its ``requires_grad`` flags matter or change.

    Args:
        model: The neural network.
        layers: The layers to record; none for the loss alone.
        data: Batches ``(X, y)``, iterated over once. ``X`` is a tensor, or a mapping
            that the model itself moves to its device.
        output_curvature: Square roots of the loss curvature in the output.
        accumulator: Receives the rows.
        weights: A weight for each example, in the order of ``data``; None for ones.
        backward: Whether to make backward passes; if not, layers have input rows only.
        seed: Seed for sampled labels.
        progress_bar: Whether to show a progress bar over the batches.
        description: The progress bar's label.

    Returns:
        A summary of the pass.

    Raises:
        ValueError: If the data are empty, not finite, or of a wrong shape or dtype,
            there are not as many weights as examples, weights are negative or all zero,
            or the network mixes examples.
    """
    parameter = next(model.parameters())
    device, dtype = parameter.device, parameter.dtype
    generator = Generator(device=device).manual_seed(int(seed))
    detached = {name: param.detach() for name, param in model.named_parameters()}

    if not backward:
        layers = [layer for layer in layers if layer.has_inputs]

    num_data, num_outputs, all_losses, traces, targets = 0, 0, [], [], []
    loss = torch.zeros((), dtype=torch.float64, device=device)
    total_weight = 0.0
    bar = tqdm(data, desc=f"[{description}]", disable=not progress_bar)
    for X, y in bar:
        X, y = (X.to(device) if isinstance(X, Tensor) else X), y.to(device)
        check_finite_inputs(X)
        batch_size = len(y)
        batch_weights = _batch_weights(weights, num_data, batch_size).to(
            dtype=torch.promote_types(dtype, torch.float32), device=device
        )
        accumulator.start_batch(batch_weights)
        with (
            torch.set_grad_enabled(backward),
            capture_rows(layers, batch_size, accumulator.add_inputs) as tape,
        ):
            output = functional_call(model, detached, (X,))
        y = check_targets(output, y, output_curvature.loss_func)
        precise, target = at_least_single(output.detach()), at_least_single(y)
        losses = example_losses(output_curvature.loss_func, precise, target)
        all_losses.append(losses)
        targets.append(y)
        traces.append(output_curvature.traces(precise, target))
        columns = []
        if layers and backward:
            if num_data == 0:
                check_examples_are_separate(tape, output)
            columns = output_curvature.columns(output, y, generator)
            columns = columns * batch_weights.sqrt().to(columns.dtype)[:, None]
        for index, column in enumerate(columns):
            retain_graph = index < len(columns) - 1
            for layer, rows in tape.gradient_rows(output, column, retain_graph):
                accumulator.add_gradients(layer, rows)

        num_data, num_outputs = num_data + batch_size, output.shape[1]
        total_weight += batch_weights.sum().item()
        loss = loss + (batch_weights * losses).sum()

    if num_data == 0:
        raise ValueError("The data source is empty: there is nothing to fit.")
    if weights is not None and len(weights) != num_data:
        raise ValueError(
            f"Got {len(weights)} weights for {num_data} examples: one each is needed."
        )
    if not loss.isfinite():
        raise ValueError(f"The loss is {loss.item()}: model or targets are not finite.")
    return SweepSummary(
        num_data,
        total_weight,
        loss.to(torch.promote_types(dtype, torch.float32)),
        num_outputs,
        torch.cat(all_losses),
        torch.cat(traces),
        None if y.is_floating_point() else torch.cat(targets),
    )


def at_least_single(tensor: Tensor) -> Tensor:
    """Turn half precision, in which a confident model's curvature is lost, into single.

    Args:
        tensor: The tensor.

    Returns:
        The tensor in single precision if it was in half, otherwise itself.
    """
    is_half = tensor.is_floating_point() and tensor.dtype.itemsize < 4
    return tensor.float() if is_half else tensor


def _batch_weights(weights: Tensor | None, start: int, batch_size: int) -> Tensor:
    """Return the weights of the batch that begins with example ``start``."""
    if weights is None:
        return torch.ones(batch_size)
    if start == 0:
        _check_weights(weights)
    own = weights[start : start + batch_size]
    if len(own) < batch_size:
        raise ValueError(
            f"Got {len(weights)} weights, but at least {start + batch_size} examples: "
            "one each is needed."
        )
    return own


def _check_weights(weights: Tensor) -> None:
    if weights.ndim != 1:
        shape = tuple(weights.shape)
        raise ValueError(f"Weights must have shape [examples], got {shape}.")
    valid = weights.isfinite() & (weights >= 0)
    if not valid.all() or not weights.any():
        raise ValueError(
            "Weights must be finite and at least zero, and some of them positive, got "
            f"{weights.min().item()}..{weights.max().item()}."
        )


def check_examples_are_separate(
    tape: Tape, output: Tensor, inputs: Sequence[Tensor] = ()
) -> None:
    """Refuse networks in which an example's output depends on others.

    Then a layer's rows do not belong to the examples that they are counted for: batch
    statistics mix examples, and in a sequence-first network the leading axis of a layer
    is not the batch. One backward pass, from the first example's output, shows it.

    Args:
        tape: The tape of a forward pass.
        output: The network's output ``[batch, outputs]``.
        inputs: Inputs that require gradients, ``[batch, ...]`` each.

    Raises:
        ValueError: If the first output has a gradient in another example's rows or
            inputs.
    """
    if len(output) == 1:
        return
    column = torch.zeros_like(output)
    column[0] = torch.arange(1, output.shape[1] + 1)
    gradients = [
        (f"layer {layer.name!r}", rows)
        for layer, rows in tape.gradient_rows(output, column, retain_graph=True)
    ]
    if inputs:
        own = torch.autograd.grad(
            output, inputs, column, retain_graph=True, allow_unused=True
        )
        gradients += [("the input", rows) for rows in own if rows is not None]
    for place, rows in gradients:
        if rows[1:].nan_to_num().any():  # zero times infinity is no dependence
            raise ValueError(
                f"In {place}, the first example's output depends on rows of others. "
                "The batch must be the leading axis of each layer's input, and layers "
                "with batch statistics must be in eval mode."
            )


def check_two_examples(
    model: nn.Module, layers: list[Layer], X: Inputs, batch_size: int
) -> None:
    """Refuse networks that mix examples, by two of a batch, or its only one twice.

    Args:
        model: The neural network.
        layers: The layers.
        X: Inputs, a tensor or a mapping.
        batch_size: Number of examples.

    Raises:
        ValueError: If the network's output is not a finite matrix, or an example's
            output depends on the other.
    """
    probes: list[Tensor] = []

    def pair_of(values: Any) -> Any:
        pair = select_rows(values, torch.arange(2) % batch_size, batch_size)
        if (
            not isinstance(values, Tensor)
            or not values.is_floating_point()
            or values.shape[:1] != (batch_size,)
        ):
            return pair
        probes.append(torch.zeros_like(pair, requires_grad=True))
        return pair + probes[-1]

    is_mapping = isinstance(X, MutableMapping)
    pair = {key: pair_of(X[key]) for key in X} if is_mapping else pair_of(X)
    detached = {name: param.detach() for name, param in model.named_parameters()}
    with (
        # whose recurrent layers have no backward pass in eval mode
        torch.backends.cudnn.flags(enabled=False),
        torch.enable_grad(),
        capture_rows(layers, 2, lambda *_: None) as tape,
    ):
        output = functional_call(model, detached, (pair,))
    check_output(output, 2)
    check_examples_are_separate(tape, output, probes)


def check_finite_inputs(X: Inputs) -> None:
    """Refuse inputs with NaN or infinite entries.

    Args:
        X: A batch of inputs.

    Raises:
        ValueError: If an entry is not finite.
    """
    tensors = X.values() if isinstance(X, MutableMapping) else [X]
    for tensor in tensors:
        if isinstance(tensor, Tensor) and not tensor.isfinite().all():
            raise ValueError("Inputs contain NaN or infinite entries.")


def check_output(output: Tensor, batch_size: int) -> None:
    """Refuse outputs that are no finite matrix with a row for each example.

    Args:
        output: Network output.
        batch_size: Number of examples.

    Raises:
        ValueError: If the output is not ``[batch, outputs]`` and finite.
    """
    if output.ndim != 2 or output.shape[0] != batch_size:
        raise ValueError(
            f"The model's output must have shape [{batch_size}, outputs] for a batch "
            f"of {batch_size}, got {tuple(output.shape)}."
        )
    if not output.isfinite().all():
        raise ValueError("The model's output contains NaN or infinite entries.")


def check_targets(output: Tensor, y: Tensor, loss_func: nn.Module) -> Tensor:
    """Refuse outputs and targets that a loss cannot compare.

    Args:
        output: Network output.
        y: Targets.
        loss_func: The loss.

    Returns:
        The targets.

    Raises:
        ValueError: If the output is not ``[batch, outputs]`` and finite, or the
            targets have a wrong shape, dtype or range.
    """
    check_output(output, len(y))
    if isinstance(loss_func, CrossEntropyLoss) and not y.is_floating_point():
        if y.ndim != 1 or y.dtype == torch.bool:
            raise ValueError(
                "Targets for classification must be class indices of shape [batch] and "
                f"integer dtype, got shape {tuple(y.shape)} and {y.dtype}."
            )
        if y.min() < 0 or y.max() >= output.shape[1]:
            raise ValueError(
                f"Class indices must lie in 0..{output.shape[1] - 1}, the model's "
                f"outputs, got {y.min().item()}..{y.max().item()}."
            )
        return y.long()
    if y.shape != output.shape or not y.is_floating_point():
        kind = (
            "class indices [batch] of integer dtype, or probabilities"
            if isinstance(loss_func, CrossEntropyLoss)
            else "floating-point"
        )
        raise ValueError(
            f"Targets must be {kind} of the output's shape {tuple(output.shape)}: the "
            f"output has {output.ndim} dims, the target {y.ndim}, of shape "
            f"{tuple(y.shape)} and {y.dtype}."
        )
    if not y.isfinite().all():
        raise ValueError("Targets contain NaN or infinite entries.")
    return y
