"""Run a network on other values of its parameters, without touching it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode,
    _get_current_function_mode_stack,
    _pop_mode,
)

from laplace_debiased.rows.arguments import arguments
from laplace_debiased.rows.inputs import Inputs
from laplace_debiased.rows.model_state import is_plain, keeping_buffers
from laplace_debiased.rows.positions import flat_output
from laplace_debiased.rows.sharing import EAGERLY, everywhere

if TYPE_CHECKING:
    from typing_extensions import Self


class Substitution(TorchFunctionMode):
    """Runs a network with other values in the place of its parameters.

    The network itself is not touched: it may have aliased modules, tied weights, and
    other threads that use it.

    Args:
        values: Values by the ``id`` of the parameters.
    """

    def __init__(self, values: Mapping[int, Tensor]):
        super().__init__()
        self._values, self.is_entered = values, False

    def __enter__(self) -> Self:
        """Enter the stack of modes, in place of those that an interrupt left there."""
        while is_left_over(_get_current_function_mode()):
            _pop_mode()
        self.is_entered = True
        return super().__enter__()

    def __exit__(self, *_: object) -> None:
        """Leave the stack of modes, with what an interrupt left on top.

        Torch takes a mode from the stack while it asks it. If an interrupt comes then,
        torch may put it back long after this: it does nothing any more.
        """
        self.is_entered = False
        while self in _get_current_function_mode_stack():
            if _pop_mode() is self:
                return

    def __torch_function__(
        self,
        func: Callable,
        types: Sequence[type],
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch."""
        if not self.is_entered:
            return func(*args, **(kwargs or {}))
        return func(*self._replaced(args), **self._replaced(kwargs or {}))

    def _replaced(self, item: Any) -> Any:
        """Replace the parameters in arguments, which may be nested."""
        if isinstance(item, Tensor):
            return self._values.get(id(item), item)
        if type(item) in (tuple, list):
            return type(item)([self._replaced(part) for part in item])
        if type(item) is dict:
            return {key: self._replaced(part) for key, part in item.items()}
        return item


def is_left_over(mode: object) -> bool:
    """Whether a mode is one of this library's that was left already.

    Args:
        mode: The mode, from torch's stack of them.

    Returns:
        Whether it does nothing.
    """
    return isinstance(mode, Substitution) and not mode.is_entered


class Substituted(nn.Module):
    """A network that other libraries may run on other values of its parameters.

    They use torch's ``functional_call``, which loses the parameters of a module that is
    registered under two names. Here each parameter is registered once.

    Args:
        model: The network.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self._network = [model]  # no submodule
        self._ids = [id(parameter) for parameter in model.parameters()]
        for k, parameter in enumerate(model.parameters()):
            self.register_parameter(str(k), parameter)

    def forward(self, X: Inputs) -> Tensor:
        """Run the network.

        Args:
            X: Inputs, a tensor or a mapping.

        Returns:
            Its output.
        """
        (model,) = self._network
        values = (getattr(self, str(k)) for k in range(len(self._ids)))
        with Substitution(dict(zip(self._ids, values, strict=True))):
            return run(model, X)


def stand_ins(
    model: nn.Module, requiring_gradients: Sequence[Tensor] = ()
) -> dict[int, Tensor]:
    """Return detached stand-ins for a network's parameters.

    Neither the parameters' gradients nor their ``requires_grad`` flags matter then.

    Args:
        model: The network.
        requiring_gradients: Parameters whose stand-ins require gradients.

    Returns:
        The stand-ins, by the ``id`` of the parameters.
    """
    values = {id(parameter): parameter.detach() for parameter in model.parameters()}
    for parameter in requiring_gradients:
        values[id(parameter)].requires_grad_()
    return values


def run(model: nn.Module, X: Inputs, **kwargs: Any) -> Tensor:
    """Call a network, eagerly if it is compiled, and function by function.

    It has copies of its buffers, so that what it writes into them is gone afterwards,
    and no other thread sees it.

    Args:
        model: The network.
        X: Inputs, a tensor or a mapping
            (:func:`~laplace_debiased.rows.arguments.arguments`).
        **kwargs: Its further keywords.

    Returns:
        Its output, or the logits that this holds, as a matrix if it has positions
        (:mod:`~laplace_debiased.rows.positions`).

    Raises:
        ValueError: If the output is no tensor and holds no logits.
    """
    return flat_output(_original(model), _run(model, X, **kwargs))


def output_shape(model: nn.Module, X: Inputs) -> tuple[int, ...]:
    """Return the shape of a network's output, which may have positions.

    Args:
        model: The network.
        X: Inputs, a tensor or a mapping.

    Returns:
        The shape.
    """
    with torch.no_grad():
        return tuple(_run(model, X).shape)


class _LargestOutput(Substitution):
    """Keeps the size of the largest tensor that a function returns, in bytes."""

    def __init__(self) -> None:
        super().__init__({})
        self.size = 1

    def __torch_function__(
        self,
        func: Callable,
        types: Sequence[type],
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor):
            self.size = max(self.size, output.numel() * output.element_size())
        return output


@torch.no_grad()
def largest_activation(model: nn.Module, X: Inputs) -> int:
    """Find the size of the largest tensor that a network computes.

    Args:
        model: The network.
        X: Inputs, a tensor or a mapping.

    Returns:
        Its size in bytes, at least one.
    """
    with _LargestOutput() as largest:
        output = run(model, X)
    return max(largest.size, output.numel() * output.element_size())


def _original(model: nn.Module) -> nn.Module:
    """Return a network that may be compiled as it was before."""
    return getattr(model, "_orig_mod", model)


def _run(model: nn.Module, X: Inputs, **kwargs: Any) -> Tensor:
    """Call a network."""
    original = _original(model)
    # under any mode, transformers do not take a fast path without derivatives, which
    # has other outputs where inputs are padded
    has_mode = _get_current_function_mode() is not None
    # buffers: another thread may have put its copies in their place, and only while
    # they are kept, none of the original ones comes back
    # nothing was compiled if the compiler was not imported, which takes long
    has_compiler = "torch._dynamo" in sys.modules
    with (
        everywhere(EAGERLY) if has_compiler else nullcontext(),
        nullcontext() if has_mode else Substitution({}),
        keeping_buffers(original),
    ):
        # alive as long as their copies are known by their `id`
        buffers = [buffer for buffer in original.buffers() if is_plain(buffer)]
        copies = {id(buffer): buffer.detach().clone() for buffer in buffers}
        with Substitution(copies) if copies else nullcontext():
            args, keywords = arguments(original, X)
            return logits_of(original(*args, **keywords, **kwargs))


def logits_of(output: Any) -> Tensor:
    """Return what is meant by a network's output.

    Args:
        output: A tensor, or what has one named ``logits``, as mapping or attribute.

    Returns:
        The tensor.

    Raises:
        ValueError: If there is none.
    """
    if isinstance(output, Tensor):
        return output
    is_mapping = isinstance(output, Mapping)
    logits = output.get("logits") if is_mapping else getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    raise ValueError(
        f"The model returns {_article(type(output).__name__)}, but a tensor [batch, "
        "outputs] is needed, alone or as its `logits`: pass a module whose "
        "`forward(x)` returns that, such as `self.model(x)[0]`."
    )


def _article(name: str) -> str:
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"
