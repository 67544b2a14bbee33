"""What a loss ignores is ignored everywhere, also in its mean."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import (
    DebiasedKFACLinearOperator,
    bias_report,
    curvature_scores,
    directional_derivatives,
)
from laplace_debiased.quadratics.gram import ggn_rows
from tests.cases import NUM_OUTPUTS, batch, network, split
from tests.dense import relative_error
from tests.fits import debiased, posterior

SIZE = 12
IGNORED = {"default": -100, "a class": 1}


def data(ignored):
    """Points of which some are ignored, and those that are not."""
    X, y = batch("mlp", SIZE)
    y = torch.where(torch.arange(SIZE) % 3 == 0, ignored, y)
    counted = y != ignored
    return (X, y), (X[counted], y[counted])


@pytest.fixture(params=IGNORED)
def ignored(request):
    return IGNORED[request.param]


@pytest.fixture(params=["sum", "mean"])
def loss(request, ignored):
    return nn.CrossEntropyLoss(reduction=request.param, ignore_index=ignored)


@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
def test_curvature_is_that_of_the_others(loss, ignored, magnitudes, fisher_type):
    model = network("mlp")
    params = list(model.parameters())
    whole, others = data(ignored)
    directions = split(*batch("mlp", SIZE, seed=3), SIZE)
    options = {"magnitudes": magnitudes, "fisher_type": fisher_type}
    operators = [
        DebiasedKFACLinearOperator(model, loss, params, directions, points, **options)
        for points in (split(*whole, 5, 7), [others])
    ]
    actual, expected = (
        operator @ torch.eye(operator.shape[0]).double() for operator in operators
    )
    assert relative_error(actual, expected) < 1e-10
    gradients, value = operators[0].gradient_and_loss()
    exact = loss(model(whole[0]), whole[1])
    assert torch.allclose(value, exact)
    for own, gradient in zip(
        gradients, torch.autograd.grad(exact, params), strict=True
    ):
        assert torch.allclose(own, gradient)


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_derivatives_are_those_of_the_others(loss, ignored, mode, curvature):
    if mode == "reverse" and curvature == "hessian":
        return
    model = network("mlp")
    params = list(model.parameters())
    D = torch.randn(sum(p.numel() for p in params), 2, dtype=torch.float64)
    actual, expected = (
        directional_derivatives(
            model, loss, params, points, D, mode=mode, curvature=curvature
        )
        for points in (split(*data(ignored)[0], 5, 7), [data(ignored)[1]])
    )
    assert relative_error(actual.slope, expected.slope) < 1e-10
    assert relative_error(actual.curvature, expected.curvature) < 1e-10


def test_scores_and_rows_are_those_of_the_others(loss, ignored):
    model = network("mlp")
    (X, y), others = data(ignored)
    scores = curvature_scores(model, loss, split(X, y, 5, 7))
    counted = y != ignored
    assert torch.allclose(scores[counted], curvature_scores(model, loss, [others]))
    assert not scores[~counted].any()
    actual, expected = (
        ggn_rows(model, loss, list(model.parameters()), points)
        for points in (split(X, y, 5, 7), [others])
    )
    assert relative_error(actual.T @ actual, expected.T @ expected) < 1e-10


def test_fits_ignore_what_torch_ignores_by_default():
    (X, y), others = data(-100)
    model, directions = network("mlp"), TensorDataset(*batch("mlp", SIZE, seed=3))
    H, loss = [], []
    for points in ((X, y), others):
        la = debiased(model, magnitudes="ggn", prior_precision=1e-10)
        la.fit(
            DataLoader(directions), magnitude_loader=DataLoader(TensorDataset(*points))
        )
        # of sums over the points of the second loader
        H.append(len(points[1]) * posterior(la))
        loss.append(la.loss)
    assert relative_error(*H) < 1e-8


def test_a_mean_over_nothing_is_refused():
    model, loss = network("mlp"), nn.CrossEntropyLoss()
    X, y = batch("mlp", SIZE)
    points = [(X, torch.full_like(y, -100))]
    operator = DebiasedKFACLinearOperator(
        model, loss, list(model.parameters()), [(X, y)], points
    )
    with pytest.raises(ValueError, match="No target counts"):
        operator.compute()


def test_bias_reports_refuse_them():
    (X, y), _ = data(-100)
    model = network("mlp")
    with pytest.raises(ValueError, match="some targets are the loss's `ignore_index`"):
        bias_report(
            model,
            nn.CrossEntropyLoss(),
            list(model.parameters()),
            DataLoader(TensorDataset(X, y)),
            num_directions=2,
            batch_size=4,
            num_batches=1,
        )


def test_other_numbers_are_still_no_classes():
    X, y = batch("mlp", SIZE)
    loss = nn.CrossEntropyLoss(ignore_index=NUM_OUTPUTS)
    y[0] = NUM_OUTPUTS
    assert curvature_scores(network("mlp"), loss, [(X, y)])[0] == 0
    y[0] = NUM_OUTPUTS + 1
    with pytest.raises(ValueError, match="must lie in"):
        curvature_scores(network("mlp"), loss, [(X, y)])
