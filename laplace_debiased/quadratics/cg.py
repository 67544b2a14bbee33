r"""Conjugate gradients, and how to debias them.

Conjugate gradients on a mini-batch quadratic :math:`\frac12 x^\top A x - b^\top x`
choose directions along which *this* batch is steep. On another batch the slope is less
extreme (regression to the mean), and the curvature differs, so that the steps are too
long. Debiased conjugate gradients take the directions :math:`d_k` from one batch and
measure slopes :math:`d_k^\top (\tilde A x - \tilde b)` at the start x, and curvatures
:math:`d_k^\top \tilde A d_k`, on another (Tatzel et al., 2024, arXiv 2410.14325,
Section 4.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

CONVERGED = "converged"
EXHAUSTED = "maximum number of iterations"
NON_POSITIVE = "non-positive curvature"


class Operator(Protocol):
    """A symmetric matrix, a curvlinops operator, or anything else that multiplies."""

    def __matmul__(self, X: Tensor) -> Tensor:
        """Multiply a vector ``[D]`` or the columns of a matrix ``[D, K]``."""


@dataclass(frozen=True)
class CGResult:
    """Iterates, and what led to them.

    Args:
        start: Where the iterates begin, ``[D]``.
        directions: Search directions as columns ``[D, K]``.
        coefficients: Coefficients of the directions in each iterate, ``[K, K]``: row k
            belongs to iterate k + 1.
        slopes: Slope along each direction ``[K]``, negative where it leads downhill. It
            is that at the start, which for conjugate directions is that at the iterate.
        curvatures: Curvature along each direction ``[K]``. A step along a direction is
            minus slope over curvature.
        termination: ``"converged"``, ``"maximum number of iterations"`` or
            ``"non-positive curvature"``.
    """

    start: Tensor
    directions: Tensor
    coefficients: Tensor
    slopes: Tensor
    curvatures: Tensor
    termination: str

    @property
    def num_iterations(self) -> int:
        """Number of directions, K."""
        return self.directions.shape[1]

    @property
    def iterates(self) -> Tensor:
        """All iterates as columns ``[D, K + 1]``, from the start on."""
        steps = self.directions @ self.coefficients.T
        return torch.cat([self.start[:, None], self.start[:, None] + steps], dim=1)

    @property
    def solution(self) -> Tensor:
        """The last iterate ``[D]``."""
        if self.num_iterations == 0:
            return self.start
        return self.start + self.directions @ self.coefficients[-1]


def cg(
    A: Operator,
    b: Tensor,
    x0: Tensor | None = None,
    *,
    rtol: float = 1e-5,
    atol: float = 0.0,
    max_iterations: int | None = None,
    preconditioner: Operator | None = None,
) -> CGResult:
    """Minimize a quadratic by conjugate gradients.

    Tolerances and iterates are those of ``scipy.sparse.linalg.cg``. But each direction
    is made conjugate to all before, since in single precision conjugacy to the last one
    alone is lost after some iterations, and with it the meaning of a direction's slope
    at the start; and a direction of non-positive curvature ends the iteration.

    Args:
        A: The quadratic's curvature, symmetric ``[D, D]``.
        b: Its negative gradient at the origin, ``[D]``.
        x0: Where to start ``[D]``; None for the origin.
        rtol: Tolerance for the norm of the residual, relative to that of ``b``.
        atol: Absolute tolerance for the norm of the residual.
        max_iterations: Largest number of iterations; None for ten times D.
        preconditioner: Approximates the inverse of ``A``; symmetric positive definite.

    Returns:
        All iterates.

    Raises:
        ValueError: If shapes do not match, an argument is negative or not finite, or
            the curvature along a direction is not finite.

    Example:
        >>> import torch
        >>> from laplace_debiased import cg
        >>> result = cg(torch.diag(torch.tensor([1.0, 10.0])), torch.ones(2))
        >>> result.solution
        tensor([1.0000, 0.1000])
        >>> result.num_iterations, result.termination
        (2, 'converged')
    """
    limit = 10 * len(b) if max_iterations is None else max_iterations
    _check_arguments(b, x0, rtol, atol, limit)
    if not b.any():  # no tolerance relative to it can be met but by the origin
        x0 = None
    start = torch.zeros_like(b) if x0 is None else x0
    residual = b if x0 is None else b - A @ x0
    # what is below rounding errors tells no direction
    tolerance = max(max(rtol, torch.finfo(b.dtype).eps) * b.norm().item(), atol)
    directions: list[Tensor] = []
    products: list[Tensor] = []
    slopes: list[Tensor] = []
    curvatures: list[Tensor] = []
    termination = EXHAUSTED
    for _ in range(limit + 1):
        if residual.norm() <= tolerance:
            termination = CONVERGED
            break
        if len(directions) == limit:
            break
        direction = residual if preconditioner is None else preconditioner @ residual
        direction = _conjugate(direction, directions, products, curvatures)
        product = A @ direction
        curvature = direction @ product
        if not curvature.isfinite():
            raise ValueError(f"The curvature along a direction is {curvature.item()}.")
        if curvature <= 0:
            termination = NON_POSITIVE
            break
        slope = -direction @ residual
        residual = residual + (slope / curvature) * product
        directions.append(direction)
        products.append(product)
        slopes.append(slope)
        curvatures.append(curvature)

    slope = _stacked(slopes, b.new_zeros(0))
    curvature = _stacked(curvatures, b.new_zeros(0))
    return CGResult(
        start,
        _stacked(directions, b.new_zeros(len(b), 0)),
        _each_after_the_other(-slope / curvature),
        slope,
        curvature,
        termination,
    )


def _check_arguments(
    b: Tensor, x0: Tensor | None, rtol: float, atol: float, limit: int
) -> None:
    """Refuse what :func:`cg` cannot start from."""
    if b.ndim != 1 or (x0 is not None and x0.shape != b.shape):
        shapes = [tuple(v.shape) for v in (b, x0) if v is not None]
        raise ValueError(f"`b` and `x0` must be vectors of one shape, got {shapes}.")
    if not b.isfinite().all():
        raise ValueError("`b` must be finite.")
    if rtol < 0 or atol < 0:
        raise ValueError(f"Tolerances must not be negative, got {rtol} and {atol}.")
    if limit < 1:
        raise ValueError(f"`max_iterations` must be at least 1, got {limit}.")


def _conjugate(
    direction: Tensor,
    directions: Sequence[Tensor],
    products: Sequence[Tensor],
    curvatures: Sequence[Tensor],
) -> Tensor:
    """Make a direction conjugate to all before."""
    for other, product, curvature in zip(directions, products, curvatures, strict=True):
        direction = direction - (direction @ product / curvature) * other
    return direction


def _stacked(tensors: Sequence[Tensor], empty: Tensor) -> Tensor:
    """Stack scalars to a vector, or vectors to columns."""
    return torch.stack(list(tensors), dim=-1) if tensors else empty


def debiased_cg(
    A: Operator,
    b: Tensor,
    A_other: Operator,
    b_other: Tensor,
    x0: Tensor | None = None,
    *,
    subspace: bool = False,
    **options: Any,
) -> CGResult:
    """Take directions from one quadratic, and step lengths from another.

    With the same quadratic in both roles, the iterates are those of :func:`cg`.

    Args:
        A: Curvature of the quadratic that gives directions, ``[D, D]``.
        b: Its negative gradient at the origin, ``[D]``.
        A_other: Curvature of the quadratic that gives magnitudes.
        b_other: Its negative gradient at the origin.
        x0: Where to start ``[D]``; None for the origin.
        subspace: Whether to minimize the other quadratic in the span of the directions.
            Otherwise each direction is minimized along by itself, as if the directions
            were conjugate there, too (the paper's).
        **options: Options of :func:`cg`.

    Returns:
        All iterates, with slopes and curvatures of the other quadratic.

    Raises:
        ValueError: As :func:`cg`.

    Example:
        >>> import torch
        >>> from laplace_debiased import cg, debiased_cg
        >>> A, b = torch.diag(torch.tensor([1.0, 10.0])), torch.tensor([1.0, 1.0])
        >>> A_other, b_other = 2 * torch.eye(2), torch.tensor([1.0, 2.0])
        >>> biased, debiased = cg(A, b), debiased_cg(A, b, A_other, b_other)
        >>> torch.equal(debiased.directions, biased.directions)
        True
        >>> biased.slopes[0], debiased.slopes[0]
        (tensor(-2.), tensor(-3.))
        >>> biased.curvatures[0], debiased.curvatures[0]
        (tensor(11.), tensor(4.))
    """
    biased = cg(A, b, x0, **options)
    directions = biased.directions
    gradient = -b_other if x0 is None else A_other @ x0 - b_other
    if biased.num_iterations == 0:
        return biased
    return rescale(
        biased,
        directions.T @ gradient,
        directions.T @ (A_other @ directions),
        subspace,
    )


def rescale(
    result: CGResult, slopes: Tensor, curvatures: Tensor, subspace: bool = False
) -> CGResult:
    """Give the directions of a result other step lengths.

    Args:
        result: From :func:`cg`.
        slopes: Slope along each direction at the start, ``[K]``.
        curvatures: Curvature along each direction ``[K]``, or between all directions
            ``[K, K]``.
        subspace: Whether to solve for all coefficients together; needs ``[K, K]``.

    Returns:
        The rescaled result. Directions without positive curvature get no step; in the
        subspace, the iterates stop there. The termination tells if there are any.
    """
    diagonal = curvatures if curvatures.ndim == 1 else curvatures.diagonal()
    if subspace:
        coefficients, complete = _subspace_coefficients(slopes, curvatures)
    else:
        positive = diagonal > 0
        steps = torch.where(positive, -slopes / torch.where(positive, diagonal, 1.0), 0)
        coefficients, complete = _each_after_the_other(steps), bool(positive.all())
    return CGResult(
        result.start,
        result.directions,
        coefficients,
        slopes,
        diagonal,
        result.termination if complete else NON_POSITIVE,
    )


def _each_after_the_other(steps: Tensor) -> Tensor:
    """Coefficients of iterates that each add a step along one more direction."""
    return steps.expand(len(steps), -1).tril()


def _subspace_coefficients(slopes: Tensor, curvatures: Tensor) -> tuple[Tensor, bool]:
    """Minimize in the span of the first k directions, for each k."""
    coefficients = torch.zeros_like(curvatures)
    for k in range(1, len(slopes) + 1):
        root, failed = torch.linalg.cholesky_ex(curvatures[:k, :k])
        if failed:
            coefficients[k - 1 :] = coefficients[k - 2] if k > 1 else 0
            return coefficients, False
        solution = torch.cholesky_solve(-slopes[:k, None], root)
        coefficients[k - 1, :k] = solution[:, 0]
    return coefficients, True
