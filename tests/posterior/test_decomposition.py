"""Posteriors whose large factors are decomposed in part."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import Laplace
from laplace_debiased.curvature import decomposition
from laplace_debiased.posterior import diagnostics

SIZE, FEATURES = 300, 400


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch):
    for module in (decomposition, diagnostics):
        monkeypatch.setattr(module, "MIN_ROWS", FEATURES)


def points():
    """Inputs whose variances fall."""
    generator = torch.Generator().manual_seed(0)
    scale = 2 * torch.arange(1, FEATURES + 1).double() ** -1.0
    X = scale * torch.randn(SIZE, FEATURES, generator=generator).double()
    return X, (X[:, 0] > 0).long() + (X[:, 1] > 0).long()


def fitted(subset="all", likelihood="classification", **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    if subset == "last_layer":
        model = nn.Sequential(nn.Identity(), nn.Linear(FEATURES, 3)).double()
    X, y = points()
    y = nn.functional.one_hot(y).double() if likelihood == "regression" else y
    la = Laplace(model, likelihood, subset, "kron_debiased", **options)
    la.fit(DataLoader(TensorDataset(X, y), 20))
    return la


def gamma(la):
    precision = la.posterior_precision
    pairs = zip(precision.spectra(), precision.deltas, strict=True)
    return sum((1 - delta / values).sum() for values, delta in pairs)


def num_alike(la):
    """Number of directions of the first layer's inputs with the same magnitudes."""
    values = la.H.eigenvalues[0]
    own = values[1] if len(values) == 2 else values[0][0]
    return int((own == own[0]).sum())


@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("estimator", ["cross_fit", "two_batch"])
@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
def test_results_are_within_the_bound(magnitudes, estimator, subset):
    options = {"magnitudes": magnitudes, "estimator": estimator, "subset": subset}
    full = fitted(**options, decomposition_tolerance=0)
    part = fitted(**options, decomposition_tolerance=0.03)
    assert num_alike(full) < num_alike(part) < FEATURES
    X, _ = points()
    for prior_precision in (0.1, 1.0, 10.0):
        full.prior_precision = part.prior_precision = prior_precision
        bound = part.decomposition_error
        assert full.decomposition_error == 0 < bound
        assert abs(gamma(part) / gamma(full) - 1) < bound
        difference = part.log_det_posterior_precision - full.log_det_posterior_precision
        assert abs(difference) < bound * gamma(part) / 2
        (_, own), (_, other) = (
            la._glm_predictive_distribution(X, diagonal_output=True)
            for la in (full, part)
        )
        assert abs(other.mean() / own.mean() - 1) < bound


def test_the_bound_falls_with_the_prior_precision_and_grows_with_the_curvature():
    la = fitted(likelihood="regression")
    bounds = []
    for prior_precision in (0.1, 1.0, 10.0):
        la.prior_precision = prior_precision
        bounds.append(la.decomposition_error)
    assert bounds[0] > 10 * bounds[1] > 100 * bounds[2] > 0
    la.prior_precision, la.sigma_noise = 1.0, 0.1**0.5  # ten times the curvature
    assert la.decomposition_error == pytest.approx(bounds[0])


def test_small_factors_are_decomposed_in_full(monkeypatch):
    for module in (decomposition, diagnostics):
        monkeypatch.setattr(module, "MIN_ROWS", FEATURES + 1)
    la = fitted()
    full = fitted(decomposition_tolerance=0)
    assert la.decomposition_error == 0
    for own, other in zip(la.H.eigenvalues, full.H.eigenvalues, strict=True):
        assert all(map(torch.equal, own, other))


def test_saved_posteriors_are_the_same():
    la = fitted()
    other = Laplace(la.model, "classification", "all", "kron_debiased")
    other.load_state_dict(la.state_dict())
    for own, loaded in zip(la.H.eigenvectors, other.H.eigenvectors, strict=True):
        assert all(map(torch.equal, own, loaded))


@pytest.mark.parametrize("tolerance", [-0.1, 1.0, float("nan")])
def test_tolerances_are_shares(tolerance):
    with pytest.raises(ValueError, match="decomposition_tolerance"):
        fitted(decomposition_tolerance=tolerance)


def test_damping_has_no_bound():
    la = fitted(damping=True)
    with pytest.raises(ValueError, match="damping"):
        _ = la.decomposition_error
