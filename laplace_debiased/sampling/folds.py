"""Who gets backward passes, in which fold, and with which weight.

Every point that a loader can yield is assigned to a fold, or left out. The assignment
is made over sorted dataset indices by a seeded draw without replacement, so it depends
on neither the batch size nor the order in which the loader shuffles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from laplace_debiased.sampling.loaders import (
    base_indices,
    counted,
    loader_indices,
    loader_over_set,
    subset_of,
)
from laplace_debiased.sampling.processes import ALONE, Alone

MIN_POINTS = 2


@dataclass(frozen=True, eq=False)
class Fold:
    """Points that estimate the curvature of all data.

    Args:
        loader: Yields the points that get backward passes.
        weights: Their weights ``[points]``: weighted sums over the points estimate sums
            over all data. This is the one place where curvature is scaled to N.
        start: Number of points before these, if they are a part of a fold.
    """

    loader: DataLoader
    weights: Tensor
    start: int = 0

    @classmethod
    def of_all(cls, loader: DataLoader, num_points: int, num_data: float) -> Fold:
        """Let points stand for all data, each for as many as the others.

        Args:
            loader: Yields the points.
            num_points: Their number.
            num_data: Number of points that they stand for.

        Returns:
            The fold.
        """
        weight = num_data / num_points
        return cls(loader, torch.full((num_points,), weight, dtype=torch.float64))

    @property
    def num_points(self) -> int:
        """Number of points."""
        return len(self.weights)

    def part(self, index: int, count: int, whole_batches: bool) -> Fold | None:
        """Return one of as many parts of about the same size, which follow each other.

        Args:
            index: The number of the part.
            count: How many there are.
            whole_batches: Whether a batch of the loader must not be divided.

        Returns:
            The part, None if there is nothing for it.
        """
        if count == 1:
            return self
        unit = (self.loader.batch_size or 1) if whole_batches else 1
        num_units = -(-self.num_points // unit)
        start, end = (
            min(unit * (num_units * k // count), self.num_points)
            for k in (index, index + 1)
        )
        if start == end:
            return None
        loader = subset_of(self.loader, torch.arange(start, end))
        return Fold(loader, self.weights[start:end], start)


@dataclass(frozen=True)
class Folds:
    """Disjoint sets of points, each of which stands for all data.

    Args:
        folds: The folds.
        num_data: Number of points that they stand for.
        explicit: Whether the user chose the points of each role: the first of two folds
            gives directions, the second magnitudes.
        apart: Whether those that give magnitudes are none of the ``num_data``.
    """

    folds: tuple[Fold, ...]
    num_data: int
    explicit: bool = False
    apart: bool = False

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
    """Points of a loader, in random order, some of which are to be used.

    Args:
        loader: Yields them and others.
        order: Their dataset indices. A point's place in the order gives its fold.
        num_data: Number of points that the curvature is scaled to.
        num_points: Number of points to use.
        draw_seed: Seed of a draw of those from each fold; None for the first ones.
        name: The loader's name in messages.
    """

    loader: DataLoader
    order: Tensor
    num_data: int
    num_points: int
    draw_seed: int | None = None
    name: str = "train_loader"

    def __len__(self) -> int:
        return self.num_points

    @property
    def indices(self) -> Tensor:
        """Dataset indices of the first points, as many as are to be used."""
        return self.order[: self.num_points]

    def first_batch(self) -> Any:
        """Return a batch of some of the points."""
        return next(iter(self.some(self.loader.batch_size or 1)))

    def some(self, num_points: int) -> DataLoader:
        """Return a loader over some of the points, at random."""
        return loader_over_set(self.loader, self.indices[:num_points])

    def split(self, shares: Sequence[float]) -> Folds:
        """Assign each point to a fold, and draw from each.

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
        parts = self._parts(fold_sizes(len(self), shares))
        folds = [
            Fold.of_all(loader_over_set(self.loader, part), len(part), self.num_data)
            for part in parts
        ]
        return Folds(tuple(folds), self.num_data)

    def _parts(self, sizes: list[int]) -> list[Tensor]:
        """Draw as many points from each fold.

        The first ones are divided by size, and the others in proportion.
        """
        first = list(self.indices.split(sizes))
        if self.draw_seed is None:
            return first
        others = self.order[len(self) :]
        ends = [end * len(others) // len(self) for end in accumulate(sizes)]
        generator = torch.Generator().manual_seed(int(self.draw_seed))
        folds = [
            torch.cat(pair)
            for pair in zip(first, others.tensor_split(ends[:-1]), strict=True)
        ]
        return [
            fold[torch.randperm(len(fold), generator=generator)[:size]]
            for fold, size in zip(folds, sizes, strict=True)
        ]


def draw_uniformly(
    loader: DataLoader,
    num_points: int | None,
    seed: int,
    name: str = "train_loader",
    draw_seed: int | None = None,
    target_key: str = "labels",
    group: Alone = ALONE,
) -> Points:
    """Draw points of a loader without replacement.

    Args:
        loader: Yields the training points.
        num_points: Number of points to draw; None for all.
        seed: Seed of the order, by which a point has its fold: the same for the same
            data, since a point that changed its fold would be in two of them.
        name: The loader's name in messages.
        draw_seed: Seed of another draw from the same folds; None for the first one.
        target_key: Key of the targets in mappings.
        group: The processes whose loaders together yield the points.

    Returns:
        The points.

    Raises:
        ValueError: If the loader is empty, or its points cannot be counted.
    """
    own_seed = seed if draw_seed is None else draw_seed
    loader, num_data = counted(loader, name, target_key, num_points, own_seed, group)
    points = loader_indices(loader, name, group).unique()
    generator = torch.Generator().manual_seed(int(seed))
    order = points[torch.randperm(len(points), generator=generator)]
    order = _copies_together(loader.dataset, order)
    num_points = len(points) if num_points is None else min(num_points, len(points))
    return Points(loader, order, num_data, num_points, draw_seed, name)


def _copies_together(dataset: Dataset, order: Tensor) -> Tensor:
    """Put what a subset has several times beside its first copy, for the same fold."""
    _, points = base_indices(dataset, order)
    distinct, number = points.unique(return_inverse=True)
    if len(distinct) == len(order):
        return order
    places = torch.arange(len(order))
    first = places.new_zeros(len(distinct))
    first = first.scatter_reduce_(0, number, places, "amin", include_self=False)
    return order[first[number].argsort(stable=True)]


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


def explicit_folds(
    direction_loader: DataLoader,
    magnitude_loader: DataLoader,
    all_count: bool = False,
    target_key: str = "labels",
    group: Alone = ALONE,
) -> Folds:
    """Take two folds from two loaders.

    Args:
        direction_loader: Yields the points that give directions.
        magnitude_loader: Yields the points that give magnitudes.
        all_count: Whether the points of both are all data; otherwise the dataset of
            ``direction_loader`` is.
        target_key: Key of the targets in mappings.
        group: The processes whose loaders together yield the points.

    Returns:
        The two folds.

    Raises:
        ValueError: If a loader is empty or its points cannot be counted, or both yield
            the same point of the same dataset.
    """
    if direction_loader is magnitude_loader:
        raise ValueError("`train_loader` and `magnitude_loader` must be disjoint.")
    direction_loader, num_data = counted(
        direction_loader, "train_loader", target_key, group=group
    )
    magnitude_loader, _ = counted(
        magnitude_loader, "magnitude_loader", target_key, group=group
    )
    directions = loader_indices(direction_loader, "train_loader", group)
    magnitudes = loader_indices(magnitude_loader, "magnitude_loader", group)

    base, own = base_indices(direction_loader.dataset, directions)
    other_base, other = base_indices(magnitude_loader.dataset, magnitudes)
    if base is other_base:
        shared = int(torch.isin(own, other).sum())
        if shared:
            raise ValueError(
                "`train_loader` and `magnitude_loader` must be disjoint, but share "
                f"{shared} points of the same dataset."
            )
    if all_count:
        num_data = len(directions) + len(magnitudes)
    folds = [
        Fold.of_all(loader_over_set(loader, indices), len(indices), num_data)
        for loader, indices in (
            (direction_loader, directions),
            (magnitude_loader, magnitudes),
        )
    ]
    apart = not all_count and direction_loader.dataset is not magnitude_loader.dataset
    return Folds(tuple(folds), num_data, explicit=True, apart=apart)
