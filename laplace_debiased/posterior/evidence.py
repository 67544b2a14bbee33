r"""The prior precision with the highest marginal likelihood, by Newton's method.

In the prior precision :math:`\delta = e^u` of some parameters, the log marginal
likelihood is, but for a constant,

.. math::
    -\tfrac12 \Big(\sum_i \log(\lambda_i + e^u) - P u + e^u \|\mu - \mu_0\|^2\Big),

with the eigenvalues :math:`\lambda_i` of the curvature. It is concave in u, with the
slope :math:`(\gamma - \delta \|\mu - \mu_0\|^2) / 2`, where :math:`\gamma = \sum_i
\lambda_i / (\lambda_i + \delta)` is the effective number of parameters (MacKay, 1992).
At the maximum, :math:`g(u) = \log \gamma - u - \log \|\mu - \mu_0\|^2` is zero. The
slope of g lies between -2 and -1, whatever the eigenvalues, so that few of Newton's
steps are enough from anywhere; gradient ascent takes a hundred.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, inf, log

import torch
from torch import Tensor

from laplace_debiased.curvature.eigenbasis import EigenbasisMatrix, spectrum
from laplace_debiased.rows.chunks import at_once

_TOLERANCE = 1e-6
# what fits in a processor's cache, and is few enough to sum in single precision
_CHUNK_ENTRIES = 2**18


def log_det_ratio(precision: EigenbasisMatrix) -> Tensor:
    """Compute the log determinant of a posterior precision over its prior's.

    In single precision, both are as large as there are parameters, and their difference
    would be lost in their rounding.

    Args:
        precision: The posterior precision, without damping.

    Returns:
        A scalar, summed in double precision.
    """
    parts = [
        (spectrum([own.double() for own in values]) / delta.double()).log1p().sum()
        for values, delta in zip(precision.eigenvalues, precision.deltas, strict=True)
    ]
    return sum(parts[1:], parts[0]).to(precision.deltas)


def best_prior_precision(
    blocks: Sequence[Sequence[Tensor]],
    squared_norm: float,
    start: float,
    max_steps: int = 100,
) -> float:
    """Find the prior precision of some blocks with the highest marginal likelihood.

    Args:
        blocks: Eigenvalues of each block's curvature, as
            :class:`~laplace_debiased.curvature.eigenbasis.EigenbasisMatrix` has them.
        squared_norm: Squared distance of the parameters from the prior's mean.
        start: Where to start.
        max_steps: Largest number of steps.

    Returns:
        The prior precision; zero or infinity if the marginal likelihood has no maximum
        in between.
    """
    if squared_norm == 0:
        return inf
    u = log(start)
    for _ in range(max_steps):
        gamma, decrease = _effective_number(blocks, exp(u))
        if gamma == 0:
            return 0.0
        step = (log(gamma) - u - log(squared_norm)) / (1 + decrease / gamma)
        u += step
        if abs(step) < _TOLERANCE:
            break
    return exp(u)


def _effective_number(
    blocks: Sequence[Sequence[Tensor]], delta: float
) -> tuple[float, float]:
    """Compute the effective number of parameters, and how it falls with log delta.

    Returns:
        The sums of t and of t (1 - t) for the share t of an eigenvalue in its sum with
        delta.
    """
    sums = []
    for own in blocks:
        outer = own[0].reshape(len(own[0]), -1)
        inner = own[1] if len(own) == 2 else outer.new_ones(outer.shape[1])
        size = at_once(_CHUNK_ENTRIES, outer.device) // len(inner)
        for rows in outer.split(max(1, size)):
            values = (rows * inner).flatten()  # [rows * d_in]
            shares = values.div_(values + delta)
            sums.append(torch.stack([shares.sum(), shares.dot(shares)]).double())
    gamma, squares = sum(sums, torch.zeros(2).to(sums[0])).tolist() if sums else (0, 0)
    return gamma, gamma - squares
