"""Loaders over some of the points that a loader yields."""

from __future__ import annotations

from collections.abc import MutableMapping, Sized
from statistics import median_high
from typing import Any

import torch
from laplace.utils import training_indices
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    default_collate,
)

from laplace_debiased.sampling.in_memory import (
    PointsInMemory,
    RunLoader,
    Runs,
    shapes,
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


def loader_over(
    loader: DataLoader, indices: Tensor, dataset: Dataset | None = None
) -> DataLoader:
    """Return a sequential loader over some points of a loader's dataset.

    laplace-torch's ``subset_loader`` does the same without workers.

    Args:
        loader: The loader.
        indices: Dataset indices of the points.
        dataset: The dataset, if it is not the loader's own.

    Returns:
        The loader.
    """
    kind = RunLoader if isinstance(loader, RunLoader) else DataLoader
    return kind(
        Subset(loader.dataset if dataset is None else dataset, indices.tolist()),
        _batch_size(loader),
        collate_fn=loader.collate_fn,
        **_reading(loader),
    )


def loader_over_set(loader: DataLoader, indices: Tensor) -> DataLoader:
    """Return a loader over points whose own order does not matter."""
    if isinstance(loader, RunLoader):
        return loader_over(loader, loader.arranged(indices))
    return loader_over(loader, indices.sort()[0])


def _batch_size(loader: DataLoader) -> int:
    """Return how many points a loader yields in a batch."""
    if loader.batch_size:
        return loader.batch_size
    assert isinstance(loader.batch_sampler, BatchSampler)
    return loader.batch_sampler.batch_size


def _reading(loader: DataLoader) -> dict[str, Any]:
    """Return how a loader reads its dataset."""
    names = ("num_workers", "pin_memory", "worker_init_fn")
    return {name: getattr(loader, name) for name in names}


def subset_of(loader: DataLoader, positions: Tensor) -> DataLoader:
    """Return a sequential loader over some of the points of a sequential loader.

    Args:
        loader: From :func:`loader_over`.
        positions: Positions of the points in it.

    Returns:
        The loader.
    """
    subset = loader.dataset
    assert isinstance(subset, Subset)
    return loader_over(
        loader, torch.as_tensor(subset.indices)[positions], subset.dataset
    )


def base_indices(dataset: Dataset, indices: Tensor) -> tuple[Dataset, Tensor]:
    """Follow nested subsets down to the dataset that holds the points."""
    while isinstance(dataset, Subset):
        indices = torch.as_tensor(list(dataset.indices))[indices]
        dataset = dataset.dataset
    return dataset, indices


def indexable(loader: DataLoader) -> DataLoader:
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
        is_plain = type(loader.batch_sampler) is BatchSampler
        return loader if is_plain else _listed(loader)
    return PointsInMemory(loader).loader()


def _listed(loader: DataLoader) -> DataLoader:
    """Return a loader over what a batch sampler of the user's own yields in an epoch.

    It may put together what can be stacked, such as sentences of one length. Without a
    ``collate_fn``, which is taken to join any points, a new batch begins where the
    shapes change.
    """
    assert loader.batch_sampler is not None
    batches = [[int(index) for index in batch] for batch in loader.batch_sampler]
    kind, collate = DataLoader, loader.collate_fn
    if collate is default_collate:
        kind, collate = RunLoader, Runs(collate, shapes)
    return kind(
        loader.dataset,
        median_high([len(batch) for batch in batches] or [1]),
        sampler=[index for batch in batches for index in batch],
        collate_fn=collate,
        **_reading(loader),
    )


def loader_of_batch(batch: Any, name: str = "batch") -> DataLoader:
    """Return a loader over the points of one batch.

    Args:
        batch: A pair ``(X, y)``, or a mapping.
        name: Its name in messages.

    Returns:
        A loader that yields them in one batch.

    Raises:
        TypeError: If it is neither.
        ValueError: If it has no points.
    """
    if not isinstance(batch, MutableMapping | tuple | list):
        raise TypeError(
            f"`{name}` must be a pair (X, y) or a mapping, got {type(batch).__name__}."
        )
    points = PointsInMemory([batch])
    if len(points) == 0:
        raise ValueError(f"`{name}` is empty: it has no points.")
    return points.loader()
