"""The settings of a debiased fit."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Any

from laplace_debiased.operator import check_magnitudes
from laplace_debiased.sampling import MIN_BUDGET


@dataclass(frozen=True)
class Debiasing:
    """How directions and magnitudes are obtained.

    Args:
        magnitudes: ``"kfac"`` or ``"ggn"``.
        direction_fraction: Share of the points that give directions.
        budget: Number of points that get backward passes; None for all.
        seed: Seed of the assignment, and of sampled labels.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If an argument is out of range.
    """

    magnitudes: str = "kfac"
    direction_fraction: float = 0.5
    budget: int | None = None
    seed: int = 0

    def __post_init__(self):
        check_magnitudes(self.magnitudes)
        if not isinstance(self.direction_fraction, int | float):
            raise TypeError(
                "`direction_fraction` must be a float, "
                f"got {self.direction_fraction!r}."
            )
        if not 0 < self.direction_fraction < 1:
            raise ValueError(
                "`direction_fraction` must lie strictly between 0 and 1, "
                f"got {self.direction_fraction}."
            )
        if self.budget is not None and not _is_integer(self.budget):
            raise TypeError(f"`budget` must be None or an int, got {self.budget!r}.")
        if self.budget is not None and self.budget < MIN_BUDGET:
            raise ValueError(
                f"`budget` must be at least {MIN_BUDGET}, one point for directions and "
                f"one for magnitudes, got {self.budget}."
            )
        if not _is_integer(self.seed):
            raise TypeError(f"`seed` must be an int, got {self.seed!r}.")


def _is_integer(value: Any) -> bool:
    """NumPy's integers are integers, too; booleans are not meant."""
    return isinstance(value, Integral) and not isinstance(value, bool)
