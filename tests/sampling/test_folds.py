from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils.data import (
    DataLoader,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)

from laplace_debiased.sampling.draw import draw_points, inclusion_probabilities
from laplace_debiased.sampling.folds import draw_uniformly, explicit_folds, fold_sizes
from laplace_debiased.sampling.loaders import subset_of

SIZE = 20
HALVES = [0.5, 0.5]


@pytest.fixture
def dataset():
    return TensorDataset(torch.arange(SIZE).float()[:, None], torch.zeros(SIZE))


def points(loader):
    return [int(x) for X, _ in loader for x in X.flatten()]


def all_points(folds):
    return [point for fold in folds.folds for point in points(fold.loader)]


def roles(loader, fraction=0.5, budget=None, seed=0):
    folds = draw_uniformly(loader, budget, seed).split([fraction, 1 - fraction]).folds
    indices = [points(fold.loader) for fold in folds]
    assert [len(own) for own in indices] == [fold.num_points for fold in folds]
    return indices


@pytest.mark.parametrize("fraction", [0.01, 0.25, 0.5, 0.8, 0.99])
@pytest.mark.parametrize("batch_size", [1, 3, SIZE, 100])
def test_each_point_has_one_role_in_the_shares_asked_for(dataset, batch_size, fraction):
    directions, magnitudes = roles(DataLoader(dataset, batch_size), fraction)
    assert sorted(directions + magnitudes) == list(range(SIZE))
    expected = min(max(round(fraction * SIZE), 1), SIZE - 1)
    assert len(directions) == expected


def test_roles_depend_on_the_seed_only(dataset):
    expected = roles(DataLoader(dataset, batch_size=3))
    for loader in (
        DataLoader(dataset, batch_size=1),
        DataLoader(dataset, batch_size=SIZE),
        DataLoader(dataset, batch_size=4, shuffle=True),
    ):
        assert roles(loader) == expected
    assert roles(DataLoader(dataset), seed=1) != expected


def test_drawing_does_not_touch_global_random_numbers(dataset):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    draw_uniformly(DataLoader(dataset, shuffle=True), 8, 0).split(HALVES)
    assert torch.rand(1) == expected


@pytest.mark.parametrize("budget", [2, 7, SIZE, 1000])
def test_budget_limits_the_points(dataset, budget):
    directions, magnitudes = roles(DataLoader(dataset), budget=budget)
    assert len(set(directions + magnitudes)) == min(budget, SIZE)


def test_draws_are_uniform(dataset):
    counts = torch.zeros(2, SIZE)
    for seed in range(600):
        for role, own in zip(
            counts, roles(DataLoader(dataset, SIZE), 0.5, 10, seed), strict=True
        ):
            role[own] += 1
    # binomial with mean 150 and standard deviation 10.6
    assert (counts - 150).abs().max() < 45


def test_a_loader_over_part_of_its_dataset_is_scaled_to_all_of_it(dataset):
    loader = DataLoader(dataset, 4, sampler=SubsetRandomSampler(range(5, 15)))
    folds = draw_uniformly(loader, None, 0).split(HALVES)
    assert sorted(all_points(folds)) == list(range(5, 15))
    assert folds.num_data == SIZE


def test_points_that_a_loader_drops_are_not_used(dataset):
    directions, magnitudes = roles(DataLoader(dataset, 8, drop_last=True))
    assert sorted(directions + magnitudes) == list(range(16))


def test_points_that_are_drawn_twice_have_one_role(dataset):
    sampler = RandomSampler(dataset, replacement=True, num_samples=200)
    directions, magnitudes = roles(DataLoader(dataset, 4, sampler=sampler))
    assert not set(directions) & set(magnitudes)


class Stream:
    """Anything that yields batches and knows its dataset."""

    def __init__(self, dataset, mapping=False):
        self.dataset, self.mapping = dataset, mapping

    def __iter__(self):
        for X, y in DataLoader(self.dataset, batch_size=6):
            yield {"x": X, "y": y, "note": "n"} if self.mapping else (X, y)


@pytest.mark.parametrize("budget", [None, 15])
def test_copies_of_a_point_share_a_fold(dataset, budget):
    """A subset may have a point several times, such as those of a rare class."""
    repeated = Subset(dataset, [*range(SIZE), *range(SIZE // 2)])
    shared = 0
    for seed in range(10):
        points = draw_uniformly(DataLoader(repeated, 10), budget, seed)
        first, other = (
            torch.as_tensor(repeated.indices)[fold.loader.dataset.indices]
            for fold in points.split([0.5, 0.5]).folds
        )
        assert abs(len(first) - len(other)) <= 1
        shared += int(torch.isin(first, other).any())
    assert shared < 10  # the one on the border of two folds, in some draws


class Fifteen(Sampler):
    """Does not tell how many points it yields."""

    def __iter__(self):
        return iter(range(15))


@pytest.mark.parametrize("sampler", [SequentialSampler(range(15)), Fifteen()])
@pytest.mark.parametrize("drop_last", [False, True])
def test_samplers_may_visit_a_part_in_order(dataset, sampler, drop_last):
    loader = DataLoader(dataset, 4, sampler=sampler, drop_last=drop_last)
    points = draw_uniformly(loader, None, 0)
    assert points.num_data == SIZE
    assert sorted(points.order.tolist()) == list(range(12 if drop_last else 15))


def test_other_iterables_are_read_into_memory(dataset):
    directions, magnitudes = roles(Stream(dataset))
    assert sorted(directions + magnitudes) == list(range(SIZE))
    folds = draw_uniformly(Stream(dataset, mapping=True), None, 0, target_key="y")
    folds = folds.split(HALVES)
    seen = torch.cat([batch["x"] for fold in folds.folds for batch in fold.loader])
    assert sorted(seen.flatten().int().tolist()) == list(range(SIZE))


def test_explicit_loaders_keep_their_roles(dataset):
    first, second = DataLoader(dataset, 4), DataLoader(TensorDataset(*dataset.tensors))
    folds = explicit_folds(first, second)
    for fold in folds.folds:
        assert points(fold.loader) == list(range(SIZE))
    assert folds.num_data == SIZE


@pytest.mark.parametrize("nested", [True, False])
def test_overlapping_explicit_loaders_are_refused(dataset, nested):
    first = Subset(dataset, range(5, 12))
    first = Subset(first, range(3, 7)) if nested else first
    second = Subset(dataset, range(10, 20))
    with pytest.raises(ValueError, match="must be disjoint, but share 2 points"):
        explicit_folds(DataLoader(first), DataLoader(second))
    explicit_folds(DataLoader(first), DataLoader(Subset(dataset, range(12, 20))))
    loader = DataLoader(dataset)
    with pytest.raises(ValueError, match="must be disjoint"):
        explicit_folds(loader, loader)


def test_empty_loaders_are_refused(dataset):
    empty = DataLoader(Subset(dataset, []))
    for loader, message in [
        (empty, "`train_loader` is empty"),
        (DataLoader(dataset, SIZE + 1, drop_last=True), "it yields no batch"),
        ([], "it yields no batch"),
        (
            DataLoader(Subset(dataset, [0])),
            "`train_loader` has too few points, 1",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            draw_uniformly(loader, None, 0).split(HALVES)
    with pytest.raises(ValueError, match="`magnitude_loader` is empty"):
        explicit_folds(DataLoader(dataset), empty)


def test_loaders_that_change_what_they_yield_are_read_through(dataset):
    class Doubling(DataLoader):
        def __iter__(self):
            return ((2 * X, y) for X, y in super().__iter__())

    directions, magnitudes = roles(Doubling(dataset, 3))
    assert sorted(directions + magnitudes) == list(range(0, 2 * SIZE, 2))


def test_workers_are_kept(dataset):
    folds = draw_uniformly(DataLoader(dataset, 4, num_workers=1), None, 0).split(HALVES)
    assert [fold.loader.num_workers for fold in folds.folds] == [1, 1]
    assert len(points(folds.folds[0].loader)) == SIZE // 2


class OwnBatches:
    """A batch sampler that tells no batch size, and counts its epochs."""

    def __init__(self, batches):
        self.batches, self.epochs = batches, 0

    def __iter__(self):
        self.epochs += 1
        yield from self.batches

    def __len__(self):
        return len(self.batches)


def test_batches_are_as_large_as_those_of_the_users_sampler(dataset):
    sampler = OwnBatches([[*range(k, min(k + 3, SIZE))] for k in range(0, SIZE, 3)])
    loader = DataLoader(dataset, batch_sampler=sampler)
    folds = draw_uniformly(loader, None, 0).split(HALVES).folds
    assert sampler.epochs == 1
    for fold in folds:
        assert [len(X) for X, _ in fold.loader] == [3, 3, 3, 1]
    assert [points(fold.loader) for fold in folds] == roles(DataLoader(dataset, 3))


LENGTHS = [2 + k % 3 for k in range(SIZE)]


def buckets():
    """Batches of examples of one length, out of order."""
    return [[k for k in range(SIZE) if LENGTHS[k] == n] for n in (3, 2, 4)]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_points_of_one_length_are_batched(num_workers):
    data = [(torch.full((LENGTHS[k],), k), k) for k in range(SIZE)]
    loader = DataLoader(
        data, batch_sampler=OwnBatches(buckets()), num_workers=num_workers
    )
    folds = draw_uniformly(loader, None, 0).split(HALVES).folds
    batches = [list(fold.loader) for fold in folds]
    seen = [torch.cat([y for _, y in own]) for own in batches]
    assert torch.cat(seen).sort()[0].tolist() == list(range(SIZE))
    for own, order, fold in zip(batches, seen, folds, strict=True):
        assert len(own) <= 5  # of three lengths, and up to 7 points
        assert all((y[:, None] == X).all() for X, y in own)
        positions = torch.tensor([0, 4, 5, 9])
        some = torch.cat([y for _, y in subset_of(fold.loader, positions)])
        assert torch.equal(some, order[positions])


def test_examples_of_several_lengths_go_to_the_users_collate_function():
    def pad(examples):
        return nn.utils.rnn.pad_sequence(examples, True), torch.zeros(len(examples))

    data = [torch.full((n,), n) for n in LENGTHS]
    loader = DataLoader(data, batch_sampler=OwnBatches(buckets()), collate_fn=pad)
    folds = draw_uniformly(loader, None, 0).split(HALVES).folds
    assert [len(X) for fold in folds for X, _ in fold.loader] == [7, 3, 7, 3]


SCORES = torch.tensor([0.0, 0.0, 10.0, 1.0, 2.0, 3.0, 0.1, 0.2, 0.0, 0.7])


@pytest.mark.parametrize("floor", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("num_points", [1, 4, 9, 10])
def test_draws_have_the_inclusion_probabilities(num_points, floor):
    expected = inclusion_probabilities(SCORES, num_points, floor)
    assert torch.allclose(expected.sum(), torch.tensor(float(num_points)))
    assert expected.max() <= 1 + 1e-6
    counts = torch.zeros(len(SCORES))
    for seed in range(2000):
        positions, weights = draw_points(SCORES, num_points, floor, seed)
        assert len(positions.unique()) == num_points
        assert torch.allclose(weights.float() * expected[positions], torch.ones(()))
        counts[positions] += 1
    # a binomial share of 2,000 draws has a standard deviation of at most 0.011
    assert (counts / 2000 - expected).abs().max() < 0.045


@pytest.mark.parametrize("num_points", [1, 3, 5])
def test_the_mean_over_all_possible_draws_is_the_sum_over_the_pool(
    num_points, monkeypatch
):
    """A systematic draw has one random start: all draws can be enumerated."""
    expected = inclusion_probabilities(SCORES.double(), num_points, 0.1)
    ends = expected.sort()[0].cumsum(0)
    starts = torch.cat([torch.tensor([0.0, 1.0]).double(), ends % 1]).sort()[0]
    values = torch.arange(1.0, len(SCORES) + 1).double() ** 2
    inclusion, mean = torch.zeros(len(SCORES)).double(), 0.0
    for low, high in pairwise(starts):
        start = ((low + high) / 2)[None]
        monkeypatch.setattr(torch, "rand", lambda *_, start=start, **__: start)
        positions, weights = draw_points(SCORES, num_points, 0.1)
        inclusion[positions] += high - low
        mean += (high - low) * (weights * values[positions]).sum()
    assert torch.allclose(inclusion, expected, atol=1e-12)
    assert torch.allclose(mean, values.sum())


def test_weighted_sums_are_unbiased():
    values = torch.randn(len(SCORES), generator=torch.Generator().manual_seed(0))
    sums = []
    for seed in range(3000):
        positions, weights = draw_points(SCORES, 4, 0.2, seed)
        sums.append((weights * values[positions]).sum())
    sums = torch.stack(sums)
    error = (sums.mean() - values.sum()).abs()
    assert error < 4 * sums.std() / len(sums) ** 0.5


def test_equal_scores_are_drawn_uniformly():
    for scores in (torch.zeros(6), torch.ones(6)):
        _, weights = draw_points(scores, 4)
        assert torch.allclose(weights, torch.full((4,), 1.5).double())


@pytest.mark.parametrize(
    ("scores", "num_points", "message"),
    [
        (torch.tensor([1.0, -1.0]), 1, "`scores` must be finite"),
        (torch.tensor([1.0, float("nan")]), 1, "`scores` must be finite"),
        (torch.ones(3), 4, r"`num_points` must lie in 1\.\.3"),
        (torch.ones(3), 0, r"`num_points` must lie in 1\.\.3"),
    ],
)
def test_bad_scores_are_refused(scores, num_points, message):
    with pytest.raises(ValueError, match=message):
        draw_points(scores, num_points)


@pytest.mark.parametrize("floor", [0.0, -0.1, 1.1])
def test_bad_floors_are_refused(floor):
    with pytest.raises(ValueError, match=r"`floor` must lie in \(0, 1\]"):
        draw_points(SCORES, 4, floor)


@pytest.mark.parametrize("num_points", [2, 5, 8, 33])
@pytest.mark.parametrize("shares", [[0.5, 0.5], [0.01, 0.99], [0.99, 0.01]])
def test_fold_sizes_add_up_and_are_positive(num_points, shares):
    sizes = fold_sizes(num_points, shares)
    assert sum(sizes) == num_points and min(sizes) >= 1
    assert abs(sizes[0] - num_points * shares[0]) <= 1


@pytest.mark.parametrize("num_folds", [2, 3, 5, 8])
def test_folds_are_of_equal_size(num_folds):
    sizes = fold_sizes(17, [1 / num_folds] * num_folds)
    assert sum(sizes) == 17 and max(sizes) - min(sizes) <= 1


def test_each_stratum_gets_its_share():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(300, generator=generator).double() ** 3
    strata = torch.randint(4, (300,), generator=generator)
    expected = inclusion_probabilities(scores, 40, 0.1)
    counts = torch.zeros(300)
    for seed in range(400):
        positions, weights = draw_points(scores, 40, seed=seed, strata=strata)
        counts[positions] += 1
        assert torch.allclose(weights, 1 / expected[positions])
        for stratum in range(4):
            number = (strata[positions] == stratum).sum()
            assert abs(number - expected[strata == stratum].sum()) < 2
    assert ((counts / 400 - expected).abs() < 0.13).all()


def test_strata_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="`strata` must have the shape of `scores`"):
        draw_points(torch.ones(5), 2, strata=torch.zeros(4))


@pytest.mark.parametrize("budget", [None, 8, 19])
@pytest.mark.parametrize("shares", [HALVES, [1 / 3] * 3, [0.1, 0.9]])
def test_a_point_has_the_same_fold_in_each_draw(dataset, budget, shares):
    fold_of, counts = {}, torch.zeros(SIZE)
    for draw_seed in (None, *range(200)):
        drawn = draw_uniformly(DataLoader(dataset, 3), budget, 5, draw_seed=draw_seed)
        folds = drawn.split(shares).folds
        sizes = fold_sizes(budget or SIZE, shares)
        assert [len(points(fold.loader)) for fold in folds] == sizes
        for k, fold in enumerate(folds):
            for point in points(fold.loader):
                assert fold_of.setdefault(point, k) == k
                counts[point] += 1
    assert counts.min() > 0  # the draws differ
