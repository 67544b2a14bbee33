"""Which parameters of a network take part, and which stay at their trained values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from laplace_debiased.rows.capture import capture_rows
from laplace_debiased.rows.layers import ConvLayer, Layer, LinearLayer, VectorLayer
from laplace_debiased.rows.sweep import Inputs

_ROW_TYPES = {
    nn.Linear: LinearLayer,
    nn.Conv1d: ConvLayer,
    nn.Conv2d: ConvLayer,
    nn.Conv3d: ConvLayer,
}
_NORM_TYPES = (_BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _InstanceNorm)
_SUPPORTED = (
    "Linear, Conv1d, Conv2d, Conv3d, BatchNorm, LayerNorm, GroupNorm, RMSNorm and "
    "InstanceNorm"
)


@dataclass(frozen=True)
class LeftOut:
    """Parameters of a module that no curvature can be computed for.

    Args:
        name: The module's name in ``model.named_modules()``.
        module: The module.
        keys: Names of the parameters in the module.
        reason: Why they are left out.
    """

    name: str
    module: nn.Module
    keys: tuple[str, ...]
    reason: str = "not supported"

    @property
    def params(self) -> list[Tensor]:
        """The parameters."""
        return [getattr(self.module, key) for key in self.keys]

    def __str__(self) -> str:
        kind = type(self.module).__name__
        label = f"{self.name or '(model)'} ({kind}: {', '.join(self.keys)})"
        return label if self.reason == "not supported" else f"{label} {self.reason}"


def select(
    model: nn.Module, params: Iterable[Tensor]
) -> tuple[list[Layer], list[LeftOut]]:
    """Find the layers that parameters belong to.

    Args:
        model: The neural network.
        params: Parameters of the network.

    Returns:
        The layers, ordered by their first parameter, and what is left out.

    Raises:
        ValueError: If a parameter is given twice, or is in no module of the network.
    """
    params = list(params)
    position = {id(param): index for index, param in enumerate(params)}
    if len(position) != len(params):
        raise ValueError("`params` must be distinct, but a parameter is given twice.")
    own = {
        name: {
            key: position[id(param)]
            for key, param in module.named_parameters(recurse=False)
            if id(param) in position
        }
        for name, module in model.named_modules()
    }
    owners = Counter(
        index for positions in own.values() for index in positions.values()
    )
    if len(owners) != len(params):
        raise ValueError(
            f"{len(params) - len(owners)} of `params` are in no module of the model."
        )

    layers, left_out = [], []
    for name, module in model.named_modules():
        shared = tuple(key for key, index in own[name].items() if owners[index] > 1)
        if shared:
            left_out.append(LeftOut(name, module, shared, "shared with other modules"))
        positions = {k: index for k, index in own[name].items() if k not in shared}
        found = _layers_of(name, module, positions)
        if positions and not found:
            left_out.append(LeftOut(name, module, tuple(positions)))
        layers += found
    return sorted(layers, key=lambda layer: min(layer.positions.values())), left_out


def _layers_of(name: str, module: nn.Module, positions: dict[str, int]) -> list[Layer]:
    """Return the layers of a module, none if it is not supported."""
    if not positions or not positions.keys() <= {"weight", "bias"}:
        return []
    for module_type, layer_type in _ROW_TYPES.items():
        # a subclass with a forward pass of its own may do something else
        if isinstance(module, module_type) and (
            type(module).forward is module_type.forward
        ):
            return [layer_type(name, module, positions)]
    if isinstance(module, _NORM_TYPES):
        return [
            VectorLayer(f"{name}.{key}" if name else key, module, {key: index})
            for key, index in positions.items()
        ]
    return []


def find_layers(model: nn.Module, params: Iterable[Tensor]) -> list[Layer]:
    """Find the layers that parameters belong to, all of which must be supported.

    Args:
        model: The neural network.
        params: Parameters of the network.

    Returns:
        The layers, ordered by their first parameter.

    Raises:
        ValueError: If a parameter is given twice, is in no module of the network, in
            several, or in one that is not supported.
    """
    layers, left_out = select(model, params)
    if left_out:
        raise ValueError(refusal(left_out))
    return layers


def unrecorded(model: nn.Module, layers: list[Layer], example: Inputs) -> list[LeftOut]:
    """Find parameters whose influence on the output is not in their layer's rows.

    Their module never runs (it is unused, or its parameters are used functionally, as
    ``nn.MultiheadAttention`` does with its output projection), is cut off from the
    output, or they are used outside of it, too. A forward and a backward pass show it:
    while its own module runs, a parameter requires no gradient, so that a gradient is
    that of another use.

    Args:
        model: The neural network.
        layers: The layers.
        example: Input of the network.

    Returns:
        The parameters, by module and reason.
    """
    detached = {name: p.detach() for name, p in model.named_parameters()}
    leaf = {id(p): detached[name] for name, p in model.named_parameters()}
    uses = [
        (layer, key, leaf[id(getattr(layer.module, key))].requires_grad_())
        for layer in layers
        for key in layer.positions
    ]
    with (
        _no_gradient_in_own_module(uses),
        torch.enable_grad(),  # as when the curvature is computed
        capture_rows(layers, 1, lambda *_: None, all_run=False) as tape,
    ):
        output = functional_call(model, detached, (example,))
    probes = [probe for layer in layers for probe in tape.probes(layer)]
    linked = _linked(output, [*probes, *(param for *_, param in uses)])

    found: dict[tuple[nn.Module, str], list[str]] = {}
    for layer, key, param in uses:
        calls = tape.probes(layer)
        if not calls:
            reason = "never runs as a module"
        elif id(param) in linked:
            reason = "is also used outside of the module"
        elif not any(id(probe) in linked for probe in calls):
            reason = "does not influence the output"
        else:
            continue
        found.setdefault((layer.module, reason), []).append(key)
    names = {module: name for name, module in model.named_modules()}
    return [
        LeftOut(names[module], module, tuple(keys), reason)
        for (module, reason), keys in found.items()
    ]


@contextmanager
def _no_gradient_in_own_module(
    uses: list[tuple[Layer, str, Tensor]],
) -> Iterator[None]:
    """Let parameters require no gradient while their own module runs."""
    handles = []
    for layer, _, param in uses:
        module = layer.module
        handles += [
            module.register_forward_pre_hook(partial(_require_gradient, param, False)),
            module.register_forward_hook(partial(_require_gradient, param, True)),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _require_gradient(param: Tensor, flag: bool, *_: Any) -> None:
    param.requires_grad_(flag)


def _linked(output: Tensor, tensors: list[Tensor]) -> set[int]:
    """Return the ids of the tensors that have a gradient, be it zero."""
    if not output.requires_grad:
        return set()
    gradients = torch.autograd.grad(
        output, tensors, torch.ones_like(output), allow_unused=True
    )
    pairs = zip(tensors, gradients, strict=True)
    return {id(tensor) for tensor, gradient in pairs if gradient is not None}


def refusal(left_out: list[LeftOut]) -> str:
    """Say why parameters are refused, and what to do about it."""
    return (
        f"Parameters found in unsupported layers: {_listed(left_out)}. Supported are "
        f"{_SUPPORTED} layers that run as modules. Exclude the others by "
        "`requires_grad_(False)` on their parameters, which keeps them at their "
        "trained values."
    )


def notice(left_out: list[LeftOut], num_fitted: int) -> str:
    """Say which parameters stay at their trained values, and how many."""
    count = sum(param.numel() for entry in left_out for param in entry.params)
    return (
        f"{count:,} of {count + num_fitted:,} parameters stay at their trained values, "
        f"because their layers are not supported: {_listed(left_out)}. Pass "
        "`strict=True` to refuse them, or silence this by `requires_grad_(False)` on "
        "them."
    )


def _listed(left_out: list[LeftOut]) -> str:
    return ", ".join(str(entry) for entry in left_out)
