import pytest
import torch

from laplace_debiased.predictive.prior_path import PriorInterval
from tests.cases import NETWORKS, batch, network
from tests.fits import SUBSETS, debiased, loader


def exact(weights, eigenvalues, prior_precisions):
    return (weights / (eigenvalues + prior_precisions[:, None])).sum(1)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-5])
@pytest.mark.parametrize("interval", [(1e-4, 1e4), (1e-2, 1e6), (1.0, 1.0), (0.5, 3.0)])
def test_variances_are_known_between_the_nodes(interval, tolerance):
    """For eigenvalues below, within and above the interval, alone and mixed."""
    path = PriorInterval(*interval, tolerance)
    nodes = torch.tensor(path.nodes, dtype=torch.float64)
    low, high = (torch.tensor(end).log10() for end in interval)
    between = torch.logspace(low, high, 500, dtype=torch.float64)
    between = between.clamp(*interval)
    spread = torch.logspace(-9, 9, 60, dtype=torch.float64)
    torch.manual_seed(0)
    mixtures = [(torch.ones(1).double(), own[None]) for own in spread]
    random = 10 ** (4 * torch.randn(20, 60)).double()
    mixtures += [(weights, spread) for weights in random]
    values = torch.stack([exact(*own, nodes) for own in mixtures])
    expected = torch.stack([exact(*own, between) for own in mixtures])
    actual = path.at(values, between)
    assert ((actual - expected).abs() / expected).max() < 2 * tolerance


def test_interpolated_variances_are_differentiable():
    path = PriorInterval(1e-2, 1e2)
    nodes = torch.tensor(path.nodes, dtype=torch.float64)
    eigenvalues = torch.tensor([0.1, 3.0]).double()
    prior = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    values = exact(torch.ones(2).double(), eigenvalues, nodes)
    path.at(values, prior).sum().backward()
    expected = -((eigenvalues + prior) ** -2).sum()
    assert torch.allclose(prior.grad, expected, rtol=1e-3)


def test_outside_of_the_interval_nothing_is_known():
    path = PriorInterval(1e-2, 1e2)
    values = torch.ones(3, len(path.nodes))
    for outside in (1e-3, 1e3):
        with pytest.raises(ValueError, match="must lie in"):
            path.at(values, torch.tensor([1.0, outside]))


def test_outputs_without_variance_stay_so():
    path = PriorInterval(1e-2, 1e2)
    values = torch.zeros(2, len(path.nodes))
    assert path.at(values, torch.tensor([1.0])).abs().max() < 1e-30


@pytest.mark.parametrize("memory_limit", [1, 2**30])
@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("name", NETWORKS)
def test_one_pass_equals_a_prediction_for_each_prior(
    name, subset, magnitudes, memory_limit
):
    la = debiased(
        network(name), subset=subset, magnitudes=magnitudes, memory_limit=memory_limit
    )
    la.fit(loader(name))
    X, _ = batch(name, 5)
    shifts = [0.1, 1.0, 30.0]
    means, variances = la._variances_by_prior(X, shifts)
    for k, shift in enumerate(shifts):
        la.prior_precision = shift
        f_mu, f_var = la._glm_predictive_distribution(X, diagonal_output=True)
        assert torch.allclose(means, f_mu)
        assert torch.allclose(variances[..., k], f_var, rtol=1e-8)
