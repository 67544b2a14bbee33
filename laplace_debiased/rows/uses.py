r"""What a function call does with its parameters: one class for each kind of use.

A network uses a parameter where it passes it to a function: ``F.linear``, ``F.conv2d``,
``F.layer_norm``. What the function got and what it returned give the rows. To add a
kind of use, write a class here, and enter its functions into :data:`USES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Where a tensor holds the examples of a batch.

    Args:
        axis: The axis, of a size ``k * batch``.
        neighbours: Whether the ``k`` entries of an example are neighbours on it
            (windows of an image), or those of the same number (tokens of a
            sequence-first network, whose first two axes were joined).
    """

    axis: int = 0
    neighbours: bool = True

    def split(self, tensor: Tensor, batch_size: int) -> Tensor:
        """Bring the examples to the front.

        Args:
            tensor: The tensor.
            batch_size: Number of examples.

        Returns:
            The tensor as ``[batch, k, ...]``, with its other axes in their order.

        Raises:
            ValueError: If the axis holds no whole number of entries for each example.
        """
        front = tensor.movedim(self.axis, 0)
        if len(front) % batch_size:
            raise ValueError(
                f"A layer got a tensor of shape {tuple(tensor.shape)} for a batch of "
                f"{batch_size}: its axis {self.axis} must hold the examples."
            )
        if self.neighbours:
            return front.unflatten(0, (batch_size, -1))
        return front.unflatten(0, (-1, batch_size)).transpose(0, 1)


# from numbers of examples and of their positions to numbers of positions ``[batch,
# count]``
Choice = Callable[[int, int], Tensor]


@dataclass(frozen=True, eq=False)
class Use:
    """A function call with parameters.

    Args:
        input: The function's input.
        weight: What it takes as weight.
        bias: What it takes as bias.
    """

    input: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None

    @property
    def axes(self) -> range:
        """Axes of input and output that may hold the examples."""
        raise NotImplementedError

    @property
    def mixes_examples(self) -> bool:
        """Whether the function computes statistics over the batch."""
        return False

    def before_changes(self, differentiable: bool) -> Use:
        """Keep what the rows need, before the network may overwrite the input.

        Args:
            differentiable: Whether rows are to be differentiated.

        Returns:
            The use.
        """
        return self if differentiable else replace(self, input=self.input.detach())

    def gradient_rows(
        self, gradient: Tensor, key: str, layout: Layout, batch_size: int
    ) -> Tensor:
        """Rearrange the gradient in the output.

        Args:
            gradient: The gradient, of the output's shape.
            key: The parameter whose rows are asked for, ``"weight"`` or ``"bias"``.
            layout: Where the output holds the examples.
            batch_size: Number of examples.

        Returns:
            Rows ``[batch, S, groups, d_out / groups]``.
        """
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class MatrixUse(Use):
    """The weight is a matrix that is multiplied by rows of inputs."""

    def input_rows(
        self, layout: Layout, batch_size: int, choice: Choice | None = None
    ) -> Tensor:
        """Rearrange the input.

        Args:
            layout: Where the input holds the examples.
            batch_size: Number of examples.
            choice: Chooses the positions that are asked for; None for all.

        Returns:
            Rows ``[batch, S, groups, d_in / groups]``.
        """
        raise NotImplementedError


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
        rows = _positions_of_vectors(self.input, layout, batch_size)
        if choice is None:
            return rows
        positions = choice(batch_size, rows.shape[1]).to(rows.device)
        return rows.take_along_dim(positions[:, :, None, None], 1)

    def gradient_rows(
        self, gradient: Tensor, key: str, layout: Layout, batch_size: int
    ) -> Tensor:
        """See :meth:`Use.gradient_rows`."""
        return _positions_of_vectors(gradient, layout, batch_size)


def _positions_of_vectors(tensor: Tensor, layout: Layout, batch_size: int) -> Tensor:
    """Turn ``[..., features]`` into ``[batch, S, 1, features]``."""
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


@dataclass(frozen=True, eq=False)
class NormalizationUse(Use):
    r"""The output is :math:`w \odot \hat x + b` with a normalized input.

    An example's gradient in the vectors is a sum over its positions: the gradient rows
    of both are the per-example gradients, with one position.

    Args:
        normalize: Computes the normalized input.
        num_axes: Number of the last axes that the vectors extend over; None if it is
            the second axis.
        batch_statistics: Whether statistics are over the batch.
        normalized: The normalized input, once it is computed.
    """

    normalize: Callable[[Tensor], Tensor] | None = None
    num_axes: int | None = None
    batch_statistics: bool = False
    normalized: Tensor | None = None

    @property
    def axes(self) -> range:
        """See :attr:`Use.axes`."""
        return range(1 if self.num_axes is None else self.input.ndim - self.num_axes)

    @property
    def mixes_examples(self) -> bool:
        """See :attr:`Use.mixes_examples`."""
        return self.batch_statistics

    def before_changes(self, differentiable: bool) -> NormalizationUse:
        """See :meth:`Use.before_changes`."""
        assert self.normalize is not None
        with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
            return replace(self, normalized=self.normalize(self.input))

    def gradient_rows(
        self, gradient: Tensor, key: str, layout: Layout, batch_size: int
    ) -> Tensor:
        """See :meth:`Use.gradient_rows`."""
        if key == "weight":
            assert self.normalized is not None
            gradient = gradient * self.normalized
        examples = layout.split(gradient, batch_size)  # [batch, k, ...]
        if self.num_axes is None:
            examples = examples.movedim(2, -1)
        own_axes = self.num_axes or 1
        sums = examples.flatten(1, examples.ndim - own_axes - 1).sum(1)
        return sums.reshape(batch_size, 1, 1, -1)


def _layer_norm(
    input: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> NormalizationUse:
    normalize = partial(F.layer_norm, normalized_shape=normalized_shape, eps=eps)
    return NormalizationUse(input, weight, bias, normalize, len(normalized_shape))


def _rms_norm(
    input: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> NormalizationUse:
    normalize = partial(F.rms_norm, normalized_shape=normalized_shape, eps=eps)
    return NormalizationUse(input, weight, None, normalize, len(normalized_shape))


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> NormalizationUse:
    normalize = partial(F.group_norm, num_groups=num_groups, eps=eps)
    return NormalizationUse(input, weight, bias, normalize)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> NormalizationUse:
    normalize = partial(
        F.batch_norm, running_mean=running_mean, running_var=running_var, eps=eps
    )
    return NormalizationUse(input, weight, bias, normalize, batch_statistics=training)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> NormalizationUse:
    # statistics of the input alone, so that running ones are not updated twice
    own = use_input_stats
    normalize = partial(
        F.instance_norm,
        running_mean=None if own else running_mean,
        running_var=None if own else running_var,
        use_input_stats=own,
        eps=eps,
    )
    return NormalizationUse(input, weight, bias, normalize)


USES: dict[Callable, Callable[..., Use]] = {
    F.linear: LinearUse,
    F.conv1d: ConvolutionUse,
    F.conv2d: ConvolutionUse,
    F.conv3d: ConvolutionUse,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
}
