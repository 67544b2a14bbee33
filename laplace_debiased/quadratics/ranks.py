"""What reports of values against ranks share: ranges of ranks, and a figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from laplace_debiased.predictive.figures import new_figure

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
    figure = new_figure(6, 2.6 * num_panels)
    return figure, list(figure.subplots(num_panels, 1, squeeze=False)[:, 0])
