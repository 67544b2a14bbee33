"""Calibrated posteriors, and what is uncertain about their predictions."""

import pickle
import warnings

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased.posterior.laplace import KronDebiasedLaplace
from laplace_debiased.predictive.calibration import Calibration
from laplace_debiased.predictive.links import probit_probabilities
from tests.cases import batch, network
from tests.fits import SUBSETS, debiased, loader

X, Y = batch("mlp", 40, seed=5)
HALF = Calibration(1.7, 0.4, 0.1, 40, 1.0, ((0.0, 1.1), (0.4, 1.0)))
NONE = Calibration(1.7, 0.0, 0.1, 40, 1.0, ((0.0, 1.0),))
CALIBRATIONS = {"half": HALF, "none": NONE}


def fitted(subset="all", likelihood="classification", **kwargs):
    la = debiased(network("mlp"), likelihood, subset, prior_precision=3.0, **kwargs)
    la.fit(loader(likelihood=likelihood))
    return la


def calibrated(calibration, subset="all"):
    la = fitted(subset)
    la._calibration = calibration
    return la


def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("subset", SUBSETS)
def test_one_pass_tells_what_predictions_then_have(subset):
    la = fitted(subset)
    val = DataLoader(TensorDataset(X, Y), 7)
    chosen = la.calibrate(val)
    other = fitted(subset)
    other.optimize_prior_precision()
    assert torch.equal(la.prior_precision, other.prior_precision)
    assert la.calibration is chosen
    p = la(X)
    nll = torch.nn.functional.nll_loss(p.log(), Y)
    assert nll.item() == pytest.approx(chosen.nll, rel=1e-9)
    assert chosen.num_points == 40
    mean, variance = other._glm_predictive_distribution(X, diagonal_output=True)
    expected = probit_probabilities(*chosen.outputs(mean, variance))
    assert torch.allclose(p, expected)


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("calibration", CALIBRATIONS.values(), ids=CALIBRATIONS)
@pytest.mark.parametrize("link", ["probit", "mc", "bridge", "bridge_norm"])
def test_every_link_approximation_is_that_of_calibrated_outputs(
    subset, calibration, link
):
    la = calibrated(calibration, subset)
    kwargs = {"link_approx": link, "n_samples": 4000, "generator": generator()}
    p = la(X, **kwargs)
    temperature, scale = calibration.temperature, calibration.scale
    assert torch.allclose(p.sum(1), torch.ones(40).double())
    if scale == 0:
        assert torch.allclose(p, (la.model(X) / temperature).softmax(1))
        return
    plain = fitted(subset)
    mean, covariance = plain._glm_predictive_distribution(X)
    f_mu, f_var = la._glm_predictive_distribution(X)
    assert torch.allclose(f_mu, mean / temperature)
    assert torch.allclose(f_var, scale * covariance / temperature**2)
    _, joint = la._glm_predictive_distribution(X, joint=True)
    assert torch.allclose(joint[:3, :3], f_var[0])
    # the links are laplace-torch's, given other moments
    diagonal = f_var.diagonal(dim1=1, dim2=2)
    plain._glm_predictive_distribution = lambda *_, diagonal_output=False, **__: (
        f_mu.clone(),
        diagonal if diagonal_output else f_var,
    )
    expected = plain(X, **kwargs | {"generator": generator()})
    tolerance = 0.05 if link == "mc" else 1e-9
    assert torch.allclose(p, expected, atol=tolerance)


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("calibration", CALIBRATIONS.values(), ids=CALIBRATIONS)
def test_samples_are_those_of_calibrated_outputs(subset, calibration):
    la, plain = calibrated(calibration, subset), fitted(subset)
    temperature, scale = calibration.temperature, calibration.scale
    options = {"n_samples": 4000, "generator": generator()}
    glm = la.functional_samples(X, **options)
    f_mu, f_var = la._glm_predictive_distribution(X, diagonal_output=True)
    spread = f_var.sqrt()
    assert (glm.mean(0) - f_mu).abs().max() <= 0.1 * spread.max() + 1e-9
    assert torch.allclose(glm.std(0), spread, rtol=0.1, atol=1e-9)
    # those of the network itself, at parameters nearer to the mean
    options = {"n_samples": 3}
    samples = plain.sample(**options, generator=generator())
    drawn = la._nn_functional_samples(X, **options, generator=generator())
    plain.sample = lambda *_: plain.mean + scale**0.5 * (samples - plain.mean)
    expected = plain._nn_functional_samples(X, **options) / temperature
    assert torch.allclose(drawn, expected)
    p = la(X, "nn", link_approx="mc", **options, generator=generator())
    assert torch.allclose(p, expected.softmax(-1).mean(0))
    # samples of the parameters are the posterior's own
    assert torch.equal(la.sample(3, generator=generator()), samples)


def test_predictions_without_variance_take_no_backward_pass(monkeypatch):
    la = calibrated(NONE)
    monkeypatch.setattr(la, "_output_moments", None)
    assert la(X).shape == (40, 3)


def test_a_calibration_is_forgotten_with_what_it_was_for():
    la = calibrated(HALF)
    with pytest.warns(UserWarning, match="of other data, prior precision or temp"):
        la.prior_precision = 4.0
    assert la.calibration is None
    for change in (
        lambda la: la.fit(loader()),
        lambda la: la.optimize_prior_precision(),
        lambda la: la.optimize_prior_precision(
            method="gridsearch", val_loader=loader(), grid_size=3
        ),
    ):
        la = calibrated(HALF)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "The best prior precision")
            change(la)
        assert la.calibration is None


def scale_in_place(la):
    la.prior_precision *= 100


def heat(la):
    la.temperature = 2.0


def add_a_batch(la):
    la.partial_fit((X, Y))


def add_data(la):
    la.fit(loader(), override=False)


@pytest.mark.parametrize("change", [scale_in_place, heat, add_a_batch, add_data])
def test_a_warning_says_that_a_calibration_is_forgotten(change):
    la = fitted()
    chosen = la.calibrate([(X, Y)])
    la.temperature = 1.0  # as it was
    assert la.calibration is chosen
    with pytest.warns(UserWarning, match="or temperature, and is forgotten"):
        change(la)
    assert la.calibration is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        change(la)


def set_another(la):
    la.prior_precision = 300.0


@pytest.mark.parametrize("change", [set_another, heat, add_a_batch, add_data])
def test_a_warning_that_is_an_error_changes_nothing(change):
    la = fitted()
    la._is_tuned = False
    la._calibration = HALF
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = la(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="is forgotten"):
            change(la)
    assert la.calibration is HALF and not la._is_tuned
    assert la.prior_precision == 3 and la.temperature == 1
    assert torch.equal(la(X), before)


@pytest.mark.parametrize("value", [-1.0, float("nan"), torch.ones(3)])
def test_a_prior_precision_that_is_refused_leaves_the_calibration(value):
    la = calibrated(HALF)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"prior_precision|Length of prior"):
            la.prior_precision = value
    assert la.calibration is HALF
    assert la.prior_precision == 3


def test_a_failed_calibration_leaves_the_last_one():
    la = calibrated(HALF)
    val = [(X, Y), (X, Y + 100)]
    with pytest.raises(ValueError, match="Class"):
        la.calibrate(val)
    assert la.calibration is HALF
    assert la.prior_precision == 3


def test_the_prior_precision_stays_if_asked():
    la = fitted()
    la.calibrate([(X, Y)], optimize_prior=False)
    assert la.prior_precision == 3


@pytest.mark.parametrize("subset", SUBSETS)
def test_checkpoints_and_copies_are_calibrated(subset, tmp_path):
    la = fitted(subset)
    la.calibrate([(X, Y)])
    la.save(tmp_path / "posterior.pt")
    other = debiased(network("mlp"), subset=subset)
    other.load(tmp_path / "posterior.pt")
    for copy in (other, pickle.loads(pickle.dumps(la))):
        assert copy.calibration == la.calibration
        assert torch.equal(copy(X), la(X))


@pytest.mark.parametrize(
    ("name", "value"),
    [("scale", 2.0), ("temperature", 0.0), ("temperature", float("nan"))],
)
def test_damaged_calibrations_are_refused(name, value):
    la = calibrated(HALF)
    saved = la.state_dict() | {f"calibration.{name}": value}
    with pytest.raises(ValueError, match="calibration"):
        la.load_state_dict(saved)
    assert la.calibration is HALF


def test_what_cannot_be_calibrated_is_refused():
    with pytest.raises(AttributeError, match="not fitted"):
        debiased(network("mlp")).calibrate([(X, Y)])
    la = fitted(likelihood="regression")
    with pytest.raises(ValueError, match="tune_sigma_noise"):
        la.calibrate(loader(likelihood="regression"))
    with pytest.raises(ValueError, match="no data"):
        fitted().calibrate([])
    with pytest.raises(ValueError, match="class indices"):
        fitted().calibrate([(X, torch.rand(40, 3).double())])


def test_points_that_the_loss_ignores_are_left_out():
    la = fitted()
    y = Y.clone()
    y[:10] = -100
    chosen = la.calibrate([(X, y)])
    assert chosen == fitted().calibrate([(X[10:], Y[10:])])
    assert chosen.num_points == 30


@pytest.mark.parametrize("subset", SUBSETS)
def test_uncertainty_is_that_of_the_whole_posterior_at_the_temperature(subset):
    la = calibrated(NONE, subset)
    found = la.uncertainty(X)
    assert torch.allclose(found.probabilities, la(X))
    mean, covariance = fitted(subset)._glm_predictive_distribution(X)
    assert torch.allclose(found.mean, mean)
    variances = covariance.diagonal(dim1=1, dim2=2)
    assert torch.allclose(found.functional_variance, variances)
    # by samples
    noise = torch.randn(20_000, *mean.shape, dtype=mean.dtype, generator=generator())
    root = torch.linalg.cholesky(covariance)
    p = ((mean + torch.einsum("bcd,sbd->sbc", root, noise)) / 1.7).softmax(-1)
    total = torch.special.entr(p.mean(0)).sum(-1)
    aleatoric = torch.special.entr(p).sum(-1).mean(0)
    assert torch.allclose(found.total, total, rtol=0.02)
    assert torch.allclose(found.aleatoric, aleatoric, rtol=0.02)
    assert torch.allclose(found.epistemic, total - aleatoric, rtol=0.1, atol=1e-3)
    assert torch.equal(found.total, found.aleatoric + found.epistemic)


def test_uncertainty_without_calibration_is_that_of_the_posterior():
    la = fitted()
    found = la.uncertainty(X)
    assert torch.allclose(found.probabilities, la(X))
    assert (found.epistemic > 0).all()


def test_uncertainty_of_a_regression_is_variance():
    la = fitted(likelihood="regression", sigma_noise=0.5)
    found = la.uncertainty(X)
    mean, variance = la(X, diagonal_output=True)
    assert found.probabilities is None
    assert torch.allclose(found.mean, mean)
    assert torch.allclose(found.epistemic, variance)
    assert torch.allclose(found.aleatoric, torch.full_like(variance, 0.25))
    assert torch.allclose(found.total, variance + 0.25)


def test_there_must_be_examples():
    with pytest.raises(ValueError, match="no examples"):
        fitted().uncertainty(X[:0])


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_predictions_warn_once_of_a_default_prior_precision(likelihood):
    la = KronDebiasedLaplace(network("mlp"), likelihood)
    la.fit(loader(likelihood=likelihood))
    names = "`prior_precision` 1"
    if likelihood == "regression":
        names += " and `sigma_noise` 1"
    with pytest.warns(UserWarning, match=names):
        la(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        la(X)


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_reports_sets_and_intervals_are_predictions(likelihood):
    data = loader(likelihood=likelihood)
    sets = "conformal_" + ("intervals" if likelihood == "regression" else "sets")
    for scored in ("report", sets):
        la = KronDebiasedLaplace(network("mlp"), likelihood)
        la.fit(data)
        with pytest.warns(UserWarning, match="`prior_precision` 1"):
            getattr(la, scored)(data)


def tune(la):
    la.optimize_prior_precision()


def search(la):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The best prior precision")
        la.optimize_prior_precision(
            method="gridsearch", val_loader=loader(), grid_size=3
        )


def choose(la):
    la.prior_precision = 1.0


@pytest.mark.parametrize("change", [tune, search, choose])
def test_predictions_do_not_warn_of_a_prior_precision_that_was_chosen(change):
    la = debiased(network("mlp"))
    la.fit(loader())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        change(la)
        la(X)
        la.uncertainty(X)


def test_regressions_warn_of_a_default_noise():
    la = fitted(likelihood="regression")
    with pytest.warns(UserWarning, match="default `sigma_noise` 1,"):
        la(X)
