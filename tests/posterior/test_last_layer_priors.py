"""Variances of a last layer with many outputs, at many prior precisions."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.fits import debiased, searched

OUTPUTS, SIZE = 300, 12
GRID = {"log_prior_prec_min": -2, "log_prior_prec_max": 2, "grid_size": 5}


class Twice(nn.Module):
    """What is after a layer."""

    def forward(self, x):
        return 2 * x


def fitted(*after, **options):
    torch.manual_seed(0)
    layers = nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, OUTPUTS), *after
    model = nn.Sequential(*layers).double()
    X, y = torch.randn(SIZE, 4).double(), torch.randint(OUTPUTS, (SIZE,))
    loader = DataLoader(TensorDataset(X, y), 8)
    options = {"fisher_rank": 5, "last_layer_name": "2"} | options
    la = debiased(model, subset="last_layer", **options)
    la.fit(loader)
    return la, X, loader


@pytest.mark.parametrize("forward_samples", ["auto", 8, None])
def test_variances_by_prior_are_exact(forward_samples):
    la, X, _ = fitted(forward_samples=forward_samples)
    priors = [0.1, 1.0, 30.0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mean, variances = la._variances_by_prior(X, priors)
    assert torch.allclose(mean, la.model.model(X))
    features = la.model.model[:2](X).detach()
    for prior, own in zip(priors, variances.unbind(2), strict=True):
        la.prior_precision = prior
        covariance = la.posterior_precision.to_matrix(-1)
        size = OUTPUTS * 6
        of_weight = covariance[:size, :size].reshape(OUTPUTS, 6, OUTPUTS, 6)
        of_weight = torch.stack([of_weight[c, :, c] for c in range(OUTPUTS)])
        expected = torch.einsum("ni,cij,nj->nc", features, of_weight, features)
        expected = expected + covariance.diagonal()[size:]
        assert torch.allclose(own, expected, rtol=1e-10)


def test_a_grid_search_has_the_exact_losses(monkeypatch):
    la, X, loader = fitted()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "The best prior precision")
        losses, nodes = searched(la, loader, monkeypatch, **GRID)
    expected = []
    _, y = loader.dataset.tensors
    for prior in torch.logspace(-2, 2, 5):
        la.prior_precision = prior
        expected.append(nn.functional.nll_loss(la(X).log(), y))
    assert torch.allclose(losses.double(), torch.stack(expected), rtol=1e-4)
    la.forward_samples = None
    assert searched(la, loader, monkeypatch, **GRID)[1] == nodes


@pytest.mark.filterwarnings("ignore:The best prior precision")
def test_what_is_not_linear_at_the_output_is_sampled(monkeypatch):
    la, X, loader = fitted(Twice())
    with pytest.warns(UserWarning, match="estimated by 64 samples"):
        _, variances = la._variances_by_prior(X, [1.0])
    la.forward_samples = None
    _, exact = la._variances_by_prior(X, [1.0])
    relative = variances / exact - 1
    assert 0.01 < relative.square().mean().sqrt() < 0.2
    losses, _ = searched(la, loader, monkeypatch, **GRID)
    la.forward_samples = 64
    assert torch.allclose(
        searched(la, loader, monkeypatch, **GRID)[0], losses, rtol=0.02
    )


def test_with_damping_each_prior_needs_its_own_pass():
    la, X, _ = fitted(damping=True)
    with pytest.raises(ValueError, match="its own pass"):
        la._variances_by_prior(X, [1.0])
