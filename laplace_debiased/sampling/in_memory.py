"""Points that go together in a batch.

Examples of several lengths cannot be stacked, nor can batches be joined that were
padded to different lengths. Points are therefore read in an order in which those of
equal shapes are neighbours, and a new batch begins where the shapes change.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, MutableMapping
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from laplace.utils import concatenate_rows, select_rows
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from laplace_debiased.rows.inputs import check_is_batch

Keys = tuple[Any, ...]  # lead to a value in nested mappings


@dataclass(frozen=True)
class Runs:
    """Collates points to batches, each a run of points that go together.

    Args:
        collate: Collates points that go together.
        kind: What such points agree in.
    """

    collate: Callable[[list], Any]
    kind: Callable[[Any], Hashable]

    def __call__(self, points: list) -> list:
        """Return the batches, with the points in their order."""
        return [self.collate(list(run)) for _, run in groupby(points, self.kind)]


class RunLoader(DataLoader):
    """Yields points in their order, in batches of points that go together.

    Its ``collate_fn`` is :class:`Runs`, and its sampler has points that go together as
    neighbours.
    """

    # a generator: torch's own class of iterators is private
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for batches in super().__iter__():
            yield from batches

    def arranged(self, indices: Tensor) -> Tensor:
        """Sort dataset indices as the sampler does."""
        rank = {index: k for k, index in enumerate(self.sampler)}
        return torch.tensor(sorted(indices.tolist(), key=rank.__getitem__))


def shapes(example: Any) -> Hashable:
    """Return the shapes of an example's arrays, which must agree to stack them."""
    if isinstance(example, MutableMapping):
        return tuple((key, shapes(value)) for key, value in example.items())
    if isinstance(example, tuple | list):
        return tuple(shapes(value) for value in example)
    return getattr(example, "shape", None)


class PointsInMemory(Dataset):
    """The points of batches that were read into memory.

    A point is the number of its batch and its row in it. Points of batches that can be
    joined follow each other.

    Args:
        batches: Yields ``(X, y)`` pairs or mappings, whose tensors, lists and tuples
            have a row for each point. Those of another length in any batch, and all
            other values, are shared by the points of their batch.
    """

    def __init__(self, batches: Iterable):
        read = list(batches)
        self._is_mapping = bool(read) and isinstance(read[0], MutableMapping)
        self._batches = [
            dict(_leaves(batch if self._is_mapping else dict(enumerate(batch))))
            for batch in read
        ]
        if read and not self._is_mapping:
            check_is_batch(self._batches[0][1,])
        self._sizes = [
            _mode(leaves) if self._is_mapping else len(leaves[1,])
            for leaves in self._batches
        ]
        self._shared = {
            path
            for leaves, size in zip(self._batches, self._sizes, strict=True)
            for path, value in leaves.items()
            if _length(value) != size
        }
        layouts = [self._layout(leaves) for leaves in self._batches]
        numbers = {layout: k for k, layout in enumerate(dict.fromkeys(layouts))}
        self._kinds = [numbers[layout] for layout in layouts]
        order = sorted(range(len(read)), key=self._kinds.__getitem__)
        self._points = [(k, row) for k in order for row in range(self._sizes[k])]

    def __len__(self) -> int:
        return len(self._points)

    def __getitem__(self, index: int) -> tuple[int, int]:
        return self._points[index]

    def loader(self) -> RunLoader:
        """Return a loader over the points, in batches no smaller than they were."""
        collate = Runs(self._collate, self._kind)
        return RunLoader(self, max([64, *self._sizes]), collate_fn=collate)

    def _kind(self, point: tuple[int, int]) -> int:
        return self._kinds[point[0]]

    def _layout(self, leaves: dict[Keys, Any]) -> Hashable:
        """Return what must agree to join batches: shapes, and what is shared."""
        return tuple(
            (path, _identity(value) if path in self._shared else _row_shape(value))
            for path, value in leaves.items()
        )

    def _collate(self, points: list[tuple[int, int]]) -> Any:
        """Join points whose batches have the same layout."""
        runs = [
            (number, torch.tensor([row for _, row in run]))
            for number, run in groupby(points, itemgetter(0))
        ]
        joined = dict(self._batches[runs[0][0]])
        for path in joined.keys() - self._shared:
            joined[path] = concatenate_rows(
                [
                    select_rows(self._batches[k][path], rows, self._sizes[k])
                    for k, rows in runs
                ]
            )
        batch = _nested(joined)
        return batch if self._is_mapping else tuple(batch.values())


def _leaves(entries: MutableMapping, path: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """Yield what nested mappings hold, with the keys that lead there."""
    for key, value in entries.items():
        if isinstance(value, MutableMapping):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


def _nested(leaves: dict[Keys, Any]) -> dict:
    """Undo :func:`_leaves`."""
    entries: dict = {}
    for (*path, last), value in leaves.items():
        inner = entries
        for key in path:
            inner = inner.setdefault(key, {})
        inner[last] = value
    return entries


def _length(value: Any) -> int | None:
    """Return the number of rows, if there are rows."""
    has_rows = (
        value.ndim if isinstance(value, Tensor) else isinstance(value, list | tuple)
    )
    return len(value) if has_rows else None


def _mode(leaves: dict[Keys, Any]) -> int:
    """Return the most frequent length, the first of several; zero if there is none."""
    lengths = (_length(value) for value in leaves.values())
    counts = Counter(length for length in lengths if length is not None)
    return max(counts, key=counts.__getitem__, default=0)


def _row_shape(value: Tensor | list | tuple) -> Hashable:
    return value.shape[1:] if isinstance(value, Tensor) else type(value)


def _identity(value: Any) -> Hashable:
    """Return what two equal constants have in common, or else an object with itself."""
    return value if isinstance(value, str | int | float | None) else id(value)
