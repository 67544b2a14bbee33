"""What reports of values against ranks share: ranges of ranks, and a figure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_RANKS = (1, 5, 10, 20, 50, 100)


def rank_ranges(count: int) -> list[tuple[int, int]]:
    """List ranges of ranks for the rows of a table.

    Args:
        count: Number of ranks.

    Returns:
        First and last rank of each range, counted from one.
    """
    ends = [rank for rank in _RANKS if rank < count] + [count]
    return [(a + 1, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def rank_figure(num_panels: int) -> tuple[Figure, list[Axes]]:
    """Begin a figure.

    Args:
        num_panels: Number of panels, one below the other.

    Returns:
        The figure and its panels.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("`plot` needs matplotlib: install it.") from error
    figure = Figure(figsize=(6, 2.6 * num_panels), layout="constrained")
    return figure, list(figure.subplots(num_panels, 1, squeeze=False)[:, 0])


def save(figure: Figure, path: str | Path | None) -> Figure:
    """Save a figure, if there is a path, and return it."""
    if path is not None:
        figure.savefig(path, dpi=200)
    return figure
