"""Debiased curvature that grows with the data.

Each kind of magnitudes keeps what it takes to add further data: ``kfac`` the Kronecker
factors of both roles, ``ggn`` the eigenbasis and the curvatures measured in it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from laplace_debiased.eigenbasis import EigenbasisMatrix, Factors, decompose, project


@dataclass(frozen=True)
class KFACCurvature:
    """Curvature with ``kfac`` magnitudes.

    Args:
        directions: Factors ``[G, A]`` or ``[G]`` of each block, of the points that give
            directions. G is scaled to all data, A is a mean.
        magnitudes: The same of the points that give magnitudes.
    """

    directions: list[Factors]
    magnitudes: list[Factors]

    def merge(self, other: KFACCurvature, share: float) -> KFACCurvature:
        """Add further data: gradient covariances add up, input covariances average.

        Args:
            other: Curvature of the further data.
            share: Number of points here, as a share of all.

        Returns:
            Curvature of all data.
        """

        def merged(own: list[Factors], new: list[Factors]) -> list[Factors]:
            return [
                [
                    G + H,
                    *(share * A + (1 - share) * B for A, B in zip(As, Bs, strict=True)),
                ]
                for (G, *As), (H, *Bs) in zip(own, new, strict=True)
            ]

        return KFACCurvature(
            merged(self.directions, other.directions),
            merged(self.magnitudes, other.magnitudes),
        )

    def decompose(self, damping: bool = False) -> EigenbasisMatrix:
        """Measure the magnitudes along the directions.

        Args:
            damping: Whether a prior precision is spread over the factors.

        Returns:
            The curvature in its eigenbasis.
        """
        eigenvectors = decompose(self.directions)
        eigenvalues = project(self.magnitudes, eigenvectors)
        return EigenbasisMatrix(eigenvectors, eigenvalues, damping=damping)

    def to_matrix(self) -> Tensor:
        """Compute the curvature densely, ``[params, params]``."""
        return self.decompose().to_matrix()

    def tensors(self) -> tuple[list[Factors], list[Factors]]:
        """Return the two lists that the curvature is built from."""
        return self.directions, self.magnitudes


@dataclass(frozen=True)
class GGNCurvature:
    """Curvature with ``ggn`` magnitudes.

    Args:
        eigenvectors: Directions ``[U_G, U_A]`` or ``[U_G]`` of each block.
        eigenvalues: Curvatures ``[matrix]`` or ``[vector]`` of each block, scaled to
            all data.
    """

    eigenvectors: list[Factors]
    eigenvalues: list[Factors]

    def merge(self, other: GGNCurvature, share: float) -> GGNCurvature:
        """Add further data, measured in the same eigenbasis: curvatures add up.

        Args:
            other: Curvature of the further data.
            share: Not needed, since curvatures are sums.

        Returns:
            Curvature of all data.
        """
        eigenvalues = [
            [value + further for value, further in zip(own, new, strict=True)]
            for own, new in zip(self.eigenvalues, other.eigenvalues, strict=True)
        ]
        return GGNCurvature(self.eigenvectors, eigenvalues)

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

    def tensors(self) -> tuple[list[Factors], list[Factors]]:
        """Return the two lists that the curvature is built from."""
        return self.eigenvectors, self.eigenvalues


CURVATURES = {"kfac": KFACCurvature, "ggn": GGNCurvature}
