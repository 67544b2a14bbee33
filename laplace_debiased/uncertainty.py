r"""Standard errors of curvature that few points estimate.

The scale of a layer's curvature, its trace, is a sum over points. With the weighted
contributions :math:`c_{nl}` of m points to layer l, the covariance of the layers'
traces is estimated by :math:`\frac{m}{m - 1} \sum_n (c_n - \bar c)(c_n - \bar c)^\top`.
Points drawn from a pool by their score add the variance of the pool itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, isinf
from typing import Any

import torch
from torch import Tensor

TRUSTED_ERROR = 0.25


@dataclass(frozen=True)
class SamplingError:
    """How much the estimates would differ with other points.

    Args:
        layers: Names of the layers.
        traces: Estimated trace of each layer's curvature ``[layers]``.
        covariance: Covariance of these estimates ``[layers, layers]``.
        loss_variance: Variance of the estimated loss.
    """

    layers: list[str]
    traces: Tensor
    covariance: Tensor
    loss_variance: Tensor

    @classmethod
    def of_points(
        cls,
        layers: list[str],
        contributions: Tensor,
        losses: Tensor,
        num_data: int,
        pool_scores: Tensor | None = None,
    ) -> SamplingError:
        """Estimate the error from what each point contributes.

        Args:
            layers: Names of the layers.
            contributions: Weighted contribution of each point that gives magnitudes to
                the traces, ``[points, layers]``.
            losses: Losses of the points that the loss was estimated from.
            num_data: Number of points that all are scaled to.
            pool_scores: Scores of the pool that the points were drawn from.

        Returns:
            The error.
        """
        traces = contributions.sum(0)
        covariance = _variance_of_sum(contributions) * _unseen(contributions, num_data)
        if pool_scores is not None:
            mean, count = pool_scores.mean(), len(pool_scores)
            relative = pool_scores.var() / (count * mean**2)
            relative = relative.nan_to_num() * _unseen(pool_scores, num_data)
            covariance = covariance + relative * torch.outer(traces, traces)
        scaled = losses * (num_data / len(losses))
        loss_variance = _variance_of_sum(scaled[:, None])[0, 0]
        loss_variance = loss_variance * _unseen(losses, num_data)
        return cls(layers, traces, covariance, loss_variance)

    def merge(self, other: SamplingError) -> SamplingError:
        """Add the error of further, independent data."""
        return SamplingError(
            self.layers,
            self.traces + other.traces,
            self.covariance + other.covariance,
            self.loss_variance + other.loss_variance,
        )

    def scaled(self, factor: float) -> SamplingError:
        """Scale curvature and loss."""
        return SamplingError(
            self.layers,
            factor * self.traces,
            factor**2 * self.covariance,
            factor**2 * self.loss_variance,
        )

    def relative_covariance(self) -> Tensor:
        """Covariance of the traces' relative errors, ``[layers, layers]``."""
        products = torch.outer(self.traces, self.traces)
        return torch.where(products > 0, self.covariance / products, 0.0)

    def relative_errors(self) -> dict[str, float]:
        """Relative standard error of each layer's trace."""
        errors = self.relative_covariance().diagonal().clamp(min=0).sqrt()
        return dict(zip(self.layers, errors.tolist(), strict=True))

    def warning(self, num_points: int) -> str | None:
        """Say that the points are too few to trust, and how many would do.

        Args:
            num_points: Number of points used.

        Returns:
            The message, None if they are enough.
        """
        errors = self.relative_errors()
        layer = max(errors, key=errors.get)
        if errors[layer] <= TRUSTED_ERROR:
            return None
        if isinf(errors[layer]):
            return (
                f"A budget of {num_points} points is too small to trust: a single one "
                "gives magnitudes, so that their error is not known."
            )
        enough = ceil(num_points * (errors[layer] / TRUSTED_ERROR) ** 2)
        return (
            f"A budget of {num_points} points is too small to trust: the curvature's "
            f"scale in layer {layer!r} has a relative standard error of "
            f"{errors[layer]:.2f}. A budget of about {enough} would bring it to "
            f"{TRUSTED_ERROR}."
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the names and numbers."""
        return dict(vars(self))


def _variance_of_sum(terms: Tensor) -> Tensor:
    """Covariance of the sum of independent terms ``[points, quantities]``."""
    count = len(terms)
    if count < 2:
        return torch.full((terms.shape[1],) * 2, torch.inf).to(terms)
    centered = terms - terms.mean(0)
    return count / (count - 1) * centered.T @ centered


def _unseen(points: Tensor, num_data: int) -> float:
    """Share of the data that was not seen: there is no error if all were."""
    return max(0.0, 1 - len(points) / num_data)
