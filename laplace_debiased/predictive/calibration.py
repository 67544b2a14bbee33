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
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import exp, inf, isfinite, log

import numpy as np
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn.functional import cross_entropy

from laplace_debiased.predictive.links import probit_logits

TOLERANCE = 1e-3
SCALES = (0.0, *np.logspace(-3, 0, 19).tolist())
# standard deviation of the temperature's logarithm, before any data were seen: without
# it, a handful of validation points that are all right would have one of zero
_PRIOR_SPREAD = 0.25
_BOUNDS = (-2.5, 2.5)
_ACCURACY = 1e-3


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
        nll: Their mean negative log likelihood, with this temperature and scale.
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
            "the trained network alone: the posterior's variance did not help"
            if self.scale == 0
            else f"{self.scale:.3g} of the posterior's covariance"
        )
        return (
            f"Outputs are divided by {self.temperature:.3g} (standard error of its "
            f"logarithm {self.temperature_error:.2g}), and probabilities are those of "
            f"{source}. Validation NLL {self.nll:.4f} on {self.num_points} points."
        )


def calibration_of(
    mean: Tensor, variance: Tensor, y: Tensor, tolerance: float = TOLERANCE
) -> Calibration:
    """Choose temperature and scale by validation data.

    Each scale has its best temperature, with a prior of the spread ``0.25`` of its
    logarithm around zero. Of the scales, the largest is taken whose mean negative log
    likelihood is that of the best but for the tolerance.

    Args:
        mean: Means of the outputs ``[points, classes]``.
        variance: Their variances, of the same shape.
        y: Classes ``[points]``.
        tolerance: Negative log likelihood in nats that may be given up.

    Returns:
        The calibration.

    Raises:
        ValueError: If there are no points, or the tolerance is negative.
    """
    if len(y) == 0:
        raise ValueError("There are no validation points to calibrate with.")
    if not tolerance >= 0:
        raise ValueError(f"`tolerance` must be at least zero, got {tolerance}.")
    mean, variance = mean.double().cpu(), variance.double().cpu()
    y = y.cpu()
    temperatures = [_best_temperature(mean, s * variance, y) for s in SCALES]
    losses = [
        _loss(mean, s * variance, y, t)
        for s, t in zip(SCALES, temperatures, strict=True)
    ]
    chosen = max(k for k, own in enumerate(losses) if own <= min(losses) + tolerance)
    scale, temperature = SCALES[chosen], temperatures[chosen]
    return Calibration(
        temperature,
        scale,
        _temperature_error(mean, scale * variance, y, temperature),
        len(y),
        losses[chosen],
        tuple(zip(SCALES, losses, strict=True)),
    )


def _loss(mean: Tensor, variance: Tensor, y: Tensor, temperature: float) -> float:
    """Mean negative log likelihood of the points."""
    logits = probit_logits(mean / temperature, variance / temperature**2)
    return cross_entropy(logits, y).item()


def _penalized(
    log_temperature: float, mean: Tensor, variance: Tensor, y: Tensor
) -> float:
    """Negative log posterior of the temperature's logarithm, over the points."""
    loss = _loss(mean, variance, y, exp(log_temperature))
    return loss + (log_temperature / _PRIOR_SPREAD) ** 2 / (2 * len(y))


def _best_temperature(mean: Tensor, variance: Tensor, y: Tensor) -> float:
    found = minimize_scalar(
        _penalized,
        bounds=_BOUNDS,
        args=(mean, variance, y),
        method="bounded",
        options={"xatol": _ACCURACY},
    )
    return exp(found.x)


def _temperature_error(
    mean: Tensor, variance: Tensor, y: Tensor, temperature: float
) -> float:
    """Standard error of the temperature's logarithm, by the curvature there."""
    center, step = log(temperature), 0.05
    low, middle, high = (
        _penalized(center + k * step, mean, variance, y) for k in (-1, 0, 1)
    )
    curvature = len(y) * (low - 2 * middle + high) / step**2
    return curvature**-0.5 if curvature > 0 and isfinite(curvature) else inf
