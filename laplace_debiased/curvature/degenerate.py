r"""One magnitude for each degenerate subspace.

Where eigenvalues of a factor agree, as all zeros of a factor of few points do, its
eigenvectors are any basis of a subspace, which changes with the order in which points
are summed. The curvature along them changes with it, but not its mean over the
subspace: the trace of the curvature there over the dimension. The mean varies less,
too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from laplace_debiased.curvature.kronecker import Kronecker, Magnitudes, Spectrum


def eigenspaces(eigenvalues: Tensor) -> Tensor:
    r"""Number the subspaces of eigenvalues that agree.

    Rounding of the size :math:`\epsilon \lambda_{\max}` turns eigenvectors by
    :math:`\epsilon \lambda_{\max}` over the gap between their eigenvalues (Davis and
    Kahan, 1970). Those of gaps below :math:`\epsilon^{5/6} \lambda_{\max}` are taken
    as one subspace.

    Args:
        eigenvalues: Eigenvalues in ascending order ``[d]``.

    Returns:
        The number of each one's subspace ``[d]``, from zero on.
    """
    tolerance = torch.finfo(eigenvalues.dtype).eps ** (5 / 6)
    gaps = eigenvalues.diff(prepend=eigenvalues[:1])
    return (gaps > tolerance * eigenvalues[-1:].abs()).cumsum(0)


def mean_over(values: Tensor, subspaces: Tensor, axis: int) -> Tensor:
    """Replace values by their mean over subspaces.

    Args:
        values: A tensor with an entry for each eigenvalue along an axis.
        subspaces: From :func:`eigenspaces`.
        axis: The axis.

    Returns:
        A tensor of the same shape.
    """
    shape = list(values.shape)
    sums = values.new_zeros(shape).index_add_(axis, subspaces, values)
    counts = values.new_zeros(len(subspaces)).index_add_(
        0, subspaces, values.new_ones(len(subspaces))
    )
    shape = [1] * values.ndim
    shape[axis] = -1
    means = sums / counts.clamp(min=1).view(shape)
    return means.index_select(axis, subspaces)


def with_common_magnitudes(
    magnitudes: Sequence[Magnitudes],
    eigenvalues: Sequence[Kronecker],
    directions: Sequence[Kronecker],
    spread: bool = True,
) -> list[Magnitudes]:
    """Average magnitudes over the degenerate subspaces of their directions.

    Args:
        magnitudes: Magnitudes of each layer, along the eigenvectors of factors.
        eigenvalues: Eigenvalues of these factors.
        directions: The eigenvectors.
        spread: Whether the eigenvalues of tables of embeddings tell how frequent
            entries are in the points that were measured, too.

    Returns:
        The magnitudes.
    """
    layers = zip(magnitudes, eigenvalues, directions, strict=True)
    return [_averaged(*own, spread) for own in layers]


def _averaged(
    own: Magnitudes, eigenvalues: Kronecker, directions: Kronecker, spread: bool
) -> Magnitudes:
    groups = eigenvalues.map(_subspaces, directions)
    if isinstance(own, Kronecker):
        return own.map(lambda values, group: mean_over(values, group, 0), groups)
    assert groups.gradients is not None
    rows, matrix, vector = groups.gradients, own.matrix, own.vector
    if matrix is not None:
        assert groups.inputs is not None and directions.inputs is not None
        matrix = mean_over(matrix, rows, 0)
        if directions.inputs.ndim == 1:
            assert eigenvalues.inputs is not None
            matrix = _spread(matrix, eigenvalues.inputs) if spread else matrix
        else:
            matrix = mean_over(matrix, groups.inputs, 1)
    return Spectrum(matrix, None if vector is None else mean_over(vector, rows, 0))


def _spread(matrix: Tensor, frequencies: Tensor) -> Tensor:
    """Spread the curvature of a table of embeddings by how frequent its entries are.

    Few points have few of the entries. The curvature of the others is not zero: it is
    what their frequency in the pool, or else in the points, makes likely.

    Args:
        matrix: Curvatures ``[d_out, d_in]``.
        frequencies: Diagonal of the input covariance ``[d_in]``.

    Returns:
        Curvatures of the same sums over inputs.
    """
    tiny = torch.finfo(matrix.dtype).tiny
    shares = frequencies / frequencies.sum().clamp(min=tiny)
    return torch.outer(matrix.sum(1), shares)


def _subspaces(eigenvalues: Tensor, basis: Tensor) -> Tensor:
    """Number the subspaces; the unit vectors are a basis that nothing turns."""
    if basis.ndim == 1:
        return torch.arange(len(basis), device=basis.device)
    return eigenspaces(eigenvalues)
