"""Loaders over some of the points that a loader yields."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping, Sequence, Sized
from statistics import median_high
from typing import Any, cast

import torch
from laplace.utils import training_indices
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
)

from laplace_debiased.rows.digests import digest
from laplace_debiased.sampling.in_memory import (
    PointsInMemory,
    RunLoader,
    Runs,
    own_generator,
    shapes,
)
from laplace_debiased.sampling.processes import ALONE, Alone


class RowsOfTensors(Subset):
    """Some rows of tensors, those of a batch read at once instead of one by one."""

    # torch's loaders ask for the points of a batch by this name
    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, ...]]:
        rows = torch.tensor([self.indices[index] for index in indices])
        columns = [tensor[rows].unbind() for tensor in self.dataset.tensors]  # type: ignore[attr-defined]
        return list(zip(*columns, strict=True))


def counted(
    loader: Iterable,
    name: str,
    target_key: str = "labels",
    num_kept: int | None = None,
    seed: int = 0,
    group: Alone = ALONE,
) -> tuple[DataLoader, int]:
    """Return a loader whose points can be drawn by index, and their number.

    A ``DataLoader`` over a map-style dataset is one. What any other iterable yields is
    read once, and kept in memory as far as it is needed.

    Args:
        loader: A ``DataLoader``, or anything that yields batches and comes to an end.
        name: Its name in messages.
        target_key: Key of the targets in mappings.
        num_kept: Number of points to keep of an iterable, drawn uniformly; None for
            all.
        seed: Seed of that draw.
        group: The processes that make a fit together, which all call this.

    Returns:
        The loader, and the number of training points N: the length of the dataset, or
        the number of points that an iterable without one yields.

    Raises:
        ValueError: If there are no points, they cannot be counted, or are more than the
            length of the dataset, or there are several processes and no indices.
    """
    # accelerate's loaders yield what those do that they were made of
    loader = getattr(loader, "base_dataloader", loader)
    dataset = getattr(loader, "dataset", None)
    size = len(dataset) if isinstance(dataset, Sized) else None
    if size == 0:
        raise ValueError(f"`{name}` is empty: its dataset has no points.")
    own = _indexable(loader, group)
    if own is not None and size is not None:
        return own, size
    if group.size > 1:
        raise ValueError(
            f"`{name}` cannot be divided among processes, which could not tell whether "
            "they read the same points: use a `DataLoader` over a map-style dataset, "
            "`partial_fit`, or a fit to each part and `merge`."
        )
    points = PointsInMemory(loader, target_key, num_kept, seed, name)
    if size is not None and points.num_seen > size:
        raise ValueError(
            f"`{name}` yields {points.num_seen} points, but its dataset has length "
            f"{size}, which must be the number of training points N: a dataset of "
            "batches must tell the number of its points."
        )
    return points.loader(), points.num_seen if size is None else size


def loader_indices(loader: DataLoader, name: str, group: Alone = ALONE) -> Tensor:
    """Return the dataset indices that a loader yields in an epoch.

    Args:
        loader: A loader over an indexable dataset.
        name: Its name in messages.
        group: The processes with such a loader of the same dataset. Loaders that yield
            the same are one, and those that do not, such as with a
            ``DistributedSampler``, are parts of one, in which a point counts once.

    Returns:
        Sorted indices.

    Raises:
        ValueError: If there are none.
    """
    own = _yielded(loader)
    all_indices = group.gathered(own.sort()[0])
    if not any(len(indices) for indices in all_indices):
        raise ValueError(f"`{name}` is empty: it yields no batch.")
    if all(torch.equal(indices, all_indices[0]) for indices in all_indices):
        return all_indices[0]
    return torch.cat(all_indices).unique()


def _yielded(loader: DataLoader) -> Tensor:
    """Return the dataset indices that a loader yields, in any order."""
    sampler, size = loader.sampler, len(cast("Sized", loader.dataset))
    is_sized = isinstance(sampler, Sized)
    is_part = isinstance(sampler, SequentialSampler) and len(sampler) != size
    if is_sized and not is_part:
        return training_indices(loader) if len(loader) else torch.arange(0)
    # laplace-torch asks for the length, and takes all points if they are in order
    batches = cast("Iterable[list[int]]", loader.batch_sampler)
    return torch.tensor([int(index) for own in batches for index in own]).long()


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
    dataset = loader.dataset if dataset is None else dataset
    subset = RowsOfTensors if type(dataset) is TensorDataset else Subset
    return kind(
        subset(dataset, indices.tolist()),
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
    """Return how a loader reads its dataset, with random numbers of its own."""
    names = (
        "num_workers",
        "pin_memory",
        "worker_init_fn",
        "multiprocessing_context",
        "prefetch_factor",
        "timeout",
    )
    own = {name: getattr(loader, name) for name in names}
    return own | {"generator": own_generator()}


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


def _indexable(loader: Iterable, group: Alone) -> DataLoader | None:
    """Return a loader whose points can be drawn by index; None if it is not one."""
    if isinstance(loader, RunLoader):
        return loader
    if (
        isinstance(loader, DataLoader)
        and type(loader).__iter__ is DataLoader.__iter__
        and loader.batch_sampler is not None
        and not isinstance(loader.dataset, IterableDataset)
    ):
        is_plain = type(loader.batch_sampler) is BatchSampler
        return loader if is_plain else _listed(loader, group)
    return None


def _listed(loader: DataLoader, group: Alone) -> DataLoader:
    """Return a loader over what a batch sampler of the user's own yields in an epoch.

    It may put together what can be stacked, such as sentences of one length. Without a
    ``collate_fn``, which is taken to join any points, a new batch begins where the
    shapes change.
    """
    assert loader.batch_sampler is not None
    own = [[int(index) for index in batch] for batch in loader.batch_sampler]
    batches = [batch for part in different(group.gathered(own)) for batch in part]
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


def different(values: list, told_by: Sequence | None = None) -> list:
    """Return the first of several values if all are the same, and else all.

    Args:
        values: The values, such as those of several processes.
        told_by: What tells them apart; None for themselves.

    Returns:
        One, or all.
    """
    kinds = {digest(own) for own in (values if told_by is None else told_by)}
    return values[:1] if len(kinds) == 1 else values


def loader_of_batch(
    batch: Any,
    name: str = "batch",
    target_key: str = "labels",
    group: Alone = ALONE,
) -> DataLoader:
    """Return a loader over the points of one batch.

    Args:
        batch: A pair ``(X, y)``, or a mapping.
        name: Its name in messages.
        target_key: Key of the targets in mappings.
        group: The processes that call this, each with the same batch, or all with
            different ones, which count together.

    Returns:
        A loader that yields them in one batch, or in one from each process.

    Raises:
        TypeError: If it is neither.
        ValueError: If it has no points, or they cannot be counted.
    """
    if not isinstance(batch, MutableMapping | tuple | list):
        raise TypeError(
            f"`{name}` must be a pair (X, y) or a mapping, got {type(batch).__name__}."
        )
    batches = different(group.gathered(batch))
    points = PointsInMemory(batches, target_key, name=name)
    if len(points) == 0:
        raise ValueError(f"`{name}` is empty: it has no points.")
    return points.loader()
