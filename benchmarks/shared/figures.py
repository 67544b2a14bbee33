"""Parts of figures, in the style of the comparison's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from laplace_debiased.comparison.style import figure_style
from shared.tables import deviation


@contextmanager
def written_figure(
    path: Path, num_columns: int, height_to_width_ratio: float = 0.9
) -> Iterator[Figure]:
    """Open a figure, which is written when the block ends.

    Args:
        path: The image file.
        num_columns: Number of panels beside each other.
        height_to_width_ratio: Height of the figure over a panel's width.

    Yields:
        The figure.
    """
    with rc_context(figure_style(num_columns, height_to_width_ratio)):
        figure = Figure()
        yield figure
        figure.savefig(path, dpi=200)


def legend_below(figure: Figure, axis: Axes, num_columns: int) -> None:
    """Add a legend of one panel's labels below all panels.

    Args:
        figure: The figure.
        axis: The panel.
        num_columns: Number of labels beside each other.
    """
    figure.legend(
        *axis.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=num_columns,
    )


def draw_range(
    axis: Axes, positions: Sequence[float], curves: np.ndarray, label: str, **style: str
) -> None:
    """Draw the median of curves, and their range shaded.

    Args:
        axis: Where to draw.
        positions: Positions ``[points]``.
        curves: A curve for each seed, ``[seeds, points]``.
        label: Name in the legend.
        **style: Options of the line.
    """
    axis.plot(positions, np.median(curves, 0), label=label, **style)
    axis.fill_between(positions, curves.min(0), curves.max(0), alpha=0.2, lw=0)


def draw_band(
    axis: Axes, positions: Sequence[float], curves: np.ndarray, label: str, **style: str
) -> None:
    """Draw the mean of curves, and their standard deviation shaded.

    Args:
        axis: Where to draw.
        positions: Positions ``[points]``.
        curves: A curve for each seed, ``[seeds, points]``.
        label: Name in the legend.
        **style: Options of the line.
    """
    mean, std = curves.mean(0), deviation(curves)
    axis.plot(positions, mean, label=label, **style)
    axis.fill_between(positions, mean - std, mean + std, alpha=0.2, lw=0)
