"""Leave a model as it was found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Restore a model's state when a block of code is left.

    Gradients are put aside, so that the block can neither change nor clear them, and
    restored in any case, as is the mode (train or eval) of each module. Hooks and
    ``requires_grad`` flags are restored if the block raises: a curvature backend may
    install hooks for good, but not half of them.

    Args:
        model: The model.

    Yields:
        Nothing.
    """
    parameters = list(model.parameters())
    gradients = [parameter.grad for parameter in parameters]
    flags = [parameter.requires_grad for parameter in parameters]
    modules = list(model.modules())
    modes = [module.training for module in modules]
    hooks = [[dict(getattr(module, name)) for name in _HOOKS] for module in modules]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    except BaseException:
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad_(flag)
        for module, saved in zip(modules, hooks, strict=True):
            for name, registered in zip(_HOOKS, saved, strict=True):
                getattr(module, name).clear()
                getattr(module, name).update(registered)
        raise
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
