"""The rows that a forward pass gives, and its backward passes.

Each use of a parameter shifts its output by a *probe* of zeros
(:func:`~laplace_debiased.rows.recorder.probed`), whose gradient gives rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from laplace_debiased.rows.copies import Copies, used_otherwise
from laplace_debiased.rows.layers import Layer, Rows
from laplace_debiased.rows.one_hot import OneHotRows
from laplace_debiased.rows.recorder import Recorder, probed
from laplace_debiased.rows.substitution import stand_ins
from laplace_debiased.rows.uses import Choice, Layout, MatrixUse, Use


@dataclass(frozen=True, eq=False)
class _Record:
    """A use, with the layers whose rows it gives, and the key of each.

    Args:
        use: The use.
        probe: The zeros that its output was shifted by.
        layout: Where the examples are.
        layers: Pairs of a layer and what its parameter is to the function.
    """

    use: Use
    probe: Tensor
    layout: Layout
    layers: list[tuple[Layer, str]]


class Tape:
    """The uses in one forward pass.

    Args:
        batch_size: Number of examples in the pass.
        dtypes: Dtype of each layer's parameters, by its name: rows are no less precise.
        copies: The copies of parameters that each example has of its own.
        replay: Does with functions that are called again in a backward pass, by
            checkpointing, what was done in the forward pass; None if there are none.

    Attributes:
        num_calls: Number of calls of each layer so far, by its name.
        num_entries: Number of entries for an example on the axes of examples of these
            calls.
        routes: Whether the pass ordered or chose rows by what they are.
    """

    def __init__(
        self,
        batch_size: int,
        dtypes: Mapping[str, torch.dtype],
        copies: Copies,
        replay: TorchFunctionMode | None,
    ):
        self._batch_size, self._replay = batch_size, replay or nullcontext()
        self._copies = copies
        self._dtypes = dtypes
        self._records: list[_Record] = []
        self.num_calls: Counter[str] = Counter()
        self.num_entries: Counter[str] = Counter()
        self.routes = False

    def add(self, record: _Record) -> None:
        """Add a use."""
        self._records.append(record)
        size = record.use.input.shape[record.layout.axis]
        for layer, _ in record.layers:
            self.num_calls[layer.name] += 1
            self.num_entries[layer.name] += size // self._batch_size

    def precise(self, layer: Layer, rows: Rows) -> Rows:
        """Return rows in the precision of parameters, also where autocast has less."""
        own = rows.values if isinstance(rows, OneHotRows) else rows
        dtype = torch.promote_types(own.dtype, self._dtypes[layer.name])
        return cast("Rows", rows.to(dtype))

    def runs_as_found(self, layers: Sequence[Layer]) -> bool:
        """Whether each layer has its entries where it had them when it was found.

        That is so if they are as many, and nothing chose or ordered them by values.
        """
        is_same = all(self.num_entries[own.name] == own.num_entries for own in layers)
        return is_same and not self.routes

    def gradient_rows(
        self,
        output: Tensor,
        column: Tensor,
        retain_graph: bool,
        create_graph: bool = False,
    ) -> list[tuple[Layer, Tensor]]:
        """Backpropagate a column to the outputs of all layers.

        Args:
            output: The network's output ``[batch, outputs]``.
            column: What to backpropagate, of the output's shape.
            retain_graph: Whether another column follows.
            create_graph: Whether the rows are to be differentiated.

        Returns:
            Each layer with its gradient rows ``[batch, S, groups, features]``, the
            positions of all calls in their order. Layers that do not influence the
            output are left out: their gradient is zero.
        """
        probes = [r.probe for r in self._records if r.probe.requires_grad]
        copies = self._copies.copies
        gradients: Iterator[Tensor | None] = iter(())
        if probes or copies:
            with self._replay:
                gradients = iter(
                    torch.autograd.grad(
                        output,
                        [*probes, *copies],
                        grad_outputs=column,
                        retain_graph=retain_graph,
                        create_graph=create_graph,
                        allow_unused=True,
                    )
                )
        calls: dict[str, tuple[Layer, list[Tensor]]] = {}
        influential: set[str] = set()
        for record in self._records:
            gradient = next(gradients) if record.probe.requires_grad else None
            for layer, key in record.layers:
                if gradient is not None:
                    influential.add(layer.name)
                rows = record.use.gradient_rows(
                    torch.zeros_like(record.probe) if gradient is None else gradient,
                    key,
                    record.layout,
                    self._batch_size,
                )
                rows = self.precise(layer, rows)
                calls.setdefault(layer.name, (layer, []))[1].append(rows)
        recorded = [
            (layer, layer.join_calls(rows))
            for name, (layer, rows) in calls.items()
            if name in influential
        ]
        return recorded + self._of_copies(list(gradients), create_graph)

    def _of_copies(
        self, gradients: list[Tensor | None], create_graph: bool
    ) -> list[tuple[Layer, Tensor]]:
        """Turn the gradients in copies into rows of one position."""
        found = self._copies.gradients(gradients, create_graph)
        return [
            (layer, self.precise(layer, found[layer.name])[:, None, None])
            for layer in self._copies.layers
            if layer.name in found
        ]


@contextmanager
def record_rows(
    model: nn.Module,
    params: Sequence[Tensor],
    layers: Sequence[Layer],
    batch_size: int,
    on_input: Callable[[Layer, Tensor | OneHotRows], None] | None,
    differentiable: bool = False,
    choices: Callable[[Layer], Choice | None] | None = None,
    bases: Mapping[str, Tensor] | None = None,
) -> Iterator[Tape]:
    """Record the layers during one forward pass, made by :func:`run`.

    Args:
        model: The network, all of whose parameters are detached meanwhile.
        params: Parameters, in which the layers have their positions.
        layers: The layers to record.
        batch_size: Number of examples in the pass.
        on_input: Called with each layer that has inputs and its input rows, at each of
            its calls, as soon as they are known: a network may overwrite an activation
            later. None if input rows are not needed.
        differentiable: Whether the rows are to be differentiated.
        choices: What chooses the positions of a layer that give input rows; None for
            all of them.
        bases: Bases by the layers' names, in which all input rows are given.

    Yields:
        The tape to ask for gradient rows once the forward pass is done.

    Raises:
        ValueError: If a layer mixes examples, runs on an input whose axis of examples
            has no whole number of entries for each, or a parameter is used by another
            function than when it was found.
    """
    values = stand_ins(model)
    of_parameter = {
        id(values[id(params[position])]): layer
        for layer in layers
        for position in layer.parameters
        if not layer.calls
    }
    copies = Copies(layers, params, values, batch_size)

    def on_replayed_use(use: Use, output: Tensor) -> Tensor:
        return probed(output)[1] if _layers_of(use, of_parameter) else output

    is_replayed = any(layer.is_recomputed for layer in layers)
    replay = Recorder(values, on_replayed_use) if is_replayed else None
    dtypes = {layer.name: params[layer.parameters[0]].dtype for layer in layers}
    tape = Tape(batch_size, dtypes, copies, replay)

    def input_rows(use: MatrixUse, layer: Layer, layout: Layout) -> Tensor | OneHotRows:
        if bases is not None:
            return use.rotated_rows(layout, batch_size, bases[layer.name])
        choice = None if choices is None or layer.is_embedding else choices(layer)
        return tape.precise(layer, use.input_rows(layout, batch_size, choice))

    def on_use(use: Use, output: Tensor) -> Tensor:
        own = _layers_of(use, of_parameter)
        if not own:
            return output
        first, _ = own[0]
        if use.mixes_examples:
            raise ValueError(batch_statistics(first.name))
        layout = first.layout(tape.num_calls[first.name])
        kept = use.before_changes(differentiable)
        with _without_autocast(use.input.device.type):
            for layer, _ in own:
                if layer.has_inputs and on_input is not None:
                    assert isinstance(kept, MatrixUse)
                    on_input(layer, input_rows(kept, layer, layout))
        probe, shifted = probed(output)
        tape.add(_Record(kept, probe, layout, own))
        return shifted

    call = copies if copies.layers else None
    recorder = Recorder(values, on_use, _refusing(of_parameter), call)
    with recorder:
        yield tape
    # the recorder itself refers to the tape, and would keep its activations
    tape.routes = recorder.routes


def _refusing(
    of_parameter: Mapping[int, Layer],
) -> Callable[[list[Tensor], str], None]:
    """Return what refuses functions that a layer's rows do not tell of."""

    def on_other(taken: list[Tensor], name: str) -> None:
        for parameter in taken:
            layer = of_parameter.get(id(parameter))
            if layer is not None:
                raise ValueError(used_otherwise("layer", layer.name, name))

    return on_other


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Leave a network's own mixed precision while its rows are processed."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _layers_of(use: Use, of_parameter: Mapping[int, Layer]) -> list[tuple[Layer, str]]:
    """Return the layers of a use's parameters, with what the first is to it."""
    keys: dict[str, tuple[Layer, str]] = {}
    for key, parameter in (("weight", use.weight), ("bias", use.bias)):
        layer = of_parameter.get(id(parameter))
        if layer is not None:
            keys.setdefault(layer.name, (layer, key))
    return list(keys.values())


def batch_statistics(name: str) -> str:
    """Say that a layer mixes examples, and what to do about it."""
    return (
        f"Layer {name!r} uses batch statistics, which mix examples. Use eval mode and "
        "running statistics, or exclude the layer by `requires_grad_(False)`."
    )
