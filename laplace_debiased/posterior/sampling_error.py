r"""Standard errors of curvature that few points estimate.

The scale of a layer's curvature, its trace, is a sum over points. With the weighted
contributions :math:`c_{nl}` of n points to layer l, the covariance of the layers'
traces is estimated by :math:`C = \frac{n}{n - 1} \sum_i (c_i - \bar c)(c_i - \bar
c)^\top`. Points drawn from a pool by their score add the covariance of the pool itself.
Contributions are those of :mod:`~laplace_debiased.posterior.influences`.

The n points are part of the N that the sum is over. The sum itself, over draws of all
data, has the covariance :math:`S = \frac{n}{N} C`. The estimate is unbiased given the
data, so that its error has :math:`C - S`. Independent parts add both. A factor f on the
number of data scales the estimate by f, and adds data to the sum: :math:`f^2 C` and
:math:`f S`. A weight d of both scales them by :math:`d^2`.

What of the contributions is not that sum's stays, however many points there are:
:math:`S = \frac{n}{N} (C - R)`, where R is as C, but of that part alone. With sampled
labels or random signs, it is their noise. The points' scores, which are not drawn, tell
a part of the contributions, and R is of all the rest: at least of the noise. Points
that are none of the N tell nothing of their sum, so that R is C.

The variance is itself estimated, and few points may carry it: with the deviations
:math:`d_i = c_i - \bar c`, as many as :math:`m = (\sum_i d_i^2)^2 / \sum_i d_i^4`.
Intervals, for the logarithm of a trace, have Student's quantile for :math:`m / 2`
degrees of freedom. For a kurtosis that is known, Satterthwaite's rule gives 2m; that of
heavy tails is larger than few points tell. The quarter was found by simulation.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from math import ceil, exp, isinf, isnan, log
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from laplace_debiased.posterior.influences import sum_of

TRUSTED_FACTOR = 1.6  # two standard errors of about a quarter
_FEWEST_DEGREES = 0.7


@dataclass(frozen=True)
class Spread:
    """Covariance of sums over all data that some of the points estimate.

    Args:
        covariance: Covariance C of the estimates ``[quantities, quantities]``.
        seen: Covariance S of the sums themselves.
        size: C in units of a point's covariance.
        seen_size: S in the same units.
        fourth_powers: Sum of the deviations' fourth powers ``[quantities]``.
    """

    covariance: Tensor
    seen: Tensor
    size: float
    seen_size: float
    fourth_powers: Tensor

    @classmethod
    def none(cls, num_quantities: int, like: Tensor) -> Spread:
        """Return the spread of what is known.

        Args:
            num_quantities: Number of quantities.
            like: A tensor of the device to use.

        Returns:
            The spread.
        """
        zeros = torch.zeros(num_quantities, dtype=torch.float64, device=like.device)
        return cls(zeros.diag(), zeros.diag(), 0.0, 0.0, zeros)

    @classmethod
    def of_sum(
        cls, terms: Tensor, num_data: float, noise: Tensor | None = None
    ) -> Spread:
        """Estimate the covariance of the sum of independent terms.

        Args:
            terms: A term of each point ``[points, quantities]``.
            num_data: Number of all points.
            noise: What of the terms is not a part of the sum over all points; None if
                nothing is.

        Returns:
            The spread, infinite for a single point.
        """
        count, terms = len(terms), terms.double()
        if count < 2:
            zeros = torch.zeros_like(terms.T @ terms)
            infinite = zeros + torch.inf
            seen_size = num_data if noise is None else 0.0
            return cls(infinite, zeros, num_data**2, seen_size, infinite.diagonal())
        covariance, fourth_powers = _moments(terms)
        seen = covariance if noise is None else covariance - _moments(noise)[0]
        seen = count / num_data * seen
        return cls(covariance, seen, num_data**2 / count, num_data, fourth_powers)

    @property
    def error(self) -> Tensor:
        """Covariance of the estimates' errors: none once all points were seen."""
        error = self.covariance - self.seen
        # up to rounding, and below zero if scaled to fewer points than were seen
        some = error.diagonal() > 1e-9 * self.seen.diagonal()
        return torch.where(some & some[:, None], error, 0.0)

    def merge(self, other: Spread) -> Spread:
        """Add what further, independent points estimate."""
        first, second = self._known_from(other), other._known_from(self)
        return Spread(
            first.covariance + second.covariance,
            first.seen + second.seen,
            self.size + other.size,
            self.seen_size + other.seen_size,
            first.fourth_powers + second.fourth_powers,
        )

    def _known_from(self, other: Spread) -> Spread:
        """Take a point's covariance from others if a single point does not tell it."""
        if self.covariance.isfinite().all() or not other.covariance.isfinite().all():
            return self
        of_point = other.covariance / other.size
        covariance = self.size * of_point
        return replace(
            self,
            covariance=covariance,
            seen=self.seen_size * of_point,
            fourth_powers=covariance.diagonal() ** 2,
        )

    def scaled(self, factor: float, decay: float = 1.0) -> Spread:
        """Scale the sums to more or fewer data.

        Args:
            factor: Factor on the sums, and on the number of data.
            decay: Weight of the data in the factor; the rest changes their number.

        Returns:
            The scaled spread.
        """
        seen = factor * decay  # decay**2 * (factor / decay)
        return Spread(
            factor**2 * self.covariance,
            seen * self.seen,
            factor**2 * self.size,
            seen * self.seen_size,
            factor**4 * self.fourth_powers,
        )


def _moments(terms: Tensor) -> tuple[Tensor, Tensor]:
    """Estimate the covariance of a sum; add up the deviations' fourth powers."""
    centered, count = terms - terms.mean(0), len(terms)
    covariance = count / (count - 1) * centered.T @ centered
    return covariance, centered.pow(4).sum(0)


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
        of_pool: Tensor | None = None,
        noise: Tensor | None = None,
        pool_noise: Tensor | None = None,
        are_apart: bool = False,
    ) -> SamplingError:
        """Estimate the error from what each point contributes.

        Args:
            layers: Names of the layers.
            contributions: Weighted contribution of each point that gives magnitudes to
                the traces, ``[points, layers]``.
            losses: Losses of the points that the loss was estimated from.
            num_data: Number of points that all are scaled to.
            of_pool: Contributions of the points of the pool that these were drawn from,
                ``[points, layers]``.
            noise: What of the contributions is drawn, at most, ``[points, layers]``;
                None if nothing is.
            pool_noise: What of the pool's contributions is not of all data, likewise.
            are_apart: Whether the points are none of those that all are scaled to.

        Returns:
            The error.
        """
        scaled = (losses * (num_data / len(losses)))[:, None].double()
        return cls(
            layers,
            contributions.sum(0),
            num_data,
            Spread.of_sum(
                contributions, num_data, contributions if are_apart else noise
            ),
            Spread.none(len(layers), contributions)
            if of_pool is None
            else Spread.of_sum(of_pool, num_data, pool_noise),
            Spread.of_sum(scaled, num_data, scaled if are_apart else None),
        )

    @property
    def covariance(self) -> Tensor:
        """Covariance of the traces ``[layers, layers]``."""
        return (self.draw.error + self.pool.error).to(self.traces)

    @property
    def loss_variance(self) -> Tensor:
        """Variance of the estimated loss."""
        return self.loss.error[0, 0].to(self.traces)

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
            decay: Weight of the data in the factor; the rest changes their number.

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
        errors = self.relative_covariance().diagonal().sqrt()
        return dict(zip(self.layers, errors.tolist(), strict=True))

    def half_widths(self, level: float = 0.95) -> Tensor:
        """Half widths of intervals for the logarithms of the traces.

        Args:
            level: The share of draws of the points whose interval should hold the trace
                of all data.

        Returns:
            ``[layers]``, NaN for layers without curvature.
        """
        spreads = self.draw, self.pool
        variance = sum_of([own.covariance.diagonal() for own in spreads])
        fourth_powers = sum_of([own.fourth_powers for own in spreads])
        degrees = (variance**2 / fourth_powers / 2).clamp(min=_FEWEST_DEGREES)
        degrees = torch.where(degrees.isfinite(), degrees, torch.inf)
        quantiles = stats.t.ppf((1 + level) / 2, degrees.cpu().numpy())
        errors = self.relative_covariance().diagonal().sqrt()
        return torch.as_tensor(quantiles).to(errors) * errors

    def intervals(self, level: float = 0.95) -> dict[str, tuple[float, float]]:
        """Confidence intervals for each layer's trace, NaN without curvature.

        Args:
            level: As in :meth:`half_widths`.

        Returns:
            The ends of each interval.
        """
        factors = self.half_widths(level).double().exp()
        ends = (self.traces / factors).tolist(), (self.traces * factors).tolist()
        return dict(zip(self.layers, zip(*ends, strict=True), strict=True))

    def warning(self, num_points: int) -> str | None:
        """Say that the points are too few to trust, and how many would do.

        Args:
            num_points: Number of points used.

        Returns:
            The message, None if they are enough.
        """
        widths = dict(zip(self.layers, self.half_widths().tolist(), strict=True))
        widths = {name: width for name, width in widths.items() if not isnan(width)}
        layer = max(widths, key=widths.__getitem__, default=None)
        if layer is None or exp(widths[layer]) <= TRUSTED_FACTOR:
            return None
        if isinf(widths[layer]):
            return (
                f"A budget of {num_points} points is too small to trust: a single one "
                "gives magnitudes, so that their error is not known."
            )
        enough = self._enough(layer, num_points)
        advice = (
            "With the same pool and share of directions, no budget would"
            if enough is None
            else f"A budget of about {enough} would"
        )
        return (
            f"A budget of {num_points} points is too small to trust: the curvature's "
            f"scale in layer {layer!r} is known to a factor of "
            f"{exp(widths[layer]):.3g} only (95 % confidence). {advice} bring it to "
            f"{TRUSTED_FACTOR}."
        )

    def _enough(self, layer: str, num_points: int) -> int | None:
        """Find the budget that would do, None if that is more than there are points.

        The draw's error goes with its size less what was seen, and its size with the
        inverse of the budget; the pool stays.
        """
        index, draw = self.layers.index(layer), self.draw
        share_seen = draw.seen[index, index] / draw.covariance[index, index]
        seen_size = draw.size * share_seen.item()
        of_draw, of_pool = (
            (spread.error[index, index] / self.traces[index] ** 2).item()
            for spread in (draw, self.pool)
        )
        share = log(TRUSTED_FACTOR) / self.half_widths()[index].item()
        needed = share**2 * (of_draw + of_pool)
        factor = (needed - of_pool) / of_draw if of_draw else 0.0
        if factor <= 0:
            return None
        size = seen_size + factor * (draw.size - seen_size)
        enough = ceil(num_points * draw.size / size)
        return enough if enough <= self.num_data else None

    def state_dict(self) -> dict[str, Any]:
        """Return the names and numbers."""
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state_dict: dict[str, Any]) -> SamplingError:
        """Build the error from :meth:`state_dict`."""
        spreads = {key: Spread(**state_dict[key]) for key in ("draw", "pool", "loss")}
        return cls(**state_dict | spreads)
