"""torch-uncertainty's wrapper of laplace-torch takes this structure, too."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch_uncertainty.post_processing import LaplaceApprox

from laplace_debiased import Laplace


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("link_approx", ["probit", "mc", "bridge"])
@pytest.mark.parametrize("weight_subset", ["last_layer", "all"])
def test_it_is_a_client(weight_subset, link_approx):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    X, y = torch.randn(60, 4), torch.randint(3, (60,))
    train = DataLoader(TensorDataset(X, y), 16)
    approximation = LaplaceApprox(
        "classification",
        model,
        weight_subset,
        "kron_debiased",
        link_approx=link_approx,
    )
    approximation.fit(train)
    probabilities = approximation(X[:5])
    assert torch.allclose(probabilities.sum(1), torch.ones(5))
    if link_approx == "probit":
        la = Laplace(model, "classification", weight_subset, "kron_debiased")
        la.fit(train)
        la.optimize_prior_precision()
        assert torch.allclose(probabilities, la(X[:5]), atol=1e-4)
