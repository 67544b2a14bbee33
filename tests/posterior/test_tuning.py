import warnings

import numpy as np
import pytest
import torch
import torchmetrics
from torch import nn
from torch.distributions import MultivariateNormal
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased.posterior.grid_search import GaussianNLL
from tests.cases import batch
from tests.fits import LOSSES, debiased

GRID = {"log_prior_prec_min": -3, "log_prior_prec_max": 3, "grid_size": 25}


def splits(likelihood, outputs, noise):
    """Training and validation data of a noisy function of two inputs."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(160, 2, generator=generator, dtype=torch.float64)
    clean = torch.stack([X[:, 0].sin() + X[:, 1] * (k + 1) for k in range(outputs)], 1)
    y = clean + noise * torch.randn(clean.shape, generator=generator).double()
    if likelihood == "classification":
        y = y.argmax(1)
    data = TensorDataset(X, y)
    return (
        DataLoader(torch.utils.data.Subset(data, range(40)), batch_size=16),
        DataLoader(torch.utils.data.Subset(data, range(40, 160)), batch_size=50),
    )


def fitted(likelihood, outputs, noise):
    """A network that was trained too long on few points, and its posterior."""
    train, val = splits(likelihood, outputs, noise)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, outputs)).double()
    loss = nn.MSELoss() if likelihood == "regression" else nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for _ in range(100):
        for X, y in train:
            optimizer.zero_grad()
            loss(model(X), y).backward()
            optimizer.step()
    la = debiased(model, likelihood)
    if likelihood == "regression":
        la.sigma_noise = noise
    la.fit(train)
    return la, val


def nll(la, val):
    """Mean NLL on all validation data at the present prior precision."""
    X, y = (torch.cat(parts) for parts in zip(*val, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prediction = la(X)
    if la.likelihood == "classification":
        return nn.functional.nll_loss(prediction.log(), y).item()
    mean, covariance = prediction
    noise = la.sigma_noise**2 * torch.eye(mean.shape[1])
    return -MultivariateNormal(mean, covariance + noise).log_prob(y).mean().item()


@pytest.mark.parametrize(
    ("likelihood", "outputs"),
    [("classification", 3), ("regression", 1), ("regression", 2)],
)
def test_choice_equals_the_best_of_all_grid_points(likelihood, outputs):
    la, val = fitted(likelihood, outputs, 0.3)
    grid, losses = torch.logspace(-3, 3, 25), []
    for prior_precision in grid:
        la.prior_precision = prior_precision
        losses.append(nll(la, val))
    best = int(np.argmin(losses))
    assert 0 < best < len(grid) - 1  # so that the choice is not the grid's end
    la.optimize_prior_precision(method="gridsearch", val_loader=val, **GRID)
    assert torch.allclose(la.prior_precision, grid[best].double())


def gaussian_nll(mean, variance, y):
    assert mean.shape == y.shape
    return (0.5 * ((mean - y) ** 2 / variance[:, 0] + variance[:, 0].log())).mean()


def brier(p, y):
    assert p.shape == y.shape
    return ((p - y) ** 2).mean()


@pytest.mark.parametrize(
    ("likelihood", "loss"),
    [("regression", gaussian_nll), ("binary_classification", brier)],
)
def test_functions_get_targets_of_the_outputs_shape(likelihood, loss):
    chosen = []
    for form in (lambda y: y, lambda y: y[:, 0]):
        X, y = batch("mlp", 60, LOSSES[likelihood])
        y = form(y[:, :1])
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        la = debiased(model, likelihood)
        la.fit(DataLoader(TensorDataset(X, y), 20))
        la.optimize_prior_precision(
            method="gridsearch", val_loader=[(X, y)], loss=loss, **GRID
        )
        chosen.append(la.prior_precision)
    assert torch.equal(*chosen)


@pytest.mark.parametrize("link_approx", ["probit", "mc"])
def test_classes_may_be_any_integers_and_some_ignored(link_approx):
    la, val = fitted("classification", 3, 0.3)
    ((X, y),) = DataLoader(val.dataset, len(val.dataset))
    options = {"method": "gridsearch", "link_approx": link_approx, **GRID}
    chosen = []
    for own, classes in (
        (X, y.int()),
        (torch.cat([X, X]), torch.cat([y, -100 + 0 * y])),
    ):
        torch.manual_seed(0)
        la.optimize_prior_precision(val_loader=[(own, classes)], **options)
        chosen.append(la.prior_precision)
    assert torch.equal(*chosen)
    with pytest.raises(ValueError, match=r"pass `y.argmax\(1\)`, or a `loss`"):
        la.optimize_prior_precision(
            val_loader=[(X, torch.eye(3).double()[y])], **options
        )
    with pytest.raises(ValueError, match="no data"):
        la.optimize_prior_precision(val_loader=[], loss=brier, **options)


def test_metrics_of_the_user_are_reset_for_each_grid_point():
    la, val = fitted("classification", 3, 0.3)
    metric = torchmetrics.classification.MulticlassCalibrationError(num_classes=3)
    metric.update(torch.eye(3), torch.arange(3))  # is forgotten
    options = {"method": "gridsearch", "val_loader": val, "loss": metric, **GRID}
    choices, expected = [], []
    for link_approx in ("probit", "bridge"):  # one pass for all, or one for each
        la.optimize_prior_precision(link_approx=link_approx, **options)
        choices.append(la.prior_precision)
    for prior_precision in torch.logspace(-3, 3, 25):
        la.prior_precision = prior_precision
        errors = []
        for link_approx in ("probit", "bridge"):
            own = torchmetrics.classification.MulticlassCalibrationError(num_classes=3)
            for X, y in val:
                own.update(la(X, link_approx=link_approx), y)
            errors.append(own.compute().item())
        expected.append(errors)
    best = torch.logspace(-3, 3, 25)[np.argmin(expected, 0)]
    assert torch.allclose(torch.cat(choices), best.double())


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_all_prior_precisions_take_one_pass(monkeypatch, likelihood):
    la, val = fitted(likelihood, 3 if likelihood == "classification" else 1, 0.3)
    calls, forward = [], la.model.forward

    def counted(X):
        calls.append(len(X))
        return forward(X)

    monkeypatch.setattr(la.model, "forward", counted)
    la.optimize_prior_precision(method="gridsearch", val_loader=val, **GRID)
    assert calls == [50, 50, 20]


@pytest.mark.parametrize(("bounds", "name"), [((-3, -2), "max"), ((2, 3), "min")])
def test_a_choice_at_the_end_of_the_grid_warns(bounds, name):
    la, val = fitted("regression", 1, 0.3)
    low, high = bounds
    with pytest.warns(UserWarning, match=f"extend it by `log_prior_prec_{name}`"):
        la.optimize_prior_precision(
            method="gridsearch",
            val_loader=val,
            grid_size=3,
            log_prior_prec_min=low,
            log_prior_prec_max=high,
        )


@pytest.mark.parametrize("shape", [(5, 2, 2), (5, 2)])
def test_gaussian_nll_equals_the_density(shape):
    torch.manual_seed(0)
    mean, y = torch.randn(2, 5, 2)
    root = torch.randn(5, 2, 2)
    covariance = root @ root.mT
    if len(shape) == 2:
        covariance = covariance.diagonal(dim1=1, dim2=2)
        full = torch.diag_embed(covariance)
    else:
        full = covariance
    noise = 0.09 * torch.eye(2)
    expected = -MultivariateNormal(mean, full + noise).log_prob(y).mean()
    metric = GaussianNLL(torch.tensor(0.09))
    for rows in torch.arange(5).split(3):
        metric.update(mean[rows], covariance[rows], y[rows])
    assert torch.allclose(metric.compute().float(), expected)
    with pytest.raises(ValueError, match="outputs' shape"):
        metric.update(mean, covariance, y[:, 0])


def test_losses_that_are_not_finite_are_not_chosen():
    la, val = fitted("classification", 3, 0.3)
    la.prior_precision = 7.0

    def first_is_nan(probabilities, _):
        # the narrower the posterior, the larger its confidence
        loss = -probabilities.max(1).values.mean()
        return torch.where(la.prior_precision > 500, torch.nan, loss)

    options = {"method": "gridsearch", "val_loader": val, **GRID}
    la.optimize_prior_precision(loss=first_is_nan, **options)
    assert 300 < la.prior_precision < 500

    before = la.prior_precision
    with pytest.raises(ValueError, match="not finite for any prior precision"):
        la.optimize_prior_precision(loss=lambda *_: torch.tensor(torch.nan), **options)
    assert la.prior_precision is before


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_prior_precisions_that_are_none_are_refused(value):
    la, _ = fitted("regression", 1, 0.3)
    before = la.prior_precision
    with pytest.raises(ValueError, match="must be finite and at least zero"):
        la.prior_precision = value
    assert la.prior_precision is before


@pytest.mark.parametrize("passed", ["before a fit", "after a fit"])
@pytest.mark.parametrize("value", [2.0, [2.0], [1.0, 2.0, 3.0, 4.0]], ids=str)
def test_a_prior_precision_is_not_changed_with_its_owners_tensor(value, passed):
    train, _ = splits("regression", 1, 0.3)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    own = torch.tensor(value, dtype=torch.float64)
    options = {"prior_precision": own} if passed == "before a fit" else {}
    la = debiased(model, "regression", **options)
    la.fit(train)
    if passed == "after a fit":
        la.prior_precision = own
    own.mul_(5)
    assert la.prior_precision.tolist() == torch.tensor(value).reshape(-1).tolist()


@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("noise", [0.1, 0.5])
def test_noise_and_prior_have_the_highest_marginal_likelihood(subset, noise):
    la, _ = fitted("regression", 1, noise)
    train, _ = splits("regression", 1, noise)
    la = debiased(la.model, "regression", subset)
    la.fit(train)
    la.optimize_prior_precision(tune_sigma_noise=True)
    sigma, prior = la.sigma_noise.clone(), la.prior_precision.clone()
    highest = la.log_marginal_likelihood()
    for factor in (0.9, 0.99, 1.01, 1.1):
        for other in (
            la.log_marginal_likelihood(prior, factor * sigma),
            la.log_marginal_likelihood(factor * prior, sigma),
            la.log_marginal_likelihood(factor * prior, factor * sigma),
        ):
            assert other < highest
    residuals = (2 * la.loss / la.n_data).sqrt()
    assert sigma > residuals  # which the network has fitted


def test_noise_is_tuned_only_where_there_is_some():
    la, val = fitted("classification", 3, 0.3)
    with pytest.raises(ValueError, match="for regression"):
        la.optimize_prior_precision(tune_sigma_noise=True)
    la, val = fitted("regression", 1, 0.3)
    with pytest.raises(ValueError, match="by the marginal likelihood"):
        la.optimize_prior_precision(
            method="gridsearch", val_loader=val, tune_sigma_noise=True
        )
    la.loss = torch.zeros(())
    with pytest.raises(ValueError, match="without residuals"):
        la.optimize_prior_precision(tune_sigma_noise=True)
    assert la.sigma_noise == 0.3


def test_a_link_that_was_passed_needs_no_reminder():
    la, val = fitted("classification", 3, 0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        la.optimize_prior_precision(
            method="gridsearch", val_loader=val, link_approx="probit", **GRID
        )


def test_the_marginal_likelihood_takes_no_validation_data():
    la, val = fitted("classification", 3, 0.3)
    with pytest.warns(UserWarning, match="takes no `val_loader`"):
        la.optimize_prior_precision(val_loader=val)
