r"""Share of directions of equal precision, without rotating into them.

A large layer has few leading directions of gradients; to those of the rest, the columns
of V, belongs one precision :math:`\lambda_j` for each direction of the inputs
(:mod:`~laplace_debiased.curvature.leading`). With the residuals
:math:`r_{cs} = V V^\top g_{cs}` of an example's gradient rows, their share in the
covariance of its outputs is

.. math::
    \sum_{ij} \frac{1}{\lambda_j} \sum_{st} (v_i^\top g_{cs}) (v_i^\top g_{dt})
    \tilde x_{sj} \tilde x_{tj} = \sum_{st} K_{st} \, r_{cs}^\top r_{dt},
    \qquad K_{st} = \sum_j \tilde x_{sj} \tilde x_{tj} / \lambda_j ,

with one K for all outputs. This takes :math:`S^2 d_1` operations for an output and S
positions, instead of :math:`S d_1 (d_1 + d_2)`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from laplace_debiased.rows.products import rows_times

# to look for equal rows pays in large matrices alone
_MIN_ROWS = 256


def num_equal(precisions: Tensor) -> int:
    """Count the first rows of a matrix that are equal.

    Args:
        precisions: Precisions ``[d_out, d_in]``, those of equal directions first.

    Returns:
        The number of rows, at least two; 0 if there are none, or the matrix is small.
    """
    if precisions.ndim < 2 or len(precisions) < _MIN_ROWS:
        return 0
    differ = (precisions != precisions[0]).any(1)
    count = int(differ.int().argmax())  # of the first one that differs
    return count if count > 1 else 0


def pays(gradients: Tensor, inputs: Tensor, count: int) -> bool:
    """Tell whether it takes less time to leave out equal directions.

    Args:
        gradients: Gradient rows ``[batch, C, S, groups, d_out / groups]``.
        inputs: Rotated input rows ``[batch, S, groups, d_in]``.
        count: Number of equal directions.

    Returns:
        Whether it is clearly less.
    """
    _, positions, groups, d_in = inputs.shape
    if count == 0 or groups > 1 or positions > d_in:
        return False
    d_out = gradients.shape[4]
    leading = d_out - count
    ours = leading * (2 * d_out + d_in) + positions * (d_out + d_in)
    return 4 * ours < 3 * d_out * (d_out + d_in)


def residuals(gradients: Tensor, leading: Tensor) -> Tensor:
    """Project gradient rows onto what is orthogonal to leading directions.

    Args:
        gradients: Gradient rows ``[batch, C, S, 1, d_out]``.
        leading: Leading directions ``[d_out, k]``, orthonormal columns.

    Returns:
        Residuals ``[batch, C, S, d_out]``.
    """
    rows = gradients.squeeze(3)
    return rows - rows_times(rows_times(rows, leading), leading.T)


def shares(
    residual: Tensor, inputs: Tensor, weights: Tensor, full: bool = False
) -> Tensor:
    """Compute the share of equal directions in the covariance of the outputs.

    Args:
        residual: Residuals of gradient rows ``[batch, C, S, d_out]``.
        inputs: Rotated input rows ``[batch, S, 1, d_in]``.
        weights: The inverse of their precisions ``[d_in]``.
        full: Whether all covariances are wanted, or variances alone.

    Returns:
        ``[batch, C, C]``, or ``[batch, C]``.
    """
    x = inputs.squeeze(2)
    kernel = (x * weights) @ x.mT  # [batch, S, S]
    mixed = kernel[:, None] @ residual  # [batch, C, S, d_out]
    if full:
        return mixed.flatten(2) @ residual.flatten(2).mT
    return torch.linalg.vecdot(mixed.flatten(2), residual.flatten(2))
