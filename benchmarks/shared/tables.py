"""Means with their spread."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def deviation(values: np.ndarray | Sequence, axis: int = 0) -> np.ndarray:
    """Return the sample standard deviation, zero of a single value."""
    values = np.asarray(values)
    return values.std(axis, ddof=min(1, values.shape[axis] - 1))


def mean_and_std(values: np.ndarray, digits: int) -> str:
    """Format a mean, with the standard deviation if there are several values."""
    mean = f"{values.mean():.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {values.std(ddof=1):.{digits}f}"
