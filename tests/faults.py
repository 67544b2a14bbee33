"""Faults that tests inject, and what must be the same after them."""

import copy
import linecache
import sys
from contextlib import suppress
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

import laplace_debiased
from laplace_debiased.posterior.laplace import _GENERATOR
from laplace_debiased.rows import sharing
from laplace_debiased.rows.substitution import is_left_over

ROOT = str(Path(laplace_debiased.__file__).parent)
# what changes something for the time of a block of code
RESTORING = ("interrupts", "sharing", "substitution", "recorder", "model_state")


class Interrupted(BaseException):
    """Like a ``KeyboardInterrupt``."""


class InterruptedAt(TorchFunctionMode):
    """Interrupts at a call of a function of torch.

    Args:
        at: Number of the call, counted from one; None to count only.
    """

    def __init__(self, at=None):
        super().__init__()
        self.at, self.count = at, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.at:
            raise Interrupted
        return func(*args, **(kwargs or {}))


class InterruptedAtLine:
    """Interrupts at a line of the library, or of a context manager's own functions.

    Python asks for interrupts at the beginning of functions, at the end of calls and of
    loops, and so at nearly all lines. It does not where a lock is released, which takes
    no function of Python.

    Args:
        at: Number of the line, counted from one; None to count only.

    Attributes:
        lines: Files and numbers of the lines so far, if they are only counted.
    """

    def __init__(self, at=None):
        self.at, self.count, self.lines = at, 0, []

    def __enter__(self):
        sys.settrace(self._enter)
        return self

    def __exit__(self, *_):
        sys.settrace(None)

    def _enter(self, frame, event, arg):
        name = frame.f_code.co_filename
        if name.endswith("contextlib.py"):
            name = frame.f_back.f_code.co_filename
        return self._step if name.startswith(ROOT) else None

    def _step(self, frame, event, arg):
        name, number = frame.f_code.co_filename, frame.f_lineno
        if event == "line" and "with _LOCK:" not in linecache.getline(name, number):
            self.count += 1
            if self.at is None:
                self.lines.append((Path(name).stem, number))
            elif self.count == self.at:
                raise Interrupted
        return self._step


def snapshot(model):
    """All that a user could notice about a model."""
    return {
        "state": copy.deepcopy(dict(model.state_dict())),
        "parameters": [(id(p), type(p)) for p in model.parameters()],
        "buffers": [id(b) for b in model.buffers()],
        "gradients": [
            (id(p.grad), None if p.grad is None else p.grad.clone())
            for p in model.parameters()
        ],
        "flags": [p.requires_grad for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "hooks": [
            [(key, id(hook)) for key, hook in entries.items()]
            for module in model.modules()
            for name, entries in vars(module).items()
            if name.endswith("_hooks") and isinstance(entries, dict)
        ],
    }


def same(first, second):
    """Whether two values, or nested containers of them, are the same."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(
            same(value, second[key]) for key, value in first.items()
        )
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def differences(model, before):
    """Names of what is not as in a snapshot."""
    now = snapshot(model)
    return [name for name in before if not same(now[name], before[name])]


def leftovers():
    """What no call may leave behind in this thread, or in the process."""
    return {
        "held": dict(sharing._HELD),
        "lock": sharing._LOCK._is_owned(),
        "generator": _GENERATOR.get(),
        "modes": [m for m in _get_current_function_mode_stack() if not is_left_over(m)],
        "records": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "attention": torch.backends.cuda.flash_sdp_enabled(),
        "cudnn": torch.backends.cudnn.enabled,
    }


def faults(call, num_faults):
    """Interrupt a call at functions of torch that are spread over it.

    Args:
        call: The call.
        num_faults: Number of faults, about; one for each function at most.

    Yields:
        The number of the function, after each interrupted call.
    """
    with InterruptedAt() as mode:
        call()
    for at in range(1, mode.count + 1, max(1, mode.count // num_faults)):
        with suppress(Interrupted), InterruptedAt(at):
            call()
        yield at


def faults_at_lines(call, num_faults, dense=True):
    """Interrupt a call at lines of the library.

    Args:
        call: The call.
        num_faults: Number of faults that are spread over it, about.
        dense: Whether to hit a third of the lines of what restores something, too, and
            of context managers: which third depends on the call.

    Yields:
        The number of the line, after each interrupted call, and while the interrupt is
        remembered, as interactive sessions do.
    """
    with InterruptedAtLine() as trace:
        call()
    spread = set(range(1, trace.count + 1, max(1, trace.count // num_faults)))
    third = trace.count % 3
    last = {line: at for at, line in enumerate(trace.lines, 1) if line[1] % 3 == third}
    names = (*RESTORING, "contextlib") if dense else ()
    for at in sorted(spread | {at for (name, _), at in last.items() if name in names}):
        try:
            with InterruptedAtLine(at):
                call()
        except Interrupted as error:
            remembered = error
        else:
            remembered = None
        yield at
        del remembered
