from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from laplace_debiased.predictive.calibration import calibration_of
from laplace_debiased.predictive.links import probit_logits


def drawn(mean, variance, temperature=1.0):
    """Classes of Gaussian outputs."""
    outputs = (mean + variance.sqrt() * torch.randn_like(mean)) / temperature
    return outputs.softmax(1).multinomial(1).squeeze(1)


def outputs(count, spread=3.0):
    torch.manual_seed(0)
    return spread * torch.randn(count, 5, dtype=torch.float64)


def nll(logits, y):
    return cross_entropy(logits, y).item()


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_the_temperature_that_classes_were_drawn_with_is_found(temperature):
    mean = outputs(4000)
    y = drawn(mean, torch.zeros_like(mean), temperature)
    found = calibration_of(mean, 1e6 * torch.rand_like(mean), y)
    ratio = torch.tensor(found.temperature / temperature).log().abs()
    assert found.scale == 0
    assert ratio < 3 * found.temperature_error
    assert found.temperature_error < 0.05
    assert "the posterior's variance did not help" in str(found)


def test_as_much_variance_is_kept_as_the_tolerance_allows():
    mean = outputs(4000)
    variance = 5 * torch.rand_like(mean)
    y = drawn(mean, torch.zeros_like(mean))
    scales = []
    for tolerance in (0, 1e-3, 1e-2, 10):
        found = calibration_of(mean, variance, y, tolerance)
        by_scale = dict(found.frontier)
        # the prior and the standard error are small next to 4,000 points
        assert by_scale[found.scale] <= by_scale[0.0] + tolerance + 5e-4
        assert all(
            nll > min(by_scale.values()) + tolerance - 2e-3
            for scale, nll in found.frontier
            if scale > found.scale
        )
        scales.append(found.scale)
    assert scales == sorted(set(scales))
    assert scales[-1] == 1


def test_negative_tolerances_are_refused():
    with pytest.raises(ValueError, match="at least zero"):
        calibration_of(outputs(5), outputs(5) ** 2, outputs(5).argmax(1), -1.0)


def test_a_posterior_that_tells_the_truth_is_kept():
    """Some examples are uncertain, others not, which a temperature cannot tell."""
    mean = outputs(4000)
    variance = 30 * (torch.rand(4000, 1) < 0.5).double().expand_as(mean)
    y = drawn(mean, variance)
    found = calibration_of(mean, variance, y, tolerance=0)
    assert 0.3 < found.scale <= 1
    assert 0.8 < found.temperature < 1.2
    assert f"{100 * found.scale:.3g} % of the posterior's covariance" in str(found)
    by_scale = dict(found.frontier)
    assert by_scale[found.scale] == found.nll < by_scale[0.0] - 0.05


@pytest.mark.parametrize("count", [1, 2, 50])
def test_few_points_that_are_all_right_do_not_make_sure(count):
    mean = outputs(count)
    y = mean.argmax(1)
    found = calibration_of(mean, torch.ones_like(mean), y)
    assert 0.7 < found.temperature <= 1
    assert found.num_points == count
    # a single point has no standard error: nothing but the network is left
    assert count > 1 or found.scale == 0


@pytest.mark.parametrize("count", [50, 200])
def test_few_points_do_no_harm(count):
    """The network is right, and its posterior's variance is noise."""
    mean = outputs(20_000)
    variance = 5 * torch.rand_like(mean)
    y = drawn(mean, torch.zeros_like(mean))
    alone = nll(mean, y)
    extra = []
    for rows in torch.arange(20_000).split(count)[:60]:
        found = calibration_of(mean[rows], variance[rows], y[rows])
        logits = probit_logits(*found.outputs(mean, variance))
        extra.append(nll(logits, y) - alone)
    assert sum(extra) / len(extra) < 1e-3
    assert max(extra) < 0.01


def test_a_temperature_that_the_data_do_not_ask_for_is_exactly_one():
    mean = outputs(100)
    y = drawn(mean, torch.zeros_like(mean))
    found = calibration_of(mean, 1e6 * torch.rand_like(mean), y)
    assert (found.temperature, found.scale) == (1, 0)


def test_each_scale_has_its_best_temperature():
    mean = outputs(4000)
    y = drawn(mean, torch.zeros_like(mean), 2.0)
    found = calibration_of(mean, torch.rand_like(mean), y, tolerance=10)
    assert found.scale == 1
    for factor in (0.9, 1.1):
        other = replace(found, temperature=factor * found.temperature)
        logits = probit_logits(*other.outputs(mean, torch.rand_like(mean)))
        assert nll(logits, y) > found.nll


def test_errors_of_the_temperature_are_those_over_draws():
    found = []
    mean = outputs(20_000)
    for rows in torch.arange(20_000).split(400):
        own = mean[rows]
        y = drawn(own, torch.zeros_like(own), 2.0)
        found.append(calibration_of(own, torch.zeros_like(own), y))
    logs = torch.tensor([own.temperature for own in found]).log()
    told = torch.tensor([own.temperature_error for own in found]).mean()
    assert told / logs.std() == pytest.approx(1, abs=0.3)


def test_moments_are_those_of_the_divided_outputs():
    found = calibration_of(outputs(50), torch.ones(50, 5), outputs(50).argmax(1))
    found = replace(found, temperature=2.0, scale=0.5)
    mean, covariance = found.outputs(torch.ones(3), torch.ones(3, 3))
    assert mean.tolist() == [0.5] * 3
    assert (covariance == 0.125).all()


def test_there_must_be_points():
    with pytest.raises(ValueError, match="no validation points"):
        calibration_of(torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0).long())
