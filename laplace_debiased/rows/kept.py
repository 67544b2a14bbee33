"""Rows of a pass that are kept, so that no second pass is needed."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from laplace_debiased.rows.layers import Layer
from laplace_debiased.rows.one_hot import OneHotRows
from laplace_debiased.rows.sweep import Accumulator, Nothing

Rows = list[tuple[Layer, Tensor]]
InputRows = list[tuple[Layer, Tensor | OneHotRows]]


@dataclass(frozen=True, eq=False)
class _Batch:
    """Rows of a batch of examples with weights."""

    weights: Tensor
    inputs: InputRows = field(default_factory=list)
    gradients: Rows = field(default_factory=list)


class KeptRows:
    """Hands rows on to an accumulator, and keeps them if there is room for all.

    Args:
        accumulator: What they are handed on to.
        room: Bytes that they may take.
        num_points: Number of examples that there will be.
    """

    takes_inputs = True

    def __init__(self, accumulator: Accumulator, room: int, num_points: int):
        self._accumulator: Accumulator = accumulator
        self._room, self._num_points = room, num_points
        self._batches: list[_Batch] = []
        self._num_seen, self.num_bytes, self.is_complete = 0, 0, True

    def start_batch(self, weights: Tensor) -> None:
        """See :meth:`~laplace_debiased.rows.sweep.Accumulator.start_batch`."""
        self._accumulator.start_batch(weights)
        self._num_seen += len(weights)
        if self.is_complete:
            self._batches.append(_Batch(weights))

    def add_inputs(self, layer: Layer, rows: Tensor | OneHotRows) -> None:
        """See :meth:`~laplace_debiased.rows.sweep.Accumulator.add_inputs`."""
        if self._accumulator.takes_inputs:
            self._accumulator.add_inputs(layer, rows)
        if self._has_room(rows):
            self._batches[-1].inputs.append((layer, rows))

    def add_gradients(self, layer: Layer, rows: Tensor) -> None:
        """See :meth:`~laplace_debiased.rows.sweep.Accumulator.add_gradients`."""
        self._accumulator.add_gradients(layer, rows)
        if self._has_room(rows):
            self._batches[-1].gradients.append((layer, rows))

    def _has_room(self, rows: Tensor | OneHotRows) -> bool:
        """Count rows, and give all up if those to come will not fit, either."""
        if isinstance(rows, OneHotRows):
            self.num_bytes += rows.num_bytes
        else:
            self.num_bytes += rows.numel() * rows.element_size()
        # what the examples so far may take
        room = self._room * self._num_seen / max(self._num_points, self._num_seen)
        if self.is_complete and self.num_bytes > room:
            self.is_complete = False
            self._batches.clear()
        return self.is_complete

    def release(self) -> None:
        """Forget the accumulator, which may be large: no further rows are to come."""
        self._accumulator = Nothing()

    def replay(self, accumulator: Accumulator) -> None:
        """Hand the rows on to another accumulator, once.

        Args:
            accumulator: The accumulator.
        """
        self._batches.reverse()
        while self._batches:
            batch = self._batches.pop()
            accumulator.start_batch(batch.weights)
            for layer, rows in batch.inputs:
                accumulator.add_inputs(layer, rows)
            for layer, rows in batch.gradients:
                accumulator.add_gradients(layer, rows)
