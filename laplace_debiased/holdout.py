r"""Which share of the points should give directions.

With n points of a d-dimensional covariance, few directions are known badly and few
magnitudes are noisy. For a white inverse Wishart population (mean one, variance p of
its eigenvalues), the expected squared error per eigenvalue with m points for
directions is approximately

.. math::
    \frac{p q}{p + q} + \frac{2}{n - m} \left(1 + \frac{p^2}{p + q}\right),
    \quad q = d / m:

the error of the best eigenvalues in the sample's eigenbasis, and the variance of
Gaussian magnitudes measured on the other points. The best ratio of the shares grows
with the root of the dimension (Lamrani, Bongiorno and Potters, 2025, arXiv 2503.15186;
best eigenvalues: Bun, Bouchaud and Potters, 2017, arXiv 1610.08104).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def holdout_error(
    shares: Tensor, num_points: int, dimension: int, variance: float = 1.0
) -> Tensor:
    """Compute the expected squared error per eigenvalue.

    Args:
        shares: Shares of the points that give directions, in (0, 1).
        num_points: Number of points, n.
        dimension: Dimension of the covariance, d.
        variance: Variance of the population's eigenvalues, p, in units of their squared
            mean.

    Returns:
        Errors of the shares' shape, in units of the squared mean eigenvalue.
    """
    p, q = variance, dimension / (num_points * shares)
    noise = 2 / (num_points * (1 - shares))
    return p * q / (p + q) + noise * (1 + p**2 / (p + q))


def best_share(num_points: int, dimensions: Iterable[int]) -> float:
    """Find the share that is best for several covariances together.

    Args:
        num_points: Number of points.
        dimensions: Dimensions of the covariances.

    Returns:
        The share of the points that should give directions, in percent steps.
    """
    shares = torch.arange(1, 100, dtype=torch.float64) / 100
    errors = sum(holdout_error(shares, num_points, d) for d in dimensions)
    return shares[errors.argmin()].item()
