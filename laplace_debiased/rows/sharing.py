"""What threads change while they run networks side by side, and the last one restores.

A network in train mode is in eval mode while any thread predicts with it, and a setting
of the process is another one while any thread needs it. If each thread restored what it
had found, that could be the change of another one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import wraps
from itertools import count
from threading import RLock, get_ident
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar

import torch
from torch._C import _len_torch_function_stack, _pop_torch_function_stack
from torch.autograd import forward_ad
from torch.backends import cuda

from laplace_debiased.rows.interrupts import afterwards

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Setting(NamedTuple):
    """A setting of the process, which may be written twice.

    Args:
        read: Returns its present value.
        write: Sets it to a value.
        value: The value that is needed.
    """

    read: Callable[[], Any]
    write: Callable[[Any], object]
    value: Any


def _read_attention() -> list[bool]:
    return [read() for read, _ in _ATTENTION]


def _write_attention(values: list[bool]) -> None:
    for (_, write), value in zip(_ATTENTION, values, strict=True):
        write(value)


def _read_stance() -> Any:
    from torch._dynamo import eval_frame  # takes long

    return eval_frame._stance


def _write_stance(stance: Any) -> None:
    from torch._dynamo import eval_frame

    is_name = isinstance(stance, str)
    eval_frame._set_stance(eval_frame.DynamoStance(stance) if is_name else stance)


def _read_dual_level() -> int:
    return forward_ad._current_level


def _write_dual_level(level: int) -> None:
    if level > forward_ad._current_level:
        forward_ad.enter_dual_level()
    elif level < forward_ad._current_level:
        forward_ad.exit_dual_level()


_ATTENTION = (
    (cuda.math_sdp_enabled, cuda.enable_math_sdp),
    (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
    (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
    (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
)
# fused attention can be differentiated once, and not in forward mode
MATH_ATTENTION = Setting(_read_attention, _write_attention, [True, False, False, False])
# whose recurrent layers have no backward pass in eval mode
NO_CUDNN = Setting(torch._C._get_cudnn_enabled, torch._C._set_cudnn_enabled, False)
# one level of dual numbers is shared by all threads: torch does not nest them
DUAL_LEVEL = Setting(_read_dual_level, _write_dual_level, 0)
EAGERLY = Setting(_read_stance, _write_stance, "force_eager")


class Change(Protocol):
    """A change of an item that can be undone; making the object saves what it takes."""

    def __init__(self, item: Any): ...

    def apply(self) -> None:
        """Change the item, also if it is changed already."""

    def restore(self) -> None:
        """Undo the change, also where it was not made, or is undone already."""


class _User(NamedTuple):
    """A block of code that needs changes."""

    thread: int
    number: int


@dataclass(frozen=True, eq=False)
class _Held:
    """A change, and who needs it; it keeps its item alive, and so its ``id``."""

    change: Change
    users: set[_User]


# held for moments only: what needs the changes runs in parallel
_LOCK = RLock()
_HELD: dict[tuple[type[Change], int], _Held] = {}
_NUMBERS = count()


@contextmanager
def shared(kind: type[Change], items: Iterable[Any]) -> Iterator[None]:
    """Change items while a block of code runs, in this thread or in another one.

    Args:
        kind: The kind of change.
        items: The items.

    Yields:
        Nothing.
    """
    restore_modes = _restoring_modes()
    user = _User(get_ident(), next(_NUMBERS))

    def end() -> None:
        # else a function around this has done so, and this is late
        if any(user in held.users for held in list(_HELD.values())):
            restore_modes()
            _release(user.__eq__)

    with afterwards(end):
        with _LOCK:
            for item in items:
                _hold(kind, item, user)
        yield


def everywhere(setting: Setting) -> AbstractContextManager[None]:
    """Change a setting of the process while a block of code runs, as :func:`shared`.

    Args:
        setting: The setting, always the same object.

    Returns:
        The context manager.
    """
    return shared(_SettingChange, [setting])


def thread_restored(
    function: Callable[Arguments, Result],
) -> Callable[Arguments, Result]:
    """Let a function leave its thread as it was.

    It ends what is :func:`shared`, and restores torch's function modes, and whether
    gradients are recorded. Each has context managers, too, but an interrupt in the
    first line of their ``__exit__`` hinders them; a function has no such line.

    In ``torch.inference_mode()``, where nothing can record gradients, the function runs
    as outside of it.

    Args:
        function: The function.

    Returns:
        The function.
    """

    @wraps(function)
    def restored(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if torch.is_inference_mode_enabled():
            with torch._C._InferenceMode(False):
                return restored(*args, **kwargs)
        restore = _restoring_thread()
        try:
            try:
                return function(*args, **kwargs)
            finally:
                restore()
        except BaseException:
            restore()
            raise

    return restored


def _restoring_thread() -> Callable[[], None]:
    """Return what ends what this thread begins from now on."""
    thread, start = get_ident(), next(_NUMBERS)
    restore_modes = _restoring_modes()

    def is_later(user: _User) -> bool:
        return user.thread == thread and user.number > start

    def restore() -> None:
        restore_modes()  # first: else they would see what is undone
        _release(is_later)
        restore_modes()

    return restore


def _restoring_modes() -> Callable[[], None]:
    """Return what restores torch's function modes, and whether it records."""
    num_modes, records = _len_torch_function_stack(), torch.is_grad_enabled()

    def restore() -> None:
        while _len_torch_function_stack() > num_modes:
            _pop_torch_function_stack()
        torch.set_grad_enabled(records)

    return restore


def _hold(kind: type[Change], item: Any, user: _User) -> None:
    key = (kind, id(item))
    if key in _HELD:
        _HELD[key].users.add(user)
    else:
        _HELD[key] = _Held(kind(item), {user})
    # only now: who is interrupted after a change must know how to undo it
    _HELD[key].change.apply()


def _release(leaves: Callable[[_User], bool]) -> None:
    with _LOCK:
        for key, held in list(_HELD.items()):
            staying = {user for user in held.users if not leaves(user)}
            if staying:
                held.users.intersection_update(staying)
            else:
                held.change.restore()
                del _HELD[key]


class _SettingChange:
    """A setting of the process that has another value."""

    def __init__(self, setting: Setting):
        self._setting, self._saved = setting, setting.read()

    def apply(self) -> None:
        """See :class:`Change`."""
        self._setting.write(self._setting.value)

    def restore(self) -> None:
        """See :class:`Change`."""
        self._setting.write(self._saved)
