r"""Layers as rows: what K-FAC needs to know about a module, and nothing else.

A linear layer that is applied at ``S`` positions of an example (tokens, pixels) maps
input rows :math:`x_{ns}` to output rows :math:`W x_{ns} + b`. With the output gradient
rows :math:`g_{ns}`, the per-example gradient is :math:`\sum_s g_{ns} x_{ns}^\top`.
Kronecker factors, directional curvatures and functional variances are contractions of
these two tensors, so a new layer type is one subclass here. The view follows
Eschenhagen et al., 2023 (arXiv 2311.00636).

Rows have shape ``[batch, S, groups, features]``, where ``groups`` is one but for
grouped convolutions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd


@dataclass(frozen=True)
class Layer:
    """A module and the positions of its parameters in the parameter list.

    Args:
        name: The module's name in ``model.named_modules()``.
        module: The module.
        positions: Maps ``"weight"`` and ``"bias"``, where they take part, to positions
            in the list of parameters.
    """

    name: str
    module: nn.Module
    positions: dict[str, int]

    def input_rows(self, inputs: Tensor, batch_size: int) -> Tensor:
        """Rearrange the module's input.

        Args:
            inputs: The module's input, batch first.
            batch_size: Number of examples.

        Returns:
            Rows ``[batch, S, groups, d_in / groups]``.
        """
        raise NotImplementedError

    def gradient_rows(self, gradients: Tensor, batch_size: int) -> Tensor:
        """Rearrange the gradient in the module's output.

        Args:
            gradients: Gradient in the module's output, of the output's shape.
            batch_size: Number of examples.

        Returns:
            Rows ``[batch, S, groups, d_out / groups]``.
        """
        raise NotImplementedError


class LinearLayer(Layer):
    """``nn.Linear`` on ``[batch, ..., d_in]``.

    A network may fold further axes into the leading one (pairs, windows): with
    ``k * batch`` leading entries, the ``k`` of an example are positions like any other.
    """

    def input_rows(self, inputs: Tensor, batch_size: int) -> Tensor:
        """See :meth:`Layer.input_rows`."""
        return inputs.reshape(batch_size, -1, 1, inputs.shape[-1])

    gradient_rows = input_rows


class ConvLayer(Layer):
    """``nn.Conv1d`` and ``nn.Conv2d``: the input rows are the unfolded patches."""

    def input_rows(self, inputs: Tensor, batch_size: int) -> Tensor:
        """See :meth:`Layer.input_rows`."""
        conv: _ConvNd = self.module
        dims = len(conv.kernel_size)
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        # torch's own convolution pads by this attribute, also for padding="same"
        patches = F.pad(inputs, conv._reversed_padding_repeated_twice, mode=mode)
        for axis, (size, stride, dilation) in enumerate(
            zip(conv.kernel_size, conv.stride, conv.dilation, strict=True), start=2
        ):
            patches = patches.unfold(axis, dilation * (size - 1) + 1, stride)
            patches = patches[..., ::dilation]
        # [batch, channels, *positions, *kernel] -> [batch, positions, groups, features]
        patches = patches.movedim(1, 1 + dims).flatten(1, dims)
        features = patches.shape[2:].numel() // conv.groups
        return patches.reshape(batch_size, -1, conv.groups, features)

    def gradient_rows(self, gradients: Tensor, batch_size: int) -> Tensor:
        """See :meth:`Layer.gradient_rows`."""
        groups = self.module.groups
        rows = gradients.movedim(1, -1)
        return rows.reshape(batch_size, -1, groups, rows.shape[-1] // groups)


_LAYER_TYPES: dict[type[nn.Module], type[Layer]] = {
    nn.Linear: LinearLayer,
    nn.Conv1d: ConvLayer,
    nn.Conv2d: ConvLayer,
}


def find_layers(model: nn.Module, params: Iterable[Tensor]) -> list[Layer]:
    """Find the layers that the parameters belong to.

    Args:
        model: The neural network.
        params: Parameters of the network.

    Returns:
        The layers, ordered by their first parameter.

    Raises:
        ValueError: If a parameter belongs to no supported layer, or to several, or
            is given twice.
    """
    params = list(params)
    position = {id(param): index for index, param in enumerate(params)}
    if len(position) != len(params):
        raise ValueError("`params` must be distinct, but a parameter is given twice.")

    owner: dict[int, str] = {}
    layers, unsupported = [], []
    for name, module in model.named_modules():
        positions = {
            key: position[id(param)]
            for key, param in module.named_parameters(recurse=False)
            if id(param) in position
        }
        if not positions:
            continue
        layer_type = _layer_type(module)
        if layer_type is None or not positions.keys() <= {"weight", "bias"}:
            unsupported.append(f"{name or '(model)'} ({type(module).__name__})")
            continue
        for index in positions.values():
            if index in owner:
                raise ValueError(
                    f"Layers {owner[index]!r} and {name!r} share a parameter, which is "
                    "not supported. Exclude it by `requires_grad_(False)`."
                )
            owner[index] = name
        layers.append(layer_type(name, module, positions))

    supported = ", ".join(module.__name__ for module in _LAYER_TYPES)
    if unsupported:
        raise ValueError(
            f"Parameters found in unsupported layers: {', '.join(unsupported)}. "
            f"Supported are {supported}. Exclude the others by `requires_grad_(False)` "
            "on their parameters, which keeps them at their trained values."
        )
    if len(owner) != len(params):
        raise ValueError(
            f"{len(params) - len(owner)} of `params` are in no module of the model."
        )
    return sorted(layers, key=lambda layer: min(layer.positions.values()))


def _layer_type(module: nn.Module) -> type[Layer] | None:
    """Return the row view for a module, or None if there is none."""
    for module_type, layer_type in _LAYER_TYPES.items():
        if isinstance(module, module_type):
            return layer_type
    return None


@dataclass(frozen=True)
class Block:
    """A diagonal block of the curvature: one layer's weight, bias, or both.

    Args:
        layer: The layer.
        positions: Positions of the block's parameters, weight first.
        has_weight: Whether the block has an input factor.
        has_bias: Whether the block has the bias; with a weight, the input rows are
            extended by a one.
    """

    layer: Layer
    positions: tuple[int, ...]
    has_weight: bool
    has_bias: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """The block's parameters as ``(d_out, d_in)``, or ``(d_out,)`` for a bias."""
        module = self.layer.module
        if not self.has_weight:
            return tuple(module.bias.shape)
        d_out, d_in = module.weight.flatten(1).shape
        return d_out, d_in + self.has_bias


def curvature_blocks(
    layers: list[Layer], separate_weight_and_bias: bool
) -> list[Block]:
    """List the diagonal blocks of the layers' curvature.

    Args:
        layers: The layers.
        separate_weight_and_bias: Whether weight and bias of a layer are blocks of
            their own, or one.

    Returns:
        The blocks, ordered by their first parameter's position.
    """
    blocks = []
    for layer in layers:
        weight, bias = layer.positions.get("weight"), layer.positions.get("bias")
        if weight is not None and bias is not None and not separate_weight_and_bias:
            blocks.append(Block(layer, (weight, bias), True, True))
            continue
        if weight is not None:
            blocks.append(Block(layer, (weight,), True, False))
        if bias is not None:
            blocks.append(Block(layer, (bias,), False, True))
    return sorted(blocks, key=lambda block: block.positions[0])
