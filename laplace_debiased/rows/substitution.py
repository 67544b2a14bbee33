"""Run a network on other values of its parameters, without touching it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,
    _pop_mode,
)

from laplace_debiased.rows.inputs import Inputs
from laplace_debiased.rows.model_state import is_plain, keeping_buffers
from laplace_debiased.rows.sharing import EAGERLY, everywhere


class Substitution(TorchFunctionMode):
    """Runs a network with other values in the place of its parameters.

    The network itself is not touched: it may have aliased modules, tied weights, and
    other threads that use it.

    Args:
        values: Values by the ``id`` of the parameters.
    """

    def __init__(self, values: Mapping[int, Tensor]):
        super().__init__()
        self._values = values

    def __exit__(self, *_: object) -> None:
        """Leave the stack of modes, with what an interrupt left on top."""
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
    """Call a network, eagerly if it is compiled.

    It has copies of its buffers, so that what it writes into them is gone afterwards,
    and no other thread sees it.

    Args:
        model: The network.
        X: Inputs, a tensor or a mapping.
        **kwargs: Its further keywords.

    Returns:
        Its output.
    """
    original = getattr(model, "_orig_mod", model)
    # buffers: another thread may have put its copies in their place, and only while
    # they are kept, none of the original ones comes back
    with (
        everywhere(EAGERLY) if _has_compiled(original) else nullcontext(),
        keeping_buffers(original),
    ):
        # alive as long as their copies are known by their `id`
        buffers = [buffer for buffer in original.buffers() if is_plain(buffer)]
        copies = {id(buffer): buffer.detach().clone() for buffer in buffers}
        with Substitution(copies) if copies else nullcontext():
            return original(X, **kwargs)


def _has_compiled(model: nn.Module) -> bool:
    """Whether a part of a network is compiled: no mode sees the functions of that."""
    return any(
        hasattr(module, "_orig_mod") or module._compiled_call_impl is not None
        for module in model.modules()
    )
