"""Uses of the kernel of a transposed convolution."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from laplace_debiased.rows.inputs import moved
from laplace_debiased.rows.matrix_uses import of_each_axis, patches
from laplace_debiased.rows.uses import Choice, Layout, MatrixUse


@dataclass(frozen=True, eq=False)
class TransposedConvolutionUse(MatrixUse):
    """``F.conv_transpose1d`` to ``F.conv_transpose3d``.

    Each pixel of the input is multiplied by a matrix, whose rows are the kernel of a
    channel, and the products are added to a patch of the output: input rows are the
    pixels, gradient rows the unfolded patches of the output's gradient. With groups, a
    pixel has a position for each of them, at which the other channels are zero. The
    bias is added to the output once: it is a vector of its own.
    """

    stride: int | tuple[int, ...] = 1
    padding: int | tuple[int, ...] = 0
    output_padding: int | tuple[int, ...] = 0
    groups: int = 1
    dilation: int | tuple[int, ...] = 1

    @property
    def is_transposed(self) -> bool:
        """See :attr:`MatrixUse.is_transposed`."""
        return True

    @property
    def axes(self) -> range:
        """See :attr:`Use.axes`."""
        assert self.weight is not None
        return range(1 if self.input.ndim == self.weight.ndim else 0)

    def is_vector(self, key: str) -> bool:
        """See :meth:`Use.is_vector`."""
        return key == "bias"

    def input_rows(
        self, layout: Layout, batch_size: int, choice: Choice | None = None
    ) -> Tensor:
        """See :meth:`MatrixUse.input_rows`."""
        pixels = _pixels(self.input, layout, batch_size)
        count = pixels.shape[1] * self.groups
        if choice is None:
            numbers = torch.arange(count).expand(batch_size, -1)
        else:
            numbers = choice(batch_size, count)
        numbers = moved(numbers, pixels.device)[:, :, None]
        rows = pixels.take_along_dim(numbers // self.groups, 1)
        if self.groups > 1:
            channels = torch.arange(rows.shape[2], device=rows.device)
            size = len(channels) // self.groups
            rows = rows * (channels // size == numbers % self.groups)
        return rows.unsqueeze(2)

    def gradient_rows(
        self, gradient: Tensor, key: str, layout: Layout, batch_size: int
    ) -> Tensor:
        """See :meth:`Use.gradient_rows`."""
        if key == "bias":
            sums = _pixels(gradient, layout, batch_size).sum(1)
            return sums[:, None, None]
        assert self.weight is not None
        kernel = self.weight.shape[2:]
        unfolded = patches(self._spread(gradient), kernel, self.stride, self.dilation)
        # [images, S, channels * kernel], the channels of a group next to each other
        examples = layout.split(unfolded.unflatten(2, (self.groups, -1)), batch_size)
        return examples.flatten(1, 3).unsqueeze(2)

    def _spread(self, gradient: Tensor) -> Tensor:
        """Pad the gradient to where the kernels of all pixels reach, and no further."""
        assert self.weight is not None
        pixels, kernel = self.input.shape[2:], self.weight.shape[2:]
        sizes = zip(
            pixels,
            kernel,
            *(
                of_each_axis(value, len(kernel))
                for value in (self.stride, self.dilation, self.padding)
            ),
            gradient.shape[2:],
            strict=True,
        )
        ends = []
        for count, size, stride, dilation, padding, given in sizes:
            reach = (count - 1) * stride + dilation * (size - 1) + 1
            # below zero where the output is padded beyond all kernels
            ends.append((padding, reach - padding - given))
        return F.pad(gradient, [end for pair in reversed(ends) for end in pair])


def _pixels(images: Tensor, layout: Layout, batch_size: int) -> Tensor:
    """Turn ``[images, channels, ...]`` into ``[batch, S, channels]``."""
    return layout.split(images.movedim(1, -1), batch_size).flatten(1, -2)
