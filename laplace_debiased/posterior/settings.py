"""The settings of a debiased fit."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from laplace.curvature import CurvatureInterface
from torch import Tensor

from laplace_debiased.curvature.operator import check_magnitudes
from laplace_debiased.posterior.upstream import is_curvlinops, is_empirical
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
        fisher_rank: Number of backward passes for each point, but for one, if the
            exact ones are more; None for those.
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
        check_magnitudes(self.magnitudes)
        if self.sampling is not None:
            _check_choice("sampling", self.sampling, SAMPLING_CHOICES)
        _check_choice("estimator", self.estimator, ESTIMATOR_CHOICES)
        if self.direction_fraction != "auto":
            _check_fraction("direction_fraction", self.direction_fraction)
        if self.budget is not None:
            check_integer("budget", self.budget, MIN_BUDGET)
        if self.pool_size is not None:
            check_integer("pool_size", self.pool_size, MIN_BUDGET)
        if not 0 < self.sampling_floor <= 1:
            raise ValueError(
                f"`sampling_floor` must lie in (0, 1], got {self.sampling_floor}."
            )
        check_integer("num_folds", self.num_folds, 2)
        if self.fisher_rank is not None:
            check_integer("fisher_rank", self.fisher_rank, 1)
        check_integer("seed", self.seed)
        if not 0 <= self.decomposition_tolerance < 1:
            raise ValueError(
                "`decomposition_tolerance` must lie in [0, 1), got "
                f"{self.decomposition_tolerance}."
            )
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
        fraction = best if self.finds_share else self.direction_fraction
        assert isinstance(fraction, float)
        return [fraction, 1 - fraction]


def _check_fraction(name: str, value: Any) -> None:
    if not isinstance(value, int | float):
        raise TypeError(f"`{name}` must be a float or 'auto', got {value!r}.")
    if not 0 < value < 1:
        raise ValueError(
            f"`{name}` must lie strictly between 0 and 1, or be 'auto', got {value}."
        )


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {list(choices)}, got {value!r}.")


def check_integer(name: str, value: Any, smallest: int | None = None) -> None:
    """Refuse what is no integer, or too small a one.

    Args:
        name: The argument's name.
        value: Its value. NumPy's integers are integers, too; booleans are not meant.
        smallest: The smallest value allowed.

    Raises:
        TypeError: If it is no integer.
        ValueError: If it is too small.
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be an int, got {value!r}.")
    if smallest is not None and value < smallest:
        raise ValueError(f"`{name}` must be at least {smallest}, got {value}.")


def check_positive(name: str, value: float | Tensor) -> None:
    """Refuse numbers that are not finite and above zero.

    Args:
        name: The argument's name.
        value: Its value.

    Raises:
        ValueError: If one is not.
    """
    values = torch.as_tensor(value)
    if not (values.isfinite() & (values > 0)).all():
        raise ValueError(f"`{name}` must be finite and above zero, got {value}.")
