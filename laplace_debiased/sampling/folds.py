"""Who gets backward passes, in which fold, and with which weight.

Every point that a loader can yield is assigned to a fold, or left out. The assignment
is made over sorted dataset indices by a seeded draw without replacement, so it depends
on neither the batch size nor the order in which the loader shuffles.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping, Sequence, Sized
from dataclasses import dataclass
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

from laplace_debiased.sampling.in_memory import Batches, RunLoader, Runs, shapes

MIN_POINTS = 2


@dataclass(frozen=True)
class Fold:
    """Points that estimate the curvature of all data.

    Args:
        loader: Yields the points that get backward passes.
        num_points: Their number.
        weights: Their weights ``[points]``; None if all count the same. Weighted sums
            over the points estimate sums over all data.
    """

    loader: Iterable
    num_points: int
    weights: Tensor | None = None


@dataclass(frozen=True)
class Folds:
    """Disjoint sets of points, and what they stand for.

    Args:
        folds: The folds.
        num_data: Number of points that the curvature is scaled to.
        explicit: Whether the user chose the points of each role: the first of two folds
            gives directions, the second magnitudes.
    """

    folds: tuple[Fold, ...]
    num_data: int
    explicit: bool = False

    @property
    def num_points(self) -> int:
        """Number of points in all folds."""
        return sum(fold.num_points for fold in self.folds)

    def first_batch(self) -> Any:
        """Return a batch of the first fold."""
        return next(iter(self.folds[0].loader))

    @property
    def shares(self) -> list[float]:
        """Each fold's share of the points."""
        return [fold.num_points / self.num_points for fold in self.folds]


@dataclass(frozen=True)
class Points:
    """Points of a loader, in random order.

    Args:
        loader: Yields them and others.
        indices: Their dataset indices.
        num_data: Number of points that the curvature is scaled to.
        name: The loader's name in messages.
    """

    loader: DataLoader
    indices: Tensor
    num_data: int
    name: str = "train_loader"

    def __len__(self) -> int:
        return len(self.indices)

    def first_batch(self) -> Any:
        """Return a batch of some of the points."""
        return next(iter(self.some(self.loader.batch_size or 1)))

    def some(self, num_points: int) -> DataLoader:
        """Return a loader over some of the points, at random."""
        return _loader_over_set(self.loader, self.indices[:num_points])

    def split(self, shares: Sequence[float]) -> Folds:
        """Assign each point to a fold.

        Args:
            shares: Share of the points in each fold; each fold gets at least one point.

        Returns:
            The folds.

        Raises:
            ValueError: If there are fewer points than folds.
        """
        needed = max(MIN_POINTS, len(shares))
        if len(self) < needed:
            raise ValueError(
                f"`{self.name}` has too few points, {len(self)}: at least {needed} are "
                "needed, since some give directions, others magnitudes."
            )
        parts = self.indices.split(fold_sizes(len(self), shares))
        folds = [Fold(_loader_over_set(self.loader, part), len(part)) for part in parts]
        return Folds(tuple(folds), self.num_data)


def draw_uniformly(
    loader: DataLoader, num_points: int | None, seed: int, name: str = "train_loader"
) -> Points:
    """Draw points of a loader without replacement.

    Args:
        loader: Yields the training points.
        num_points: Number of points to draw; None for all.
        seed: Seed of draw and order.
        name: The loader's name in messages.

    Returns:
        The points.

    Raises:
        ValueError: If the loader is empty or has no dataset of known size.
    """
    num_data = dataset_size(loader, name)
    loader = _indexable(loader)
    points = loader_indices(loader, name).unique()
    generator = torch.Generator().manual_seed(int(seed))
    drawn = points[torch.randperm(len(points), generator=generator)][:num_points]
    return Points(loader, drawn, num_data, name)


def fold_sizes(num_points: int, shares: Sequence[float]) -> list[int]:
    """Divide a number of points by shares, with at least one point for each.

    Args:
        num_points: The number of points, no less than there are shares.
        shares: Shares, which add up to one.

    Returns:
        Sizes that add up to the number.
    """
    ends = [round(num_points * sum(shares[: k + 1])) for k in range(len(shares))]
    for k in range(len(ends)):
        low = ends[k - 1] + 1 if k else 1
        ends[k] = min(max(ends[k], low), num_points - (len(ends) - 1 - k))
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def draw(
    scores: Tensor,
    num_points: int,
    floor: float = 0.1,
    seed: int = 0,
    strata: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Draw points with probabilities that grow with their scores.

    Inclusion probabilities are :math:`\pi_n \propto (1 - f) s_n / \sum s + f / M`,
    capped at one, and the draw is systematic: exactly ``num_points`` distinct points,
    spread evenly over strata and scores. With the weights :math:`1 / \pi_n`, weighted
    sums over the points are unbiased estimates of sums over the pool (Horvitz and
    Thompson, 1952).

    Args:
        scores: Non-negative scores ``[M]``.
        num_points: Number of points to draw, at most M.
        floor: Share f of the uniform distribution, which bounds the weights.
        seed: Seed of the draw.
        strata: Number of each point's stratum ``[M]``, such as its class: each stratum
            gets points in proportion to its scores. None for one stratum.

    Returns:
        Sorted positions in the pool, and their weights, both ``[num_points]``.

    Raises:
        ValueError: If scores are negative or not finite, there are fewer of them than
            points to draw, or the floor is out of range.
    """
    if not 0 < floor <= 1:
        raise ValueError(f"`floor` must lie in (0, 1], got {floor}.")
    if not (scores.isfinite() & (scores >= 0)).all():
        raise ValueError("`scores` must be finite and at least zero.")
    if strata is not None and strata.shape != scores.shape:
        raise ValueError(
            f"`strata` must have the shape of `scores`, {tuple(scores.shape)}, got "
            f"{tuple(strata.shape)}."
        )
    if not 0 < num_points <= len(scores):
        raise ValueError(
            f"`num_points` must lie in 1..{len(scores)}, the number of scores, got "
            f"{num_points}."
        )
    probabilities = inclusion_probabilities(scores.double().cpu(), num_points, floor)
    order = probabilities.argsort(stable=True)
    if strata is not None:
        order = order[strata.cpu()[order].argsort(stable=True)]
    generator = torch.Generator().manual_seed(int(seed))
    ticks = torch.arange(num_points, dtype=torch.float64)
    ticks += torch.rand(1, generator=generator, dtype=torch.float64)
    ends = probabilities[order].cumsum(0)
    ends *= num_points / ends[-1].clone()
    places = torch.searchsorted(ends, ticks, right=True)
    # by rounding, the last tick may lie at the very end
    positions = order[places.clamp(max=len(ends) - 1)].sort()[0]
    return positions, probabilities[positions].reciprocal()


def inclusion_probabilities(scores: Tensor, num_points: int, floor: float) -> Tensor:
    """Scale scores to probabilities that add up to the number of points.

    Args:
        scores: Non-negative scores ``[M]``.
        num_points: Number of points to draw.
        floor: Share of the uniform distribution.

    Returns:
        Probabilities ``[M]``, none above one.
    """
    uniform = torch.full_like(scores, 1 / len(scores))
    total = scores.sum()
    mixture = (1 - floor) * scores / total + floor * uniform if total > 0 else uniform
    certain = torch.zeros_like(scores, dtype=torch.bool)
    while True:
        rest = num_points - int(certain.sum())
        scaled = mixture * (rest / mixture[~certain].sum())
        probabilities = torch.where(certain, 1.0, scaled)
        above = ~certain & (probabilities > 1)
        if not above.any():
            return probabilities
        certain |= above


def explicit_folds(direction_loader: DataLoader, magnitude_loader: DataLoader) -> Folds:
    """Take two folds from two loaders.

    Args:
        direction_loader: Yields the points that give directions; the curvature is
            scaled to the size of its dataset.
        magnitude_loader: Yields the points that give magnitudes.

    Returns:
        The two folds.

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
    return Folds(
        (
            Fold(_loader_over_set(direction_loader, directions), len(directions)),
            Fold(_loader_over_set(magnitude_loader, magnitudes), len(magnitudes)),
        ),
        num_data,
        explicit=True,
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
        loader.batch_size or loader.batch_sampler.batch_size,
        collate_fn=loader.collate_fn,
        **_reading(loader),
    )


def _loader_over_set(loader: DataLoader, indices: Tensor) -> DataLoader:
    """Return a loader over points whose own order does not matter."""
    if isinstance(loader, RunLoader):
        return loader_over(loader, loader.arranged(indices))
    return loader_over(loader, indices.sort()[0])


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
    indices = torch.as_tensor(loader.dataset.indices)[positions]
    return loader_over(loader, indices, loader.dataset.dataset)


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
        is_plain = type(loader.batch_sampler) is BatchSampler
        return loader if is_plain else _listed(loader)
    return Batches(loader).loader()


def _listed(loader: DataLoader) -> DataLoader:
    """Return a loader over what a batch sampler of the user's own yields in an epoch.

    It may put together what can be stacked, such as sentences of one length. Without a
    ``collate_fn``, which is taken to join any points, a new batch begins where the
    shapes change.
    """
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
    points = Batches([batch])
    if len(points) == 0:
        raise ValueError(f"`{name}` is empty: it has no points.")
    return points.loader()
