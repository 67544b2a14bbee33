"""A weight counts an example as often in gradient and loss as in the curvature."""

import pytest
import torch
from curvlinops import GGNLinearOperator
from torch import nn

from laplace_debiased import DebiasedKFACLinearOperator
from laplace_debiased.rows.output_curvature import example_losses
from tests.cases import LOSSES, NUM_OUTPUTS, batch, network, split

SIZE = 24
REDUCTIONS = ["sum", "mean"]


def operator(model, loss, data, weights=None, **options):
    return DebiasedKFACLinearOperator(
        model,
        loss,
        list(model.parameters()),
        data,
        data,
        direction_weights=weights,
        magnitude_weights=weights,
        **options,
    )


def flat(gradient_and_loss):
    gradients, loss = gradient_and_loss
    return torch.cat([*(part.flatten() for part in gradients), loss[None]])


def close(actual, expected):
    return torch.allclose(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sizes", [(24,), (1, 16, 7), (8, 0, 8, 8)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss_name", LOSSES)
def test_integer_weights_are_as_if_points_were_there_several_times(
    loss_name, reduction, sizes
):
    model, (X, y) = network("mlp"), batch("mlp", SIZE, loss_name)
    loss = LOSSES[loss_name](reduction=reduction)
    counts = torch.arange(SIZE) % 4  # some have no weight
    repeated = [(X.repeat_interleave(counts, 0), y.repeat_interleave(counts, 0))]
    expected = operator(model, loss, repeated, magnitudes="ggn")
    for weights in (counts, counts.float(), counts.double()):
        weighted = operator(model, loss, split(X, y, *sizes), weights, magnitudes="ggn")
        actual = weighted.gradient_and_loss()
        assert close(flat(actual), flat(expected.gradient_and_loss()))
        assert close(weighted.trace, expected.trace)
        assert [part.dtype for part in actual[0]] == [X.dtype] * 4


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss_name", LOSSES)
def test_other_weights_are_those_of_the_losses(loss_name, reduction):
    model, (X, y) = network("mlp"), batch("mlp", SIZE, loss_name)
    loss = LOSSES[loss_name](reduction=reduction)
    weights = torch.rand(SIZE, generator=torch.Generator().manual_seed(0)).double()
    # those of one example alone, whose outputs are averaged
    losses = torch.stack([loss(model(X[n : n + 1]), y[n : n + 1]) for n in range(SIZE)])
    value = weights @ losses / (weights.sum() if reduction == "mean" else 1)
    expected = torch.autograd.grad(value, list(model.parameters())), value.detach()
    weighted = operator(model, loss, split(X, y, 5, 19), weights)
    assert close(flat(weighted.gradient_and_loss()), flat(expected))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradient_and_curvature_are_of_one_quadratic(reduction):
    """The loss of a linear regression: its curvature changes the gradient."""
    model = nn.Linear(4, 1, bias=False).double()
    X, y = batch("mlp", SIZE)[0], torch.randn(SIZE, 1).double()
    weights = torch.linspace(0, 3, SIZE)
    linear = operator(model, nn.MSELoss(reduction=reduction), [(X, y)], weights)
    curvature = linear @ torch.eye(4).double()
    (before,), loss_before = linear.gradient_and_loss()
    step = torch.randn(1, 4).double()
    with torch.no_grad():
        model.weight += step
    (after,), loss_after = linear.gradient_and_loss()
    assert close(after - before, step @ curvature)
    assert close(loss_after - loss_before, ((before + after) / 2 * step).sum())


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_weights_of_ignored_examples_do_not_count(reduction):
    model, (X, y) = network("mlp"), batch("mlp", SIZE)
    weights = torch.linspace(1, 2, SIZE)
    y[::3] = -100
    rest = y != -100
    loss = nn.CrossEntropyLoss(reduction=reduction)
    weighted = operator(model, loss, split(X, y, 11, 13), weights)
    expected = operator(model, loss, [(X[rest], y[rest])], weights[rest])
    assert close(flat(weighted.gradient_and_loss()), flat(expected.gradient_and_loss()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_weights_of_one_change_no_bit(reduction, dtype):
    model, (X, y) = network("mlp").to(dtype), batch("mlp", SIZE)
    data = split(X.to(dtype), y, 5, 19)
    loss = nn.CrossEntropyLoss(reduction=reduction)
    ones = operator(model, loss, data, torch.ones(SIZE)).gradient_and_loss()
    none = operator(model, loss, data).gradient_and_loss()
    assert torch.equal(flat(ones), flat(none))
    # as before there were weights
    total, gradients = 0, [0] * 4
    for X, y in data:
        batch_loss = example_losses(loss, model(X), y).sum()
        parts = torch.autograd.grad(batch_loss, list(model.parameters()))
        gradients = [a + b for a, b in zip(gradients, parts, strict=True)]
        total = total + batch_loss.detach()
    scale = 1 / SIZE if reduction == "mean" else 1.0
    plain = [scale * part for part in gradients], scale * total
    assert torch.equal(flat(none), flat(plain))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss_name", LOSSES)
def test_without_weights_they_are_those_of_curvlinops(loss_name, reduction):
    model, (X, y) = network("mlp"), batch("mlp", SIZE, loss_name)
    loss, data = LOSSES[loss_name](reduction=reduction), split(X, y, 5, 19)
    theirs = GGNLinearOperator(model, loss, list(model.parameters()), data)
    own = operator(model, loss, data)
    assert close(flat(own.gradient_and_loss()), flat(theirs.gradient_and_loss()))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(SIZE - 1), "one each is needed"),
        (torch.ones(SIZE + 1), "one each is needed"),
        (-torch.ones(SIZE), "at least zero"),
        (torch.zeros(SIZE), "some of them positive"),
        (torch.ones(SIZE, 1), r"must have shape \[examples\]"),
    ],
)
def test_bad_weights_are_refused_by_the_gradient_too(weights, message):
    X, y = batch("mlp", SIZE)
    assert y.max() < NUM_OUTPUTS
    linear = operator(
        network("mlp"), nn.CrossEntropyLoss(), split(X, y, 5, 19), weights
    )
    with pytest.raises(ValueError, match=message):
        linear.gradient_and_loss()
