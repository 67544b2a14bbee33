r"""Leading eigenpairs of a large covariance; the rest as one eigenspace.

The eigenvalues of covariances of thousands of features fall fast: few directions have
nearly all of their squares. The matrix C is replaced by

.. math:: \hat C = V \Theta V^\top + a (I - V V^\top),

with the leading Ritz pairs :math:`V, \Theta` of a block Krylov space and the mean a of
the other eigenvalues, so that both have the same trace. :math:`\hat C` is a projection
of C, which gives the error exactly, :math:`\|C - \hat C\|_F^2 = \|C\|_F^2 -
\|\hat C\|_F^2`: the space grows until the error is small enough.

Sources: Golub and Underwood, 1977 (block Lanczos); Halko, Martinsson and Tropp, 2011
(random start, arXiv 0909.4061).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from laplace_debiased.curvature.full_eigh import full_eigh

# smaller matrices are decomposed within a second
MIN_ROWS = 2048
_BLOCK = 64
# a larger share of the directions costs as much as all of them
_MAX_SHARE = 0.4
# how far a space grows from one look at its eigenvalues to the next
_GROWTH = 1.2
_ROWS = 1024


def leading_eigh(matrix: Tensor, tolerance: float) -> tuple[Tensor, Tensor] | None:
    r"""Decompose a covariance up to an isotropic rest.

    The start is random, with the same seed each time.

    Args:
        matrix: Positive semi-definite matrix C ``[d, d]``, in at least single
            precision.
        tolerance: Largest error :math:`\|C - \hat C\|_F` as a share of
            :math:`\|C\|_F`.

    Returns:
        Eigenvalues ``[d]`` of :math:`\hat C` in ascending order, the equal ones of the
        rest first, and orthonormal eigenvectors ``[d, d]`` as columns; None where the
        leading directions would be too many.
    """
    size, squared_norm = len(matrix), _squared_norm(matrix)
    largest = tolerance**2 * squared_norm
    rounding = 32 * torch.finfo(matrix.dtype).eps * squared_norm
    trace = matrix.diagonal().sum(dtype=torch.float64)
    space = _KrylovSpace(matrix, int(_MAX_SHARE * size))
    next_look = 0.0
    while space.grow():
        if space.size < next_look:
            continue
        next_look = _GROWTH * space.size
        values, vectors = full_eigh(space.projection())
        count, rest = _split(values.double(), trace, size)
        values, vectors = values[-count:], vectors[:, -count:]
        of_rest = (size - count) * rest**2
        # the error as it follows from norms costs nothing, but is rounded
        by_norms = squared_norm - values.double().square().sum() - of_rest
        if by_norms > largest + rounding:
            continue
        basis = space.basis() @ vectors
        if _squared_residual(matrix, values, basis) - of_rest <= largest:
            rests = rest.to(values.dtype).expand(size - count)
            return torch.cat([rests, values]), completed(basis)
    return None


def _split(values: Tensor, trace: Tensor, size: int) -> tuple[int, Tensor]:
    """Keep the Ritz values above the mean of all other eigenvalues.

    Args:
        values: Ritz values in ascending order.
        trace: The matrix's trace.
        size: Number of its rows.

    Returns:
        The number of those to keep, and the mean of the others.
    """
    mean = (trace - values.sum()) / (size - len(values))
    count = max(1, int((values > mean).sum()))
    return count, (trace - values[-count:].sum()).clamp(min=0) / (size - count)


def _squared_norm(matrix: Tensor) -> Tensor:
    return torch.linalg.vector_norm(matrix, dtype=torch.float64).square()


def _squared_residual(matrix: Tensor, values: Tensor, basis: Tensor) -> Tensor:
    """Compute what eigenpairs leave of a matrix, without all of it at once."""
    parts = zip(matrix.split(_ROWS), basis.split(_ROWS), strict=True)
    return sum(
        (_squared_norm(rows - (own * values) @ basis.T) for rows, own in parts),
        values.new_zeros((), dtype=torch.float64),
    )


def completed(basis: Tensor) -> Tensor:
    """Complete orthonormal columns to an orthonormal basis.

    Args:
        basis: The columns ``[d, k]``.

    Returns:
        A square matrix ``[d, d]``, the last k columns of which are the given ones.
    """
    size, count = basis.shape
    reflectors, scales = torch.geqrf(basis)
    padded = F.pad(reflectors, (0, size - count))
    others = torch.linalg.householder_product(padded, scales)[:, count:]
    return torch.cat([others, basis], 1)


class _KrylovSpace:
    """An orthonormal basis of what a matrix makes of random vectors, block by block.

    Args:
        matrix: The symmetric matrix ``[d, d]``.
        max_size: Largest number of basis vectors.
    """

    def __init__(self, matrix: Tensor, max_size: int):
        self._matrix = matrix
        self.size, self._max_size = 0, max_size
        # a basis vector is a row, so that blocks of them are contiguous
        self._rows = matrix.new_empty(max_size, len(matrix))
        self._products = matrix.new_zeros(max_size, max_size)
        generator = torch.Generator(matrix.device).manual_seed(0)
        start = torch.randn(
            len(matrix),
            _BLOCK,
            generator=generator,
            dtype=matrix.dtype,
            device=matrix.device,
        )
        self._next = matrix @ start  # without what the matrix maps to zero

    def grow(self) -> bool:
        """Add a block to the basis; tell whether there was room for it."""
        old, new = self.size, self.size + _BLOCK
        if new > self._max_size:
            return False
        # what is left of a block without anything new is rounding: it is taken out of
        # the earlier vectors again, once it has their scale
        block = torch.linalg.qr(self._without_earlier(self._next))[0]
        block = torch.linalg.qr(self._without_earlier(block))[0]
        self._rows[old:new] = block.T
        self.size = new
        image = self._matrix @ block
        products = self._rows[:new] @ image
        self._products[:new, old:new] = products
        self._products[old:new, :new] = products.T
        self._next = image - self._rows[:new].T @ products
        return True

    def _without_earlier(self, block: Tensor) -> Tensor:
        earlier = self._rows[: self.size]
        return block - earlier.T @ (earlier @ block)

    def basis(self) -> Tensor:
        """Return the basis ``[d, size]``."""
        return self._rows[: self.size].T

    def projection(self) -> Tensor:
        """Return the matrix in this basis ``[size, size]``."""
        return self._products[: self.size, : self.size]
