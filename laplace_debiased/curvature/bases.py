"""Orthonormal bases: a matrix of columns, or a vector of ones for the unit vectors.

Factors of one-hot inputs, and of parameters that only their diagonal is kept of, are
diagonal, and far too large to be matrices: they are vectors, as are their eigenvectors,
the unit vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from laplace_debiased.rows.products import rows_times


def rotated(rows: Tensor, basis: Tensor) -> Tensor:
    """Compute coordinates in a basis.

    Args:
        rows: Vectors ``[..., d]``.
        basis: A basis ``[d, d]``, or ``[d]`` for the unit vectors.

    Returns:
        Their coordinates ``[..., d]``.
    """
    return rows if basis.ndim == 1 else rows_times(rows, basis)


def columns_rotated(matrices: Tensor, basis: Tensor) -> Tensor:
    """Compute coordinates of columns in a basis.

    Args:
        matrices: Columns ``[..., d, k]``.
        basis: As in :func:`rotated`.

    Returns:
        Their coordinates ``[..., d, k]``.
    """
    return matrices if basis.ndim == 1 else basis.T @ matrices


def inverse(basis: Tensor) -> Tensor:
    """Return the basis of the inverse rotation."""
    return basis if basis.ndim == 1 else basis.T


def composed(eigenvalues: Tensor, basis: Tensor) -> Tensor:
    r"""Compute :math:`U \mathrm{diag}(\lambda) U^\top`, a vector if it is diagonal."""
    return eigenvalues if basis.ndim == 1 else (basis * eigenvalues) @ basis.T


def squared_overlaps(first: Tensor, second: Tensor) -> Tensor:
    """Compute the squared scalar products of two bases' vectors, of the same kind."""
    return first if first.ndim == 1 else (first.T @ second) ** 2


def as_matrix(basis: Tensor) -> Tensor:
    """Return a basis as a matrix ``[d, d]``."""
    return torch.diag(basis) if basis.ndim == 1 else basis
