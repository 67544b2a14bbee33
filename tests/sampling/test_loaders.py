"""Loaders over some of the points that a loader yields."""

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from laplace_debiased.sampling.loaders import loader_over, subset_of

TENSORS = torch.randn(30, 2, 3), torch.arange(30), torch.rand(30, dtype=torch.float64)
INDICES = torch.tensor([4, 29, 0, 7, 7, 12, 3])


class PointByPoint(Dataset):
    """Has rows that cannot be read at once."""

    def __len__(self):
        return 30

    def __getitem__(self, index):
        return tuple(own[index] for own in TENSORS)


class OwnTensorDataset(TensorDataset):
    """Changes what it returns."""

    def __getitem__(self, index):
        return tuple(-own for own in super().__getitem__(index))


def same_batches(first, second):
    pairs = zip(first, second, strict=True)
    return all(
        type(a) is type(b)
        and all(
            x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True)
        )
        for a, b in pairs
    )


@pytest.mark.parametrize("num_workers", [0, 1])
def test_rows_of_tensors_are_those_read_one_by_one(num_workers):
    read = {
        type(dataset): DataLoader(dataset, batch_size=3, num_workers=num_workers)
        for dataset in (TensorDataset(*TENSORS), PointByPoint())
    }
    ours, expected = (loader_over(own, INDICES) for own in read.values())
    assert same_batches(ours, expected)
    positions = torch.tensor([5, 1, 1, 0])
    assert same_batches(subset_of(ours, positions), subset_of(expected, positions))
    assert len(ours) == len(expected) == 3


def test_other_ways_to_read_stay():
    negative = next(iter(loader_over(DataLoader(OwnTensorDataset(*TENSORS)), INDICES)))
    assert torch.equal(negative[0], -TENSORS[0][INDICES[:1]])

    def collate(points):
        return [2 * own for own in default_collate(points)]

    loader = DataLoader(TensorDataset(*TENSORS), 4, collate_fn=collate)
    twice = next(iter(loader_over(loader, INDICES)))
    assert torch.equal(twice[0], 2 * TENSORS[0][INDICES[:4]])


def test_workers_are_started_and_awaited_as_before():
    loader = DataLoader(
        PointByPoint(),
        num_workers=1,
        multiprocessing_context="spawn",
        timeout=7,
        prefetch_factor=5,
    )
    over = loader_over(loader, INDICES)
    for own in (over, subset_of(over, torch.tensor([1, 0]))):
        assert own.multiprocessing_context.get_start_method() == "spawn"
        assert (own.timeout, own.prefetch_factor) == (7, 5)
