"""Record the uses of parameters in a forward pass, and their gradients afterwards.

A :class:`torch.overrides.TorchFunctionMode` sees each torch function that a network
calls, with the parameter itself among its arguments, the input as it is, and the output
before anyone changes it. Modules, hooks and aliases do not matter, nor do weights that
are used twice.

Each use shifts its output by a *probe* of zeros. The gradient in a probe is that in the
output of the function, also where an activation then overwrites that output in place,
and asking autograd for the probes alone spares the weight gradients that a backward
pass to the parameters computes and throws away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from laplace_debiased.rows.calls import name_of
from laplace_debiased.rows.functions import USES
from laplace_debiased.rows.substitution import Substitution
from laplace_debiased.rows.uses import Use


def _opened(function: Any) -> FunctionType:
    """Copy a function of torch so that a mode sees the functions that it calls.

    Else it is given to the mode as a whole.
    """
    inner = function.__globals__ | {"has_torch_function": lambda _: False}
    opened = FunctionType(
        function.__code__, inner, function.__name__, function.__defaults__
    )
    opened.__kwdefaults__ = function.__kwdefaults__
    return opened


_OPENED: dict[Callable, Callable] = {
    function: _opened(function)
    for function in (F.multi_head_attention_forward, torch.autograd.grad)
}


_ROUTING = {"sort", "argsort", "topk", "nonzero", "masked_select", "unique"}
# functions that take the kind of a tensor alone
_OF_KINDS = {
    *(f"new_{name}" for name in ("zeros", "ones", "full", "empty")),
    *(f"{name}_like" for name in ("zeros", "ones", "full", "empty", "rand", "randn")),
}


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    *_: bool,
    **__: bool,
) -> Tensor:
    """Look up embeddings, with derivatives that are neither scaled nor sparse."""
    return F.embedding(input, weight, padding_idx, max_norm, norm_type)


class Recorder(Substitution):
    """Tells of each use of a parameter.

    Args:
        values: Stand-ins for all parameters of the network, by their ``id``.
        on_use: Called with each use, whose weight and bias are stand-ins, and its
            output; returns a tensor to go on with.
        on_other: Called with the stand-ins that another function takes, be it a part of
            them, and its name; None if it does not matter.
        call: Calls a function with positional and keyword arguments.

    Attributes:
        routes: Whether a function was called that orders or chooses rows by what they
            are, so that the next batch may have them elsewhere.
    """

    def __init__(
        self,
        values: Mapping[int, Tensor],
        on_use: Callable[[Use, Tensor], Tensor],
        on_other: Callable[[list[Tensor], str], None] | None = None,
        call: Callable[[Callable, tuple, dict[str, Any]], Any] | None = None,
    ):
        super().__init__(values)
        self._stand_ins = {id(value): value for value in values.values()}
        self._on_use, self._on_other, self._call = on_use, on_other, call
        self.routes = False

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
        if func in _OPENED:
            with copy(self):
                return _OPENED[func](*args, **(kwargs or {}))
        args, kwargs = self._replaced(args), self._replaced(kwargs or {})
        if func is F.embedding:
            return self._called(func, embedding, args, kwargs)
        return self._called(func, func, args, kwargs)

    def _called(
        self, func: Callable, plain: Callable, args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        """Call what stands for a function of torch, and tell of it."""
        self.routes = self.routes or _routes(name_of(func), args)
        if self._call is None:
            output = plain(*args, **kwargs)
        else:
            output = self._call(plain, args, kwargs)
        use = USES[func](*args, **kwargs) if func in USES else None
        if use is not None and self._is_recorded(use):
            return self._on_use(use, output)
        if self._on_other is not None and name_of(func) not in _OF_KINDS:
            taken, name = list(self._taken([args, kwargs])), name_of(func)
            is_use = name == "__setitem__" or any(map(self._is_new, _tensors(output)))
            if taken and is_use:
                self._on_other(taken, name)
        return output

    def _is_recorded(self, use: Use) -> bool:
        """Whether weight or bias is a parameter, and no parameter is used otherwise."""
        parameters = [p for p in (use.weight, use.bias) if p is not None]
        return (
            all(id(p) in self._stand_ins or not self._is_part(p) for p in parameters)
            and any(id(p) in self._stand_ins for p in parameters)
            and id(use.input) not in self._stand_ins
            and not self._is_part(use.input)
            # what a transform of functions maps over cannot be probed
            and not torch._C._functorch.is_functorch_wrapped_tensor(use.input)
        )

    def _is_part(self, tensor: Tensor) -> bool:
        return id(tensor._base) in self._stand_ins

    def _is_new(self, tensor: Tensor) -> bool:
        """Whether a tensor is neither a stand-in nor a part of one."""
        return id(tensor) not in self._stand_ins and not self._is_part(tensor)

    def _taken(self, item: Any) -> Iterator[Tensor]:
        """Yield the stand-ins among arguments, and those that they are parts of."""
        for tensor in _tensors(item):
            for own in (tensor, tensor._base):
                if id(own) in self._stand_ins:
                    yield self._stand_ins[id(own)]


def _routes(name: str, args: tuple) -> bool:
    """Whether a function orders or chooses rows by values, as by a mask."""
    if name != "__getitem__":
        return name in _ROUTING
    return any(own.dtype == torch.bool and own.ndim for own in _tensors(args[1:]))


def _tensors(item: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested containers."""
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, tuple | list):
        for part in item:
            yield from _tensors(part)
    elif isinstance(item, dict):
        yield from _tensors(list(item.values()))


def probed(output: Tensor) -> tuple[Tensor, Tensor]:
    """Shift an output by zeros whose gradient is that in the output.

    Args:
        output: The output of a function.

    Returns:
        The zeros, which have no gradient where gradients are disabled or the output is
        of integers, and a tensor equal to the output.
    """
    zeros = output.new_zeros(()).expand(output.shape)
    has_gradient = output.is_floating_point() or output.is_complex()
    if not (torch.is_grad_enabled() and has_gradient):
        return zeros, output
    zeros.requires_grad_()
    return zeros, output + zeros
