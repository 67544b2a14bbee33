"""Loaders that can only be iterated over."""

import gc

import pytest
import torch
from laplace.curvature import AsdlGGN, CurvlinopsGGN
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from laplace_debiased.sampling.folds import draw_uniformly, explicit_folds
from laplace_debiased.sampling.in_memory import PointsInMemory
from tests.cases import network
from tests.fits import debiased, posterior

HALVES = [0.5, 0.5]


class Example:
    """Counts how many of its kind are alive."""

    alive = peak = 0

    def __init__(self, number):
        self.number = number
        Example.alive += 1
        Example.peak = max(Example.peak, Example.alive)

    def __del__(self):
        Example.alive -= 1


def examples(count, batch_size):
    for start in range(0, count, batch_size):
        numbers = range(start, min(start + batch_size, count))
        X = torch.tensor([[float(k)] for k in numbers])
        yield {"x": X, "examples": [Example(k) for k in numbers], "labels": X[:, 0]}


@pytest.mark.parametrize("num_kept", [1, 7, 50])
def test_no_more_points_are_held_than_are_kept_and_a_batch(num_kept):
    gc.collect()
    Example.alive = Example.peak = 0
    batch_size, count = 6, 500
    points = PointsInMemory(examples(count, batch_size), num_kept=num_kept)
    # the last batch is held until the next one is complete
    assert Example.peak <= num_kept + 2 * batch_size
    assert Example.alive == len(points) == num_kept and points.num_seen == count
    for batch in points.loader():
        for x, example in zip(batch["x"], batch["examples"], strict=True):
            assert x.item() == example.number
            # no view keeps the batch alive that the point came in
            assert batch["x"].untyped_storage().nbytes() == 4 * len(batch["x"])


def test_each_point_of_a_stream_is_kept_with_the_same_probability():
    X = torch.arange(20.0)[:, None]
    batches = list(zip(X.split(3), X.split(3), strict=True))
    counts = torch.zeros(20)
    for seed in range(800):
        points = PointsInMemory(batches, num_kept=5, seed=seed)
        ((kept, _),) = points.loader()
        assert len(kept.unique()) == 5
        counts[kept.flatten().long()] += 1
    # binomial with 800 draws and probability 1/4: four standard deviations
    assert (counts - 200).abs().max() < 4 * (800 * 0.25 * 0.75) ** 0.5
    again = [PointsInMemory(batches, num_kept=5, seed=1) for _ in range(2)]
    first, second = (next(iter(points.loader()))[0] for points in again)
    assert torch.equal(first, second)


class Stream(IterableDataset):
    """Yields examples, and may tell their number."""

    def __init__(self, X, y):
        self.X, self.y = X, y

    def __iter__(self):
        return iter(list(zip(self.X, self.y, strict=True)))


class SizedStream(Stream):
    def __len__(self):
        return len(self.X)


def data(count=200):
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return X, torch.randint(3, (count,), generator=generator)


@pytest.mark.parametrize("budget", [None, 16])
def test_streams_are_fitted_like_the_points_they_yield(budget):
    X, y = data()
    # all points are in the pool
    options = {"budget": budget, "pool_size": 200}
    expected = debiased(network("mlp"), **options)
    expected.fit(DataLoader(TensorDataset(X, y), 9))
    pairs = zip(X.split(9), y.split(9), strict=True)
    for train in (
        DataLoader(Stream(X, y), 9),
        DataLoader(SizedStream(X, y), 9),
        list(pairs),
        iter([(X, y)]),
    ):
        la = debiased(network("mlp"), **options)
        la.fit(train)
        assert la.n_data == 200
        assert torch.allclose(posterior(la), posterior(expected), rtol=1e-10)


@pytest.mark.parametrize("sampling", ["curvature", "uniform"])
def test_a_drawn_stream_stands_for_all_that_was_seen(sampling):
    X, y = data(2000)
    options = {"budget": 200, "sampling": sampling, "pool_size": 400}
    all_points = debiased(network("mlp"))
    all_points.fit(DataLoader(TensorDataset(X, y), 100))
    fits = [debiased(network("mlp"), **options) for _ in range(2)]
    for la in fits:
        la.fit(DataLoader(Stream(X, y), 100))
        assert la.n_data == 2000
    assert torch.equal(posterior(fits[0]), posterior(fits[1]))
    ratio = fits[0].H.diag().sum() / all_points.H.diag().sum()
    assert 0.8 < ratio < 1.25


def test_points_are_counted_by_their_targets():
    X, y = data(30)
    # most entries are of another length
    batches = [
        {"input_ids": rows, "a": torch.eye(5), "b": torch.eye(5), "c": [0] * 5, "t": t}
        for rows, t in zip(X.split(10), y.split(10), strict=True)
    ]

    class OnMapping(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network("mlp")

        def forward(self, batch):
            assert batch["a"].shape == (5, 5)
            return self.net(batch["input_ids"])

    expected, la = debiased(OnMapping().net), debiased(OnMapping(), dict_key_y="t")
    expected.fit([(X, y)])
    la.fit(batches)
    assert la.n_data == 30
    assert torch.allclose(posterior(la), posterior(expected), rtol=1e-10)
    la.partial_fit(batches[0])
    assert la.n_data == 40
    with pytest.raises(ValueError, match="no targets: they are expected at 'labels'"):
        debiased(OnMapping()).fit(batches)


def test_a_dataset_of_batches_must_tell_its_points():
    X, y = data(30)
    batches = list(zip(X.split(10), y.split(10), strict=True))
    with pytest.raises(ValueError, match=r"yields 30 points, but .* has length 3"):
        debiased(network("mlp")).fit(DataLoader(batches, batch_size=None))
    with pytest.raises(ValueError, match="`magnitude_loader` yields 30 points"):
        explicit_folds([(X, y)], DataLoader(batches, batch_size=None))


@pytest.mark.parametrize("mapping", [False, True])
def test_single_examples_are_refused(mapping):
    X, y = data(30)
    single = list(zip(X, y, strict=True))
    if mapping:
        single = [{"input_ids": x, "labels": t} for x, t in single]
    with pytest.raises(ValueError, match=r"yields single examples.* set its `batch_"):
        debiased(network("mlp")).fit(DataLoader(single, batch_size=None))


def test_what_is_no_batch_is_refused():
    X, y = data(12)
    for batches, message in (
        ([X], "must yield pairs .* got Tensor"),
        ([(X,)], "no targets: they are expected at 1"),
        ([(X[:5], y)], r"inputs of shape \(5, 4\) with 12 targets"),
    ):
        with pytest.raises(ValueError, match=message):
            draw_uniformly(batches, None, 0)


def test_rows_that_turn_out_to_be_shared_cannot_be_drawn():
    X, y = data(10)
    batches = [
        {"x": rows, "turn": torch.eye(4), "labels": t}
        for rows, t in zip(X.split(4), y.split(4), strict=True)
    ]
    with pytest.raises(ValueError, match=r"'turn'.*had a row for each point"):
        draw_uniformly(batches, 5, 0)
    assert len(draw_uniformly(batches[::-1], 5, 0)) == 5


def state_after(loader, generator, fit):
    """Random states after a fit, or an epoch."""
    la = debiased(network("mlp"), budget=16)
    torch.manual_seed(3)
    generator.manual_seed(4)
    if fit:
        la.fit(loader)
    else:
        for _ in loader:
            pass
    return torch.get_rng_state(), generator.get_state()


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.filterwarnings("ignore:A budget")
def test_a_fit_by_index_advances_no_random_numbers(num_workers):
    generator = torch.Generator()
    loader = DataLoader(
        TensorDataset(*data(60)),
        7,
        shuffle=True,
        generator=generator,
        num_workers=num_workers,
    )
    before = torch.Generator().manual_seed(3), torch.Generator().manual_seed(4)
    after = state_after(loader, generator, fit=True)
    for own, state in zip(before, after, strict=True):
        assert torch.equal(own.get_state(), state)


@pytest.mark.parametrize("of_its_own", [True, False])
@pytest.mark.filterwarnings("ignore:A budget")
def test_a_fit_to_a_stream_advances_what_an_epoch_does(of_its_own):
    class Shuffled(DataLoader):
        def __iter__(self):
            return super().__iter__()

    generator = torch.Generator()
    loader = Shuffled(
        TensorDataset(*data(60)),
        7,
        shuffle=True,
        generator=generator if of_its_own else None,
    )
    fit, epoch = (state_after(loader, generator, fit) for fit in (True, False))
    assert all(torch.equal(*pair) for pair in zip(fit, epoch, strict=True))


def test_a_sampler_that_tells_its_indices_by_an_epoch_is_read_once():
    generator = torch.Generator()
    dataset = TensorDataset(*data(60))
    sampler = torch.utils.data.RandomSampler(
        dataset, replacement=True, generator=generator
    )
    loader = DataLoader(dataset, 7, sampler=sampler)
    fit, epoch = (state_after(loader, generator, fit)[1] for fit in (True, False))
    assert torch.equal(fit, epoch)


@pytest.mark.parametrize("backend", [CurvlinopsGGN, AsdlGGN])
def test_an_index_must_give_one_example(backend):
    X, y = data(30)
    batches = list(zip(X.float().split(5), y.split(5), strict=True))
    loader = DataLoader(batches, 1, collate_fn=lambda batches: batches[0])
    with pytest.raises(ValueError, match="examples: one each is needed"):
        debiased(network("mlp").float(), backend=backend).fit(loader)
