"""Debiased curvature that grows with the data.

Each kind of magnitudes keeps what it takes to add further data: ``kfac`` the Kronecker
factors of each fold, ``ggn`` the factors that gave the directions, in their eigenbasis,
and the curvatures measured along it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from laplace_debiased.curvature.eigenbasis import (
    EigenbasisMatrix,
    Factors,
    decompose,
    project,
    to_eigenbasis,
)


def average(
    estimates: Sequence[list[Factors]], shares: Sequence[float]
) -> list[Factors]:
    """Average the factors, or the eigenvalues, of several folds.

    Args:
        estimates: Factors of each block, for each fold.
        shares: Weights of the folds, of any sum.

    Returns:
        The averages. Blocks that hold the same tensor still do.
    """
    known: dict[tuple[int, ...], Tensor] = {}

    def mean(tensors: tuple[Tensor, ...]) -> Tensor:
        key = tuple(id(tensor) for tensor in tensors)
        if key not in known:
            weighted = (s * t for s, t in zip(shares, tensors, strict=True))
            known[key] = sum(weighted) / sum(shares)
        return known[key]

    return [
        [mean(tensors) for tensors in zip(*blocks, strict=True)]
        for blocks in zip(*estimates, strict=True)
    ]


def add_data(own: list[Factors], new: list[Factors], share: float) -> list[Factors]:
    """Add further data: gradient covariances add up, input covariances average.

    Args:
        own: Factors of each block.
        new: Those of the further data.
        share: Number of points that ``own`` stands for, as a share of all.

    Returns:
        Factors of all data. Blocks that hold the same tensors still do.
    """
    total = _remembering(torch.add)
    mean = _remembering(lambda A, B: share * A + (1 - share) * B)
    return [
        [total(G, H), *(mean(A, B) for A, B in zip(As, Bs, strict=True))]
        for (G, *As), (H, *Bs) in zip(own, new, strict=True)
    ]


def without(items: Sequence, index: int) -> list:
    """Return all items but one."""
    return [item for k, item in enumerate(items) if k != index]


@dataclass(frozen=True)
class KFACCurvature:
    """Curvature with ``kfac`` magnitudes.

    Two batches: the first fold gives directions, the second magnitudes. Cross-fit: all
    folds give directions; each fold's magnitudes are measured along the directions of
    the others, and are averaged by rank (Bartz, 2016). Input covariances that a pool of
    many points gave are not scarce: two batches are enough for them, which spares two
    of three decompositions of what often are the largest factors.

    Args:
        folds: Factors ``[G, A]`` or ``[G]`` of each block, for each fold. G is scaled
            to all data, A is a mean.
        shares: Each fold's share of the points.
        cross_fit: Whether each fold plays both roles.
        surveyed: Whether the input covariances are those of a pool.
    """

    folds: list[list[Factors]]
    shares: Sequence[float] = (0.5, 0.5)
    cross_fit: bool = False
    surveyed: bool = False

    def merge(self, other: KFACCurvature, share: float) -> KFACCurvature:
        """Add further data: gradient covariances add up, input covariances average.

        Args:
            other: Curvature of the further data.
            share: Number of points here, as a share of all.

        Returns:
            Curvature of all data.

        Raises:
            ValueError: If the folds of both do not match.
        """
        if (len(self.folds), self.cross_fit) != (len(other.folds), other.cross_fit):
            raise ValueError(
                "Further data must be used as the first data were: in as many folds, "
                "with `estimator='cross_fit'` both times or not at all."
            )
        pairs = zip(self.folds, other.folds, strict=True)
        folds = [add_data(own, new, share) for own, new in pairs]
        pairs = zip(self.shares, other.shares, strict=True)
        return replace(
            self,
            folds=folds,
            shares=[share * own + (1 - share) * new for own, new in pairs],
            surveyed=self.surveyed and other.surveyed,
        )

    def scaled(self, factor: float) -> KFACCurvature:
        """Scale the curvature."""
        folds = [scale_gradients(fold, factor) for fold in self.folds]
        return replace(self, folds=folds)

    def decompose(self, damping: bool = False) -> EigenbasisMatrix:
        """Measure the magnitudes along the directions.

        Args:
            damping: Whether a prior precision is spread over the factors.

        Returns:
            The curvature in its eigenbasis.
        """
        return EigenbasisMatrix(*self._eigendecomposition(), damping=damping)

    def _eigendecomposition(self) -> tuple[list[Factors], list[Factors]]:
        """Compute eigenvectors and eigenvalues of each block."""
        if not self.cross_fit:
            return _two_batches(*self.folds)
        if not self.surveyed:
            return _cross_fitted(self.folds, self.shares)
        gradients = [[[G] for G, *_ in fold] for fold in self.folds]
        inputs = [[As for _, *As in fold] for fold in self.folds]
        directions = average(inputs[:-1], self.shares[:-1])
        parts = zip(
            _cross_fitted(gradients, self.shares),
            _two_batches(directions, inputs[-1]),
            strict=True,
        )
        return tuple(_joined(*part) for part in parts)

    def to_matrix(self) -> Tensor:
        """Compute the curvature densely, ``[params, params]``."""
        return self.decompose().to_matrix()

    def state_dict(self) -> dict[str, Any]:
        """Return what the curvature is built from."""
        return dict(vars(self))


def _two_batches(
    directions: list[Factors], magnitudes: list[Factors]
) -> tuple[list[Factors], list[Factors]]:
    """Measure factors along the eigenvectors of others."""
    eigenvectors = decompose(directions, fast=True)
    return eigenvectors, project(magnitudes, eigenvectors)


def _cross_fitted(
    folds: list[list[Factors]], shares: Sequence[float]
) -> tuple[list[Factors], list[Factors]]:
    """Measure each fold along the eigenvectors of the others; average by rank."""
    held_out = [
        project(fold, held_out_directions(folds, shares, k))
        for k, fold in enumerate(folds)
    ]
    directions = decompose(average(folds, shares), fast=True)
    return directions, average(held_out, shares)


def _joined(first: list[Factors], second: list[Factors]) -> list[Factors]:
    """Join the factors of each block."""
    return [[*a, *b] for a, b in zip(first, second, strict=True)]


def held_out_directions(
    folds: list[list[Factors]], shares: Sequence[float], index: int
) -> list[Factors]:
    """Compute the eigenvectors of all folds but one.

    Args:
        folds: Factors of each block, for each fold.
        shares: Each fold's share of the points.
        index: The fold to leave out.

    Returns:
        Eigenvectors of each block.
    """
    others = average(without(folds, index), without(shares, index))
    return decompose(others, fast=True)


def scale_gradients(kfacs: list[Factors], factor: float) -> list[Factors]:
    """Scale the first factor of each block, and so the curvature.

    Args:
        kfacs: Factors ``[G, A]``, or ``[G]``, or eigenvalues, of each block.
        factor: The factor.

    Returns:
        The scaled factors. Blocks that hold the same tensor still do.
    """
    scaled = {id(first): factor * first for first, *_ in kfacs}
    return [[scaled[id(first)], *others] for first, *others in kfacs]


@dataclass(frozen=True)
class GGNCurvature:
    """Curvature with ``ggn`` magnitudes.

    Args:
        eigenvectors: Directions ``[U_G, U_A]`` or ``[U_G]`` of each block.
        eigenvalues: Curvatures ``[matrix]`` or ``[vector]`` of each block, scaled to
            all data.
        factor_eigenvalues: Eigenvalues of the factors that gave the directions, G
            scaled to all data.
    """

    eigenvectors: list[Factors]
    eigenvalues: list[Factors]
    factor_eigenvalues: list[Factors]

    def factors(self) -> list[Factors]:
        """Compute the Kronecker factors that gave the directions.

        Returns:
            Factors ``[G, A]`` or ``[G]`` of each block.
        """
        compose = _remembering(lambda vectors, values: (vectors * values) @ vectors.T)
        return [
            [compose(*pair) for pair in zip(vectors, values, strict=True)]
            for vectors, values in zip(
                self.eigenvectors, self.factor_eigenvalues, strict=True
            )
        ]

    def along(self, directions: list[Factors]) -> list[Factors]:
        r"""Measure the curvature along other directions.

        They are :math:`\lambda'_{ij} = \sum_{kl} (u'_i \cdot u_k)^2 (v'_j \cdot v_l)^2
        \lambda_{kl}`. Their sum is that of the eigenvalues.

        Args:
            directions: Directions ``[U_G, U_A]`` or ``[U_G]`` of each block.

        Returns:
            Curvatures ``[matrix]`` or ``[vector]`` of each block.
        """
        overlaps = _remembering(lambda own, new: (own.T @ new) ** 2)
        bases = zip(self.eigenvectors, directions, self.eigenvalues, strict=True)
        return [
            [
                to_eigenbasis(
                    values,
                    [overlaps(*pair) for pair in zip(vectors, others, strict=True)],
                )
            ]
            for vectors, others, (values,) in bases
        ]

    def merge(self, other: GGNCurvature, share: float) -> GGNCurvature:
        """Add further data, whose directions are those of all data.

        Args:
            other: Curvature of the further data along the directions of all data, and
                the factors that gave these (:func:`add_data` of the earlier factors
                and the new ones).
            share: Not needed, since curvatures are sums.

        Returns:
            Curvature of all data.
        """
        eigenvalues = [
            [value + further for value, further in zip(own, new, strict=True)]
            for own, new in zip(
                self.along(other.eigenvectors), other.eigenvalues, strict=True
            )
        ]
        return replace(other, eigenvalues=eigenvalues)

    def scaled(self, factor: float) -> GGNCurvature:
        """Scale the curvature."""
        return GGNCurvature(
            self.eigenvectors,
            scale_gradients(self.eigenvalues, factor),
            scale_gradients(self.factor_eigenvalues, factor),
        )

    def decompose(self, damping: bool = False) -> EigenbasisMatrix:
        """Return the curvature in its eigenbasis.

        Args:
            damping: Must be false, since the eigenvalues do not factor.

        Returns:
            The curvature in its eigenbasis.
        """
        return EigenbasisMatrix(self.eigenvectors, self.eigenvalues, damping=damping)

    def to_matrix(self) -> Tensor:
        """Compute the curvature densely, ``[params, params]``."""
        return self.decompose().to_matrix()

    def state_dict(self) -> dict[str, Any]:
        """Return what the curvature is built from."""
        return dict(vars(self))


def _remembering(function: Callable[[Tensor, Tensor], Tensor]) -> Callable:
    """Compute a function of two tensors once for the same two.

    A weight and its bias hold the same tensors.
    """
    known: dict[tuple[int, int], Tensor] = {}

    def computed(first: Tensor, second: Tensor) -> Tensor:
        key = id(first), id(second)
        if key not in known:
            known[key] = function(first, second)
        return known[key]

    return computed


CURVATURES = {"kfac": KFACCurvature, "ggn": GGNCurvature}
