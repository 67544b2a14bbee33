"""Uses of the scale and the shift of a normalization."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from laplace_debiased.rows.uses import Layout, Use


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

    def is_vector(self, key: str) -> bool:
        """See :meth:`Use.is_vector`."""
        return True

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


def layer_norm(
    input: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> NormalizationUse:
    """Describe a call of ``F.layer_norm``, whose arguments these are."""
    normalize = partial(F.layer_norm, normalized_shape=normalized_shape, eps=eps)
    return NormalizationUse(input, weight, bias, normalize, len(normalized_shape))


def rms_norm(
    input: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> NormalizationUse:
    """Describe a call of ``F.rms_norm``, whose arguments these are."""
    normalize = partial(F.rms_norm, normalized_shape=normalized_shape, eps=eps)
    return NormalizationUse(input, weight, None, normalize, len(normalized_shape))


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> NormalizationUse:
    """Describe a call of ``F.group_norm``, whose arguments these are."""
    normalize = partial(F.group_norm, num_groups=num_groups, eps=eps)
    return NormalizationUse(input, weight, bias, normalize)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> NormalizationUse:
    """Describe a call of ``F.batch_norm``, whose arguments these are."""
    normalize = partial(
        F.batch_norm, running_mean=running_mean, running_var=running_var, eps=eps
    )
    return NormalizationUse(input, weight, bias, normalize, batch_statistics=training)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> NormalizationUse:
    """Describe a call of ``F.instance_norm``, whose arguments these are."""
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
