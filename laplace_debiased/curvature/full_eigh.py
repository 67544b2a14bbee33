"""All eigenpairs of a dense symmetric matrix, in double precision where it needs it."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor

from laplace_debiased.rows.inputs import all_finite

# in single precision, a GPU decomposes smaller matrices by Jacobi rotations: of 512
# rows, in four times the time of double precision, with 300 times the usual error
_JACOBI_ROWS = 512


def full_eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Decompose a symmetric matrix, in its own precision where that is enough.

    Args:
        matrix: Symmetric matrix ``[d, d]``.

    Returns:
        Eigenvalues ``[d]`` in ascending order, and eigenvectors ``[d, d]`` as columns,
        in the matrix's dtype.
    """
    if matrix.dtype.itemsize >= 4 and not _is_left_to_jacobi(matrix):
        # in single precision it need not converge: some versions raise, others return
        # NaN
        with suppress(torch.linalg.LinAlgError):
            values, vectors = torch.linalg.eigh(matrix)
            if all_finite(values) and all_finite(vectors):
                return values, vectors
    values, vectors = torch.linalg.eigh(matrix.double())
    return values.to(matrix.dtype), vectors.to(matrix.dtype)


def _is_left_to_jacobi(matrix: Tensor) -> bool:
    return (
        matrix.is_cuda and matrix.dtype == torch.float32 and len(matrix) <= _JACOBI_ROWS
    )
