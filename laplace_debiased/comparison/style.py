"""The style that all figures share."""

from __future__ import annotations

from typing import Any

from tueplots import axes, figsizes, fontsizes


def figure_style(
    num_columns: int, height_to_width_ratio: float = 0.9
) -> dict[Any, Any]:
    """Return matplotlib's settings for a row of panels.

    Args:
        num_columns: Number of panels beside each other.
        height_to_width_ratio: Height of a panel over its width.

    Returns:
        The settings, for ``matplotlib.rc_context``.
    """
    return {
        **figsizes.neurips2023(
            ncols=num_columns,
            rel_width=1.4,
            height_to_width_ratio=height_to_width_ratio,
        ),
        **fontsizes.neurips2023(),
        **axes.lines(),
        **axes.grid(),
        "axes.grid": True,
    }
