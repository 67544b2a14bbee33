"""Products of rows with a matrix, as one product of two matrices."""

from __future__ import annotations

from torch import Tensor


def rows_times(rows: Tensor, matrix: Tensor) -> Tensor:
    """Multiply rows by a matrix.

    Rows that are no view of one matrix, such as those of an attention, whose first axis
    is the sequence, are copied: torch would multiply one after the other.

    Args:
        rows: Rows ``[..., d]``.
        matrix: The matrix ``[d, k]``.

    Returns:
        Their products ``[..., k]``.
    """
    if rows.ndim < 3:
        return rows @ matrix
    return (rows.flatten(0, -2) @ matrix).unflatten(0, rows.shape[:-1])
