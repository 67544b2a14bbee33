"""Uses of a matrix: linear layers, products and convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from laplace_debiased.rows.inputs import NEED_EXAMPLES, moved
from laplace_debiased.rows.uses import Choice, Layout, MatrixUse

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


@dataclass(frozen=True, eq=False)
class LinearUse(MatrixUse):
    """``F.linear`` on ``[..., d_in]``: each entry of the other axes is a position.

    Args:
        stored_transposed: Whether the weight is ``[d_in, d_out]``, as of a product.
    """

    stored_transposed: bool = False

    @property
    def is_transposed(self) -> bool:
        """See :attr:`MatrixUse.is_transposed`."""
        return self.stored_transposed

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
        positions = moved(choice(batch_size, rows.shape[1]), rows.device)
        return rows.take_along_dim(positions[:, :, None, None], 1)

    def gradient_rows(
        self, gradient: Tensor, key: str, layout: Layout, batch_size: int
    ) -> Tensor:
        """See :meth:`Use.gradient_rows`."""
        return positions_of_vectors(gradient, layout, batch_size)


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> LinearUse | None:
    """Describe a call of ``F.linear``; None if weight or bias have another shape."""
    is_shared = bias is not None and bias.numel() != weight.shape[0]
    if weight.ndim != 2 or is_shared or input.layout != torch.strided:
        return None
    original = _transposed_original(weight)
    if original is None:
        return LinearUse(input, weight, bias)
    return LinearUse(input, original, bias, stored_transposed=True)


def product(input: Tensor, other: Tensor) -> LinearUse | None:
    """Describe a call of ``torch.matmul``; None if it is no product by a matrix."""
    is_matrix = isinstance(other, Tensor) and other.ndim == 2
    if not is_matrix or input.layout != torch.strided:
        return None
    original = _transposed_original(other)
    if original is None:
        return LinearUse(input, other, stored_transposed=True)
    return LinearUse(input, original)


def matrix_product(input: Tensor, mat2: Tensor) -> LinearUse | None:
    """Describe a call of ``torch.mm``, whose arguments these are."""
    return product(input, mat2)


def shifted_product(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> LinearUse | None:
    """Describe a call of ``torch.addmm``; None unless it adds a bias to a product."""
    use = product(mat1, mat2)
    if use is None or (beta, alpha) != (1, 1) or input.shape != mat2.shape[1:]:
        return None
    return replace(use, bias=input)


def _transposed_original(weight: Tensor) -> Tensor | None:
    """Return the matrix that another one is a transposed view of, if it is one."""
    base = weight._base
    is_transpose = (
        base is not None
        and base.ndim == 2
        and weight.shape == base.shape[::-1]
        and weight.stride() == base.stride()[::-1]
        and weight.storage_offset() == base.storage_offset()
    )
    return base if is_transpose else None


def positions_of_vectors(tensor: Tensor, layout: Layout, batch_size: int) -> Tensor:
    """Turn vectors into rows.

    Args:
        tensor: Vectors ``[..., features]``.
        layout: Where they hold the examples.
        batch_size: Number of examples.

    Returns:
        Rows ``[batch, S, 1, features]``.

    Raises:
        ValueError: If it is a single vector.
    """
    if tensor.ndim < 2:
        raise ValueError(f"A layer got a single vector. {NEED_EXAMPLES}")
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
            dilations = of_each_axis(self.dilation, len(self._kernel))
            totals = [d * (k - 1) for d, k in zip(dilations, self._kernel, strict=True)]
            ends = [(total // 2, total - total // 2) for total in totals]
        else:
            assert not isinstance(self.padding, str)
            ends = [(p, p) for p in of_each_axis(self.padding, len(self._kernel))]
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

    def rotated_rows(self, layout: Layout, batch_size: int, basis: Tensor) -> Tensor:
        """See :meth:`MatrixUse.rotated_rows`."""
        dims = len(self._kernel)
        # convolutions on a GPU may be of lower precision than products of matrices
        if basis.ndim == 1 or basis.device.type != "cpu":
            rows = super().rotated_rows(layout, batch_size, basis)
            assert isinstance(rows, Tensor)
            return rows
        # each direction is a kernel, and nothing is unfolded
        kernels = basis.T.unflatten(1, (-1, *self._kernel))
        kernels = kernels.repeat(self.groups, *[1] * (dims + 1))
        padded = F.pad(self.input, self._padding()).to(basis.dtype)
        turned = _CONVOLUTIONS[dims - 1](
            padded, kernels, None, self.stride, 0, self.dilation, self.groups
        )
        rows = layout.split(turned.flatten(2).mT, batch_size).flatten(1, 2)
        return rows.unflatten(2, (self.groups, -1))

    def _patches(self, padded: Tensor) -> Tensor:
        return patches(padded, self._kernel, self.stride, self.dilation)

    def _chosen(
        self, padded: Tensor, layout: Layout, batch_size: int, choice: Choice
    ) -> Tensor:
        """Take some patches alone ``[batch, count, d_in]``."""
        device, entries = padded.device, padded[0].numel()
        numbers = torch.arange(entries, device=device).view_as(padded[:1])
        (patch,) = self._patches(numbers)  # [S, d_in]
        images = layout.split(torch.arange(len(padded), device=device), batch_size)
        chosen = moved(choice(batch_size, images.shape[1] * len(patch)), device)
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


def patches(
    padded: Tensor,
    kernel: Sequence[int],
    stride: int | tuple[int, ...],
    dilation: int | tuple[int, ...],
) -> Tensor:
    """Unfold what a kernel is moved over.

    Args:
        padded: Images ``[images, channels, ...]``.
        kernel: The kernel's sizes.
        stride: Its steps.
        dilation: Distance of its entries.

    Returns:
        ``[images, S, channels * kernel]``.
    """
    dims = len(kernel)
    sizes = zip(
        kernel, of_each_axis(stride, dims), of_each_axis(dilation, dims), strict=True
    )
    for axis, (size, step, distance) in enumerate(sizes, start=2):
        padded = padded.unfold(axis, distance * (size - 1) + 1, step)
        padded = padded[..., ::distance]
    # [images, channels, *positions, *kernel]
    return padded.movedim(1, 1 + dims).flatten(1, dims).flatten(2)


def of_each_axis(value: int | tuple[int, ...], count: int) -> tuple[int, ...]:
    """Repeat a number for each axis, as torch's convolutions do."""
    if isinstance(value, int):
        return (value,) * count
    return tuple(value) * (count if len(value) == 1 else 1)
