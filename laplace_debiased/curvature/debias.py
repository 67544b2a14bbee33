r"""Directions from some points, magnitudes from others: the method, in one file.

The top eigenvectors of a mini-batch's curvature are extreme for that batch only, so
that its curvature along them is an overestimate. Debiasing takes *directions*
(eigenvectors) from some points, and *magnitudes* (curvature along them) from others:

- Tatzel, L., Mucsányi, B., Hackel, O., Hennig, P. (2024). Debiasing Mini-Batch
  Quadratics for Applications in Deep Learning (arXiv 2410.14325), Section 4.2.

:func:`two_batch` does so. :func:`cross_fit` lets each fold of points play both roles:
its magnitudes are measured along directions of the other folds, and averaged by rank
(Bartz, 2016).

Magnitudes are what a function of directions *measures*: :func:`project` for the K-FAC
of other points (the paper's), or the exact curvature of their GGN, for which a pass
over them is needed. Directions that only rounding tells apart share one magnitude
(:mod:`~laplace_debiased.curvature.degenerate`). Everything is given layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic, cast

import torch
from torch import Tensor

from laplace_debiased.curvature.decomposition import Decompose, decompose
from laplace_debiased.curvature.degenerate import (
    eigenspaces,
    with_common_magnitudes,
)
from laplace_debiased.curvature.kronecker import Kronecker, Magnitudes, Spectrum

Factors = list[Kronecker]
Directions = list[Kronecker]
# along the eigenvectors of other points' factors, whose eigenvalues are given, too
Measure = Callable[[Directions, list[Kronecker]], list[Magnitudes]]


@dataclass(frozen=True, eq=False)
class Debiased(Generic[Magnitudes]):
    """What debiasing gives, layer by layer.

    Args:
        directions: The directions.
        magnitudes: Curvature along them, of other points.
        own: Eigenvalues of the factors that gave the directions.
    """

    directions: Directions
    magnitudes: list[Magnitudes]
    own: list[Kronecker]


def two_batch(
    factors: Factors,
    measure: Measure[Magnitudes],
    pooled_inputs: bool = False,
    decomposition: Decompose = decompose,
) -> Debiased[Magnitudes]:
    """Measure magnitudes along the eigenvectors of other points.

    Args:
        factors: Kronecker factors of the points that give directions.
        measure: Measures the others along directions.
        pooled_inputs: Whether input covariances are those of a pool, so that they tell
            how frequent the entries of a table of embeddings are in other points.
        decomposition: Decomposes factors.

    Returns:
        Directions and magnitudes.
    """
    directions, own = decomposition(factors)
    found = measure(directions, own)
    magnitudes = with_common_magnitudes(found, own, directions, pooled_inputs)
    return Debiased(directions, magnitudes, own)


def cross_fit(
    folds: Sequence[Factors],
    measures: Sequence[Measure[Magnitudes]],
    shares: Sequence[float],
    pooled_inputs: bool = False,
    decomposition: Decompose = decompose,
) -> Debiased[Magnitudes]:
    """Measure each fold along the eigenvectors of the others; average by rank.

    Args:
        folds: Kronecker factors of each fold.
        measures: Measures each fold along directions.
        shares: Each fold's share of the points.
        pooled_inputs: Whether input covariances are those of a pool, of which the
            measured points are a small part: their eigenvectors are then those of all.
        decomposition: Decomposes factors.

    Returns:
        Directions of all folds, and the averaged magnitudes.
    """
    directions, own = decomposition(average(folds, shares))

    def along_others(index: int) -> tuple[Directions, list[Kronecker]]:
        others = held_out(folds, shares, index)
        if not pooled_inputs:
            return decomposition(others)
        gradients = decomposition([Kronecker(own.gradients) for own in others])
        vectors, values = zip(gradients, (directions, own), strict=True)
        return joined(*vectors), joined(*values)

    def measured(index: int) -> list[Magnitudes]:
        vectors, values = along_others(index)
        found = measures[index](vectors, values)
        return with_common_magnitudes(found, values, vectors)

    # bases are large: each is gone before the next one is computed
    averaged = average([measured(index) for index in range(len(folds))], shares)
    return Debiased(directions, with_common_magnitudes(averaged, own, directions), own)


def held_out(folds: Sequence[Factors], shares: Sequence[float], index: int) -> Factors:
    """Average the factors of all folds but one.

    Args:
        folds: Kronecker factors of each fold.
        shares: Each fold's share of the points.
        index: The fold to leave out.

    Returns:
        Factors of each layer.
    """
    return average(without(folds, index), without(shares, index))


def kfac_cross_fit(
    folds: Sequence[Factors],
    shares: Sequence[float],
    pooled_inputs: bool = False,
    decomposition: Decompose = decompose,
) -> Debiased[Kronecker]:
    """Cross-fit with the folds' K-FAC as magnitudes.

    Input covariances of a pool of many points are not scarce: two batches are enough
    for them, which spares two of three decompositions of what often are the largest
    factors.

    Args:
        folds: Kronecker factors of each fold.
        shares: Each fold's share of the points.
        pooled_inputs: Whether input covariances are those of a pool.
        decomposition: Decomposes factors.

    Returns:
        Directions and factored magnitudes.
    """
    if not pooled_inputs:
        measures = [partial(project, fold) for fold in folds]
        return cross_fit(folds, measures, shares, False, decomposition)
    gradients = [[Kronecker(own.gradients) for own in fold] for fold in folds]
    inputs = [[Kronecker(None, own.inputs) for own in fold] for fold in folds]
    outer = kfac_cross_fit(gradients, shares, False, decomposition)
    first, measure = average(inputs[:-1], shares[:-1]), partial(project, inputs[-1])
    inner = two_batch(first, measure, decomposition=decomposition)
    return Debiased(
        joined(outer.directions, inner.directions),
        joined(outer.magnitudes, inner.magnitudes),
        joined(outer.own, inner.own),
    )


def project(
    factors: Factors,
    directions: Directions,
    eigenvalues: Sequence[Kronecker] | None = None,
) -> list[Kronecker]:
    r"""Measure Kronecker factors along given directions.

    These are the ``kfac`` magnitudes of Tatzel et al., 2024 (arXiv 2410.14325,
    Section 4.2): :math:`\lambda_{ij} = (u_{G,i}^\top \tilde G u_{G,i})
    (u_{A,j}^\top \tilde A u_{A,j})`.

    Args:
        factors: Kronecker factors of each layer.
        directions: Directions of each layer, orthonormal bases.
        eigenvalues: Those of the points that gave the directions. Where most of a
            factor's agree, their directions get the mean, which is cheaper.

    Returns:
        Factored eigenvalues of each layer.
    """
    if eigenvalues is None:
        pairs = zip(factors, directions, strict=True)
        return [own.map(_squared_lengths, vectors) for own, vectors in pairs]
    triples = zip(factors, directions, eigenvalues, strict=True)
    return [own.map(_with_common_rest, *others) for own, *others in triples]


def _squared_lengths(matrix: Tensor, vectors: Tensor) -> Tensor:
    if matrix.ndim == 1:  # diagonal, and so are the vectors
        return matrix
    # [d, d] @ [d, k] -> [k], of each column u the form u^T M u
    return ((matrix @ vectors) * vectors).sum(0).clamp(min=0)


def _with_common_rest(matrix: Tensor, vectors: Tensor, eigenvalues: Tensor) -> Tensor:
    """Measure along the first ones together, by what is left of the trace."""
    if matrix.ndim == 1:
        return _squared_lengths(matrix, vectors)
    rest = int((eigenspaces(eigenvalues) == 0).sum())
    if 2 * rest <= len(matrix):
        return _squared_lengths(matrix, vectors)
    lengths = _squared_lengths(matrix, vectors[:, rest:])
    trace = matrix.diagonal().sum(dtype=torch.float64)
    left = (trace - lengths.sum(dtype=torch.float64)).clamp(min=0)
    return torch.cat([(left / rest).to(lengths).expand(rest), lengths])


def average(
    estimates: Sequence[list[Magnitudes]], shares: Sequence[float]
) -> list[Magnitudes]:
    """Average factors, or magnitudes, over folds.

    Args:
        estimates: Those of each layer, for each fold.
        shares: Weights of the folds, of any sum.

    Returns:
        The averages.
    """
    return [_mean(own, shares) for own in zip(*estimates, strict=True)]


def _mean(own: Sequence[Magnitudes], shares: Sequence[float]) -> Magnitudes:
    """Average those of a layer."""
    mean = own[0].map(_weighted(shares), *own[1:])
    used = [s * (not _is_unused(part)) for s, part in zip(shares, own, strict=True)]
    if all(used) or not any(used):
        return mean
    parts = cast("list[Kronecker]", own)
    inputs = parts[0].map(_weighted(used), *parts[1:]).inputs
    return cast("Magnitudes", replace(cast("Kronecker", mean), inputs=inputs))


def _weighted(weights: Sequence[float]) -> Callable[..., Tensor]:
    """Return what averages as many tensors."""

    def mean(*tensors: Tensor) -> Tensor:
        parts = [s * t for s, t in zip(weights, tensors, strict=True)]
        return sum(parts[1:], parts[0]) / sum(weights)

    return mean


def _is_unused(own: Kronecker | Spectrum) -> bool:
    """Whether a layer had no rows, so that there is no mean of its inputs.

    Inputs alone do not tell: they may be zeros.
    """
    if not isinstance(own, Kronecker) or own.gradients is None or own.inputs is None:
        return False
    return not (own.gradients.any() or own.inputs.any())


def add_data(own: Factors, new: Factors, share: float) -> Factors:
    """Add further data: gradient covariances add up, input covariances average.

    Args:
        own: Kronecker factors of each layer.
        new: Those of the further data.
        share: Number of points that ``own`` stands for, as a share of all.

    Returns:
        Factors of all data.
    """

    def added(a: Kronecker, b: Kronecker) -> Kronecker:
        total = a.map(lambda G, H: G + H, b).gradients
        if _is_unused(a) or _is_unused(b):
            return Kronecker(total, b.inputs if _is_unused(a) else a.inputs)
        mean = a.map(lambda A, B: share * A + (1 - share) * B, b)
        return Kronecker(total, mean.inputs)

    return [added(*pair) for pair in zip(own, new, strict=True)]


def scale_gradients(factors: Sequence[Kronecker], factor: float) -> list[Kronecker]:
    """Scale the first factor of each layer, and so the curvature.

    Args:
        factors: Kronecker factors, or factored eigenvalues, of each layer.
        factor: The factor.

    Returns:
        The scaled factors; the same ones if there is nothing to scale.
    """
    if factor == 1:
        return list(factors)
    return [
        Kronecker(None if own.gradients is None else factor * own.gradients, own.inputs)
        for own in factors
    ]


def joined(first: Sequence[Kronecker], second: Sequence[Kronecker]) -> list[Kronecker]:
    """Join what goes with gradients of the first, and with inputs of the second."""
    pairs = zip(first, second, strict=True)
    return [Kronecker(a.gradients, b.inputs) for a, b in pairs]


def without(items: Sequence, index: int) -> list:
    """Return all items but one."""
    return [item for k, item in enumerate(items) if k != index]
