r"""Quadratics with known bias: a linear model whose inputs have spiked covariance.

With inputs :math:`x \sim N(0, \Sigma)` and squared loss, the curvature of m points is
their second moment. :math:`\Sigma` has a few *spikes* :math:`\ell > 1 + \sqrt\gamma`
among eigenvalues of one. For dimension d and m points with :math:`d / m \to \gamma`
(Baik and Silverstein, 2006; Paul, 2007):

- the top eigenvalue of the sample is :math:`\ell (1 + \gamma / (\ell - 1))`;
- its eigenvector has the squared overlap :math:`(1 - \gamma / (\ell - 1)^2) / (1 +
  \gamma / (\ell - 1))` with the spike's, so that the curvature of other points along it
  is one plus the overlap times :math:`\ell - 1`.

A gradient :math:`g_B = \mu + \varepsilon / \sqrt m` with Gaussian noise is steepest
along itself: there the slope is :math:`\|g_B\|`, but on other points
:math:`\mu^\top g_B / \|g_B\|` (regression to the mean).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


def top_eigenvalue(spike: float, gamma: float) -> float:
    """Predict the curvature along a sample's top eigenvector on the same sample.

    Args:
        spike: Eigenvalue of the population, above one plus the root of gamma.
        gamma: Dimension over number of points.

    Returns:
        The curvature.
    """
    _check_spike(spike, gamma)
    return spike * (1 + gamma / (spike - 1))


def squared_overlap(spike: float, gamma: float) -> float:
    """Predict the squared overlap of a sample's top eigenvector with the population's.

    Args:
        spike: Eigenvalue of the population, above one plus the root of gamma.
        gamma: Dimension over number of points.

    Returns:
        The squared overlap.
    """
    _check_spike(spike, gamma)
    return (1 - gamma / (spike - 1) ** 2) / (1 + gamma / (spike - 1))


def held_out_curvature(spike: float, gamma: float) -> float:
    """Predict the curvature along a sample's top eigenvector on other points.

    Args:
        spike: Eigenvalue of the population, above one plus the root of gamma.
        gamma: Dimension over number of points.

    Returns:
        The curvature.
    """
    return 1 + (spike - 1) * squared_overlap(spike, gamma)


def _check_spike(spike: float, gamma: float) -> None:
    if spike <= 1 + gamma**0.5:
        raise ValueError(
            f"`spike` must be above 1 + sqrt(gamma) = {1 + gamma**0.5:.3g}: below, the "
            f"sample does not tell it from noise; got {spike}."
        )


@dataclass(frozen=True)
class SpikedQuadratic:
    """A population of quadratics, one for each set of points.

    Args:
        dimension: Number of parameters, d.
        spikes: Eigenvalues of the population above one.
        gradient: Gradient of the population ``[d]``; None for zero.
        noise: Standard deviation of each entry of a point's gradient.
    """

    dimension: int
    spikes: tuple[float, ...] = ()
    gradient: Tensor | None = field(default=None, repr=False)
    noise: float = 1.0

    @property
    def spectrum(self) -> Tensor:
        """Eigenvalues ``[d]`` of the population, along the unit vectors."""
        spectrum = torch.ones(self.dimension, dtype=torch.float64)
        spectrum[: len(self.spikes)] = torch.tensor(self.spikes, dtype=torch.float64)
        return spectrum

    def sample(
        self, num_points: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Draw the quadratic of some points.

        Args:
            num_points: Number of points, m.
            generator: Random numbers.

        Returns:
            Curvature ``[d, d]`` and gradient ``[d]``.
        """

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        X = normal(num_points, self.dimension) * self.spectrum.sqrt()
        gradient = self.noise * normal(self.dimension) / num_points**0.5
        if self.gradient is not None:
            gradient = self.gradient.double() + gradient
        return X.T @ X / num_points, gradient
