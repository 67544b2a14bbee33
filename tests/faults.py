"""Faults that tests inject, and what must be the same after them."""

import copy
from contextlib import suppress

import torch
from torch.overrides import TorchFunctionMode

from laplace_debiased.rows import sharing


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
        "modes": torch._C._len_torch_function_stack(),
        "records": torch.is_grad_enabled(),
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
