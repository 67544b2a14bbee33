r"""Layers as rows: what K-FAC needs to know about a module, and nothing else.

A linear layer that is applied at ``S`` positions of an example (tokens, pixels, calls)
maps input rows :math:`x_{ns}` to output rows :math:`W x_{ns} + b`. With the output
gradient rows :math:`g_{ns}`, the per-example gradient is
:math:`\sum_s g_{ns} x_{ns}^\top`. Kronecker factors, directional curvatures and
functional variances are contractions of these two tensors, so a new layer type is one
subclass here. The view follows Eschenhagen et al., 2023 (arXiv 2311.00636).

Rows have shape ``[batch, S, groups, features]``, where ``groups`` is one but for
grouped convolutions. The scale and the shift of a normalization layer are vectors: each
is a layer of its own that has gradient rows, the per-example gradients, and no inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd


@dataclass(frozen=True)
class Layer:
    """A module, or a part of it, with the positions of its parameters.

    Args:
        name: A name that no other layer has.
        module: The module.
        positions: Maps ``"weight"`` and ``"bias"``, where they take part, to positions
            in the list of parameters.
    """

    name: str
    module: nn.Module
    positions: dict[str, int]

    has_inputs = True

    def input_rows(self, inputs: Tensor, batch_size: int) -> Tensor:
        """Rearrange the module's input.

        Args:
            inputs: The module's input, batch first.
            batch_size: Number of examples.

        Returns:
            Rows ``[batch, S, groups, d_in / groups]``.
        """
        raise NotImplementedError

    def probe(
        self, inputs: Tensor, output: Tensor, batch_size: int
    ) -> tuple[Tensor, Tensor]:
        """Shift the module's output by zeros whose gradient gives gradient rows.

        Args:
            inputs: The module's input, batch first.
            output: The module's output.
            batch_size: Number of examples.

        Returns:
            The zeros, and a tensor equal to the output.
        """
        zeros = output.new_zeros(()).expand(output.shape).requires_grad_()
        return zeros, output + zeros

    def gradient_rows(self, gradients: Tensor, batch_size: int) -> Tensor:
        """Rearrange the gradient in the probe's zeros.

        Args:
            gradients: The gradient.
            batch_size: Number of examples.

        Returns:
            Rows ``[batch, S, groups, d_out / groups]``.
        """
        raise NotImplementedError

    def join_calls(self, rows: list[Tensor]) -> Tensor:
        """Join the gradient rows of several calls: each has positions of its own."""
        return join_positions(rows)

    def blocks(self, separate_weight_and_bias: bool) -> Iterator[Block]:
        """Yield the diagonal blocks of the layer's curvature."""
        d_out, d_in = self.module.weight.flatten(1).shape
        weight, bias = self.positions.get("weight"), self.positions.get("bias")
        if weight is not None and bias is not None and not separate_weight_and_bias:
            yield Block(self, (weight, bias), (d_out, d_in + 1))
            return
        if weight is not None:
            yield Block(self, (weight,), (d_out, d_in))
        if bias is not None:
            yield Block(self, (bias,), (d_out,))


def join_positions(rows: list[Tensor]) -> Tensor:
    """Concatenate rows ``[batch, S, ...]`` along the positions."""
    return rows[0] if len(rows) == 1 else torch.cat(rows, 1)


class LinearLayer(Layer):
    """``nn.Linear`` on ``[batch, ..., d_in]``.

    A network may fold further axes into the leading one (pairs, windows): with
    ``k * batch`` leading entries, the ``k`` of an example are positions like any other.
    """

    def input_rows(self, inputs: Tensor, batch_size: int) -> Tensor:
        """See :meth:`Layer.input_rows`."""
        return inputs.reshape(batch_size, -1, 1, inputs.shape[-1])

    def gradient_rows(self, gradients: Tensor, batch_size: int) -> Tensor:
        """See :meth:`Layer.gradient_rows`."""
        return self.input_rows(gradients, batch_size)


class ConvLayer(Layer):
    """A convolution: the input rows are the unfolded patches."""

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


class VectorLayer(Layer):
    r"""The scale or the shift of a normalization layer, as a vector.

    The output :math:`w \odot \hat x + b` is linear in both. Adding what the module
    gives for an example's own :math:`w` (or :math:`b`) of zeros changes nothing, and
    the gradient in those zeros is the example's gradient in the parameter, whatever the
    module's layout. The block is exact: it has one factor, and no positions.
    """

    has_inputs = False

    @property
    def _key(self) -> str:
        (key,) = self.positions
        return key

    def probe(
        self, inputs: Tensor, output: Tensor, batch_size: int
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`Layer.probe`.

        Raises:
            ValueError: If the module is in train mode, has no running statistics, or
                is not linear in the parameter.
        """
        self._check_statistics()
        parameters = dict(self.module.named_parameters(prefix="module"))
        zero = {key: torch.zeros_like(p) for key, p in parameters.items()}
        own = f"module.{self._key}"
        zeros = zero[own].expand(batch_size, *zero[own].shape).clone().requires_grad_()
        unhooked = _Unhooked(self.module)

        def effect(vector: Tensor, example: Tensor) -> Tensor:
            return functional_call(unhooked, zero | {own: vector}, (example,))

        shift = vmap(effect)(zeros, inputs.unflatten(0, (batch_size, -1)))
        if shift.any():
            raise ValueError(
                f"Layer {self.name!r} ({type(self.module).__name__}) is not linear in "
                "its parameters. Exclude it by `requires_grad_(False)`."
            )
        return zeros, output + shift.reshape(output.shape)

    def _check_statistics(self) -> None:
        if not isinstance(self.module, _BatchNorm):
            return
        if self.module.training or self.module.running_mean is None:
            raise ValueError(
                f"Layer {self.name!r} ({type(self.module).__name__}) uses batch "
                "statistics, which mix examples. Use eval mode and running statistics, "
                "or exclude the layer by `requires_grad_(False)`."
            )

    def gradient_rows(self, gradients: Tensor, batch_size: int) -> Tensor:
        """See :meth:`Layer.gradient_rows`."""
        return gradients.reshape(batch_size, 1, 1, -1)

    def join_calls(self, rows: list[Tensor]) -> Tensor:
        """Join the gradient rows of several calls: they add up."""
        return sum(rows)

    def blocks(self, separate_weight_and_bias: bool) -> Iterator[Block]:
        """Yield the layer's only block."""
        (position,) = self.positions.values()
        yield Block(self, (position,), (getattr(self.module, self._key).numel(),))


class _Unhooked(nn.Module):
    """A module without its hooks, so that it can be called by one of them."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """Call the module."""
        return self.module.forward(x)


@dataclass(frozen=True)
class Block:
    """A diagonal block of the curvature: one layer's weight, bias, or both.

    Args:
        layer: The layer.
        positions: Positions of the block's parameters, weight first.
        shape: The block's parameters as ``(d_out, d_in)``, or ``(d_out,)`` for a
            vector, which has no input factor.
    """

    layer: Layer
    positions: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def has_inputs(self) -> bool:
        """Whether the block has an input factor."""
        return len(self.shape) == 2

    @property
    def is_joint(self) -> bool:
        """Whether the bias is a further column of the weight, of constant input."""
        return len(self.positions) == 2


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
    blocks = [
        block for layer in layers for block in layer.blocks(separate_weight_and_bias)
    ]
    return sorted(blocks, key=lambda block: block.positions[0])
