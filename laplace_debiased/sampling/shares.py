r"""Which share of the points should give directions.

With n points of a d-dimensional covariance, few directions are known badly and few
magnitudes are noisy. For a white inverse Wishart population (mean one, variance p of
its eigenvalues), the expected squared error per eigenvalue with m points for
directions is approximately

.. math::
    \frac{p q}{p + q} + \frac{2}{n - m} \left(1 + \frac{p^2}{p + q}\right),
    \quad q = d / m:

the error of the best eigenvalues in the sample's eigenbasis, and the variance of
Gaussian magnitudes measured on the other points (Lamrani, Bongiorno and Potters, 2025,
arXiv 2503.15186; best eigenvalues: Bun, Bouchaud and Potters, 2017, arXiv 1610.08104).
The variance follows from the effective rank :math:`r = (\mathrm{tr}\, C)^2 /
\mathrm{tr}\, C^2`: it is :math:`p = d / r - 1`. For p far above q, the best ratio of
the shares is :math:`\sqrt{r / 2}`, whatever the dimension.

A layer's gradient covariance is :math:`\sum_n J_n^\top \Lambda_n J_n` for the Jacobian
of the network's output in the layer's. That of the last layer is the sum of the output
curvatures :math:`\Lambda_n`, which forward passes give. Its effective rank stands for
that of all layers.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def holdout_error(
    shares: Tensor, num_points: int, dimension: int, variance: float
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


def effective_rank(covariance: Tensor) -> float:
    """Compute by how many equal eigenvalues a covariance could be replaced.

    Args:
        covariance: The covariance ``[d, d]``.

    Returns:
        Its squared trace over the trace of its square, in 1..d; one for zeros.
    """
    trace, square = covariance.trace(), covariance.square().sum()
    return (trace**2 / square).item() if trace > 0 else 1.0


def best_share(
    num_points: int, dimensions: Iterable[int], effective_rank: float
) -> float:
    """Find the share that is best for several covariances together.

    Args:
        num_points: Number of points.
        dimensions: Dimensions of the covariances.
        effective_rank: Effective rank of each.

    Returns:
        The share of the points that should give directions, in percent steps; a half if
        all eigenvalues are equal, so that no direction is better than another.
    """
    shares = torch.arange(1, 100, dtype=torch.float64) / 100
    variances = [(d, d / effective_rank - 1) for d in dimensions]
    errors = [holdout_error(shares, num_points, d, p) for d, p in variances if p > 1e-6]
    if not errors:
        return 0.5
    return shares[sum(errors[1:], errors[0]).argmin()].item()
