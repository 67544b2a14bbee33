"""From folds of points to debiased curvature."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from laplace_debiased.curvature.eigenbasis import Factors, decompose, eigendecompose
from laplace_debiased.curvature.streams import (
    GGNCurvature,
    KFACCurvature,
    add_data,
    average,
    scale_gradients,
    without,
)
from laplace_debiased.posterior.sampling_error import SamplingError
from laplace_debiased.posterior.sources import CurvatureSource
from laplace_debiased.rows.seeds import mixed_seed
from laplace_debiased.rows.sweep import SweepSummary, at_least_single
from laplace_debiased.sampling.folds import Fold, Folds, draw, fold_sizes, subset_of


@dataclass(frozen=True)
class Estimate:
    """What a fit measures.

    Args:
        curvature: The curvature, scaled to all data.
        loss: The negative log likelihood, scaled to all data.
        num_outputs: Number of network outputs.
        error: The sampling error of both, None if the backend does not tell.
    """

    curvature: KFACCurvature | GGNCurvature
    loss: Tensor
    num_outputs: int
    error: SamplingError | None

    def merge(self, other: Estimate, share: float) -> Estimate:
        """Add further data.

        Args:
            other: The estimate from the further data.
            share: Number of points here, as a share of all.

        Returns:
            The estimate for all data.
        """
        return Estimate(
            self.curvature.merge(other.curvature, share),
            self.loss + other.loss,
            other.num_outputs,
            self.error and other.error and self.error.merge(other.error),
        )

    def scaled(self, factor: float, decay: float = 1.0) -> Estimate:
        """Scale curvature and loss to more or fewer data.

        Args:
            factor: The factor.
            decay: Weight of the data in the factor; the rest changes their number.

        Returns:
            The scaled estimate.
        """
        return Estimate(
            self.curvature.scaled(factor),
            factor * self.loss,
            self.num_outputs,
            self.error and self.error.scaled(factor, decay),
        )


@dataclass(frozen=True)
class Earlier:
    """What earlier points contribute to the directions of all.

    Args:
        factors: Their Kronecker factors, G scaled to their number.
        share: Their number, as a share of all.
    """

    factors: list[Factors]
    share: float


class Estimator:
    """Measures debiased curvature.

    Args:
        source: Measures curvature on given points.
        folds: The points.
        cross_fit: Whether each fold gives directions and magnitudes; otherwise the
            first of two folds gives directions and the second magnitudes.
    """

    def __init__(self, source: CurvatureSource, folds: Folds, cross_fit: bool):
        self._source, self._cross_fit = source, cross_fit
        self._folds, self._num_data = folds.folds, folds.num_data
        self._shares = folds.shares
        self._surveyed: list[list[Factors]] | None = None
        self._surveys: list[SweepSummary] = []
        self._summaries: list[SweepSummary] = []
        self._earlier: Earlier | None = None

    def draw(self, num_points: int, seed: int, floor: float = 0.1) -> None:
        """Draw points from the folds with probabilities that grow with their curvature.

        The score of a point is the trace of its output curvature, which takes a forward
        pass. Classes are strata. All points of the folds give input covariances and the
        loss.

        Args:
            num_points: Number of points to draw from all folds together.
            seed: Seed of the draw.
            floor: Share of the uniform distribution in the probabilities.
        """
        sizes = fold_sizes(num_points, self._shares)
        drawn, surveyed = [], []
        for k, (pool, size) in enumerate(zip(self._folds, sizes, strict=True)):
            factors, summary = self._source.survey(pool.loader)
            scale = self._num_data / pool.num_points
            positions, weights = draw(
                summary.traces,
                size,
                floor,
                seed=mixed_seed(seed, k),
                strata=summary.classes,
            )
            loader = subset_of(pool.loader, positions)
            drawn.append(Fold(loader, size, scale * weights))
            surveyed.append(factors)
            self._surveys.append(replace(summary, loss=scale * summary.loss))
        self._folds, self._surveyed = tuple(drawn), surveyed

    def kfac(self) -> Estimate:
        """Measure curvature with ``kfac`` magnitudes."""
        folds = [self._kfacs(k) for k in range(len(self._folds))]
        surveyed = self._surveyed is not None
        return self._estimate(
            KFACCurvature(folds, self._shares, self._cross_fit, surveyed)
        )

    def ggn(self, earlier: Earlier | None = None) -> Estimate:
        """Measure curvature with ``ggn`` magnitudes.

        Args:
            earlier: What earlier points contribute to the directions.

        Returns:
            The estimate of these points alone, along directions of all.
        """
        self._earlier = earlier
        return self._estimate(
            self._cross_fit_ggn() if self._cross_fit else self._two_batch_ggn()
        )

    def _two_batch_ggn(self) -> GGNCurvature:
        directions = self._with_earlier(self._kfacs(0))
        eigenvectors, factor_eigenvalues = eigendecompose(directions, fast=True)
        curvatures = self._curvatures(1, eigenvectors)
        return GGNCurvature(eigenvectors, curvatures, factor_eigenvalues)

    def _cross_fit_ggn(self) -> GGNCurvature:
        """Measure each fold along the directions of the others."""
        indices = range(len(self._folds))
        kfacs = [self._kfacs(k) for k in indices]
        self._summaries.clear()  # the same points again
        mean = self._with_earlier(average(kfacs, self._shares))
        eigenvectors, factor_eigenvalues = eigendecompose(mean, fast=True)
        measured = [
            self._curvatures(k, self._held_out_directions(kfacs, k, eigenvectors))
            for k in indices
        ]
        curvatures = average(measured, self._shares)
        return GGNCurvature(eigenvectors, curvatures, factor_eigenvalues)

    def _held_out_directions(
        self, kfacs: list[list[Factors]], index: int, eigenvectors: list[Factors]
    ) -> list[Factors]:
        """Compute the directions of all points but those of a fold.

        Input directions that a pool gave are those of all its points, of which the
        measured ones are a small part.
        """
        others = average(without(kfacs, index), without(self._shares, index))
        others = self._with_earlier(others)
        if self._surveyed is None:
            return decompose(others, fast=True)
        gradients = decompose([[G] for G, *_ in others], fast=True)
        pairs = zip(gradients, eigenvectors, strict=True)
        return [[U, *inputs] for (U,), (_, *inputs) in pairs]

    def _with_earlier(self, factors: list[Factors]) -> list[Factors]:
        """Add the factors of earlier points."""
        if self._earlier is None:
            return factors
        return add_data(self._earlier.factors, factors, self._earlier.share)

    def _kfacs(self, index: int) -> list[Factors]:
        """Compute the factors of a fold, scaled to all data."""
        fold = self._folds[index]
        kfacs, summary = self._source.kfacs(fold)
        kfacs = scale_gradients(self._checked(kfacs), self._note(summary, fold))
        if self._surveyed is None:
            return kfacs
        pairs = zip(kfacs, self._surveyed[index], strict=True)
        return [[G, *As] for (G, *_), (_, *As) in pairs]

    def _curvatures(self, index: int, eigenvectors: list[Factors]) -> list[Factors]:
        """Measure a fold's curvature along directions, scaled to all data."""
        fold = self._folds[index]
        curvatures, summary = self._source.directional_curvatures(fold, eigenvectors)
        return scale_gradients(self._checked(curvatures), self._note(summary, fold))

    def _checked(self, kfacs: list[Factors]) -> list[Factors]:
        """Refuse curvature that overflowed; turn half precision into single."""
        if not all(factor.isfinite().all() for own in kfacs for factor in own):
            raise ValueError(
                f"Curvature is not finite in {self._source.params[0].dtype}: use a "
                "model in float32 or bfloat16."
            )
        return [[at_least_single(factor) for factor in own] for own in kfacs]

    def _note(self, summary: SweepSummary, fold: Fold) -> float:
        """Keep a summary, scaled to all data; return the scale."""
        scale = self._num_data / fold.num_points if fold.weights is None else 1.0
        contributions = summary.contributions
        self._summaries.append(
            replace(
                summary,
                loss=scale * at_least_single(summary.loss),
                contributions=None if contributions is None else scale * contributions,
            )
        )
        return scale

    def _estimate(self, curvature: KFACCurvature | GGNCurvature) -> Estimate:
        seen = self._surveys or self._summaries
        pairs = zip(self._shares, seen, strict=True)
        loss = sum(share * summary.loss for share, summary in pairs)
        num_outputs = self._summaries[0].num_outputs
        return Estimate(curvature, loss, num_outputs, self._error(seen))

    def _error(self, seen: list[SweepSummary]) -> SamplingError | None:
        if not self._source.takes_weights:
            return None
        measured, shares, pools = self._summaries, self._shares, self._surveys
        if not self._cross_fit:  # only the second fold gives magnitudes
            measured, shares, pools = measured[1:], [1.0], pools[1:]
        pairs = zip(shares, measured, strict=True)
        return SamplingError.of_points(
            self._source.layers,
            torch.cat([share * summary.contributions for share, summary in pairs]),
            torch.cat([summary.losses for summary in seen]),
            self._num_data,
            torch.cat([pool.traces for pool in pools]) if pools else None,
        )
