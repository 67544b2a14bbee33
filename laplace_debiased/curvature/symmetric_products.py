"""Products of a matrix with its own transpose, in little more than half the time."""

from __future__ import annotations

from torch import Tensor

# columns of a strip: products of fewer are slow
_MIN_WIDTH, _NUM_STRIPS = 128, 16


def summed_outer_products(rows: Tensor) -> Tensor:
    """Sum the outer products of rows.

    What lies below the diagonal is copied. Libraries have such products (``syrk``), but
    torch does not call them.

    Args:
        rows: ``[n, d]``.

    Returns:
        ``rows.T @ rows``, of shape ``[d, d]``.
    """
    size = rows.shape[1]
    width = max(_MIN_WIDTH, size // _NUM_STRIPS)
    if rows.device.type != "cpu" or size < 2 * width:
        return rows.T @ rows
    product = rows.new_empty(size, size)
    for start in range(0, size, width):
        end = start + width
        strip = rows[:, start:end].T @ rows[:, start:]  # [width, size - start]
        product[start:end, start:] = strip
        product[end:, start:end] = strip[:, width:].T
    return product
