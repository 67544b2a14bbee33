"""Undo what a block of code did, also if an interrupt comes in the midst of undoing it.

An interrupt (Ctrl-C, or a signal whose handler raises) may come at any line, even in
the one that undoes something: what undoes it is called again then, and must not mind
that. Two interrupts at once are one too many.

A context manager, too, may be interrupted in the first line of its ``__exit__``. What
it would have undone is undone by the function around it
(:func:`~laplace_debiased.rows.sharing.thread_restored`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def afterwards(restore: Callable[[], object]) -> Iterator[None]:
    """Restore something after a block of code, whether that raises or not.

    Args:
        restore: Restores it; called again if anything raises.

    Yields:
        Nothing.
    """
    # no line is between the two: the outer one is entered before anything happens
    try:
        try:
            yield
        finally:
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
        try:
            yield
        except GeneratorExit:  # the block was done before the interrupt came
            raise
        except BaseException:
            undo()
            raise
    except GeneratorExit:
        raise
    except BaseException:
        undo()
        raise
