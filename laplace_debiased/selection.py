"""Which parameters of a network take part, and which stay at their trained values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from laplace_debiased.layers import ConvLayer, Layer, LinearLayer, VectorLayer
from laplace_debiased.sweep import Inputs

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


def idle_modules(
    model: nn.Module, layers: list[Layer], example: Inputs
) -> list[LeftOut]:
    """Find modules that never run as such, by one forward pass.

    They are unused, or their parameters are used functionally (as
    ``nn.MultiheadAttention`` does with its output projection), so that nothing can be
    recorded.

    Args:
        model: The neural network.
        layers: The layers.
        example: Input of the network.

    Returns:
        The modules that did not run, with the parameters of the layers.
    """
    ran: set[nn.Module] = set()
    modules = {layer.module for layer in layers}
    handles = [
        module.register_forward_hook(lambda module, *_: ran.add(module))
        for module in modules
    ]
    try:
        detached = {name: p.detach() for name, p in model.named_parameters()}
        with torch.enable_grad():  # as when the curvature is computed
            functional_call(model, detached, (example,))
    finally:
        for handle in handles:
            handle.remove()
    keys: dict[nn.Module, list[str]] = {}
    for layer in layers:
        if layer.module not in ran:
            keys.setdefault(layer.module, []).extend(layer.positions)
    names = {module: name for name, module in model.named_modules()}
    return [
        LeftOut(names[module], module, tuple(own), "never runs as a module")
        for module, own in keys.items()
    ]


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
