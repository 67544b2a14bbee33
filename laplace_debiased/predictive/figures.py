"""Figures of reports, by matplotlib, which is an extra."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """Begin a figure.

    Args:
        width: Its width in inches.
        height: Its height in inches.

    Returns:
        The figure.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Figures need matplotlib: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: str | Path | None) -> Figure:
    """Save a figure, if there is a path, and return it."""
    if path is not None:
        figure.savefig(path, dpi=200)
    return figure
