"""Leave a model as it was found, or refuse it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.dropout import _DropoutNd

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


# BackPACK's note on a module that its hooks are installed
_BACKPACK_MARK = "_backpack_extend"


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Run a model in eval mode, and restore its state, whether the block raises or not.

    Gradients are put aside, so that the block can neither change nor clear them. If it
    succeeds, new hooks stay: a curvature backend may install some for good, but not
    half of them.

    Args:
        model: The model, whose gradients, ``requires_grad`` flags, modes (train or
            eval) and hooks are restored.

    Yields:
        Nothing.
    """
    parameters = list(model.parameters())
    gradients = [parameter.grad for parameter in parameters]
    flags = [parameter.requires_grad for parameter in parameters]
    modules = list(model.modules())
    modes = [module.training for module in modules]
    hooks = [_hooks(module) for module in modules]
    for parameter in parameters:
        parameter.grad = None
    try:
        model.eval()
        yield
    except BaseException:
        for module, saved in zip(modules, hooks, strict=True):
            _restore_hooks(module, saved)
        raise
    finally:
        for parameter, gradient, flag in zip(parameters, gradients, flags, strict=True):
            parameter.requires_grad_(flag)
            parameter.grad = gradient
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def check_repeatable(model: nn.Module) -> None:
    """Refuse models whose output for an example is not a function of it alone.

    Batch statistics mix examples, running statistics change with each pass, and dropout
    is drawn anew: there is no one quadratic then, whose slopes could be measured.

    Args:
        model: The model.

    Raises:
        ValueError: If the model has such a module.
    """
    for name, module in model.named_modules():
        if _varies(module):
            raise ValueError(
                f"Module {name!r} ({type(module).__name__}) draws anew or uses batch "
                "statistics in this mode: call `model.eval()`, and keep running "
                "statistics."
            )


def _varies(module: nn.Module) -> bool:
    """Tell if a module's output for an example varies with others, or in each pass."""
    if isinstance(module, _BatchNorm) and module.running_mean is None:
        return True
    if not module.training:
        return False
    if isinstance(module, _NormBase):
        return isinstance(module, _BatchNorm) or module.track_running_stats
    if isinstance(module, nn.RNNBase):  # no dropout after the last of the layers
        return module.dropout > 0 and module.num_layers > 1
    if isinstance(module, nn.MultiheadAttention):
        return module.dropout > 0
    return isinstance(module, nn.RReLU) or (
        isinstance(module, _DropoutNd) and module.p > 0
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a model in eval mode, and restore each module's own mode afterwards.

    Args:
        model: The model.

    Yields:
        Nothing.
    """
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def unchanged_on_failure(item: object) -> Iterator[None]:
    """Restore an object's attributes if a block of code raises.

    Args:
        item: The object.

    Yields:
        Nothing.
    """
    saved = dict(vars(item))
    try:
        yield
    except BaseException:
        vars(item).clear()
        vars(item).update(saved)
        raise


@contextmanager
def frozen(parameters: list[Tensor]) -> Iterator[None]:
    """Let parameters require no gradients while a block of code runs.

    Args:
        parameters: The parameters, which require gradients.

    Yields:
        Nothing.
    """
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_()


def _hooks(module: nn.Module) -> dict[str, Any]:
    """Copy a module's hooks."""
    saved = {name: dict(getattr(module, name)) for name in _HOOKS}
    return saved | {_BACKPACK_MARK: getattr(module, _BACKPACK_MARK, False)}


def _restore_hooks(module: nn.Module, saved: dict[str, Any]) -> None:
    """Put back a module's hooks."""
    for name in _HOOKS:
        getattr(module, name).clear()
        getattr(module, name).update(saved[name])
    if getattr(module, _BACKPACK_MARK, False) != saved[_BACKPACK_MARK]:
        setattr(module, _BACKPACK_MARK, saved[_BACKPACK_MARK])
