"""Standard errors over draws, and the warning of too small a budget."""

import warnings
from dataclasses import replace
from math import exp, isfinite, isnan, log

import pytest
import torch
from laplace.curvature.asdl import AsdlGGN
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased.posterior.sampling_error import TRUSTED_FACTOR, SamplingError
from tests.cases import batch, network
from tests.fits import SIZE, TWO_BATCH, debiased, loader

LAYERS = ["0", "2"]


def spread_network():
    """A network whose curvature differs from point to point."""
    model = network("mlp")
    for parameter in model.parameters():
        parameter.data *= 4
    return model


def error_of(contributions, num_data=10**9, losses=None, of_pool=None):
    losses = torch.zeros(len(contributions)) if losses is None else losses
    return SamplingError.of_points(
        ["a", "b"][: contributions.shape[1]],
        contributions,
        losses,
        num_data,
        of_pool,
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


@pytest.mark.parametrize("options", [{}, {"budget": 24}, {"budget": 24, **TWO_BATCH}])
@pytest.mark.parametrize("batch_size", [7, SIZE])
@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_traces_are_those_of_the_curvature(kfac_approx, batch_size, options):
    la = debiased(
        network("cnn-stride-padding").double(),
        asdl_fisher_kwargs={"kfac_approx": kfac_approx},
        **options,
    )
    X, y = batch("cnn-stride-padding", SIZE, dtype=torch.float64)
    la.fit(DataLoader(TensorDataset(X, y), batch_size))
    spectra = iter(own.sum() for own in la.H.spectra())
    traces = [
        sum(next(spectra) for _ in layer.parameters) for layer in la._selection.layers
    ]
    torch.testing.assert_close(la.sampling_error.traces, torch.stack(traces))


def test_a_pool_adds_its_own_error():
    contributions = torch.ones(50, 1).double()  # a draw without error
    of_pool = torch.rand(400, 1).double()
    error = error_of(contributions, of_pool=of_pool)
    expected = of_pool.std() * 20 / 50
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


@pytest.mark.parametrize(("decay", "num_data"), [(1, 400), (1, 1000), (0.5, 300)])
def test_parts_of_which_more_and_less_was_seen(decay, num_data):
    generator = torch.Generator().manual_seed(0)
    factor = num_data / (200 * decay + 200)
    errors, told = [], []
    for _ in range(1000):
        points = torch.randn(max(num_data, 400), 1, generator=generator).double()
        first, second = points[:200], points[200:400]
        part = error_of(10 * first[:20], 200, first[:20, 0])
        both = part.scaled(decay, decay).merge(error_of(second, 200, second[:, 0]))
        scaled = both.scaled(factor)
        truth = decay * first.sum() + second.sum()
        if factor > 1:  # there are others
            truth = points[:num_data].sum()
        errors.append(scaled.traces[0] - truth)
        told.append(torch.stack([scaled.covariance[0, 0], scaled.loss_variance]))
    assert torch.stack(told).mean(0) / torch.stack(errors).var() == pytest.approx(
        1, abs=0.15
    )


def test_data_all_of_which_were_seen_add_no_error_to_a_pool_of_all():
    X, y = batch("mlp", 32)
    la = debiased(spread_network(), budget=20, pool_size=SIZE, sampling="curvature")
    la.fit(loader())
    before = la.sampling_error.covariance
    la.partial_fit((X[:16], y[:16]))
    torch.testing.assert_close(la.sampling_error.covariance, before)
    assert la.sampling_error.loss_variance == 0


@pytest.mark.parametrize("order", [1, -1])
def test_a_single_point_may_vary_as_others_do(order):
    lone = error_of(2 * torch.rand(1, 2).double(), 2)
    others = error_of(2 * torch.rand(20, 2).double(), 40)
    first, second = (lone, others)[::order]
    # a point of two, and 20 of 40, with the covariance of a point
    of_point = others.draw.covariance / (40**2 / 20)
    expected = (2**2 - 2 + 40**2 / 20 - 40) * of_point
    torch.testing.assert_close(first.merge(second).covariance, expected)
    lone_pair = lone.merge(lone)
    assert lone_pair.covariance.isinf().all()
    expected = expected + (2**2 - 2) * of_point
    torch.testing.assert_close(lone_pair.merge(others).covariance, expected)


@pytest.mark.parametrize("sizes", [(2, 16), (16, 2)])
def test_a_stream_gets_over_a_batch_with_a_single_magnitude(sizes):
    X, y = batch("mlp", 18)
    la = debiased(spread_network(), estimator="two_batch")
    parts = zip(X.split(sizes), y.split(sizes), strict=True)
    for part in parts:
        la.partial_fit(part, decay=0.9)
    assert all(e > 0 and isfinite(e) for e in la.curvature_standard_errors.values())


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decay", [0.5, 0.9, 1.0])
def test_a_stream_of_all_data_has_no_error(decay, dtype):
    X, y = batch("mlp", 60)
    la = debiased(spread_network().to(dtype))
    for rows, labels in zip(X.to(dtype).split(13), y.split(13), strict=True):
        la.partial_fit((rows, labels), decay=decay)
    assert set(la.curvature_standard_errors.values()) == {0.0}
    assert la.log_marginal_likelihood_standard_error() == 0


def test_fewer_data_than_were_seen_have_no_negative_variance():
    signs = torch.tensor([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]).double()
    parts = (1 + signs[:, [0, 0]], 4), (1 + 1.1 * signs[:, 1:], 10**9)
    seen, part = (
        SamplingError.of_points(LAYERS, terms, torch.ones(4).double(), num_data)
        for terms, num_data in parts
    )
    la = debiased(spread_network())
    la.fit(loader())
    error = seen.merge(part).scaled(0.5)
    la._estimate = replace(la._estimate, error=error)
    assert la.sampling_error.covariance[0, 1] < 0 < la.sampling_error.covariance[0, 0]
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
        {
            "estimator": "two_batch",
            "direction_fraction": 0.8,
            "sampling": "curvature",
            "pool_size": 40,
        },
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
    assert 8 < enough < SIZE
    assert message.endswith(f"would bring it to {TRUSTED_FACTOR}.")


@pytest.mark.parametrize("num_used", [8, 4])  # of a budget of 8
@pytest.mark.parametrize("num_data", [20, 60, 10**6])
def test_a_budget_that_would_do(num_data, num_used):
    terms = torch.tensor([0.0, 1.0] * (num_used // 2)).double()[:, None]
    error = error_of(num_data / num_used * terms, num_data)
    message = error.warning(8)
    rest = 1 / num_used - 1 / num_data
    needed = rest * (log(TRUSTED_FACTOR) / error.half_widths()[0].item()) ** 2
    enough = 8 / num_used / (1 / num_data + needed)
    if enough > num_data:
        assert "no budget would bring it to" in message
    else:
        assert f"A budget of about {int(enough) + 1} would" in message


def test_a_pool_that_is_too_small_for_any_budget():
    terms = torch.tensor([1.0, 5.0] * 4).double()[:, None]
    of_pool = torch.tensor([0.0] * 30 + [24.0]).double()[:, None]
    message = error_of(terms, of_pool=of_pool).warning(8)
    assert "With the same pool and share of directions, no budget would" in message


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


def heavy_tailed(size):
    """Inputs whose squared lengths differ by orders of magnitude."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(size, 4, generator=generator, dtype=torch.float64)
    scales = torch.randn(size, 1, generator=generator, dtype=torch.float64)
    return X * (0.7 * scales).exp(), torch.randint(3, (size,), generator=generator)


@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
@pytest.mark.parametrize("sampling", ["uniform", "curvature"])
def test_intervals_cover_the_curvature_of_all_data(sampling, magnitudes):
    model = network("mlp")
    data = TensorDataset(*heavy_tailed(4000))
    train = DataLoader(data, batch_size=1000)
    options = {"magnitudes": magnitudes, "pool_size": 1000}
    full = debiased(model, magnitudes=magnitudes)
    full.fit(train)
    truth, covered, warned = full.sampling_error.traces, [], 0
    for seed in range(60):
        la = debiased(model, budget=64, sampling=sampling, seed=seed, **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            la.fit(train)
        warned += any("too small to trust" in str(w.message) for w in caught)
        ends = torch.tensor(list(la.curvature_intervals().values()))
        covered.append((ends[:, 0] <= truth) & (truth <= ends[:, 1]))
    coverage = torch.stack(covered).double().mean(0)
    assert (coverage >= 0.85).all(), coverage
    if sampling == "uniform":  # the scale of few inputs tells little
        assert warned > 20


def test_intervals_widen_with_the_level():
    la = debiased(spread_network(), budget=20)
    la.fit(loader())
    traces = la.sampling_error.traces.tolist()
    for layer, trace in zip(LAYERS, traces, strict=True):
        wide, narrow = (la.curvature_intervals(p)[layer] for p in (0.99, 0.5))
        assert 0 < wide[0] < narrow[0] < trace < narrow[1] < wide[1]
        assert wide[0] * wide[1] == pytest.approx(trace**2)
    with pytest.raises(ValueError, match="`level` must lie in"):
        la.curvature_intervals(95)


def test_intervals_of_many_equal_points_are_normal():
    terms = torch.tensor([1.0, 3.0] * 2000).double()[:, None]
    error = error_of(terms)
    expected = exp(1.96 * error.relative_errors()["a"]) * error.traces[0].item()
    assert error.intervals()["a"][1] == pytest.approx(expected, rel=1e-4)
