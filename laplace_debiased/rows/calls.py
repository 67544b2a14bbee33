"""How function calls treat examples, found out from sizes of two numbers of examples.

Where no row type tells what a function does with a parameter, it is called on each
example by itself (:mod:`~laplace_debiased.rows.copies`). What must be known for that is
which axes of its arguments hold the examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# marks a number among the arguments that grows with the number of examples
NUMBER = -1
_OPERATORS = ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow")
_IN_PLACE = {f"__i{name}__" for name in (*_OPERATORS, "and", "or", "xor")}
Axes = tuple[int | None, ...]


@dataclass(frozen=True)
class Call:
    """How a call treats examples.

    Args:
        function: The function's name.
        inputs: For each argument, those in containers one by one, the axis of examples
            of a tensor, or :data:`NUMBER`; None if all examples share it.
        outputs: Likewise for the tensors that it returns. If all examples share them,
            the call computes something from parameters alone.
        singles: For each argument, whether an example had a single entry on its axis,
            which does not tell whose further ones would be.
    """

    function: str
    inputs: Axes
    outputs: Axes
    singles: tuple[bool, ...]

    @property
    def is_of_parameters(self) -> bool:
        """Whether all examples share what it returns."""
        return all(axis is None for axis in self.outputs)


def leaves(item: Any) -> Iterator[Any]:
    """Yield what is in nested containers, in their order."""
    if isinstance(item, tuple | list):
        for part in item:
            yield from leaves(part)
    elif isinstance(item, dict):
        for part in item.values():
            yield from leaves(part)
    else:
        yield item


def with_leaves(item: Any, values: Iterator[Any]) -> Any:
    """Rebuild nested containers with other leaves.

    Args:
        item: The containers.
        values: What to put in the place of each of their leaves.

    Returns:
        Lists, dictionaries, and tuples, also where there were sizes.
    """
    if isinstance(item, tuple | list):
        parts = [with_leaves(part, values) for part in item]
        return parts if isinstance(item, list) else tuple(parts)
    if isinstance(item, dict):
        return {key: with_leaves(part, values) for key, part in item.items()}
    return next(values)


def new_tensors(output: Any, given: Sequence[Any]) -> list[Tensor]:
    """Return the tensors that a function made.

    Args:
        output: What it returned.
        given: Its arguments.

    Returns:
        The tensors that were not among these.
    """
    known = {id(item) for item in given}
    found = (item for item in leaves(output) if isinstance(item, Tensor))
    return [item for item in found if id(item) not in known]


def name_of(function: Callable) -> str:
    """Return a function's name."""
    return getattr(function, "__name__", str(function))


def is_in_place(function: Callable) -> bool:
    """Tell by its name if a function changes its first argument.

    Args:
        function: The function, such as ``add_``, ``__iadd__`` or ``__setitem__``.

    Returns:
        Whether it does.
    """
    name = name_of(function)
    if name.startswith("__"):
        return name == "__setitem__" or name in _IN_PLACE
    return name.endswith("_")


@dataclass(frozen=True, eq=False)
class Event:
    """A call that was seen.

    Args:
        function: The function's name.
        inputs: Sizes of tensors, and other arguments as they are.
        outputs: Sizes of the tensors that it returned.
        sources: Where what is tracked among its arguments came from: the number of the
            event that returned it, and the position of a parameter, one of them None.
    """

    function: str
    inputs: list[Any]
    outputs: list[torch.Size]
    sources: set[tuple[int | None, int | None]]


class Tracer:
    """Calls functions, and keeps which take some parameters, or what depends on them.

    What depends on the examples, too, is not followed any further.

    Args:
        params: The parameters, by their positions.
        data: The tensors that the network gets.
    """

    def __init__(self, params: Mapping[int, Tensor], data: Sequence[Tensor]):
        self.events: list[Event] = []
        # by their `id`; kept, so that no other tensor gets it
        self._data = {id(tensor): tensor for tensor in data}
        self._tracked: dict[int, tuple[Tensor, int | None, int | None]] = {
            id(param): (param, None, k) for k, param in params.items()
        }

    def __call__(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Call a function.

        Args:
            func: The function.
            args: Its arguments.
            kwargs: Those by keyword.

        Returns:
            What it returns.
        """
        output = func(*args, **kwargs)
        given = list(leaves([args, kwargs]))
        new = new_tensors(output, given)
        tensors = [item for item in given if isinstance(item, Tensor)]
        sources = {
            self._tracked[id(item)][1:] for item in tensors if id(item) in self._tracked
        }
        if sources and new:
            sizes = [i.shape if isinstance(i, Tensor) else i for i in given]
            outputs = [item.shape for item in new]
            self.events.append(Event(name_of(func), sizes, outputs, sources))
        if any(id(item) in self._data for item in tensors):
            changed = [item for item in tensors[:1] if _writes(func, output, item)]
            self._data |= {id(item): item for item in [*new, *changed]}
        elif sources:
            number = len(self.events) - 1
            self._tracked |= {id(item): (item, number, None) for item in new}
        return output


def _writes(func: Callable, output: Any, first: Tensor) -> bool:
    """Whether a function changed its first argument in place."""
    return output is first or name_of(func) == "__setitem__"


def find_calls(
    pair: Sequence[Event], many: Sequence[Event], counts: tuple[int, int]
) -> dict[int, tuple[Call, ...]]:
    """Find out which calls take each parameter, or what is computed from it alone.

    Args:
        pair: Calls with some examples.
        many: Those with more.
        counts: The numbers of examples.

    Returns:
        The calls of each parameter by its position, without those parameters that have
        one whose axes of examples are not known.
    """
    names = [[event.function for event in events] for events in (pair, many)]
    if names[0] != names[1]:
        return {}
    found: dict[int, list[Call]] = {}
    unknown: set[int] = set()
    of_parameters: dict[int, set[int]] = {}  # what such a call depends on
    for number, (few, more) in enumerate(zip(pair, many, strict=True)):
        positions = {k for _, k in few.sources if k is not None}
        for source, _ in few.sources:
            if source is not None:
                positions |= of_parameters.get(source, set())
        call = _call(few, more, counts)
        if call is None:
            unknown |= positions
            continue
        for k in positions:
            found.setdefault(k, []).append(call)
        if call.is_of_parameters:
            of_parameters[number] = positions
    return {k: tuple(own) for k, own in found.items() if k not in unknown}


def _call(few: Event, more: Event, counts: tuple[int, int]) -> Call | None:
    """Compare a call with some examples with that with more.

    Returns:
        How it treats examples; None if the calls differ, or a tensor has no entries,
        which does not tell whose further ones would be.
    """
    if any(0 in size for size in _sizes(few)):
        return None
    try:
        inputs, outputs = (
            tuple(_axis(a, b, counts) for a, b in zip(*own, strict=True))
            for own in ((few.inputs, more.inputs), (few.outputs, more.outputs))
        )
    except ValueError:
        return None
    if None in outputs and set(outputs) != {None}:
        return None
    singles = tuple(
        axis is not None and axis != NUMBER and item[axis] == counts[0]
        for item, axis in zip(few.inputs, inputs, strict=True)
    )
    return Call(few.function, inputs, outputs, singles)


def _sizes(event: Event) -> list[torch.Size]:
    given = [item for item in event.inputs if isinstance(item, torch.Size)]
    return given + event.outputs


def _axis(few: Any, more: Any, counts: tuple[int, int]) -> int | None:
    """Find the axis of examples by two sizes, or if a number grows with them."""
    if type(few) is not type(more):
        raise ValueError
    if isinstance(few, torch.Size):
        if len(few) != len(more):
            raise ValueError
        axes = [k for k, size in enumerate(few) if size != more[k]]
        if len(axes) > 1:
            raise ValueError
        if not axes:
            return None
        (axis,) = axes
        if _grows(few[axis], more[axis], counts):
            return axis
        raise ValueError
    if few is more or few == more:
        return None
    if isinstance(few, int) and _grows(few, more, counts):
        return NUMBER
    raise ValueError


def _grows(few: int, more: int, counts: tuple[int, int]) -> bool:
    return few % counts[0] == 0 and few * counts[1] == more * counts[0]
