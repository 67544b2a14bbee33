"""Points that go together in a batch.

Examples of several lengths cannot be stacked, nor can batches be joined that were
padded to different lengths. Points are therefore read in an order in which those of
equal shapes are neighbours, and a new batch begins where the shapes change.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, MutableMapping
from copy import copy
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from laplace.utils import concatenate_rows, select_rows
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from laplace_debiased.rows.digests import digest

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


@dataclass(frozen=True, eq=False)
class _Batch:
    """What a loader yields at a time.

    Args:
        leaves: Its values, with the keys that lead there.
        size: Number of points.
        is_mapping: Whether it is a mapping; else a pair.
        kinds: Empty mappings of the classes of those that it has, where they are no
            dictionaries, with the keys that lead there.
    """

    leaves: dict[Keys, Any]
    size: int
    is_mapping: bool
    kinds: dict[Keys, MutableMapping] = field(default_factory=dict)

    @classmethod
    def read(cls, batch: Any, target_key: str, name: str) -> _Batch:
        """Count the points of a pair or mapping by its targets.

        Raises:
            TypeError: If targets are no tensor.
            ValueError: If it is neither, its targets are missing or have no rows, or
                the inputs of a pair have other rows.
        """
        if not isinstance(batch, MutableMapping | tuple | list):
            raise ValueError(
                f"`{name}` must yield pairs (X, y) or mappings, got "
                f"{type(batch).__name__}."
            )
        is_mapping = isinstance(batch, MutableMapping)
        if not is_mapping and len(batch) > 2:
            raise ValueError(
                f"`{name}` yields {len(batch)} entries, and not pairs (X, y): several "
                "inputs go into a mapping."
            )
        entries = batch if isinstance(batch, MutableMapping) else enumerate(batch)
        leaves = dict(_leaves(dict(entries)))
        target = (target_key,) if is_mapping else (1,)
        if target not in leaves:
            raise ValueError(
                f"`{name}` yields no targets: they are expected at {target[0]!r} "
                f"(`dict_key_y` for mappings), but there are {list(leaves)}."
            )
        size = _length(leaves[target])
        if size is None and np.ndim(leaves[target]) > 0:
            kind = type(leaves[target]).__name__
            raise TypeError(
                f"`{name}` must yield targets that are a tensor, got {kind}."
            )
        if size is None:
            raise ValueError(
                f"`{name}` yields single examples, whose targets have no rows: it must "
                "yield batches. With a `DataLoader`, set its `batch_size`."
            )
        inputs = None if is_mapping else leaves.get((0,))
        if isinstance(inputs, Tensor) and _length(inputs) != size:
            raise ValueError(
                f"`{name}` yields inputs of shape {tuple(inputs.shape)} with {size} "
                "targets: both must have a row for each point."
            )
        return cls(leaves, size, is_mapping, dict(_kinds(batch)))

    def shared(self) -> set[Keys]:
        """Return the keys of what has no row for each point."""
        values = self.leaves.items()
        return {path for path, value in values if _length(value) != self.size}

    def copy(self, constants: dict[str, Tensor]) -> _Batch:
        """Copy its tensors, equal constants of all batches once.

        Args:
            constants: Those of earlier batches, by their digest.
        """
        leaves, shared = dict(self.leaves), self.shared()
        for path, value in leaves.items():
            if isinstance(value, Tensor) and path in shared:
                key = digest(value)
                if key not in constants:
                    constants[key] = value.clone()
                leaves[path] = constants[key]
            elif isinstance(value, Tensor):
                leaves[path] = value.clone()
        return _Batch(leaves, self.size, self.is_mapping, self.kinds)

    def point(self, row: int, shared: set[Keys]) -> _Batch:
        """Copy one of the points, and refer to what is shared."""
        index = torch.tensor([row])
        leaves = {
            path: value if path in shared else select_rows(value, index, self.size)
            for path, value in self.leaves.items()
        }
        return _Batch(leaves, 1, self.is_mapping, self.kinds)


class PointsInMemory(Dataset):
    """The points of batches that were read into memory, or some of them.

    A point is the number of its batch and its row in it. Points of batches that can be
    joined follow each other.

    Args:
        batches: Yields ``(X, y)`` pairs or mappings, whose tensors, lists and tuples
            have a row for each point. Those of another length in any batch, and all
            other values, are shared by the points of their batch.
        target_key: Key of the targets in mappings, whose rows are counted.
        num_kept: Number of points to keep, drawn uniformly while they are read, so that
            no more are held than these and a batch; None for all.
        seed: Seed of the draw.
        name: The loader's name in messages.

    Raises:
        TypeError: If targets are no tensor.
        ValueError: If the points of a batch cannot be counted, or a draw cannot tell
            them apart.
    """

    def __init__(
        self,
        batches: Iterable,
        target_key: str = "labels",
        num_kept: int | None = None,
        seed: int = 0,
        name: str = "train_loader",
    ):
        #: Number of points that were read.
        self.num_seen = 0
        self._shared: set[Keys] = set()
        self._largest = 0
        read = self._noted(_Batch.read(batch, target_key, name) for batch in batches)
        constants: dict[str, Tensor] = {}
        # some refill the tensors that they yield
        read = (batch.copy(constants) for batch in read)
        kept = list(read) if num_kept is None else self._drawn(read, num_kept, seed)
        self._is_mapping = bool(kept) and kept[0].is_mapping
        self._classes = kept[0].kinds if kept else {}
        self._batches = [batch.leaves for batch in kept]
        self._sizes = [batch.size for batch in kept]
        layouts = [self._layout(leaves) for leaves in self._batches]
        numbers = {layout: k for k, layout in enumerate(dict.fromkeys(layouts))}
        self._kinds = [numbers[layout] for layout in layouts]
        order = sorted(range(len(kept)), key=self._kinds.__getitem__)
        self._points = [(k, row) for k in order for row in range(self._sizes[k])]

    def _noted(self, batches: Iterable[_Batch]) -> Iterator[_Batch]:
        """Hand on batches, and note what is in them."""
        for batch in batches:
            self._shared |= batch.shared()
            self._largest = max(self._largest, batch.size)
            yield batch
            self.num_seen += batch.size

    def _drawn(
        self, batches: Iterator[_Batch], num_kept: int, seed: int
    ) -> list[_Batch]:
        """Keep points with equal probability: each further one may take a place.

        This is the reservoir of Waterman (Knuth, 1981, section 3.4.2).
        """
        generator = torch.Generator().manual_seed(int(seed))
        kept: list[_Batch] = []
        shared: set[Keys] = set()
        for batch in batches:
            if kept and self._shared != shared:
                raise ValueError(
                    f"The entries {sorted(self._shared - shared)} had a row for each "
                    "point in earlier batches, but not in this one: points of a stream "
                    "cannot be told apart. Yield what points share as a scalar or a "
                    "`str`, or fit without a `budget`."
                )
            shared = set(self._shared)
            numbers = torch.arange(self.num_seen, self.num_seen + batch.size)
            chances = torch.rand(batch.size, generator=generator, dtype=torch.float64)
            places = torch.where(
                numbers < num_kept, numbers, (chances * (numbers + 1)).long()
            )
            for row, place in enumerate(places.tolist()):
                if place < num_kept:
                    kept[place : place + 1] = [batch.point(row, shared)]
        return kept

    def __len__(self) -> int:
        return len(self._points)

    def __getitem__(self, index: int) -> tuple[int, int]:
        return self._points[index]

    def loader(self) -> RunLoader:
        """Return a loader over the points, in batches no smaller than they were."""
        collate = Runs(self._collate, self._kind)
        return RunLoader(
            self,
            max(64, self._largest),
            collate_fn=collate,
            generator=own_generator(),
        )

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
        batch = _nested(joined, self._classes)
        return batch if self._is_mapping else tuple(batch.values())


def own_generator() -> torch.Generator:
    """Return what a loader seeds its workers from, instead of the global generator."""
    return torch.Generator().manual_seed(torch.initial_seed())


def _leaves(entries: MutableMapping, path: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """Yield what nested mappings hold, with the keys that lead there."""
    for key, value in entries.items():
        if isinstance(value, MutableMapping):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


def _kinds(value: Any, path: Keys = ()) -> Iterator[tuple[Keys, MutableMapping]]:
    """Yield empty mappings of the classes that are no dictionaries."""
    is_mapping = isinstance(value, MutableMapping)
    if is_mapping and type(value) is not dict:
        kind = copy(value)
        kind.clear()
        yield path, kind
    for key, own in value.items() if is_mapping else enumerate(value):
        if isinstance(own, MutableMapping):
            yield from _kinds(own, (*path, key))


def _nested(leaves: dict[Keys, Any], kinds: dict[Keys, MutableMapping]) -> Any:
    """Undo :func:`_leaves`, with mappings of the same classes."""
    entries: MutableMapping = copy(kinds.get((), {}))
    for (*path, last), value in leaves.items():
        inner = entries
        for depth, key in enumerate(path, 1):
            if key not in inner:
                inner[key] = copy(kinds.get(tuple(path[:depth]), {}))
            inner = inner[key]
        inner[last] = value
    return entries


def _length(value: Any) -> int | None:
    """Return the number of rows, if there are rows."""
    has_rows = (
        value.ndim if isinstance(value, Tensor) else isinstance(value, list | tuple)
    )
    return len(value) if has_rows else None


def _row_shape(value: Tensor | list | tuple) -> Hashable:
    return value.shape[1:] if isinstance(value, Tensor) else type(value)


def _identity(value: Any) -> Hashable:
    """Return what two equal constants have in common, or else an object with itself."""
    if isinstance(value, Tensor):
        return digest(value)
    return value if isinstance(value, str | int | float | None) else id(value)
