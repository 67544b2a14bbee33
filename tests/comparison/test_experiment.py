import warnings

import pytest
import torch
from laplace import KronLaplace
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased.comparison.data import TrainTestSplit
from laplace_debiased.comparison.experiment import (
    CALIBRATED,
    ESTIMATORS,
    MAP,
    PRIOR_PRECISIONS,
    choose_prior_precision,
    compare,
    held_out,
    mutual_information,
    nll_curve,
    predict,
)
from laplace_debiased.comparison.metrics import score
from laplace_debiased.comparison.networks import mlp
from laplace_debiased.comparison.posteriors import DEFAULT, FULL_DATA
from laplace_debiased.comparison.training import Recipe, train

RECIPE = Recipe(lambda: mlp((5,), 4), epochs=20, batch_size=16, learning_rate=1e-2)


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(90, 4, generator=generator)
    y = (3 * X[:, 0]).round().long().clamp(-2, 2) + 2
    return TrainTestSplit(TensorDataset(X[:60], y[:60]), X[60:], y[60:])


@pytest.fixture
def laplace(data):
    laplace = KronLaplace(train(RECIPE, data.train, 0).model, "classification")
    laplace.fit(DataLoader(data.train, batch_size=60))
    return laplace


@pytest.fixture(scope="module")
def runs(data):
    return compare(data, RECIPE, budget=20, num_seeds=2)


def test_every_estimator_runs_on_every_seed(runs):
    expected = [(seed, name) for seed in range(2) for name in ESTIMATORS]
    assert [(run.seed, run.estimator) for run in runs] == expected


def test_points_are_counted(runs):
    points = [run.num_points for run in runs]
    assert points == 2 * [0, 0, 48, 20, 20, 20, 40, 20, 20]


def test_map_has_no_posterior(runs):
    for run in runs[:2]:
        assert run.prior_precision is run.fit_seconds is run.curve is None


def test_validation_points_are_not_trained_on():
    points = TensorDataset(torch.arange(50), torch.arange(50))
    train, validation = held_out(points)
    assert len(validation) == 10
    together = torch.cat([train.tensors[0], validation.tensors[0]])
    assert torch.equal(together.sort().values, torch.arange(50))
    assert torch.equal(held_out(points)[1].tensors[0], validation.tensors[0])


def test_calibrated_predictions_are_better_than_the_default_ones(runs):
    of_seed = {run.estimator: run for run in runs[: len(ESTIMATORS)]}
    calibrated, default = of_seed[CALIBRATED], of_seed[DEFAULT]
    assert calibrated.scores.nll < default.scores.nll
    # with so few validation points, next to nothing is changed
    assert calibrated.scores.nll < of_seed[MAP].scores.nll + 0.01
    assert calibrated.prior_precision == default.prior_precision


def test_temperature_scaling_changes_probabilities_and_no_class(runs):
    unscaled, scaled = (run.probabilities for run in runs[:2])
    assert torch.equal(unscaled.argmax(1), scaled.argmax(1))
    assert (unscaled - scaled).abs().max() > 1e-3


def test_mutual_information_is_that_of_samples(laplace, data):
    torch.manual_seed(0)
    X = data.test_inputs
    mean, covariance = laplace._glm_predictive_distribution(X)
    root, noise = torch.linalg.cholesky(covariance), torch.randn(20_000, *mean.shape)
    p = (mean + torch.einsum("bcd,sbd->sbc", root, noise)).softmax(-1)
    entropy = torch.special.entr
    expected = entropy(p.mean(0)).sum(-1) - entropy(p).sum(-1).mean(0)
    found = mutual_information(laplace, X)
    torch.testing.assert_close(found, expected, rtol=0.1, atol=2e-3)


def test_scores_are_those_of_the_predictions(runs, data):
    for run in runs:
        assert run.scores == score(run.probabilities, data.test_labels)


def test_seeds_differ_in_network(runs):
    assert runs[0].scores.nll != runs[len(runs) // 2].scores.nll


def test_runs_are_reproducible(runs, data):
    again = compare(data, RECIPE, budget=20, num_seeds=1)
    for old, new in zip(runs, again, strict=False):
        assert old.scores == new.scores
        assert old.curve == new.curve


def test_prior_precision_maximizes_marginal_likelihood(laplace):
    chosen = choose_prior_precision(laplace)
    assert laplace.prior_precision.item() == chosen
    best = laplace.log_marginal_likelihood(torch.tensor([chosen]))
    for factor in (0.8, 1.25):
        other = laplace.log_marginal_likelihood(torch.tensor([factor * chosen]))
        assert other < best


def test_known_warning_alone_is_silenced(laplace, monkeypatch):
    inner = laplace.optimize_prior_precision

    def with_another_warning(**kwargs):
        inner(**kwargs)
        warnings.warn("something else", stacklevel=1)

    monkeypatch.setattr(laplace, "optimize_prior_precision", with_another_warning)
    with pytest.warns() as caught:
        choose_prior_precision(laplace)
    assert [str(warning.message) for warning in caught] == ["something else"]


def test_predictions_do_not_depend_on_batches(laplace, data):
    torch.testing.assert_close(
        predict(laplace, data.test_inputs), laplace(data.test_inputs)
    )


def test_curve_tends_to_map_with_the_prior_precision(runs):
    for index, run in enumerate(runs):
        if run.estimator == FULL_DATA:
            map_nll = runs[index - 2].scores.nll
            distances = [abs(nll - map_nll) for nll in run.curve]
            assert distances[-1] < 0.1 * distances[0]


def test_curve_has_the_nll_of_each_prior_precision(laplace, data):
    curve = nll_curve(laplace, data.test_inputs, data.test_labels)
    for index in (0, 4):
        laplace.prior_precision = PRIOR_PRECISIONS[index]
        probabilities = predict(laplace, data.test_inputs)
        assert score(probabilities, data.test_labels).nll == curve[index]
