"""Conformal sets and intervals of a posterior."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased.predictive.calibration import Calibration
from tests.cases import batch, network
from tests.fits import SUBSETS, debiased, loader

X, Y = batch("mlp", 40, seed=5)


def fitted(likelihood="classification", subset="all"):
    la = debiased(network("mlp"), likelihood, subset, prior_precision=3.0)
    la.fit(loader(likelihood=likelihood))
    return la


def data(x, y):
    return DataLoader(TensorDataset(x, y), 7)


@pytest.mark.parametrize("subset", SUBSETS)
def test_sets_hold_as_many_targets_as_the_rank_says(subset):
    la = fitted(subset=subset)
    la._calibration = Calibration(1.7, 0.4, 0.1, 40, 1.0, ((0.4, 1.0),))
    sets = la.conformal_sets(data(X, Y), 0.8)
    held = sets(X)
    scores = (1 - la(X)).gather(1, Y[:, None])[:, 0].sort().values
    assert sets.thresholds == pytest.approx([scores[32].item()])
    assert held.dtype == torch.bool and held.shape == la(X).shape
    assert torch.equal(held, 1 - la(X) <= sets.thresholds[0])


def test_intervals_have_a_threshold_for_each_output():
    la = fitted("regression")
    y = la.uncertainty(X).mean + torch.randn(40, la.n_outputs).double()
    intervals = la.conformal_intervals(data(X, y), 0.8)
    lower, upper = intervals(X)
    inside = ((lower <= y + 1e-9) & (y <= upper + 1e-9)).sum(0)
    assert inside.tolist() == [33] * la.n_outputs
    assert intervals.num_points == 40


def test_coverage_over_many_splits_is_what_was_asked_for():
    la = fitted()
    g = torch.Generator().manual_seed(0)
    x = torch.randn(6000, *X.shape[1:], generator=g, dtype=X.dtype)
    y = la(x).multinomial(1, generator=g)[:, 0]
    held = []
    for own, other in zip(x.view(30, 200, -1), y.view(30, 200), strict=True):
        own = own.view(200, *X.shape[1:])
        sets = la.conformal_sets(data(own[:99], other[:99]), 0.9)
        held.append(sets(own[99:]).gather(1, other[99:, None]).double().mean())
    assert abs(torch.stack(held).mean() - 0.9) < 3 * (0.09 / 99 / 15) ** 0.5


def test_changed_posteriors_are_refused():
    la = fitted()
    for change in (
        lambda: setattr(la, "prior_precision", 7.0),
        lambda: la.calibrate(data(X, Y)),
        lambda: la.fit(loader()),
        lambda: la.fit(loader(), override=False),
        lambda: la.load_state_dict(la.state_dict()),
    ):
        sets = la.conformal_sets(data(X, Y))
        change()
        with pytest.raises(RuntimeError, match="compute them again"):
            sets(X)


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_another_temperature_is_refused(likelihood):
    la = fitted(likelihood)
    thresholds = {
        "classification": la.conformal_sets,
        "regression": la.conformal_intervals,
    }
    computed = thresholds[likelihood](loader(likelihood=likelihood))
    la.temperature = 50.0
    with pytest.raises(RuntimeError, match="compute them again"):
        computed(X)


def test_what_is_not_valid_is_refused():
    la = fitted()
    with pytest.raises(ValueError, match="for regression"):
        la.conformal_intervals(data(X, Y))
    with pytest.raises(ValueError, match="coverage"):
        la.conformal_sets(data(X, Y), 1.0)
    with pytest.raises(ValueError, match="no points"):
        la.conformal_sets([])
    with pytest.raises(ValueError, match="class indices"):
        la.conformal_sets(data(X, la(X)))


def test_ignored_targets_are_left_out():
    la = fitted()
    y = Y.clone()
    y[::4] = -100
    kept = y >= 0
    sets = la.conformal_sets(data(X, y), 0.8)
    assert sets.num_points == 30
    expected = la.conformal_sets(data(X[kept], Y[kept]), 0.8)
    assert sets.thresholds == pytest.approx(expected.thresholds, rel=1e-12)


def test_too_few_points_give_all_classes():
    la = fitted()
    assert la.conformal_sets(data(X[:3], Y[:3]), 0.9)(X).all()
