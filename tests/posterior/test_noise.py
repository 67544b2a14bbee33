"""Standard errors where contributions are drawn, or points are none of the data."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset, SubsetRandomSampler, TensorDataset

from laplace_debiased.posterior.sampling_error import SamplingError
from tests.fits import debiased

SAMPLED = {"backend_kwargs": {"stochastic": True}}
TWO_BATCH = {"estimator": "two_batch"}


def classes(num_data, count=10):
    """A network of some classes, and data."""
    torch.manual_seed(0)
    layers = nn.Linear(4, 20), nn.Tanh(), nn.Linear(20, count)
    X, y = torch.randn(num_data, 4), torch.randint(count, (num_data,))
    return nn.Sequential(*layers).double(), X.double(), y


class Mixed(nn.Module):
    """Adds the mean of all tokens to each."""

    def forward(self, x):
        return x + 3 * x.mean(1, keepdim=True)


def positions(num_data):
    """A network with a row of classes for each of some tokens, and data."""
    model, X, _ = classes(6 * num_data, 3)
    model.insert(1, Mixed())
    return model, X.view(-1, 6, 4), torch.randint(3, (num_data, 6))


def fits(model, X, y, seeds=40, **options):
    """Fit by several seeds, and return traces and standard errors of layers."""
    train = DataLoader(TensorDataset(X, y), 100)
    traces, errors = [], []
    for seed in range(seeds):
        la = debiased(model, seed=seed, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            la.fit(train)
        traces.append(la.sampling_error.traces)
        errors.append(list(la.curvature_standard_errors.values()))
    return torch.stack(traces), torch.tensor(errors)


def told_by_actual(case, options, magnitudes="ggn"):
    """Standard errors as shares of actual errors, of each layer."""
    truth, zeros = fits(*case, seeds=1, magnitudes=magnitudes)
    traces, errors = fits(*case, magnitudes=magnitudes, **options)
    actual = (traces / truth - 1).square().mean(0).sqrt()
    assert not zeros.any()
    return errors.square().mean(0).sqrt() / actual


@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
@pytest.mark.parametrize(
    ("num_data", "options", "most"),
    [
        (200, {"fisher_rank": 1}, 1.4),
        (200, {"fisher_rank": 5}, 1.8),  # what scores do not tell is more than noise
        (200, SAMPLED, 1.4),
        (600, {"fisher_rank": 1, "budget": 300}, 1.4),
        (200, {"fisher_rank": 1, **TWO_BATCH}, 1.4),
        (200, {"fisher_rank": 1, "fit_memory_limit": 10**5}, 1.4),
    ],
)
def test_errors_of_random_signs_and_sampled_labels(num_data, options, most, magnitudes):
    ratio = told_by_actual(classes(num_data), options, magnitudes)
    assert (ratio > 0.75).all() and (ratio < most).all(), ratio


@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
def test_errors_of_the_signs_of_positions(magnitudes):
    traces, errors = fits(*positions(200), class_axis=-1, magnitudes=magnitudes)
    told = errors.square().mean(0).sqrt() * traces.mean(0)
    ratio = told / traces.std(0)
    # K-FAC takes the last layer's positions one by one, so that signs do not matter
    ratio = ratio[:1] if magnitudes == "kfac" else ratio
    assert (ratio > 0.75).all() and (ratio < 1.5).all(), ratio
    assert magnitudes == "ggn" or told[1] < 1e-6 * traces[0, 1]


@pytest.mark.parametrize("budget", [100, 300])
def test_inputs_of_one_pool_stand_for_those_of_all(budget):
    options = {"budget": budget, "pool_size": 600}
    ratio = told_by_actual(classes(600), options, "kfac")
    assert (ratio > 0.75).all() and (ratio < 1.5).all(), ratio


@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
def test_a_rank_that_leaves_out_nothing_has_no_error(magnitudes):
    _, errors = fits(*classes(60, 3), 1, fisher_rank=1, magnitudes=magnitudes)
    assert not errors.any()


def test_a_lone_magnitude_with_noise_is_not_seen():
    lone, others = (torch.rand(count, 1).double() for count in (1, 20))
    told = [
        SamplingError.of_points(["a"], own, torch.ones(len(own)), len(own), noise=own)
        for own in (lone, others)
    ]
    covariance = told[0].merge(told[1]).covariance
    assert covariance.item() == pytest.approx(21 * others.var().item())


@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
@pytest.mark.parametrize("sizes", [(128, 128), (128, 64), (64, 128)])
def test_errors_of_magnitudes_from_other_data(sizes, magnitudes):
    model, X, y = classes(4000, 3)
    X = X * torch.rand(4000, 1) * 3
    data, found = TensorDataset(X, y), []
    for seed in range(40):
        order = torch.randperm(4000, generator=torch.Generator().manual_seed(seed))
        first, second = (
            DataLoader(Subset(data, part.tolist()), 64)
            for part in order[: sum(sizes)].split(sizes)
        )
        la = debiased(model, magnitudes=magnitudes)
        la.fit(first, magnitude_loader=second)
        own = la.sampling_error
        found.append(
            (own.traces, own.covariance.diagonal(), la.loss, own.loss_variance)
        )
    traces, variances, losses, loss_variances = map(
        torch.stack, zip(*found, strict=True)
    )
    ratio = (variances.mean(0) / traces.var(0)).sqrt()
    assert (ratio > 0.75).all() and (ratio < 1.4).all(), ratio
    assert loss_variances.mean().sqrt() / losses.std() == pytest.approx(1, abs=0.3)


def test_all_points_of_one_dataset_are_seen_by_two_samplers():
    model, X, y = classes(80, 3)
    data = TensorDataset(X, y)
    first, second = (
        DataLoader(data, 20, sampler=SubsetRandomSampler(range(*ends)))
        for ends in ((0, 1), (1, 80))
    )
    la = debiased(model)
    la.fit(first, magnitude_loader=second)
    few = debiased(model)
    few.fit(second, magnitude_loader=first)
    assert all(0 < own < 0.02 for own in la.curvature_standard_errors.values())
    assert set(few.curvature_standard_errors.values()) == {float("inf")}
