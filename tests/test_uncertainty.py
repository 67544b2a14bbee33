"""Standard errors over draws, and the warning of too small a budget."""

import warnings
from math import isnan

import pytest
import torch
from laplace.curvature.asdl import AsdlGGN
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased.uncertainty import TRUSTED_ERROR, SamplingError
from tests.cases import batch, network
from tests.fits import SIZE, debiased, loader

LAYERS = ["0", "2"]


def spread_network():
    """A network whose curvature differs from point to point."""
    model = network("mlp")
    for parameter in model.parameters():
        parameter.data *= 4
    return model


def error_of(contributions, num_data=10**9, losses=None, pool_scores=None):
    losses = torch.zeros(len(contributions)) if losses is None else losses
    return SamplingError.of_points(
        ["a", "b"][: contributions.shape[1]],
        contributions,
        losses,
        num_data,
        pool_scores,
    )


def test_error_of_a_sum_of_independent_contributions():
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([1.0, 3.0], dtype=torch.float64)
    terms = scale * torch.rand(4000, 50, 2, generator=generator).double()
    spread = terms.sum(1).T.cov()
    mean = torch.stack([error_of(own).covariance for own in terms]).mean(0)
    assert torch.allclose(mean.diagonal(), spread.diagonal(), rtol=0.05)
    assert torch.allclose(error_of(terms[0]).traces, terms[0].sum(0))


def test_there_is_no_error_if_all_points_were_seen():
    contributions = torch.rand(50, 2).double()
    error = error_of(contributions, num_data=50, losses=torch.rand(50).double())
    assert error.covariance.abs().max() == 0 and error.loss_variance == 0


def test_a_pool_adds_its_own_error():
    contributions = torch.ones(50, 1).double()  # a draw without error
    scores = torch.rand(400).double()
    error = error_of(contributions, pool_scores=scores)
    expected = scores.std() / (scores.mean() * 20)
    assert error.relative_errors()["a"] == pytest.approx(expected.item(), rel=1e-6)


def test_further_data_add_variances():
    first, second = (error_of(torch.rand(20, 2).double()) for _ in range(2))
    both = first.merge(second)
    assert torch.equal(both.traces, first.traces + second.traces)
    torch.testing.assert_close(both.covariance, first.covariance + second.covariance)
    tripled = first.scaled(3.0)
    assert tripled.relative_errors() == pytest.approx(first.relative_errors())
    assert tripled.loss_variance == pytest.approx(9 * first.loss_variance)


def test_points_scaled_to_more_data_are_a_part_of_them():
    contributions, losses = torch.rand(20, 2).double(), torch.rand(20).double()
    seen = error_of(contributions, 20, losses)
    part = error_of(10 * contributions, 200, losses)
    scaled = seen.scaled(10.0)
    assert seen.loss_variance == 0
    torch.testing.assert_close(scaled.covariance, part.covariance)
    torch.testing.assert_close(scaled.loss_variance, part.loss_variance)
    # half of the points' weight is forgotten, and they are still all there is
    assert seen.scaled(0.5, decay=0.5).covariance.abs().max() == 0


@pytest.mark.parametrize("size", [8, 16])
def test_errors_of_a_stream_are_those_of_a_fit_with_as_many_points(size):
    model, variances = spread_network(), []
    X, y = batch("mlp", 1000)
    for seed in range(30):
        la = debiased(model, budget=32, sampling="uniform", seed=seed)
        stream = debiased(model, seed=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            la.fit(DataLoader(TensorDataset(X, y), 500))
        for k in range(32 // size):
            rows = slice(32 * seed + size * k, 32 * seed + size * (k + 1))
            stream.partial_fit((X[rows], y[rows]), num_data=1000)
        errors = la.sampling_error, stream.sampling_error
        variances.append([e.relative_covariance().trace() for e in errors])
    of_fits, of_streams = torch.tensor(variances).mean(0)
    assert of_streams / of_fits == pytest.approx(1, abs=0.2)


def test_a_stream_of_all_data_has_no_error():
    X, y = batch("mlp", 32)
    la = debiased(spread_network())
    for rows in (slice(16), slice(16, 32)):
        la.partial_fit((X[rows], y[rows]), decay=0.5)
    assert set(la.curvature_standard_errors.values()) == {0.0}
    assert la.log_marginal_likelihood_standard_error() == 0


def test_a_layer_without_curvature_has_no_relative_error():
    model = network("mlp")
    model[2].weight.data.zero_()  # no gradient reaches the first layer
    la = debiased(model, budget=20)
    la.fit(loader())
    errors = la.curvature_standard_errors
    assert isnan(errors["0"]) and not isnan(errors["2"])
    assert la.log_marginal_likelihood_standard_error().isfinite()
    assert error_of(torch.zeros(9, 2).double()).warning(9) is None


@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
@pytest.mark.parametrize(
    "options",
    [
        {"estimator": "cross_fit", "sampling": "uniform"},
        {"estimator": "two_batch", "sampling": "uniform"},
        {"estimator": "cross_fit", "sampling": "curvature", "pool_size": 40},
    ],
)
def test_standard_errors_tell_the_spread_over_draws(options, magnitudes):
    model, train = spread_network(), loader()
    traces, errors, evidences, evidence_errors = [], [], [], []
    for seed in range(80):
        la = debiased(model, budget=20, magnitudes=magnitudes, seed=seed, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            la.fit(train)
        traces.append(la.sampling_error.traces)
        errors.append(list(la.curvature_standard_errors.values()))
        evidences.append(la.log_marginal_likelihood())
        evidence_errors.append(la.log_marginal_likelihood_standard_error())
    traces = torch.stack(traces)
    spread = traces.std(0) / traces.mean(0)
    told = torch.tensor(errors).square().mean(0).sqrt()
    assert list(la.curvature_standard_errors) == LAYERS
    assert (told / spread).log().abs().max() < 0.4, (told, spread)
    ratio = torch.stack(evidence_errors).square().mean().sqrt() / torch.stack(
        evidences
    ).std(0)
    assert ratio.log().abs() < 0.5, ratio


def test_too_small_a_budget_is_told_with_one_that_would_do():
    model = spread_network()
    with pytest.warns(UserWarning, match="budget of 8 points is too small") as caught:
        debiased(model, budget=8, sampling="uniform", seed=1).fit(loader())
    (message,) = (str(w.message) for w in caught if "budget" in str(w.message))
    enough = int(message.split("A budget of about ")[1].split()[0])
    assert enough > 8 and message.endswith(f"would bring it to {TRUSTED_ERROR}.")


def test_enough_points_need_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        debiased(spread_network(), budget=SIZE - 1).fit(loader())
        debiased(spread_network()).fit(loader())


def test_a_single_point_has_infinite_error():
    error = error_of(torch.ones(1, 1).double())
    assert error.relative_errors()["a"] == float("inf")


def test_unknown_errors_are_no_reason_to_trust():
    error = SamplingError.of_points(
        ["0"], torch.ones(1, 1), torch.ones(9), num_data=100
    )
    assert "their error is not known" in error.warning(8)


def test_backends_that_see_sums_only_say_so():
    model = network("mlp").float()
    la = debiased(model, backend=AsdlGGN, budget=20)
    la.fit(loader(dtype=torch.float32))
    with pytest.raises(ValueError, match="AsdlGGN does not tell what each point"):
        la.curvature_standard_errors  # noqa: B018
    with pytest.raises(ValueError, match="use `CurvlinopsGGN`"):
        la.log_marginal_likelihood_standard_error()


def test_errors_are_saved(tmp_path):
    model = network("mlp")
    la = debiased(model, budget=20)
    la.fit(loader())
    torch.save(la.state_dict(), tmp_path / "la.pt")
    other = debiased(model)
    other.load_state_dict(torch.load(tmp_path / "la.pt", weights_only=True))
    assert other.curvature_standard_errors == la.curvature_standard_errors


def test_there_are_no_errors_before_a_fit():
    with pytest.raises(AttributeError):
        debiased(network("mlp")).curvature_standard_errors  # noqa: B018
