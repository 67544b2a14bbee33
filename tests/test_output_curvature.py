import pytest
import torch
from torch import nn

from laplace_debiased.output_curvature import OutputCurvature
from tests.cases import LOSSES, NUM_OUTPUTS

SIZE = 6


def outputs_and_targets(loss_name):
    f = torch.randn(SIZE, NUM_OUTPUTS, dtype=torch.float64)
    if loss_name == "cross-entropy":
        return f, torch.randint(NUM_OUTPUTS, (SIZE,))
    y = torch.rand(SIZE, NUM_OUTPUTS, dtype=torch.float64)
    return f, y.round() if loss_name == "bce" else y


def outer_products(columns):
    return torch.einsum("knc,knd->ncd", columns, columns)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("loss_name", LOSSES)
def test_type_2_columns_are_a_square_root_of_each_examples_hessian(
    loss_name, reduction
):
    f, y = outputs_and_targets(loss_name)
    loss = LOSSES[loss_name](reduction=reduction)
    columns = OutputCurvature(loss, "type-2").columns(f, y, torch.Generator())
    for n in range(SIZE):
        target = y[n : n + 1]
        hessian = torch.func.hessian(lambda g, t=target: loss(g[None], t))(f[n])
        assert torch.allclose(outer_products(columns)[n], hessian, atol=1e-12)


@pytest.mark.parametrize("loss_name", LOSSES)
def test_empirical_columns_are_each_examples_gradient(loss_name):
    f, y = outputs_and_targets(loss_name)
    loss = LOSSES[loss_name](reduction="sum")
    columns = OutputCurvature(loss, "empirical").columns(f, y, torch.Generator())
    expected = torch.func.grad(loss)(f, y)
    assert torch.allclose(columns[0], expected)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("loss_name", LOSSES)
def test_mc_columns_are_unbiased(loss_name, reduction):
    f, y = outputs_and_targets(loss_name)
    loss = LOSSES[loss_name](reduction=reduction)
    generator = torch.Generator().manual_seed(0)
    exact = outer_products(OutputCurvature(loss).columns(f, y, generator))
    sampler = OutputCurvature(loss, "mc", mc_samples=20_000)
    sampled = outer_products(sampler.columns(f, y, generator))
    assert torch.allclose(sampled, exact, atol=0.06 * exact.abs().max().item())


@pytest.mark.parametrize("loss_name", LOSSES)
def test_total_loss_is_each_examples_loss(loss_name):
    f, y = outputs_and_targets(loss_name)
    loss = LOSSES[loss_name](reduction="sum")
    expected = [loss(f[n : n + 1], y[n : n + 1]) for n in range(SIZE)]
    actual = OutputCurvature(loss).total_loss(f, y)
    assert torch.allclose(actual, torch.stack(expected))


def test_label_smoothing_enters_loss_and_gradient():
    f, y = outputs_and_targets("cross-entropy")
    loss = nn.CrossEntropyLoss(reduction="sum", label_smoothing=0.2)
    curvature = OutputCurvature(loss, "empirical")
    assert torch.allclose(curvature.total_loss(f, y).sum(), loss(f, y))
    expected = torch.func.grad(loss)(f, y)
    assert torch.allclose(curvature.columns(f, y, torch.Generator())[0], expected)
