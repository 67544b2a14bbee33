"""Eigendecompositions of symmetric matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from laplace_debiased.curvature.full_eigh import full_eigh
from laplace_debiased.curvature.kronecker import Kronecker
from laplace_debiased.curvature.leading import MIN_ROWS, leading_eigh
from laplace_debiased.rows.inputs import all_finite

# computes eigenvectors and eigenvalues of factors, wherever that is done
Decompose = Callable[[Sequence[Kronecker]], tuple[list[Kronecker], list[Kronecker]]]


def symmetric_eigh(matrix: Tensor, tolerance: float = 0.0) -> tuple[Tensor, Tensor]:
    """Decompose a symmetric matrix, in its own precision where that is enough.

    Rows of zeros, such as those of units that no example activates, are taken out
    before: a unit vector is the eigenvector of each.

    Args:
        matrix: Symmetric matrix ``[d, d]``, or the diagonal ``[d]`` of one.
        tolerance: How far, as a share of its norm, a large one may be from what is
            decomposed, which is then isotropic but for its leading directions
            (:mod:`~laplace_debiased.curvature.leading`). The matrix must not have
            negative eigenvalues, then.

    Returns:
        Eigenvalues ``[d]`` in ascending order, and eigenvectors ``[d, d]`` as columns,
        in the matrix's dtype; of a diagonal, its entries in their own order, and a
        basis ``[d]`` (:mod:`~laplace_debiased.curvature.bases`).
    """
    if matrix.ndim == 1:
        return matrix, torch.ones_like(matrix)
    used = matrix.any(0)
    if used.all():
        return _eigh(matrix, tolerance)
    some, none = used.nonzero().squeeze(1), used.logical_not().nonzero().squeeze(1)
    own_values, own_vectors = _eigh(matrix[used][:, used], tolerance)
    values, vectors = matrix.new_zeros(len(matrix)), torch.zeros_like(matrix)
    # before they are sorted, each eigenvector has the place of one of its rows
    values[some] = own_values
    vectors[some[:, None], some] = own_vectors
    vectors[none, none] = 1
    order = values.argsort(stable=True)
    return values[order], vectors[:, order]


def _eigh(matrix: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Decompose a matrix, a large one up to the tolerance if that is less work."""
    if tolerance and len(matrix) >= MIN_ROWS and matrix.dtype.itemsize >= 4:
        with suppress(torch.linalg.LinAlgError):
            leading = leading_eigh(matrix, tolerance)
            if leading and all(map(all_finite, leading)):
                return leading
    return full_eigh(matrix)


def symmetric_eighs(
    matrices: Iterable[Tensor], tolerance: float = 0.0
) -> list[tuple[Tensor, Tensor]]:
    """Decompose symmetric matrices one by one, as :func:`symmetric_eigh` does."""
    return [symmetric_eigh(matrix, tolerance) for matrix in matrices]


def decompose(
    factors: Sequence[Kronecker],
    tolerance: float = 0.0,
    eighs: Callable[..., list[tuple[Tensor, Tensor]]] = symmetric_eighs,
) -> tuple[list[Kronecker], list[Kronecker]]:
    """Compute eigenvectors and eigenvalues of Kronecker factors.

    The factors' own precision is enough to measure magnitudes along the eigenvectors:
    there their errors enter squared.

    Args:
        factors: Factors of each layer.
        tolerance: See :func:`symmetric_eigh`.
        eighs: Decomposes matrices, given them and the tolerance.

    Returns:
        Eigenvectors, and eigenvalues, of each layer.
    """
    matrices = [matrix for own in factors for matrix in own.tensors()]
    decompositions = eighs(matrices, tolerance)
    eigenvalues, eigenvectors = (
        _like(factors, [pair[index] for pair in decompositions]) for index in (0, 1)
    )
    return eigenvectors, eigenvalues


def _like(factors: Sequence[Kronecker], tensors: Sequence[Tensor]) -> list[Kronecker]:
    """Give each layer the tensors that go with its factors."""
    remaining = iter(tensors)
    return [own.map(lambda _: next(remaining)) for own in factors]


def eigenvectors(factors: Sequence[Kronecker]) -> list[Kronecker]:
    """Compute the eigenvectors alone, as :func:`decompose` does.

    Args:
        factors: Factors of each layer.

    Returns:
        Eigenvectors of each layer.
    """
    return decompose(factors)[0]
