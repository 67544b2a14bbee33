"""Who gives directions, who gives magnitudes.

Every point that a loader can yield is assigned to one of the two roles. The assignment
is made over sorted dataset indices by a seeded draw without replacement, so it depends
on neither the batch size nor the order in which the loader shuffles.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping, Sized
from dataclasses import dataclass
from typing import Any

import torch
from laplace.utils import training_indices
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

MIN_BUDGET = 2


@dataclass(frozen=True)
class Roles:
    """The two data sources of a debiased fit.

    Args:
        directions: Loader of the points that give directions.
        magnitudes: Loader of the points that give magnitudes.
        num_directions: Number of points in ``directions``.
        num_magnitudes: Number of points in ``magnitudes``.
        num_data: Number of points that the curvature is scaled to.
    """

    directions: Iterable
    magnitudes: Iterable
    num_directions: int
    num_magnitudes: int
    num_data: int


def split_roles(
    loader: DataLoader, direction_fraction: float, budget: int | None, seed: int
) -> Roles:
    """Assign each point of a loader to one of the two roles.

    Args:
        loader: Yields the training points.
        direction_fraction: Share of the points that give directions; each role gets at
            least one point.
        budget: Number of points to use, drawn uniformly; None for all.
        seed: Seed of draw and assignment.

    Returns:
        The two data sources.

    Raises:
        ValueError: If the loader is empty, yields a single point, or has no dataset of
            known size.
    """
    num_data = dataset_size(loader, "train_loader")
    loader = _indexable(loader)
    points = loader_indices(loader, "train_loader").unique()
    if len(points) < MIN_BUDGET:
        raise ValueError(
            f"`train_loader` yields {len(points)} point, but at least {MIN_BUDGET} are "
            "needed: one gives directions, another magnitudes."
        )
    generator = torch.Generator().manual_seed(int(seed))
    drawn = points[torch.randperm(len(points), generator=generator)][:budget]
    count = round(direction_fraction * len(drawn))
    count = min(max(count, 1), len(drawn) - 1)
    directions, magnitudes = drawn[:count].sort()[0], drawn[count:].sort()[0]
    return Roles(
        _loader_of(loader, directions),
        _loader_of(loader, magnitudes),
        len(directions),
        len(magnitudes),
        num_data,
    )


def explicit_roles(direction_loader: DataLoader, magnitude_loader: DataLoader) -> Roles:
    """Take the two roles from two loaders.

    Args:
        direction_loader: Yields the points that give directions; the curvature is
            scaled to the size of its dataset.
        magnitude_loader: Yields the points that give magnitudes.

    Returns:
        The two data sources.

    Raises:
        ValueError: If a loader is empty or has no dataset of known size, or both yield
            the same point of the same dataset.
    """
    if direction_loader is magnitude_loader:
        raise ValueError("`train_loader` and `magnitude_loader` must be disjoint.")
    num_data = dataset_size(direction_loader, "train_loader")
    dataset_size(magnitude_loader, "magnitude_loader")
    direction_loader = _indexable(direction_loader)
    magnitude_loader = _indexable(magnitude_loader)
    directions = loader_indices(direction_loader, "train_loader")
    magnitudes = loader_indices(magnitude_loader, "magnitude_loader")

    base, own = _base_indices(direction_loader.dataset, directions)
    other_base, other = _base_indices(magnitude_loader.dataset, magnitudes)
    if base is other_base:
        shared = int(torch.isin(own, other).sum())
        if shared:
            raise ValueError(
                "`train_loader` and `magnitude_loader` must be disjoint, but share "
                f"{shared} points of the same dataset."
            )
    return Roles(
        _loader_of(direction_loader, directions),
        _loader_of(magnitude_loader, magnitudes),
        len(directions),
        len(magnitudes),
        num_data,
    )


def dataset_size(loader: DataLoader, name: str) -> int:
    """Return the number of points in a loader's dataset.

    Args:
        loader: The loader.
        name: Its name in messages.

    Returns:
        The number of points, N.

    Raises:
        ValueError: If there is no dataset of known, positive size.
    """
    dataset = getattr(loader, "dataset", None)
    if not isinstance(dataset, Sized):
        raise ValueError(
            f"`{name}` must have a `dataset` with a length, which is the number of "
            f"training points N; got {type(loader).__name__} with dataset "
            f"{type(dataset).__name__}."
        )
    if len(dataset) == 0:
        raise ValueError(f"`{name}` is empty: its dataset has no points.")
    return len(dataset)


def loader_indices(loader: DataLoader, name: str) -> Tensor:
    """Return the dataset indices that a loader yields in an epoch.

    Args:
        loader: A loader over an indexable dataset.
        name: Its name in messages.

    Returns:
        Sorted indices.

    Raises:
        ValueError: If there are none.
    """
    if len(loader) == 0:
        raise ValueError(f"`{name}` is empty: it yields no batch.")
    return training_indices(loader).sort()[0]


def _loader_of(loader: DataLoader, indices: Tensor) -> DataLoader:
    """Return a sequential loader over some points of a loader's dataset.

    laplace-torch's ``subset_loader`` does the same without workers.
    """
    batch_size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", 1)
    return DataLoader(
        Subset(loader.dataset, indices.tolist()),
        batch_size,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
    )


def _base_indices(dataset: Dataset, indices: Tensor) -> tuple[Dataset, Tensor]:
    """Follow nested subsets down to the dataset that holds the points."""
    while isinstance(dataset, Subset):
        indices = torch.as_tensor(list(dataset.indices))[indices]
        dataset = dataset.dataset
    return dataset, indices


def _indexable(loader: DataLoader) -> DataLoader:
    """Return a loader whose points can be drawn by index.

    A ``DataLoader`` over a map-style dataset is one. What any other iterable yields is
    read once and kept in memory.
    """
    if (
        isinstance(loader, DataLoader)
        and type(loader).__iter__ is DataLoader.__iter__
        and loader.batch_sampler is not None
        and not isinstance(loader.dataset, IterableDataset)
    ):
        return loader
    batches = _Batches(loader)
    return DataLoader(batches, batch_size=batches.largest, collate_fn=batches.collate)


class _Batches(Dataset):
    """The points of batches that were read into memory.

    Args:
        batches: Yields ``(X, y)`` pairs or mappings of tensors.
    """

    def __init__(self, batches: Iterable):
        self._points = [point for batch in batches for point in _points(batch)]
        sizes = [_batch_size(batch) for batch in self._points]
        self.largest = max(64, *sizes) if sizes else 1

    def __len__(self) -> int:
        return len(self._points)

    def __getitem__(self, index: int) -> Any:
        return self._points[index]

    @staticmethod
    def collate(points: list) -> Any:
        """Join points, each a batch of one."""
        if isinstance(points[0], MutableMapping):
            return {key: _join([point[key] for point in points]) for key in points[0]}
        return tuple(_join(list(parts)) for parts in zip(*points, strict=True))


def _join(values: list) -> Any:
    return torch.cat(values) if isinstance(values[0], Tensor) else values[0]


def _batch_size(batch: Any) -> int:
    values = batch.values() if isinstance(batch, MutableMapping) else batch
    return next(len(value) for value in values if isinstance(value, Tensor))


def _points(batch: Any) -> Iterator[Any]:
    """Yield the points of a batch, each as a batch of one."""

    def row(value: Any, index: int) -> Any:
        return value[index : index + 1] if isinstance(value, Tensor) else value

    for index in range(_batch_size(batch)):
        if isinstance(batch, MutableMapping):
            yield {key: row(value, index) for key, value in batch.items()}
        else:
            yield tuple(row(value, index) for value in batch)
