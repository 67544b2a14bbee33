"""Record the uses of parameters in a forward pass, and their gradients afterwards.

A :class:`torch.overrides.TorchFunctionMode` sees each torch function that a network
calls, with the parameter itself among its arguments, the input as it is, and the output
before anyone changes it. Modules, hooks and aliases do not matter, nor do weights that
are used twice.

Each use shifts its output by a *probe* of zeros. The gradient in a probe is that in the
output of the function, also where an activation then overwrites that output in place,
and asking autograd for the probes alone spares the weight gradients that a backward
pass to the parameters computes and throws away.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from laplace_debiased.rows.functions import USES
from laplace_debiased.rows.layers import Layer
from laplace_debiased.rows.substitution import Substitution, stand_ins
from laplace_debiased.rows.uses import Choice, Layout, MatrixUse, Use


def _opened(function: Any) -> FunctionType:
    """Copy a function of torch so that a mode sees the functions that it calls.

    Else it is given to the mode as a whole.
    """
    inner = function.__globals__ | {"has_torch_function": lambda _: False}
    opened = FunctionType(
        function.__code__, inner, function.__name__, function.__defaults__
    )
    opened.__kwdefaults__ = function.__kwdefaults__
    return opened


_OPENED: dict[Callable, Callable] = {
    function: _opened(function)
    for function in (F.multi_head_attention_forward, torch.autograd.grad)
}


class Recorder(Substitution):
    """Tells of each use of a parameter.

    Args:
        values: Stand-ins for all parameters of the network, by their ``id``.
        on_use: Called with each use, whose weight and bias are stand-ins, and its
            output; returns a tensor to go on with.
        on_other: Called with the stand-ins that another function takes, be it a part of
            them, and its name; None if it does not matter.
    """

    def __init__(
        self,
        values: Mapping[int, Tensor],
        on_use: Callable[[Use, Tensor], Tensor],
        on_other: Callable[[list[Tensor], str], None] | None = None,
    ):
        super().__init__(values)
        self._stand_ins = {id(value): value for value in values.values()}
        self._on_use, self._on_other = on_use, on_other

    def __torch_function__(
        self,
        func: Callable,
        types: Sequence[type],
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch."""
        if not self.is_entered:
            return func(*args, **(kwargs or {}))
        if func in _OPENED:
            with copy(self):
                return _OPENED[func](*args, **(kwargs or {}))
        args, kwargs = self._replaced(args), self._replaced(kwargs or {})
        output = func(*args, **kwargs)
        use = USES[func](*args, **kwargs) if func in USES else None
        if use is not None and self._is_recorded(use):
            return self._on_use(use, output)
        if self._on_other is not None:
            taken = list(self._taken([args, kwargs]))
            if taken and any(self._is_new(value) for value in _tensors(output)):
                self._on_other(taken, getattr(func, "__name__", str(func)))
        return output

    def _is_recorded(self, use: Use) -> bool:
        """Whether weight or bias is a parameter, and no parameter is used otherwise."""
        parameters = [p for p in (use.weight, use.bias) if p is not None]
        return (
            all(id(p) in self._stand_ins or not self._is_part(p) for p in parameters)
            and any(id(p) in self._stand_ins for p in parameters)
            and id(use.input) not in self._stand_ins
            and not self._is_part(use.input)
            # what a transform of functions maps over cannot be probed
            and not torch._C._functorch.is_functorch_wrapped_tensor(use.input)
        )

    def _is_part(self, tensor: Tensor) -> bool:
        return id(tensor._base) in self._stand_ins

    def _is_new(self, tensor: Tensor) -> bool:
        """Whether a tensor is neither a stand-in nor a part of one."""
        return id(tensor) not in self._stand_ins and not self._is_part(tensor)

    def _taken(self, item: Any) -> Iterator[Tensor]:
        """Yield the stand-ins among arguments, and those that they are parts of."""
        for tensor in _tensors(item):
            for own in (tensor, tensor._base):
                if id(own) in self._stand_ins:
                    yield self._stand_ins[id(own)]


def _tensors(item: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested containers."""
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, tuple | list):
        for part in item:
            yield from _tensors(part)
    elif isinstance(item, dict):
        yield from _tensors(list(item.values()))


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
        replay: Does with functions that are called again in a backward pass, by
            checkpointing, what was done in the forward pass; None if there are none.

    Attributes:
        num_calls: Number of calls of each layer so far, by its name.
        num_entries: Number of entries for an example on the axes of examples of these
            calls.
    """

    def __init__(
        self,
        batch_size: int,
        dtypes: Mapping[str, torch.dtype],
        replay: TorchFunctionMode | None,
    ):
        self._batch_size, self._replay = batch_size, replay or nullcontext()
        self._dtypes = dtypes
        self._records: list[_Record] = []
        self.num_calls: Counter[str] = Counter()
        self.num_entries: Counter[str] = Counter()

    def add(self, record: _Record) -> None:
        """Add a use."""
        self._records.append(record)
        size = record.use.input.shape[record.layout.axis]
        for layer, _ in record.layers:
            self.num_calls[layer.name] += 1
            self.num_entries[layer.name] += size // self._batch_size

    def precise(self, layer: Layer, rows: Tensor) -> Tensor:
        """Return rows in the precision of parameters, also where autocast has less."""
        return rows.to(torch.promote_types(rows.dtype, self._dtypes[layer.name]))

    def runs_as_found(self, layers: Sequence[Layer]) -> bool:
        """Whether each layer has as many entries as when it was found."""
        return all(self.num_entries[own.name] == own.num_entries for own in layers)

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
        gradients: Iterator[Tensor | None] = iter(())
        if probes:
            with self._replay:
                gradients = iter(
                    torch.autograd.grad(
                        output,
                        probes,
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
        return [
            (layer, layer.join_calls(rows))
            for name, (layer, rows) in calls.items()
            if name in influential
        ]


def probed(output: Tensor) -> tuple[Tensor, Tensor]:
    """Shift an output by zeros whose gradient is that in the output.

    Args:
        output: The output of a function.

    Returns:
        The zeros, which have no gradient where gradients are disabled, and a tensor
        equal to the output.
    """
    zeros = output.new_zeros(()).expand(output.shape)
    if not torch.is_grad_enabled():
        return zeros, output
    zeros.requires_grad_()
    return zeros, output + zeros


@contextmanager
def record_rows(
    model: nn.Module,
    params: Sequence[Tensor],
    layers: Sequence[Layer],
    batch_size: int,
    on_input: Callable[[Layer, Tensor], None] | None,
    differentiable: bool = False,
    choices: Callable[[Layer], Choice] | None = None,
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

    Yields:
        The tape to ask for gradient rows once the forward pass is done.

    Raises:
        ValueError: If a layer mixes examples, or runs on an input whose axis of
            examples has no whole number of entries for each.
    """
    values = stand_ins(model)
    of_parameter = {
        id(values[id(params[position])]): layer
        for layer in layers
        for position in layer.parameters
    }

    def on_replayed_use(use: Use, output: Tensor) -> Tensor:
        return probed(output)[1] if _layers_of(use, of_parameter) else output

    is_replayed = any(layer.is_recomputed for layer in layers)
    replay = Recorder(values, on_replayed_use) if is_replayed else None
    dtypes = {layer.name: params[layer.parameters[0]].dtype for layer in layers}
    tape = Tape(batch_size, dtypes, replay)

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
                    choice = None if choices is None else choices(layer)
                    rows = kept.input_rows(layout, batch_size, choice)
                    on_input(layer, tape.precise(layer, rows))
        probe, shifted = probed(output)
        tape.add(_Record(kept, probe, layout, own))
        return shifted

    with Recorder(values, on_use):
        yield tape


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
