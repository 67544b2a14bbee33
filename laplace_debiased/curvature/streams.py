"""Debiased curvature that grows with the data.

Each kind of magnitudes keeps what it takes to add further data: ``kfac`` the Kronecker
factors of each fold, ``ggn`` the factors that gave the directions, in their eigenbasis,
and the curvatures measured along it. Everything is scaled to all data already.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any, TypeVar

from torch import Tensor

from laplace_debiased.curvature.bases import (
    columns_rotated,
    composed,
    rotated,
    squared_overlaps,
)
from laplace_debiased.curvature.debias import (
    Debiased,
    Factors,
    add_data,
    kfac_cross_fit,
    project,
    scale_gradients,
    two_batch,
)
from laplace_debiased.curvature.decomposition import Decompose, decompose
from laplace_debiased.curvature.eigenbasis import EigenbasisMatrix, by_parameter
from laplace_debiased.curvature.kronecker import Kronecker, Spectrum
from laplace_debiased.rows.layers import Layer

Item = TypeVar("Item")


@dataclass(frozen=True, eq=False)
class KFACCurvature:
    """Curvature with ``kfac`` magnitudes.

    Two batches: the first fold gives directions, the second magnitudes. Cross-fit: all
    folds give both (:mod:`laplace_debiased.curvature.debias`).

    Args:
        layers: The layers.
        folds: Kronecker factors of each layer, for each fold. G is scaled to all data,
            A is a mean.
        shares: Each fold's share of the points.
        cross_fit: Whether each fold plays both roles.
        pooled_inputs: Whether the input covariances are those of a pool.
    """

    layers: Sequence[Layer]
    folds: Sequence[Factors]
    shares: Sequence[float] = (0.5, 0.5)
    cross_fit: bool = False
    pooled_inputs: bool = False

    @classmethod
    def of_layers(cls, parts: Sequence[KFACCurvature]) -> KFACCurvature:
        """Put together what was measured of some layers each, in their order."""
        folds = zip(*(own.folds for own in parts), strict=True)
        return replace(
            parts[0],
            layers=_joined([own.layers for own in parts]),
            folds=[_joined(fold) for fold in folds],
        )

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
        shares = zip(self.shares, other.shares, strict=True)
        return replace(
            self,
            folds=folds,
            shares=[share * own + (1 - share) * new for own, new in shares],
            pooled_inputs=self.pooled_inputs and other.pooled_inputs,
        )

    def turned(self, other: KFACCurvature, share: float) -> KFACCurvature:
        """Return the curvature itself: its directions are found when all is known.

        Args:
            other: Not needed.
            share: Not needed.

        Returns:
            The curvature.
        """
        return self

    def scaled(self, factor: float) -> KFACCurvature:
        """Scale the curvature."""
        folds = [scale_gradients(fold, factor) for fold in self.folds]
        return replace(self, folds=folds)

    def debiased(
        self,
        decomposition: Decompose = decompose,
        at_a_time: Sequence[int] | None = None,
    ) -> Debiased[Kronecker]:
        """Measure the magnitudes along the directions, as :meth:`decompose` does."""
        sizes = [len(self.layers)] if at_a_time is None else at_a_time
        ends = list(accumulate(sizes))
        found = [
            self._debiased(end - size, end, decomposition)
            for size, end in zip(sizes, ends, strict=True)
        ]
        return Debiased(
            _joined([own.directions for own in found]),
            _joined([own.magnitudes for own in found]),
            _joined([own.own for own in found]),
        )

    def _debiased(
        self, start: int, end: int, decomposition: Decompose
    ) -> Debiased[Kronecker]:
        """Do so for the layers from one to another."""
        folds = [fold[start:end] for fold in self.folds]
        if self.cross_fit:
            return kfac_cross_fit(folds, self.shares, self.pooled_inputs, decomposition)
        directions, magnitudes = folds
        measure = partial(project, magnitudes)
        return two_batch(directions, measure, decomposition=decomposition)

    def decompose(
        self,
        damping: bool = False,
        decomposition: Decompose = decompose,
        at_a_time: Sequence[int] | None = None,
    ) -> EigenbasisMatrix:
        """Measure the magnitudes along the directions.

        Args:
            damping: Whether a prior precision is spread over the factors.
            decomposition: Decomposes factors.
            at_a_time: How many of the layers are decomposed at a time, one number after
                the other; None for all.

        Returns:
            The curvature in its eigenbasis.
        """
        debiased = self.debiased(decomposition, at_a_time)
        return by_parameter(
            self.layers, debiased.directions, debiased.magnitudes, damping
        )

    def to_matrix(self) -> Tensor:
        """Compute the curvature densely, ``[params, params]``."""
        return self.decompose().to_matrix()

    def state_dict(self) -> dict[str, Any]:
        """Return what the curvature is built from, but for the layers."""
        return {
            "folds": [[own.state_dict() for own in fold] for fold in self.folds],
            "shares": list(self.shares),
            "cross_fit": self.cross_fit,
            "pooled_inputs": self.pooled_inputs,
        }

    @classmethod
    def from_state_dict(
        cls, layers: Sequence[Layer], state_dict: dict[str, Any]
    ) -> KFACCurvature:
        """Build the curvature from :meth:`state_dict`."""
        folds = [[Kronecker(**own) for own in fold] for fold in state_dict["folds"]]
        return cls(layers, **state_dict | {"folds": folds})


@dataclass(frozen=True, eq=False)
class GGNCurvature:
    """Curvature with ``ggn`` magnitudes.

    Args:
        layers: The layers.
        directions: Directions of each layer.
        spectra: Curvatures along them, scaled to all data.
        factor_eigenvalues: Eigenvalues of the factors that gave the directions, G
            scaled to all data.
    """

    layers: Sequence[Layer]
    directions: Sequence[Kronecker]
    spectra: Sequence[Spectrum]
    factor_eigenvalues: Sequence[Kronecker]

    @classmethod
    def of_layers(cls, parts: Sequence[GGNCurvature]) -> GGNCurvature:
        """Put together what was measured of some layers each, in their order."""
        return cls(
            _joined([own.layers for own in parts]),
            _joined([own.directions for own in parts]),
            _joined([own.spectra for own in parts]),
            _joined([own.factor_eigenvalues for own in parts]),
        )

    def factors(self) -> Factors:
        """Compute the Kronecker factors that gave the directions."""
        pairs = zip(self.directions, self.factor_eigenvalues, strict=True)
        return [values.map(composed, U) for U, values in pairs]

    def along(self, directions: Sequence[Kronecker]) -> list[Spectrum]:
        r"""Measure the curvature along other directions.

        They are :math:`\lambda'_{ij} = \sum_{kl} (u'_i \cdot u_k)^2 (v'_j \cdot v_l)^2
        \lambda_{kl}`. Their sum is that of the eigenvalues.

        Args:
            directions: Directions of each layer.

        Returns:
            Curvatures of each layer.
        """
        return [
            _along(values, own.map(squared_overlaps, new))
            for values, own, new in zip(
                self.spectra, self.directions, directions, strict=True
            )
        ]

    def merge(self, other: GGNCurvature, share: float) -> GGNCurvature:
        """Add further data, whose directions are those of all data.

        Args:
            other: Curvature of the further data along the directions of all data, and
                the factors that gave these
                (:func:`~laplace_debiased.curvature.debias.add_data` of the earlier
                factors and the new ones).
            share: Not needed, since curvatures are sums.

        Returns:
            Curvature of all data.
        """
        pairs = zip(self.along(other.directions), other.spectra, strict=True)
        spectra = [own.map(lambda a, b: a + b, new) for own, new in pairs]
        return replace(other, spectra=spectra)

    def turned(self, other: GGNCurvature, share: float) -> GGNCurvature:
        """Measure the curvature along directions of these and other data.

        Args:
            other: Curvature of the other data.
            share: Number of the other data, as a share of all.

        Returns:
            Curvature of these data, along directions of all.
        """
        directions, values = decompose(add_data(other.factors(), self.factors(), share))
        return replace(
            self,
            directions=directions,
            spectra=self.along(directions),
            factor_eigenvalues=values,
        )

    def scaled(self, factor: float) -> GGNCurvature:
        """Scale the curvature."""
        return replace(
            self,
            spectra=[own.map(lambda values: factor * values) for own in self.spectra],
            factor_eigenvalues=scale_gradients(self.factor_eigenvalues, factor),
        )

    def decompose(
        self,
        damping: bool = False,
        decomposition: Decompose = decompose,
        at_a_time: Sequence[int] | None = None,
    ) -> EigenbasisMatrix:
        """Return the curvature in its eigenbasis.

        Args:
            damping: Must be false, since the eigenvalues do not factor.
            decomposition: Not needed, since it was done for the measurement.
            at_a_time: Not needed, likewise.

        Returns:
            The curvature in its eigenbasis.
        """
        return by_parameter(self.layers, self.directions, self.spectra, damping)

    def to_matrix(self) -> Tensor:
        """Compute the curvature densely, ``[params, params]``."""
        return self.decompose().to_matrix()

    def state_dict(self) -> dict[str, Any]:
        """Return what the curvature is built from, but for the layers."""
        return {
            "directions": [own.state_dict() for own in self.directions],
            "spectra": [own.state_dict() for own in self.spectra],
            "factor_eigenvalues": [own.state_dict() for own in self.factor_eigenvalues],
        }

    @classmethod
    def from_state_dict(
        cls, layers: Sequence[Layer], state_dict: dict[str, Any]
    ) -> GGNCurvature:
        """Build the curvature from :meth:`state_dict`."""
        return cls(
            layers,
            [Kronecker(**own) for own in state_dict["directions"]],
            [Spectrum(**own) for own in state_dict["spectra"]],
            [Kronecker(**own) for own in state_dict["factor_eigenvalues"]],
        )


Curvature = KFACCurvature | GGNCurvature
# the kind of curvature that each kind of magnitudes needs
CURVATURE_TYPES: dict[str, type[KFACCurvature] | type[GGNCurvature]] = {
    "kfac": KFACCurvature,
    "ggn": GGNCurvature,
}


def _joined(parts: Iterable[Sequence[Item]]) -> list[Item]:
    return [item for part in parts for item in part]


def _along(values: Spectrum, overlaps: Kronecker) -> Spectrum:
    """Turn a spectrum by squared overlaps of old and new directions."""
    outer, inner = overlaps.gradients, overlaps.inputs
    assert outer is not None
    matrix, vector = values.matrix, values.vector
    if matrix is not None:
        assert inner is not None
        matrix = rotated(columns_rotated(matrix, outer), inner)  # [d_out, d_in]
    return Spectrum(matrix, None if vector is None else rotated(vector, outer))
