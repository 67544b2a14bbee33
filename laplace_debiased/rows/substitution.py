"""Run a network on other values of its parameters, without touching it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import (
    BaseTorchFunctionMode,
    TorchFunctionMode,
    _get_current_function_mode,
)

from laplace_debiased.rows.inputs import Inputs


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

    Args:
        model: The network.
        X: Inputs, a tensor or a mapping.
        **kwargs: Its further keywords.

    Returns:
        Its output, or the logits that this holds.

    Raises:
        ValueError: If the output is no tensor and holds no logits.
    """
    original = getattr(model, "_orig_mod", model)
    # under any mode, transformers do not take a fast path without derivatives, which
    # has other outputs where inputs are padded
    has_mode = _get_current_function_mode() is not None
    with _EAGERLY, nullcontext() if has_mode else BaseTorchFunctionMode():
        return logits_of(original(X, **kwargs))


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


class _Eagerly:
    """Lets compiled modules and functions run eagerly, while any thread asks for it.

    No mode sees what is inside of those. The compiler's stance is that of all threads:
    the last one to leave puts it back.
    """

    def __init__(self) -> None:
        self._lock, self._count = Lock(), 0
        self._stance: Any = None

    def __enter__(self) -> None:
        with self._lock:
            # nothing was compiled if the compiler was not imported, which takes long
            if self._count == 0 and "torch._dynamo" in sys.modules:
                self._stance = torch.compiler.set_stance("force_eager")
            self._count += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._count -= 1
            if self._count == 0 and self._stance is not None:
                self._stance.__exit__(None, None, None)
                self._stance = None


_EAGERLY = _Eagerly()
