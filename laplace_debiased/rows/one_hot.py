"""Input rows of embeddings: one-hot vectors, by the number of their one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class OneHotRows:
    """Input rows ``[batch, S, 1, d_in]``, each with a single entry that is not zero.

    Args:
        numbers: Where that entry is ``[batch, S]``.
        values: The entries ``[batch, S]``: ones, or zeros of what is padded.
        size: Number of features, d_in.
    """

    numbers: Tensor
    values: Tensor
    size: int

    @property
    def shape(self) -> torch.Size:
        """Shape of the rows."""
        return torch.Size([*self.numbers.shape, 1, self.size])

    @property
    def num_bytes(self) -> int:
        """Size in memory."""
        parts = self.numbers, self.values
        return sum(part.numel() * part.element_size() for part in parts)

    def to(self, dtype: torch.dtype) -> OneHotRows:
        """Return rows of another dtype."""
        return OneHotRows(self.numbers, self.values.to(dtype), self.size)

    def split(self, size: int) -> list[OneHotRows]:
        """Split the rows into those of some examples at a time."""
        parts = zip(self.numbers.split(size), self.values.split(size), strict=True)
        return [OneHotRows(*part, self.size) for part in parts]

    def joined(self, others: list[OneHotRows]) -> OneHotRows:
        """Append the positions of other calls."""
        parts = [self, *others]
        return OneHotRows(
            torch.cat([own.numbers for own in parts], 1),
            torch.cat([own.values for own in parts], 1),
            self.size,
        )

    def squared_lengths(self) -> Tensor:
        """Sum the squares of each example's rows ``[batch]``."""
        return self.values.square().sum(1)

    def covariance(self, weights: Tensor) -> Tensor:
        """Sum the weighted outer products of all rows, which are diagonal.

        Args:
            weights: A weight for each example ``[batch]``.

        Returns:
            The diagonal ``[d_in]``.
        """
        squares = self.values.square() * weights[:, None]
        sums = squares.new_zeros(self.size)
        return sums.index_add_(0, self.numbers.flatten(), squares.flatten())

    def compressed(self) -> tuple[Tensor, Tensor]:
        """Leave out the features that are zero in all rows.

        Returns:
            Dense rows ``[batch, S, 1, K]``, and the number of each of their K features.
        """
        numbers, places = self.numbers.unique(return_inverse=True)
        rows = self.values.new_zeros(*self.numbers.shape, len(numbers))
        rows.scatter_(2, places[:, :, None], self.values[:, :, None])
        return rows.unsqueeze(2), numbers
