"""Analytical nonlinear shrinkage of the eigenvalues of sample covariances."""

from __future__ import annotations

from math import log, pi, sqrt

import torch
from torch import Tensor

# the bandwidth's kernel must not reach zero
FEWEST_ROWS = 12


def shrunken(eigenvalues: Tensor, num_rows: int) -> Tensor:
    r"""Estimate variances along the eigenvectors of a sample covariance.

    By the kernel estimate of the sample spectrum's density f and of its Hilbert
    transform Hf: with p eigenvalues, n rows and c = p / n, an eigenvalue becomes

    .. math:: \lambda / ((\pi c \lambda f)^2 + (1 - c - \pi c \lambda Hf)^2).

    Source: Ledoit and Wolf, 2020 (Annals of Statistics 48(5), Section 4). Rows are not
    centred, so that n is their number.

    Args:
        eigenvalues: Those of the sample covariance ``[p]``, ascending. Where rows are
            as many, eigenvalues of zero are taken for the population's, and stay.
        num_rows: Number of independent rows, n. Of the eigenvalues, only the n largest
            count; the others share one variance.

    Returns:
        The variances ``[p]``, in double precision.

    Raises:
        ValueError: If the rows are fewer than twelve, and than the eigenvalues.
    """
    values = eigenvalues.double().clamp(min=0)
    negligible = len(values) * torch.finfo(eigenvalues.dtype).eps * values.max()
    rank = int((values > negligible).sum())
    if len(values) <= num_rows:
        zeros = torch.zeros_like(values[: len(values) - rank])
        return torch.cat([zeros, _of_full_rank(values[len(zeros) :], num_rows)])
    num_rows = min(num_rows, rank)
    if num_rows < FEWEST_ROWS:
        raise ValueError(f"Shrinkage takes {FEWEST_ROWS} rows, got {num_rows}.")
    return _with_null_space(values[len(values) - num_rows :], len(values))


def _of_full_rank(values: Tensor, num_rows: int) -> Tensor:
    if len(values) == 0:
        return values
    ratio, (density, transform) = len(values) / num_rows, _density(values, num_rows)
    imaginary = pi * ratio * values * density
    real = 1 - ratio - pi * ratio * values * transform
    return values / (imaginary**2 + real**2)


def _with_null_space(values: Tensor, size: int) -> Tensor:
    """Shrink where there are fewer rows than eigenvalues, the others of which are zero.

    Args:
        values: The eigenvalues above zero, one for each row.
        size: Number of all.

    Returns:
        The variances ``[size]``.
    """
    num_rows = len(values)
    density, transform = _density(values, num_rows)
    h = num_rows ** (-1 / 3)
    edge = sqrt(5) * h
    at_zero = 3 / (10 * h**2)
    at_zero += 3 / (4 * edge) * (1 - 1 / edge**2) * log((1 + edge) / (1 - edge))
    at_zero = at_zero / pi * (1 / values).mean()
    null = 1 / (pi * (size - num_rows) / num_rows * at_zero)
    above = 1 / (pi**2 * values * (density**2 + transform**2))
    return torch.cat([null.expand(size - num_rows), above])


def _density(values: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Estimate the spectrum's density, and its Hilbert transform, at its eigenvalues.

    By Epanechnikov's kernel, whose bandwidth is proportional to the eigenvalue.
    """
    widths = num_rows ** (-1 / 3) * values
    x = (values[:, None] - values) / widths
    density = 3 / (4 * sqrt(5)) * (1 - x**2 / 5).clamp(min=0) / widths
    logs = ((sqrt(5) - x) / (sqrt(5) + x)).abs().log()
    product = ((1 - x**2 / 5) * logs).where(x.abs() != sqrt(5), 0.0)
    transform = (-3 / (10 * pi) * x + 3 / (4 * sqrt(5) * pi) * product) / widths
    return density.mean(1), transform.mean(1)
