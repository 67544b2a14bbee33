"""The noise of a regression with the highest marginal likelihood."""

import warnings
from math import exp, log, pi

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased.posterior.noise import best_noise
from tests.fits import debiased


def fitted(num_data, residuals, width=5, outputs=1, **options):
    """The posterior of a network with residuals of a given size."""
    torch.manual_seed(0)
    layers = nn.Linear(3, width), nn.Tanh(), nn.Linear(width, outputs)
    model = nn.Sequential(*layers).double()
    X = torch.randn(num_data, 3).double()
    with torch.no_grad():
        y = model(X) + residuals * torch.randn(num_data, outputs).double()
    la = debiased(model, "regression", **options)
    la.fit(DataLoader(TensorDataset(X, y), 50))
    return la


def highest(la):
    """The highest log marginal likelihood over noise and prior, by another search."""
    values = np.concatenate(
        [np.outer(*map(np.asarray, own)).ravel() for own in matrices(la)]
    )
    loss, T = float(la.loss), la.temperature
    norm = float((la.mean - la.prior_mean).square().sum())
    count = la.n_data * la.n_outputs

    def cost(logs):
        sigma, delta = np.exp(logs)
        fit = -loss / (sigma**2 * T) - count * log(sigma * (2 * pi) ** 0.5)
        determinant = np.log(values / (sigma**2 * T) + delta) - np.log(delta)
        return (determinant.sum() + delta * norm) / 2 - fit

    rmse = (2 * loss / count) ** 0.5
    starts = [(log(rmse * 10**k / T**0.5), 0.0) for k in range(6)]
    options = {"xatol": 1e-7, "fatol": 1e-9, "maxiter": 10**4}
    searches = [
        minimize(cost, start, method="Nelder-Mead", options=options) for start in starts
    ]
    best = min(searches, key=lambda own: own.fun)
    return exp(best.x[0]), -best.fun


def matrices(la):
    """Eigenvalues of both factors of each block, that of a vector's other being one."""
    return [(own[0], own[1] if len(own) == 2 else [1.0]) for own in la.H.eigenvalues]


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("temperature", [1.0, 4.0, 0.1, 1e-5])
def test_the_noise_has_the_temperature(temperature, outputs):
    la = fitted(100, 0.5, outputs=outputs, temperature=temperature)
    la.optimize_prior_precision(tune_sigma_noise=True)
    sigma, value = highest(la)
    assert la.sigma_noise.item() == pytest.approx(sigma, rel=1e-3)
    assert la.log_marginal_likelihood().item() == pytest.approx(value, abs=1e-4)


@pytest.mark.parametrize("residuals", [1e-1, 1e-3, 1e-5])
def test_the_noise_of_overfitted_networks_is_far_above_their_residuals(residuals):
    la = fitted(30, residuals, width=40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        la.optimize_prior_precision(tune_sigma_noise=True)
    sigma, value = highest(la)
    assert sigma > 200 * residuals or residuals == 1e-1
    assert la.sigma_noise.item() == pytest.approx(sigma, rel=1e-3)
    assert la.log_marginal_likelihood().item() == pytest.approx(value, abs=1e-4)


def test_a_noise_at_the_end_of_the_search_warns():
    la = fitted(30, 0.1, width=40)
    la.loss = torch.tensor(1e-50, dtype=torch.float64)
    lowest = (2 * la.loss / la.n_data).sqrt()
    with pytest.warns(UserWarning, match="still grows at the noise"):
        la.optimize_prior_precision(tune_sigma_noise=True)
    assert la.sigma_noise.item() == pytest.approx(1e20 * lowest.item())


@pytest.mark.parametrize("factor", [1.0, 1.3, 9.9, 10.0, 10.1, 345.0, 1e7])
def test_a_maximum_is_found_wherever_it_is(factor):
    tried = []

    def concave(sigma):
        tried.append(sigma)
        return -(log(sigma / (0.2 * factor)) ** 2)

    assert best_noise(concave, 0.2) == pytest.approx(0.2 * factor, rel=1e-3)
    assert min(tried) == 0.2 and max(tried) < 1000 * 0.2 * factor
