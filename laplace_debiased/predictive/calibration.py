r"""Probabilities that validation data agree with.

A network's outputs are divided by a temperature T (Guo et al., 2017, arXiv 1706.04599),
and the posterior's covariance is multiplied by a *scale* s between zero and one: the
outputs of an example are Gaussian with mean :math:`\mu / T` and covariance :math:`s
\Sigma / T^2`. Both are chosen by the negative log likelihood of validation data. At s =
0, the probabilities are those of the trained network with temperature scaling; one is
the posterior as it was fitted.

The marginal likelihood fits a posterior that tells foreign inputs best, but is too wide
for clean data. Clean data hardly tell scales apart that have each their best
temperature, while inputs that have changed since training are predicted the better, the
more of the variance is left. So the scale is the largest one that costs next to nothing
on validation data, and the epistemic uncertainty is always that of the whole posterior.

Few validation points must not do harm, so what is chosen is shrunk towards the trained
network, T = 1 and s = 0, unless the data speak clearly:

- 50 further points have the network's own probabilities as labels, a catalytic prior
  (Huang et al., 2020, PNAS 117, 12004).
- The prior of log T is a Laplace distribution: T is exactly one unless the data's slope
  there exceeds the prior's, and is hardly shrunk where they know it well.
- A scale costs next to nothing only if it does so with a standard error added, that of
  the difference to temperature scaling, s = 0, point by point (Breiman et al., 1984).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import exp, inf, pi

import numpy as np
from scipy.optimize import brentq
from torch import Tensor

from laplace_debiased.predictive.links import SOFTMAX, Link

TOLERANCE = 2e-3
SCALES = (0.0, *np.logspace(-3, 0, 13).tolist())
# points that the trained network labels, and mean of the absolute logarithm of the
# temperature, both before any data were seen
_PRIOR_POINTS = 50
_PRIOR_SPREAD = 0.1
# of the temperature's logarithm: its largest absolute value, and its accuracy
_BOUND = 2.5
_ACCURACY = 5e-3


@dataclass(frozen=True)
class Calibration:
    """How probabilities are made from the posterior.

    Args:
        temperature: Temperature T of the outputs.
        scale: Scale s of the posterior's covariance; zero for the trained network's own
            outputs.
        temperature_error: Standard error of the temperature's logarithm; infinite where
            the points do not tell.
        num_points: Number of validation points.
        nll: Their mean negative log likelihood, with this temperature and scale: of the
            class, or of all labels of a point together.
        frontier: That with the best temperature for each scale, by scale.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from laplace_debiased import Laplace
        >>> _ = torch.manual_seed(0)
        >>> X = torch.randn(300, 2)
        >>> y = (X[:, 0] + torch.randn(300) > 0).long()
        >>> train, val = (DataLoader(TensorDataset(X[s], y[s]), 50) for s in (
        ...     slice(200), slice(200, 300)))
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)
        ... )
        >>> la = Laplace(model, "classification", "all", "kron_debiased")
        >>> la.fit(train)
        >>> found = la.calibrate(val)
        >>> found.num_points
        100
        >>> 0 <= found.scale <= 1 and found is la.calibration
        True
    """

    temperature: float
    scale: float
    temperature_error: float
    num_points: int
    nll: float
    frontier: tuple[tuple[float, float], ...]

    def outputs(self, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """Calibrate the moments of outputs.

        Args:
            mean: Means of any shape.
            covariance: Variances or covariances of any shape.

        Returns:
            The calibrated moments, of the same shapes.
        """
        scale = self.scale / self.temperature**2
        return mean / self.temperature, scale * covariance

    def with_whole_posterior(self) -> Calibration:
        """Return a calibration of the same temperature, which keeps all variance."""
        return replace(self, scale=1.0)

    def __str__(self) -> str:
        """Say in a line what was chosen."""
        source = (
            "probabilities are those of the trained network alone: the posterior's "
            "variance did not help"
            if self.scale == 0
            else f"{100 * self.scale:.3g} % of the posterior's covariance enters the "
            "probabilities"
        )
        return (
            f"Outputs are divided by {self.temperature:.3g} (standard error of its "
            f"logarithm {self.temperature_error:.2g}), and {source}. Validation NLL "
            f"{self.nll:.4f} on {self.num_points} points."
        )


def calibration_of(
    mean: Tensor,
    variance: Tensor,
    y: Tensor,
    tolerance: float = TOLERANCE,
    link: Link = SOFTMAX,
) -> Calibration:
    """Choose temperature and scale by validation data.

    Each scale has its best temperature. Scales whose mean negative log likelihood is,
    with its standard error, above that of temperature scaling by more than the
    tolerance are left out. Of the others, the largest is taken that is as good as the
    best but for the tolerance. The likelihood has a prior that keeps few points from
    doing harm, see the module.

    Args:
        mean: Means of the outputs ``[points, outputs]``.
        variance: Their variances, of the same shape.
        y: Classes ``[points]``, or labels ``[points, labels]``.
        tolerance: Negative log likelihood in nats that may be given up, of a point and
            all its labels.
        link: How probabilities are made of outputs.

    Returns:
        The calibration.

    Raises:
        ValueError: If there are no points, or the tolerance is negative.
    """
    if len(y) == 0:
        raise ValueError("There are no validation points to calibrate with.")
    if not tolerance >= 0:
        raise ValueError(f"`tolerance` must be at least zero, got {tolerance}.")
    # with the points last, softmax is several times as fast
    mean, variance, labels = (
        own.double().cpu().T.contiguous()
        for own in (mean, variance, link.indicators(y, mean.shape[1]))
    )
    share = _PRIOR_POINTS / (len(y) + _PRIOR_POINTS)
    mixed = (1 - share) * labels + share * link.probabilities(mean, 0)
    candidates = [_Outputs(mean, pi / 8 * s * variance, link) for s in SCALES]
    slope = 1 / (_PRIOR_SPREAD * (len(y) + _PRIOR_POINTS))
    logs = [_best_log_temperature(own, mixed, slope) for own in candidates]
    found = [c.logits(x) for c, x in zip(candidates, logs, strict=True)]
    losses = [link.losses(own, mixed, 0) for own in found]
    nlls = [link.losses(own, labels, 0).mean().item() for own in found]
    chosen = _largest_scale(losses, tolerance)
    return Calibration(
        exp(logs[chosen]),
        SCALES[chosen],
        _temperature_error(candidates[chosen], logs[chosen], labels),
        len(y),
        nlls[chosen],
        tuple(zip(SCALES, nlls, strict=True)),
    )


@dataclass(frozen=True)
class _Outputs:
    """Gaussian outputs, as a function of the logarithm x of their temperature.

    Args:
        mean: Means of the outputs ``[outputs, points]``.
        spread: Their variances times pi / 8, of the same shape: logits are those of
            :func:`~laplace_debiased.predictive.links.probit_logits`.
        link: How probabilities are made of them.
    """

    mean: Tensor
    spread: Tensor
    link: Link

    def logits(self, x: float) -> Tensor:
        """Compute the logits ``[outputs, points]``."""
        return self.mean * (exp(2 * x) + self.spread).rsqrt()

    def slope(self, x: float, labels: Tensor) -> float:
        """Compute the derivative of the labels' mean cross entropy."""
        total = exp(2 * x) + self.spread
        logits = self.mean * total.rsqrt()
        errors = (labels - self.link.probabilities(logits, 0)).mul_(logits).div_(total)
        return exp(2 * x) * errors.sum().item() / labels.shape[1]


def _best_log_temperature(outputs: _Outputs, labels: Tensor, prior: float) -> float:
    """Minimize the loss plus the prior's slope times the absolute logarithm."""
    at_one = outputs.slope(0.0, labels)
    if abs(at_one) <= prior:
        return 0.0
    bound, own = (_BOUND, prior) if at_one < 0 else (-_BOUND, -prior)

    def slope(x: float) -> float:
        return outputs.slope(x, labels) + own

    if slope(bound) * bound <= 0:
        return bound
    return float(brentq(slope, 0.0, bound, xtol=_ACCURACY))


def _largest_scale(losses: list[Tensor], tolerance: float) -> int:
    """Return which scale is the largest that costs next to nothing."""
    means = [own.mean().item() for own in losses]
    extra = [own - losses[0] for own in losses]
    limits = [own.mean() + _standard_error(own) for own in extra]
    allowed = [k for k, own in enumerate(limits) if k == 0 or own <= tolerance]
    best = min(means[k] for k in allowed)
    return max(k for k in allowed if means[k] <= best + tolerance)


def _standard_error(values: Tensor) -> float:
    """Standard error of a mean; infinite of a single value."""
    return values.std().item() / len(values) ** 0.5 if len(values) > 1 else inf


def _temperature_error(outputs: _Outputs, x: float, labels: Tensor) -> float:
    """Standard error of the temperature's logarithm, by the curvature there."""
    step = 0.05
    low, high = (outputs.slope(x + own, labels) for own in (-step, step))
    curvature = labels.shape[1] * (high - low) / (2 * step)
    return curvature**-0.5 if curvature > 0 else inf
