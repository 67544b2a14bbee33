"""Leave a model as it was found, or refuse it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.dropout import _DropoutNd

from laplace_debiased.rows.interrupts import on_failure
from laplace_debiased.rows.sharing import shared


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Run a model in eval mode, and restore its state, whether the block raises or not.

    Gradients are put aside, so that the block can neither change nor clear them. If it
    succeeds, new hooks stay: a curvature backend may install some for good, but not
    half of them. Buffers that get another shape stay, too: these are caches.

    Args:
        model: The model, whose gradients, ``requires_grad`` flags, modes (train or
            eval), buffers and hooks are restored.

    Yields:
        Nothing.
    """
    with (
        shared(_Tensors, [model]),
        unchanged_on_failure(*model.modules()),
        keeping_buffers(model),
        evaluating(model),
    ):
        yield


class _Tensors:
    """A model's tensors, whose gradients are put aside."""

    def __init__(self, model: nn.Module):
        self._parameters = [(p, p.grad, p.requires_grad) for p in model.parameters()]
        self._buffers = [
            (buffer, buffer.detach().clone())
            for buffer in model.buffers()
            if is_plain(buffer)
        ]

    def apply(self) -> None:
        """Put the gradients aside."""
        for parameter, _, _ in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def restore(self) -> None:
        """Make the tensors again what they were like."""
        for parameter, gradient, flag in self._parameters:
            parameter.requires_grad_(flag)
            parameter.grad = gradient
        for buffer, value in self._buffers:
            # a graph may wait for its backward pass, and need the buffer untouched
            same_shape = buffer.shape == value.shape
            if same_shape and not torch.equal(buffer, value):
                buffer.copy_(value)


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor can be copied and compared: it is dense and holds values."""
    return tensor.layout is torch.strided and not (
        tensor.is_meta or tensor.is_inference()
    )


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


def evaluating(model: nn.Module) -> AbstractContextManager[None]:
    """Run a model in eval mode, and restore each module's own mode afterwards.

    Several threads may do so at once: the last one restores the modes.

    Args:
        model: The model.

    Returns:
        The context manager.
    """
    return shared(_Evaluation, model.modules())


class _Evaluation:
    """A module in eval mode."""

    def __init__(self, module: nn.Module):
        self._module, self._training = module, module.training

    def apply(self) -> None:
        """Begin the evaluation."""
        self._module.training = False

    def restore(self) -> None:
        """End it."""
        self._module.training = self._training


def keeping_buffers(model: nn.Module) -> AbstractContextManager[None]:
    """Let a model have its tensors again if it puts others in their place.

    These are buffers, and attributes such as those that old weight normalization sets
    anew in each pass. New ones, and tensors of another shape, stay: they are caches,
    whose size the network may keep elsewhere.

    Args:
        model: The model.

    Returns:
        The context manager, which several threads may use at once.
    """
    return shared(_Kept, (m for m in model.modules() if m._buffers or _tensors_of(m)))


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's attributes that are tensors, but no parameters or buffers."""
    return {k: own for k, own in vars(module).items() if isinstance(own, Tensor)}


class _Kept:
    """A module's buffers, and its tensors that are none."""

    def __init__(self, module: nn.Module):
        self._current: tuple[dict[str, Any], ...] = module._buffers, vars(module)
        self._saved = dict(module._buffers), _tensors_of(module)

    def apply(self) -> None:
        """Let the module change them."""

    def restore(self) -> None:
        """Put them back."""
        (buffers, attributes), (saved_buffers, saved) = self._current, self._saved
        _put_back(buffers, saved_buffers)
        _put_back(attributes, saved)


def _put_back(current: dict[str, Any], saved: Mapping[str, Tensor | None]) -> None:
    """Put back tensors in whose place are others of the same shape."""
    for name, own in saved.items():
        new = current.get(name)
        if isinstance(new, Tensor) and own is not None and new.shape == own.shape:
            current[name] = own


@dataclass(frozen=True, eq=False)
class _Attributes:
    """An object's attributes, with the entries of those that are dictionaries."""

    item: object
    values: dict[str, Any]
    entries: dict[str, dict]

    @classmethod
    def of(cls, item: object) -> _Attributes:
        """Save an object's attributes."""
        values = dict(vars(item))
        entries = {k: dict(v) for k, v in values.items() if isinstance(v, dict)}
        return cls(item, values, entries)

    def restore(self) -> None:
        """Put them back."""
        _replace(vars(self.item), self.values)
        for name, entries in self.entries.items():
            _replace(self.values[name], entries)


def _replace(dictionary: dict, entries: dict) -> None:
    """Replace a dictionary's entries, without emptying it unless their order differs.

    Other threads may look into it meanwhile.
    """
    for key in dictionary.keys() - entries.keys():
        del dictionary[key]
    dictionary.update(entries)
    if list(dictionary) != list(entries):
        dictionary.clear()
        dictionary.update(entries)


@contextmanager
def unchanged_on_failure(*items: object) -> Iterator[None]:
    """Restore attributes of objects if a block of code raises.

    Attributes that are dictionaries, such as a module's hooks, get their entries back.

    Args:
        *items: The objects.

    Yields:
        Nothing.
    """
    saved = [_Attributes.of(item) for item in items]

    def restore() -> None:
        for attributes in saved:
            attributes.restore()

    with on_failure(restore):
        yield
