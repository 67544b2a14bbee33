"""Undo what a block of code did, also if an interrupt comes in the midst of undoing it.

An interrupt (Ctrl-C, or a signal whose handler raises) may come at any call, even in
the first line of a context manager's ``__exit__``. It then undoes its block when the
interrupt is dealt with and forgotten. Two interrupts at once are one too many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch._C import _len_torch_function_stack, _pop_torch_function_stack


@contextmanager
def afterwards(restore: Callable[[], object]) -> Iterator[None]:
    """Restore something after a block of code, whether that raises or not.

    Args:
        restore: Restores it; called again if it is interrupted.

    Yields:
        Nothing.
    """
    try:
        yield
    finally:
        try:
            restore()
        except BaseException:
            restore()
            raise


@contextmanager
def on_failure(undo: Callable[[], object]) -> Iterator[None]:
    """Undo a block of code if it raises.

    Args:
        undo: Undoes it; called again if it is interrupted.

    Yields:
        Nothing.
    """
    try:
        yield
    except GeneratorExit:  # the block was done before the interrupt came
        raise
    except BaseException:
        try:
            undo()
        except BaseException:
            undo()
            raise
        raise


def thread_restored() -> AbstractContextManager[None]:
    """Restore what torch keeps for a thread: function modes, and whether to record.

    They are restored by context managers, too, which an interrupt may hinder.

    Returns:
        The context manager.
    """
    num_modes, records = _len_torch_function_stack(), torch.is_grad_enabled()

    def restore() -> None:
        while _len_torch_function_stack() > num_modes:
            _pop_torch_function_stack()
        torch.set_grad_enabled(records)

    return afterwards(restore)
