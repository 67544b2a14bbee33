r"""Standard errors of curvature that few points estimate.

The scale of a layer's curvature, its trace, is a sum over points. With the weighted
contributions :math:`c_{nl}` of m points to layer l, the covariance of the layers'
traces is estimated by :math:`\frac{m}{m - 1} \sum_n (c_n - \bar c)(c_n - \bar c)^\top`.
Points drawn from a pool by their score add the variance of the pool itself. What m of N
points estimate has the share 1 - m / N of these variances (finite population).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import ceil, isinf, isnan
from typing import Any

import torch
from torch import Tensor

TRUSTED_ERROR = 0.25


@dataclass(frozen=True)
class Spread:
    """Covariance of sums over all data that some of the points estimate.

    Args:
        covariance: Covariance ``[quantities, quantities]`` if the data had no end.
        num_points: Number of points seen.
    """

    covariance: Tensor
    num_points: float

    @classmethod
    def of_sum(cls, terms: Tensor) -> Spread:
        """Estimate the covariance of the sum of independent terms.

        Args:
            terms: A term of each point ``[points, quantities]``.

        Returns:
            The covariance, infinite for a single point.
        """
        count = len(terms)
        if count < 2:
            return cls(torch.full((terms.shape[1],) * 2, torch.inf).to(terms), count)
        centered = terms - terms.mean(0)
        return cls(count / (count - 1) * centered.T @ centered, count)

    def merge(self, other: Spread) -> Spread:
        """Add what further, independent points estimate."""
        return Spread(
            self.covariance + other.covariance, self.num_points + other.num_points
        )

    def scaled(self, factor: float, decay: float = 1.0) -> Spread:
        """Scale the sums, and the number of points by ``decay``."""
        return Spread(factor**2 * self.covariance, decay * self.num_points)

    def among(self, num_data: float) -> Tensor:
        """Compute the covariance if there is an end: none once all points were seen.

        Args:
            num_data: Number of all points.

        Returns:
            The covariance.
        """
        unseen = 1 - self.num_points / num_data
        # which may be infinite
        zeros = torch.zeros_like(self.covariance)
        return unseen * self.covariance if unseen > 1e-9 else zeros


@dataclass(frozen=True)
class SamplingError:
    """How much the estimates would differ with other points.

    Args:
        layers: Names of the layers.
        traces: Estimated trace of each layer's curvature ``[layers]``.
        num_data: Number of points that all is scaled to.
        draw: Spread of the traces over draws of the points that give magnitudes.
        pool: Spread of the traces over the pools that the points are drawn from.
        loss: Spread of the estimated loss.
    """

    layers: list[str]
    traces: Tensor
    num_data: float
    draw: Spread
    pool: Spread
    loss: Spread

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
        pool = Spread(torch.zeros(len(layers), len(layers)).to(traces), 0)
        if pool_scores is not None:
            mean, count = pool_scores.mean(), len(pool_scores)
            relative = (pool_scores.var() / (count * mean**2)).nan_to_num()
            pool = Spread(relative * torch.outer(traces, traces), count)
        scaled = losses * (num_data / len(losses))
        return cls(
            layers,
            traces,
            num_data,
            Spread.of_sum(contributions),
            pool,
            Spread.of_sum(scaled[:, None]),
        )

    @property
    def covariance(self) -> Tensor:
        """Covariance of the traces ``[layers, layers]``."""
        return self.draw.among(self.num_data) + self.pool.among(self.num_data)

    @property
    def loss_variance(self) -> Tensor:
        """Variance of the estimated loss."""
        return self.loss.among(self.num_data)[0, 0]

    def merge(self, other: SamplingError) -> SamplingError:
        """Add the error of further, independent data."""
        return SamplingError(
            self.layers,
            self.traces + other.traces,
            self.num_data + other.num_data,
            self.draw.merge(other.draw),
            self.pool.merge(other.pool),
            self.loss.merge(other.loss),
        )

    def scaled(self, factor: float, decay: float = 1.0) -> SamplingError:
        """Scale curvature and loss to more or fewer data.

        Args:
            factor: Factor on curvature, loss and the number of data.
            decay: Factor on the numbers of points seen.

        Returns:
            The scaled error.
        """
        return SamplingError(
            self.layers,
            factor * self.traces,
            factor * self.num_data,
            self.draw.scaled(factor, decay),
            self.pool.scaled(factor, decay),
            self.loss.scaled(factor, decay),
        )

    def relative_covariance(self) -> Tensor:
        """Covariance of the traces' relative errors.

        Returns:
            ``[layers, layers]``, NaN for layers without curvature.
        """
        products = torch.outer(self.traces, self.traces)
        return torch.where(products > 0, self.covariance / products, torch.nan)

    def relative_errors(self) -> dict[str, float]:
        """Relative standard error of each layer's trace, NaN without curvature."""
        errors = self.relative_covariance().diagonal().clamp(min=0).sqrt()
        return dict(zip(self.layers, errors.tolist(), strict=True))

    def warning(self, num_points: int) -> str | None:
        """Say that the points are too few to trust, and how many would do.

        Args:
            num_points: Number of points used.

        Returns:
            The message, None if they are enough.
        """
        errors = {k: e for k, e in self.relative_errors().items() if not isnan(e)}
        layer = max(errors, key=errors.get, default=None)
        if layer is None or errors[layer] <= TRUSTED_ERROR:
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
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state_dict: dict[str, Any]) -> SamplingError:
        """Build the error from :meth:`state_dict`."""
        spreads = {key: Spread(**state_dict[key]) for key in ("draw", "pool", "loss")}
        return cls(**state_dict | spreads)
