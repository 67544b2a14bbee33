"""A regression of one number: targets may be a column, or a vector, as outputs may."""

from itertools import product

import pytest
import torch
from laplace.curvature import AsdlGGN
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import (
    DebiasedKFACLinearOperator,
    bias_report,
    curvature_scores,
    directional_derivatives,
)
from tests.faults import same
from tests.fits import SUBSETS, debiased, posterior
from tests.zoo import Model

SIZE = 40


def data():
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(SIZE, 4, generator=generator, dtype=torch.float64)
    return X, X[:, 0].sin() + torch.randn(SIZE, generator=generator).double()


def network(squeezed=False):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    return Model(lambda self, x: self.net(x)[:, 0], net=net) if squeezed else net


def uses(la, X, y):
    """What is done with a posterior, in numbers."""
    batches = [(X, y)]
    la.fit(batches)
    found = [posterior(la), la.loss]
    la.optimize_prior_precision(tune_sigma_noise=True)
    found += [la.sigma_noise, la.log_marginal_likelihood(), *la(X[:3])]
    found += [la.uncertainty(X[:3]).total, la.report(batches, [X]).posterior.nll]
    found += [*la.conformal_intervals(batches)(X[:3])]
    la.optimize_prior_precision(method="gridsearch", val_loader=batches, grid_size=4)
    return [*found, la.prior_precision]


# laplace-torch finds the last layer of matrices alone
@pytest.mark.parametrize(
    ("subset", "squeezed"), [*product(SUBSETS, [False]), ("all", True)]
)
@pytest.mark.parametrize("options", [{}, {"magnitudes": "ggn", "budget": 20}], ids=str)
def test_all_that_is_done_with_a_posterior(options, subset, squeezed):
    X, y = data()
    options |= {"subset": subset, "likelihood": "regression"}
    expected = uses(debiased(network(), **options), X, y[:, None])
    assert same(uses(debiased(network(squeezed), **options), X, y), expected)


@pytest.mark.parametrize("squeezed", [False, True])
@pytest.mark.parametrize(
    ("damping", "options"),
    [(False, {"pred_type": "nn", "link_approx": "mc"}), (True, {"pred_type": "glm"})],
)
def test_one_prior_precision_after_another_is_tried(damping, options, squeezed):
    """Where not all are tried at once."""
    (X, y), found = data(), []
    for targets in (y, y[:, None]):
        la = debiased(network(squeezed), "regression", damping=damping)
        la.fit([(X, targets)])
        torch.manual_seed(0)
        la.optimize_prior_precision(
            method="gridsearch", val_loader=[(X, targets)], grid_size=4, **options
        )
        found.append(la.prior_precision)
    assert same(*found)


def test_other_backends():
    (X, y), found = data(), []
    for targets in (y, y[:, None]):
        la = debiased(network(), "regression", backend=AsdlGGN)
        la.fit([(X, targets)])
        found.append((posterior(la), la.loss))
    assert same(*found)


@pytest.mark.parametrize("squeezed", [False, True])
def test_operators_scores_and_derivatives(squeezed):
    def found(model, X, y):
        loss, params, batches = nn.MSELoss(), list(model.parameters()), [(X, y)]
        columns = torch.eye(sum(map(torch.numel, params)), 2, dtype=X.dtype)
        operator = DebiasedKFACLinearOperator(
            model, loss, params, batches, batches, fisher_type="empirical"
        )
        loader = DataLoader(TensorDataset(X, y), 10)
        options = {"num_directions": 2, "batch_size": 10, "num_batches": 1}
        return [
            operator.trace,
            *operator.gradient_and_loss()[0],
            curvature_scores(model, loss, batches),
            directional_derivatives(model, loss, params, batches, columns).slopes,
            bias_report(model, loss, params, loader, **options).slope.own,
        ]

    X, y = data()
    assert same(found(network(squeezed), X, y), found(network(), X, y[:, None]))


def test_a_vector_of_targets_is_not_that_of_several_outputs():
    X, y = data()
    la = debiased(nn.Linear(4, 3).double(), "regression")
    with pytest.raises(ValueError, match=r"output's shape \(\d+, 3\)"):
        la.fit([(X, y)])


@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
@pytest.mark.parametrize("batch_size", [1, 8, 13])  # 40 are 3 * 13 and one
def test_networks_that_squeeze_predict_one_example(batch_size, magnitudes):
    """Its output is then a scalar."""
    X, y = data()
    net = network()
    squeezing = Model(lambda self, x: self.net(x).squeeze(), net=net)
    train = DataLoader(TensorDataset(X, y), batch_size)
    posteriors = [
        debiased(own, "regression", magnitudes=magnitudes) for own in (squeezing, net)
    ]
    for la in posteriors:
        la.fit(train)
    for size in (1, 2):
        own, expected = (la(X[:size]) for la in posteriors)
        assert same(own, expected)
        own, expected = (la.uncertainty(X[:size]).total for la in posteriors)
        assert own.shape == (size, 1) and same(own, expected)
