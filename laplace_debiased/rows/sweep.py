"""One pass over a data source: a forward pass a batch, a backward pass a column."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Generator, Tensor, nn
from torch.nn import MSELoss
from tqdm import tqdm

from laplace_debiased.rows.batches import select_rows
from laplace_debiased.rows.inputs import (
    Batch,
    Requirements,
    at_least_single,
    check_finite_inputs,
    check_targets,
    moved,
    on_device,
)
from laplace_debiased.rows.layers import Layer
from laplace_debiased.rows.one_hot import OneHotRows
from laplace_debiased.rows.output_curvature import (
    Loss,
    OutputCurvature,
    are_probabilities,
    example_losses,
    is_counted,
)
from laplace_debiased.rows.positions import num_positions, points
from laplace_debiased.rows.seeds import mixed_seed
from laplace_debiased.rows.separation import SeparationCheck
from laplace_debiased.rows.substitution import run
from laplace_debiased.rows.tape import Tape, record_rows
from laplace_debiased.rows.targets import arranged_targets, classes_of
from laplace_debiased.rows.thinning import thinnings


class Accumulator(Protocol):
    """What a sweep feeds with rows."""

    @property
    def takes_inputs(self) -> bool:
        """Whether it needs input rows."""

    def start_batch(self, weights: Tensor) -> None:
        """Begin a batch of examples with weights ``[batch]``."""

    def add_inputs(self, layer: Layer, rows: Tensor | OneHotRows) -> None:
        """Take input rows ``[batch, S, groups, d_in]``."""

    def add_gradients(self, layer: Layer, rows: Tensor) -> None:
        """Take the gradient rows ``[batch, S, groups, d_out / groups]`` of a column."""


class Nothing:
    """Takes no rows: a sweep then tells of the losses alone."""

    takes_inputs = False

    def start_batch(self, weights: Tensor) -> None:
        """See :meth:`Accumulator.start_batch`."""

    def add_inputs(self, layer: Layer, rows: Tensor | OneHotRows) -> None:
        """See :meth:`Accumulator.add_inputs`."""

    def add_gradients(self, layer: Layer, rows: Tensor) -> None:
        """See :meth:`Accumulator.add_gradients`."""


@dataclass(frozen=True)
class SweepSummary:
    """What a sweep saw.

    Args:
        num_data: Number of examples.
        total_weight: Sum of the weights of those that the loss counts.
        loss: Weighted sum of their losses, a scalar tensor.
        num_outputs: Number of network outputs, at a position if there are several.
        are_probabilities: Whether the outputs are probabilities, where logits are
            expected.
        losses: Each example's loss ``[num_data]``, unweighted; None, as all that
            follows, if a backend of laplace-torch does not tell.
        traces: Trace of each example's output curvature ``[num_data]``, unweighted.
        classes: Each example's class ``[num_data]``; None if it has none, or several.
        contributions: Each example's weighted contribution to the traces of the layers'
            curvature, ``[num_data, layers]``; with K-FAC's factors, to that of G alone.
        squared_inputs: Sum of the squared entries of each example's input rows,
            ``[num_data, layers]``; None if no input covariances were computed.
        num_rows: Number of these rows, likewise.
        is_random: Whether contributions have noise of sampled labels or random signs.
    """

    num_data: int
    total_weight: float
    loss: Tensor
    num_outputs: int
    are_probabilities: bool = False
    losses: Tensor | None = None
    traces: Tensor | None = None
    classes: Tensor | None = None
    contributions: Tensor | None = None
    squared_inputs: Tensor | None = None
    num_rows: Tensor | None = None
    is_random: bool = False

    @classmethod
    def joined(cls, parts: Sequence[SweepSummary]) -> SweepSummary:
        """Put together what sweeps over parts of the data saw, in their order.

        Args:
            parts: The summaries.

        Returns:
            That of all data.

        Raises:
            ValueError: If no target counts.
        """
        first = parts[0]
        per_example: dict[str, Any] = {}
        for name in _PER_EXAMPLE:
            values = [getattr(own, name) for own in parts]
            known = all(own is not None for own in values)  # some may have no classes
            per_example[name] = torch.cat(values) if known else None
        whole = replace(
            first,
            num_data=sum(own.num_data for own in parts),
            total_weight=sum(own.total_weight for own in parts),
            loss=torch.stack([own.loss for own in parts]).sum(),
            are_probabilities=all(own.are_probabilities for own in parts),
            **per_example,
        )
        whole.check_counted()
        return whole

    @classmethod
    def of_layers(cls, parts: Sequence[SweepSummary]) -> SweepSummary:
        """Put together what sweeps over the same data saw of some layers each.

        Args:
            parts: The summaries, in the order of the layers.

        Returns:
            That of all layers.
        """
        columns: dict[str, Any] = {
            name: torch.cat([getattr(own, name) for own in parts], 1)
            for name in _PER_LAYER
            if getattr(parts[0], name) is not None
        }
        return replace(parts[0], **columns)

    def check_counted(self) -> None:
        """Refuse data of which none counts.

        Raises:
            ValueError: If the loss ignores all targets.
        """
        if self.total_weight == 0:
            raise ValueError(
                "No target counts: the loss ignores all of them, or their weight is "
                "zero."
            )


_PER_LAYER = ("contributions", "squared_inputs", "num_rows")
_PER_EXAMPLE = ("losses", "traces", "classes", *_PER_LAYER)


def sweep(
    model: nn.Module,
    params: Sequence[Tensor],
    layers: Sequence[Layer],
    data: Iterable[Batch],
    output_curvature: OutputCurvature,
    accumulator: Accumulator,
    *,
    weights: Tensor | None = None,
    backward: bool = True,
    positions: int | None = None,
    seed: int = 0,
    start: int | None = None,
    progress_bar: bool = False,
    description: str = "Curvature",
    num_points: int | None = None,
    among: Sequence[Layer] | None = None,
) -> SweepSummary:
    """Feed the rows of a data source to an accumulator.

    The network is run on detached stand-ins for its parameters, so that neither their
    gradients nor their ``requires_grad`` flags matter or change.

    Args:
        model: The neural network.
        params: Parameters, in which the layers have their positions.
        layers: The layers to record; none for the loss alone.
        data: Batches ``(X, y)``, iterated over once. ``X`` is a tensor, or a mapping
            that the model itself moves to its device.
        output_curvature: Square roots of the loss curvature in the output.
        accumulator: Receives the rows.
        weights: A weight for each example, in the order of ``data``; None for ones.
        backward: Whether to make backward passes; if not, layers have input rows only.
        positions: Number of positions of an example that give input rows of a layer, at
            most (:func:`~laplace_debiased.rows.thinning.thinnings`); None for all.
        seed: Seed for sampled labels and positions, which depend on how many examples
            are before their batch.
        start: Number of examples before these, if they are a part of the data: then
            some of the others have to count. None if they are all.
        progress_bar: Whether to show a progress bar over the examples.
        description: The progress bar's label.
        num_points: The progress bar's total, if it is known.
        among: All layers, of which those to record may be some: how batches are
            divided, and so what is drawn, depends on all. None if they are all.

    Returns:
        A summary of the pass.

    Raises:
        ValueError: If the data are empty, not finite, or of a wrong shape or dtype,
            there are not as many weights as examples, weights are negative or all zero,
            or the network mixes examples.
    """
    parameter = next(model.parameters())
    device, loss_func = parameter.device, output_curvature.loss_func
    generator = Generator(device=device)
    if not backward:
        layers = [layer for layer in layers if layer.has_inputs]
    dtype = torch.promote_types(parameter.dtype.to_real(), torch.float32)
    totals, check_separate = _Totals(dtype, device), SeparationCheck()
    add_inputs = accumulator.add_inputs if accumulator.takes_inputs else None
    with tqdm(
        desc=f"[{description}]", total=num_points, disable=not progress_bar
    ) as bar:
        for X, y in _parts(data, (among or layers) if backward else []):
            X, y = on_device(X, device), moved(y, device)
            y = arranged_targets(model, y, loss_func)
            check_finite_inputs(X, totals.requirements.add)
            own = weights_of_batch(weights, totals.num_data, len(y)).to(dtype)
            own = moved(own, device) * is_counted(loss_func, y)
            accumulator.start_batch(own)
            own_seed = mixed_seed(seed, (start or 0) + totals.num_data)
            generator.manual_seed(own_seed)
            choices = None if positions is None else thinnings(positions, own_seed)
            with (
                torch.set_grad_enabled(backward),
                record_rows(
                    model, params, layers, len(y), add_inputs, choices=choices
                ) as tape,
            ):
                output = run(model, X)
            y = check_targets(output, y, loss_func, totals.requirements.add)
            if layers and backward:
                check_separate(tape, output)
                columns = output_curvature.columns(output, y, generator)
                columns = columns * own.sqrt().to(columns.dtype)[:, None]
                for layer, rows in _gradient_rows(tape, output, columns):
                    accumulator.add_gradients(layer, rows)
            totals.add(output_curvature, output, y, own)
            bar.update(len(y))
    summary = totals.summary(weights, loss_func)
    if start is None:
        summary.check_counted()
    return summary


# of the gradients in copies that examples have of a parameter
_COPIED_ENTRIES = 2**27


def _parts(data: Iterable[Batch], layers: Sequence[Layer]) -> Iterator[Batch]:
    """Split batches whose copies of parameters would take too much memory."""
    entries = sum(layer.d_out for layer in layers if layer.calls)
    size = max(1, _COPIED_ENTRIES // max(1, entries))
    for X, y in data:
        if 0 < len(y) <= size:
            yield X, y
        elif len(y):
            for part in torch.arange(len(y)).split(size):
                yield select_rows(X, part, len(y)), y[part]


def _gradient_rows(
    tape: Tape, output: Tensor, columns: Tensor
) -> Iterator[tuple[Layer, Tensor]]:
    """Backpropagate columns ``[columns, batch, outputs]``, one after the other."""
    for index, column in enumerate(columns):
        retain_graph = index < len(columns) - 1
        yield from tape.gradient_rows(output, column, retain_graph)


@dataclass(eq=False)
class _Totals:
    """What a sweep has seen so far.

    Args:
        dtype: Dtype of the loss.
        device: The network's device.
    """

    dtype: torch.dtype
    device: torch.device
    num_data: int = 0
    num_outputs: int = 0
    num_positions: int = 0
    are_probabilities: Tensor | bool = True
    losses: list[Tensor] = field(default_factory=list)
    traces: list[Tensor] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self.total_weight = torch.zeros_like(self.loss)
        self.requirements = Requirements()

    def add(
        self,
        output_curvature: OutputCurvature,
        output: Tensor,
        y: Tensor,
        weights: Tensor,
    ) -> None:
        """Add a batch."""
        precise, target = at_least_single(output.detach()), at_least_single(y)
        losses = example_losses(output_curvature.loss_func, precise, target)
        loss_func = output_curvature.loss_func
        count = num_positions(y)
        if isinstance(loss_func, MSELoss) and self.num_positions not in (0, count):
            raise ValueError(
                "The examples of a regression must have equally many positions, whose "
                f"density is normalized as one, got {self.num_positions} and {count}."
            )
        classes, self.num_positions = output.shape[1] // count, count
        if self.num_outputs not in (0, classes):
            raise ValueError(
                f"Targets of shape {list(y.shape)} are not those of outputs with "
                f"{self.num_outputs} classes."
            )
        self.are_probabilities &= are_probabilities(loss_func, points(output, classes))
        self.losses.append(losses)
        self.traces.append(output_curvature.traces(precise, target))
        self.targets.append(y)
        self.loss = self.loss + (weights * losses).sum()
        self.total_weight = self.total_weight + weights.sum()
        self.num_data, self.num_outputs = self.num_data + len(y), classes

    def summary(self, weights: Tensor | None, loss_func: Loss) -> SweepSummary:
        """Check that there were as many points as weights, and sum up."""
        if self.num_data == 0:
            raise ValueError("The data source is empty: there is nothing to fit.")
        self.requirements.check()
        if weights is not None and len(weights) != self.num_data:
            raise ValueError(
                f"Got {len(weights)} weights for {self.num_data} examples: one each is "
                "needed."
            )
        if not self.loss.isfinite():
            raise ValueError(
                f"The loss is {self.loss.item()}: model or targets are not finite."
            )
        return SweepSummary(
            self.num_data,
            self.total_weight.item(),
            self.loss.to(self.dtype),
            self.num_outputs,
            bool(self.are_probabilities),
            torch.cat(self.losses),
            torch.cat(self.traces),
            classes_of(self.targets, loss_func),
        )


def weights_of_batch(weights: Tensor | None, start: int, batch_size: int) -> Tensor:
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
    if not (weights.isfinite() & (weights >= 0)).all() or not weights.any():
        raise ValueError(
            "Weights must be finite and at least zero, and some of them positive, got "
            f"{weights.min().item()}..{weights.max().item()}."
        )
