"""What users of laplace-torch's `KronLaplace` and `KronLLLaplace` rely on."""

import pytest
import torch
from laplace import KronLaplace, KronLLLaplace
from torch.distributions import MultivariateNormal

from tests import dense
from tests.cases import network
from tests.fits import SUBSETS, debiased, loader

THEIRS = {"all": KronLaplace, "last_layer": KronLLLaplace}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_folds": 3},
        {"estimator": "two_batch", "direction_fraction": 0.3},
        {"estimator": "two_batch", "magnitudes": "ggn"},
    ],
)
def test_the_same_data_again_scale_the_curvature(options):
    la = debiased(network("mlp"), **options)
    la.fit(loader())
    H, loss = la.H.clone(), la.loss
    for times in (2, 3):
        saved = la.state_dict()
        la = debiased(la.model, **options)
        la.load_state_dict(saved)
        la.fit(loader(), override=False)
        expected = times * H.to_matrix()
        assert dense.relative_error(la.H.to_matrix(), expected) < 1e-8
        assert torch.allclose(la.loss, times * loss)
        assert la.n_data == times * len(loader().dataset)


def test_exact_curvatures_of_the_same_data_again_keep_their_sum():
    la = debiased(network("mlp"), magnitudes="ggn")
    la.fit(loader())
    trace = la.H.diag().sum()
    la.fit(loader(), override=False)
    assert torch.allclose(la.H.diag().sum(), 2 * trace, rtol=1e-10)


@pytest.mark.parametrize("subset", SUBSETS)
def test_factors_are_those_of_the_debiased_curvature(subset):
    la = debiased(network("mlp"), subset=subset)
    assert la.H_facs is None
    la.fit(loader())
    assert dense.relative_error(la.H_facs.to_matrix(), la.H.to_matrix()) < 1e-10
    la = debiased(network("mlp"), subset=subset, magnitudes="ggn")
    la.fit(loader())
    assert la.H_facs is None  # the eigenvalues do not factor
    with pytest.raises(AttributeError, match="cannot be set"):
        la.H_facs = la.H


@pytest.mark.parametrize("subset", SUBSETS)
def test_without_a_fit_there_is_the_prior(subset):
    model = network("mlp")
    options = {"prior_precision": 0.3, "prior_mean": 0.1}
    if subset == "last_layer":
        options["last_layer_name"] = "2"
    la = debiased(model, subset=subset, **options)
    theirs = THEIRS[subset](model, "classification", **options)
    value = torch.randn(la.n_params, dtype=torch.float64)
    precision = 0.3 * torch.eye(len(value), dtype=torch.float64)
    prior = MultivariateNormal(torch.full_like(value, 0.1), precision_matrix=precision)
    assert torch.allclose(la.log_prob(value), prior.log_prob(value))
    ours = [[factor.shape for factor in own] for own in la.H.kfacs]
    assert ours == [[factor.shape for factor in own] for own in theirs.H.kfacs]
    assert not any(factor.any() for own in la.H.kfacs for factor in own)
    storages = [f.untyped_storage().nbytes() for own in la.H.kfacs for f in own]
    assert max(storages) == 8
    with pytest.raises(AttributeError, match="not fitted"):
        la.sample()
