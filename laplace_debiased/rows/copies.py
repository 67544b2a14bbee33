"""Parameters that are used in any way: each example gets a copy of its own.

Where no row type tells what a function does with a parameter, it is called on each
example by itself, with that example's copy of the parameter, all at once by
:func:`torch.vmap`. The gradient in an example's copy is its per-example gradient. What
is computed from parameters alone, as by weight normalization, is copied in their place,
and its gradients are taken on to the parameters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laplace_debiased.rows.calls import (
    NUMBER,
    Call,
    is_in_place,
    leaves,
    name_of,
    new_tensors,
    with_leaves,
)
from laplace_debiased.rows.layers import Layer


@dataclass(frozen=True, eq=False)
class _Tracked:
    """A parameter, or what is computed from parameters alone.

    Args:
        original: The tensor that the network has.
        values: Its values, as a function of those of the layers' parameters.
        layers: Names of the layers.
    """

    original: Tensor
    values: Tensor
    layers: frozenset[str]


@dataclass(frozen=True, eq=False)
class _Record:
    """Copies that a call got.

    Args:
        tracked: What was copied.
        copies: The copies ``[batch, ...]``.
    """

    tracked: _Tracked
    copies: Tensor


class Copies:
    """Calls functions, with a copy for each example of what it tracks.

    Args:
        layers: Layers, of which those with known calls are tracked.
        params: Parameters, in which the layers have their positions.
        values: The values that the network has in their place, by their ``id``.
        batch_size: Number of examples.

    Attributes:
        layers: The layers that are tracked.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        params: Sequence[Tensor],
        values: Mapping[int, Tensor],
        batch_size: int,
    ):
        self.layers = [layer for layer in layers if layer.calls]
        self._calls = {layer.name: layer.calls for layer in self.layers}
        self._batch_size = batch_size
        self._num_calls: Counter[str] = Counter()
        self._roots: dict[str, Tensor] = {}
        # by the `id` of the tensor that a function may get
        self._tracked: dict[int, _Tracked] = {}
        for layer in self.layers:
            (position,) = layer.parameters
            value = values[id(params[position])]
            root = value.detach().requires_grad_()
            own = _Tracked(value, root, frozenset({layer.name}))
            self._roots[layer.name] = root
            self._tracked |= {id(value): own, id(root): own}
        self._records: list[_Record] = []

    @property
    def copies(self) -> list[Tensor]:
        """All copies ``[batch, ...]``, whose gradients are asked for."""
        return [record.copies for record in self._records]

    def __call__(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Call a function.

        Args:
            func: The function.
            args: Its arguments.
            kwargs: Those by keyword.

        Returns:
            What it returns.

        Raises:
            ValueError: If it was not called with a parameter when the layer was found.
        """
        given = list(leaves([args, kwargs]))
        tracked = [self._tracked.get(id(item)) for item in given]
        names = frozenset[str]().union(*(own.layers for own in tracked if own))
        if not names:
            return func(*args, **kwargs)
        call = self._next_call(names)
        if call is None or call.function != name_of(func):
            output = func(*args, **kwargs)
            is_written = torch.is_grad_enabled() and is_in_place(func)
            if is_written or new_tensors(output, given):
                raise ValueError(used_otherwise("parameter", min(names), name_of(func)))
            return output
        run = self._of_parameters if call.is_of_parameters else self._of_examples
        output, is_new = run(call, func, [args, kwargs], given, tracked)
        if is_new:
            self._num_calls.update(names)
        return output

    def _next_call(self, names: frozenset[str]) -> Call | None:
        """Return what the layers' next call is; None if there is none."""
        name = min(names)
        calls, number = self._calls[name], self._num_calls[name]
        return calls[number] if number < len(calls) else None

    def _of_parameters(
        self,
        _: Call,
        func: Callable,
        arguments: list[Any],
        given: list[Any],
        tracked: list[_Tracked | None],
    ) -> tuple[Any, bool]:
        """Compute something from parameters alone, and track it."""
        own = [
            item if of is None else of.values
            for item, of in zip(given, tracked, strict=True)
        ]
        args, kwargs = with_leaves(arguments, iter(own))
        with torch.enable_grad():
            output = func(*args, **kwargs)
        names = frozenset[str]().union(*(of.layers for of in tracked if of))
        new = new_tensors(output, own)
        for tensor in new:
            self._tracked[id(tensor)] = _Tracked(tensor, tensor, names)
        return output, bool(new)

    def _of_examples(
        self,
        call: Call,
        func: Callable,
        arguments: list[Any],
        given: list[Any],
        tracked: list[_Tracked | None],
    ) -> tuple[Any, bool]:
        """Call a function on each example by itself."""
        own, mapped = list(given), {}
        for k, (item, of, axis) in enumerate(
            zip(given, tracked, call.inputs, strict=True)
        ):
            if of is not None:
                mapped[k] = self._copied(of)
            elif axis == NUMBER:
                own[k] = item // self._batch_size
            elif axis is not None:
                if call.singles[k]:
                    _check_single(item, axis, self._batch_size, name_of(func))
                mapped[k] = _split(item, axis, self._batch_size)
        kind: list[Any] = []

        def of_example(*values: Tensor) -> list[Tensor]:
            for k, value in zip(mapped, values, strict=True):
                own[k] = value
            args, kwargs = with_leaves(arguments, iter(own))
            kind[:] = [func(*args, **kwargs)]
            return [item for item in leaves(kind) if isinstance(item, Tensor)]

        outputs = torch.vmap(of_example)(*mapped.values())
        pairs = zip(outputs, call.outputs, strict=True)
        joined = iter([_join(output, axis) for output, axis in pairs])
        items = [next(joined) if isinstance(i, Tensor) else i for i in leaves(kind)]
        return with_leaves(kind, iter(items))[0], True

    def _copied(self, tracked: _Tracked) -> Tensor:
        """Return a copy for each example, and record it."""
        values = tracked.values.detach()
        copies = values.expand(self._batch_size, *values.shape)
        copies.requires_grad_(torch.is_grad_enabled())
        self._records.append(_Record(tracked, copies))
        return copies

    def gradients(
        self, of_copies: Sequence[Tensor | None], create_graph: bool
    ) -> dict[str, Tensor]:
        """Turn the gradients in the copies into those in the parameters.

        Args:
            of_copies: Gradients in :attr:`copies`; None for zeros.
            create_graph: Whether they are to be differentiated.

        Returns:
            Per-example gradients ``[batch, params]`` by the layers' names; of those
            alone that there are.
        """
        sums: dict[str, Tensor] = {}
        for record, gradient in zip(self._records, of_copies, strict=True):
            if gradient is None:
                continue
            for name in record.tracked.layers:
                own = self._in_parameter(record.tracked, name, gradient, create_graph)
                if own is not None:
                    rows = own.reshape(len(own), -1)
                    sums[name] = sums[name] + rows if name in sums else rows
        return sums

    def _in_parameter(
        self, tracked: _Tracked, name: str, gradient: Tensor, create_graph: bool
    ) -> Tensor | None:
        """Take gradients ``[batch, ...]`` in what is tracked on to a parameter."""
        root = self._roots[name]
        if tracked.values is root:
            return gradient
        (own,) = torch.autograd.grad(
            tracked.values,
            root,
            gradient,
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
            is_grads_batched=True,
        )
        return own


def used_otherwise(kind: str, name: str, function: str) -> str:
    """Say that a function takes a parameter for some examples alone."""
    return (
        f"The {kind} {name!r} is used by `{function}`, which it was not when the layer "
        "was found: it must be used by the same functions whatever the examples."
    )


def _check_single(tensor: Tensor, axis: int, batch_size: int, name: str) -> None:
    """Refuse several entries of an example, if it is not known whose they are."""
    if tensor.shape[axis] > batch_size > 1:
        raise ValueError(
            f"`{name}` got a tensor of shape {tuple(tensor.shape)} for a batch of "
            f"{batch_size}, but one entry on axis {axis} for each example when its "
            "parameter was found, which does not tell whose entries these are: fit "
            "with examples of several positions first in the data."
        )


def _split(tensor: Tensor, axis: int, batch_size: int) -> Tensor:
    """Bring examples to the front, and leave an axis of each one's entries behind."""
    if tensor.ndim <= axis or tensor.shape[axis] % batch_size:
        raise ValueError(
            f"A parameter is used with a tensor of shape {tuple(tensor.shape)} for a "
            f"batch of {batch_size}, of which axis {axis} has no whole number of "
            "entries for each example: it must be used by the same functions whatever "
            "the examples."
        )
    front = tensor.movedim(axis, 0).unflatten(0, (batch_size, -1))
    return front.movedim(1, axis + 1)


def _join(tensor: Tensor, axis: int | None) -> Tensor:
    """Invert :func:`_split`; the network may view the result in other shapes."""
    assert axis is not None
    joined = tensor.movedim(axis + 1, 1).flatten(0, 1).movedim(0, axis)
    return joined.contiguous()
