"""Uses of a table of embeddings: a matrix that multiplies one-hot rows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from laplace_debiased.rows.matrix_uses import positions_of_vectors
from laplace_debiased.rows.one_hot import OneHotRows
from laplace_debiased.rows.uses import Choice, Layout, MatrixUse


@dataclass(frozen=True, eq=False)
class EmbeddingUse(MatrixUse):
    """``F.embedding``: each number in the input is a position.

    The table is stored as ``[d_in, d_out]``.
    """

    padding_idx: int | None = None
    max_norm: float | None = None
    norm_type: float = 2.0
    scale_grad_by_freq: bool = False
    sparse: bool = False

    @property
    def is_transposed(self) -> bool:
        """See :attr:`MatrixUse.is_transposed`."""
        return True

    @property
    def axes(self) -> range:
        """See :attr:`Use.axes`."""
        return range(self.input.ndim)

    def input_rows(
        self, layout: Layout, batch_size: int, choice: Choice | None = None
    ) -> OneHotRows:
        """See :meth:`MatrixUse.input_rows`; all positions are cheap."""
        assert self.weight is not None
        numbers = layout.split(self.input, batch_size).flatten(1).long()
        values = self.weight.new_ones(()).expand(numbers.shape)
        if self.padding_idx is not None:
            padding = self.padding_idx % len(self.weight)
            values = (numbers != padding).to(self.weight.dtype)
        return OneHotRows(numbers, values, len(self.weight))

    def gradient_rows(
        self, gradient: Tensor, key: str, layout: Layout, batch_size: int
    ) -> Tensor:
        """See :meth:`Use.gradient_rows`."""
        return positions_of_vectors(gradient, layout, batch_size)
