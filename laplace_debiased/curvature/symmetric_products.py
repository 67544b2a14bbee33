"""Products of a matrix with its own transpose, in little more than half the time."""

from __future__ import annotations

import torch
from torch import Tensor

# columns of a strip: products of fewer are slow
_MIN_WIDTH, _NUM_STRIPS = 128, 16
# rows of a product: fewer wait for others
_MIN_ROWS = 1024


class Sums:
    """Sums in double precision, each with a name."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._waiting: dict[str, list[Tensor]] = {}

    def add(self, name: str, term: Tensor) -> None:
        """Add a term.

        Args:
            name: Name of the sum.
            term: The term, always of one shape.
        """
        if name in self._sums:
            self._sums[name] += term
        else:
            self._sums[name] = term.double()

    def add_outer_products(self, name: str, rows: Tensor) -> None:
        """Add the outer products of rows, once there are enough of them.

        Args:
            name: Name of the sum.
            rows: ``[n, d]``, which must not change later.
        """
        waiting = self._waiting.setdefault(name, [])
        waiting.append(rows)
        if sum(map(len, waiting)) >= _MIN_ROWS:
            self._multiply(name)

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums by name; what is done to this mapping is done to them."""
        for name in list(self._waiting):
            self._multiply(name)
        return self._sums

    def _multiply(self, name: str) -> None:
        rows = self._waiting.pop(name)
        joined = torch.cat(rows) if len(rows) > 1 else rows[0]
        self.add(name, summed_outer_products(joined))


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
