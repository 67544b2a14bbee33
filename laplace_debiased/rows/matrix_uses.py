"""Uses of a matrix: linear layers and convolutions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from laplace_debiased.rows.uses import Choice, Layout, MatrixUse


@dataclass(frozen=True, eq=False)
class LinearUse(MatrixUse):
    """``F.linear`` on ``[..., d_in]``: each entry of the other axes is a position."""

    @property
    def axes(self) -> range:
        """See :attr:`Use.axes`."""
        return range(self.input.ndim - 1)

    def input_rows(
        self, layout: Layout, batch_size: int, choice: Choice | None = None
    ) -> Tensor:
        """See :meth:`MatrixUse.input_rows`."""
        rows = positions_of_vectors(self.input, layout, batch_size)
        if choice is None:
            return rows
        positions = choice(batch_size, rows.shape[1]).to(rows.device)
        return rows.take_along_dim(positions[:, :, None, None], 1)

    def gradient_rows(
        self, gradient: Tensor, key: str, layout: Layout, batch_size: int
    ) -> Tensor:
        """See :meth:`Use.gradient_rows`."""
        return positions_of_vectors(gradient, layout, batch_size)


def positions_of_vectors(tensor: Tensor, layout: Layout, batch_size: int) -> Tensor:
    """Turn vectors into rows.

    Args:
        tensor: Vectors ``[..., features]``.
        layout: Where they hold the examples.
        batch_size: Number of examples.

    Returns:
        Rows ``[batch, S, 1, features]``.
    """
    examples = layout.split(tensor, batch_size)
    return examples.flatten(1, -2).unsqueeze(2)


@dataclass(frozen=True, eq=False)
class ConvolutionUse(MatrixUse):
    """``F.conv1d`` to ``F.conv3d``: the input rows are the unfolded patches."""

    stride: int | tuple[int, ...] = 1
    padding: int | tuple[int, ...] | str = 0
    dilation: int | tuple[int, ...] = 1
    groups: int = 1

    @property
    def axes(self) -> range:
        """See :attr:`Use.axes`."""
        assert self.weight is not None
        # without an axis of examples, the input is a single image
        return range(1 if self.input.ndim == self.weight.ndim else 0)

    @property
    def _kernel(self) -> tuple[int, ...]:
        assert self.weight is not None
        return tuple(self.weight.shape[2:])

    def _padding(self) -> list[int]:
        """What ``F.pad`` takes: both ends of the last axis, then of the one before."""
        if self.padding == "valid":
            return [0] * 2 * len(self._kernel)
        if self.padding == "same":  # torch's own convention: the odd one at the end
            dilations = _of_each_axis(self.dilation, len(self._kernel))
            totals = [d * (k - 1) for d, k in zip(dilations, self._kernel, strict=True)]
            ends = [(total // 2, total - total // 2) for total in totals]
        else:
            assert not isinstance(self.padding, str)
            ends = [(p, p) for p in _of_each_axis(self.padding, len(self._kernel))]
        return [end for pair in reversed(ends) for end in pair]

    def input_rows(
        self, layout: Layout, batch_size: int, choice: Choice | None = None
    ) -> Tensor:
        """See :meth:`MatrixUse.input_rows`."""
        padded = F.pad(self.input, self._padding())
        if choice is None:
            rows = layout.split(self._patches(padded), batch_size).flatten(1, 2)
        else:
            rows = self._chosen(padded, layout, batch_size, choice)
        return rows.unflatten(2, (self.groups, -1))

    def _patches(self, padded: Tensor) -> Tensor:
        """Unfold ``[images, channels, ...]`` into ``[images, S, d_in]``."""
        dims = len(self._kernel)
        sizes = zip(
            self._kernel,
            _of_each_axis(self.stride, dims),
            _of_each_axis(self.dilation, dims),
            strict=True,
        )
        for axis, (size, stride, dilation) in enumerate(sizes, start=2):
            padded = padded.unfold(axis, dilation * (size - 1) + 1, stride)
            padded = padded[..., ::dilation]
        # [images, channels, *positions, *kernel]
        return padded.movedim(1, 1 + dims).flatten(1, dims).flatten(2)

    def _chosen(
        self, padded: Tensor, layout: Layout, batch_size: int, choice: Choice
    ) -> Tensor:
        """Take some patches alone ``[batch, count, d_in]``."""
        device, entries = padded.device, padded[0].numel()
        numbers = torch.arange(entries, device=device).view_as(padded[:1])
        (patch,) = self._patches(numbers)  # [S, d_in]
        images = layout.split(torch.arange(len(padded), device=device), batch_size)
        chosen = choice(batch_size, images.shape[1] * len(patch)).to(device)
        firsts = entries * images.gather(1, chosen // len(patch))
        indices = firsts[:, :, None] + patch[chosen % len(patch)]
        return padded.flatten().index_select(0, indices.flatten()).view_as(indices)

    def gradient_rows(
        self, gradient: Tensor, key: str, layout: Layout, batch_size: int
    ) -> Tensor:
        """See :meth:`Use.gradient_rows`."""
        channels = gradient.shape[1]
        examples = layout.split(gradient.movedim(1, -1), batch_size)
        return examples.reshape(batch_size, -1, self.groups, channels // self.groups)


def _of_each_axis(value: int | tuple[int, ...], count: int) -> tuple[int, ...]:
    """Repeat a number for each axis, as torch's convolutions do."""
    if isinstance(value, int):
        return (value,) * count
    return tuple(value) * (count if len(value) == 1 else 1)
