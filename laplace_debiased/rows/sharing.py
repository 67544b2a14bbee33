"""What threads change while they run networks side by side, and the last one restores.

A network in train mode is in eval mode while any thread predicts with it, and a setting
of the process is another one while any thread needs it. If each thread restored what it
had found, that could be the change of another one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from threading import RLock
from typing import Any, Protocol

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from laplace_debiased.rows.interrupts import afterwards

Setting = Callable[[], AbstractContextManager[Any]]
# fused attention can be differentiated once, and not in forward mode
MATH_ATTENTION: Setting = partial(sdpa_kernel, SDPBackend.MATH)
# whose recurrent layers have no backward pass in eval mode
NO_CUDNN: Setting = partial(torch.backends.cudnn.flags, enabled=False)
EAGERLY: Setting = partial(torch.compiler.set_stance, "force_eager")


class Change(Protocol):
    """A change of an item that can be undone; making the object saves what it takes."""

    def __init__(self, item: Any): ...

    def apply(self) -> None:
        """Change the item, also if it is changed already."""

    def restore(self) -> None:
        """Undo the change, also where it was not made, or is undone already."""


@dataclass(frozen=True, eq=False)
class _Held:
    """A change, and who needs it; it keeps its item alive, and so its ``id``."""

    change: Change
    users: set[object]


# held for moments only: what needs the changes runs in parallel
_LOCK = RLock()
_HELD: dict[tuple[type[Change], int], _Held] = {}


@contextmanager
def shared(kind: type[Change], items: Iterable[Any]) -> Iterator[None]:
    """Change items while a block of code runs, in this thread or in another one.

    Args:
        kind: The kind of change.
        items: The items.

    Yields:
        Nothing.
    """
    user = object()
    with afterwards(partial(_release, user)):
        with _LOCK:
            for item in items:
                _hold(kind, item, user)
        yield


def everywhere(setting: Setting) -> AbstractContextManager[None]:
    """Change a setting of the process while a block of code runs, as :func:`shared`.

    Args:
        setting: Makes the context manager that changes it; always the same object.

    Returns:
        The context manager.
    """
    return shared(_SettingChange, [setting])


def _hold(kind: type[Change], item: Any, user: object) -> None:
    key = (kind, id(item))
    if key in _HELD:
        _HELD[key].users.add(user)
    else:
        _HELD[key] = _Held(kind(item), {user})
    # only now: who is interrupted after a change must know how to undo it
    _HELD[key].change.apply()


def _release(user: object) -> None:
    with _LOCK:
        for key, held in list(_HELD.items()):
            if held.users == {user}:
                held.change.restore()
                del _HELD[key]
            else:
                held.users.discard(user)


class _SettingChange:
    """A context manager that was entered."""

    def __init__(self, setting: Setting):
        self._setting, self._stack = setting, ExitStack()
        self._is_made = False

    def apply(self) -> None:
        """See :class:`Change`."""
        if not self._is_made:
            self._is_made = True
            self._stack.enter_context(self._setting())

    def restore(self) -> None:
        """See :class:`Change`."""
        self._stack.close()
