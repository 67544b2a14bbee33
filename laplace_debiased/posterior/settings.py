"""The settings of a debiased fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from laplace.curvature import CurvatureInterface

from laplace_debiased.curvature.streams import CURVATURE_TYPES
from laplace_debiased.posterior.upstream import is_curvlinops, is_empirical
from laplace_debiased.rows.checks import check_between, check_choice, check_integer
from laplace_debiased.sampling.folds import Folds

MIN_BUDGET = 8
POOL_FACTOR = 32
# with few backward passes a point there are more points, and the pool stays what it was
POOL_FACTOR_OF_FEW = 8
SAMPLING_CHOICES = ("curvature", "uniform")
ESTIMATOR_CHOICES = ("two_batch", "cross_fit")
DECOMPOSITION_TOLERANCE = 3e-3


@dataclass(frozen=True)
class Settings:
    """How directions and magnitudes are obtained.

    Args:
        magnitudes: ``"kfac"`` or ``"ggn"``.
        direction_fraction: Share of the points that give directions, with two batches;
            ``"auto"`` for the best one by theory.
        budget: Number of points that get backward passes; None for all.
        sampling: How the budget is drawn: ``"curvature"`` or ``"uniform"``; None for
            the former if the backend allows it.
        pool_size: Number of points that curvature sampling draws from; None for
            ``POOL_FACTOR`` times the budget, or ``POOL_FACTOR_OF_FEW`` with a rank.
        sampling_floor: Share of the uniform distribution in curvature sampling, in
            (0, 1], which bounds the weights.
        estimator: ``"two_batch"`` or ``"cross_fit"``.
        num_folds: Number of folds of ``"cross_fit"``.
        fisher_rank: Number of columns of the output curvature's square root that are
            kept for each point, which takes one backward pass more; None for all.
        seed: Seed of the assignment, and of sampled labels.
        decomposition_tolerance: How far a factor of thousands of rows may be, as a
            share of its norm, from what is decomposed, which is isotropic but for its
            leading directions; zero to decompose all factors in full.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If an argument is out of range.
    """

    magnitudes: str = "kfac"
    direction_fraction: float | str = 0.5
    budget: int | None = None
    sampling: str | None = None
    pool_size: int | None = None
    sampling_floor: float = 0.1
    estimator: str = "cross_fit"
    num_folds: int = 2
    fisher_rank: int | None = None
    seed: int = 0
    decomposition_tolerance: float = DECOMPOSITION_TOLERANCE

    def __post_init__(self):
        check_choice("magnitudes", self.magnitudes, CURVATURE_TYPES)
        if self.sampling is not None:
            check_choice("sampling", self.sampling, SAMPLING_CHOICES)
        check_choice("estimator", self.estimator, ESTIMATOR_CHOICES)
        if self.direction_fraction != "auto":
            _check_fraction(self.direction_fraction)
        if self.budget is not None:
            check_integer("budget", self.budget, MIN_BUDGET)
        if self.pool_size is not None:
            check_integer("pool_size", self.pool_size, MIN_BUDGET)
        check_between("sampling_floor", self.sampling_floor, "(0, 1]")
        check_integer("num_folds", self.num_folds, 2)
        if self.fisher_rank is not None:
            check_integer("fisher_rank", self.fisher_rank, 1)
        check_integer("seed", self.seed)
        tolerance = self.decomposition_tolerance
        check_between("decomposition_tolerance", tolerance, "[0, 1)")
        if self.budget is not None and self.num_folds > self.budget:
            raise ValueError(
                f"`num_folds` must be at most `budget`, got {self.num_folds} folds for "
                f"{self.budget} points."
            )

    def check_damping(self, damping: bool) -> None:
        """Refuse laplace-torch's damping where eigenvalues do not factor."""
        if damping and self.magnitudes == "ggn":
            raise ValueError(
                "`damping=True` needs factored eigenvalues: use `magnitudes='kfac'`."
            )

    def check_backend(
        self, backend: type[CurvatureInterface], stochastic: bool
    ) -> None:
        """Refuse settings that a backend does not support.

        Args:
            backend: The backend.
            stochastic: Whether it samples labels.

        Raises:
            ValueError: If a setting needs another backend.
        """
        has_rows = is_curvlinops(backend)
        if self.magnitudes == "ggn" and not has_rows:
            raise ValueError(
                "`magnitudes='ggn'` needs a curvlinops backend, got "
                f"{backend.__name__}: use `CurvlinopsGGN` or `magnitudes='kfac'`."
            )
        if self.sampling == "curvature" and not has_rows:
            raise ValueError(
                "`sampling='curvature'` needs a curvlinops backend, got "
                f"{backend.__name__}: use `CurvlinopsGGN` or `sampling='uniform'`."
            )
        if self.fisher_rank is None:
            return
        if not has_rows or is_empirical(backend):
            raise ValueError(
                f"`fisher_rank` needs `CurvlinopsGGN`, got {backend.__name__}."
            )
        if stochastic:
            raise ValueError(
                "`fisher_rank` needs exact output curvature: it does not go with "
                "`stochastic=True`, which samples labels."
            )

    @property
    def num_candidates(self) -> int | None:
        """Number of points that a budget is drawn from by curvature."""
        if self.budget is None:
            return None
        if self.pool_size is None:
            few = self.fisher_rank is not None
            return (POOL_FACTOR_OF_FEW if few else POOL_FACTOR) * self.budget
        return max(self.pool_size, self.budget)

    @property
    def cross_fit(self) -> bool:
        """Whether each fold gives directions and magnitudes."""
        return self.estimator == "cross_fit"

    def measures_again(self, folds: Folds) -> bool:
        """Whether points that give directions are measured along others' directions.

        Args:
            folds: The points.

        Returns:
            Whether they are, so that they would need two passes.
        """
        return self.magnitudes == "ggn" and self.cross_fit and not folds.explicit

    @property
    def finds_share(self) -> bool:
        """Whether the share of the points that give directions is to be found."""
        return not self.cross_fit and self.direction_fraction == "auto"

    def draws(self, backend: type[CurvatureInterface]) -> bool:
        """Whether points are drawn by their curvature.

        Args:
            backend: The backend.

        Returns:
            Whether they are.
        """
        if self.sampling is None:
            return is_curvlinops(backend)
        return self.sampling == "curvature"

    def num_used(self, folds: Folds) -> int:
        """Number of points that get backward passes.

        Args:
            folds: The points to use or to draw from.

        Returns:
            The number.
        """
        if folds.explicit or self.budget is None:
            return folds.num_points
        return min(self.budget, folds.num_points)

    def shares(self, best: float | None = None) -> list[float]:
        """Return the share of the points in each fold.

        Args:
            best: The share that ``"auto"`` stands for; needed only then.

        Returns:
            The shares.
        """
        if self.cross_fit:
            return [1 / self.num_folds] * self.num_folds
        share = best if self.finds_share else self.direction_fraction
        assert share is not None
        return [float(share), 1 - float(share)]


def _check_fraction(value: Any) -> None:
    if isinstance(value, str):
        raise TypeError(
            f"`direction_fraction` must be a number or 'auto', got {value!r}."
        )
    check_between("direction_fraction", value, "(0, 1)")
