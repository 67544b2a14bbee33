"""Square roots of a loss's Hessian in the outputs, of few columns."""

import pytest
import torch
from torch.func import hessian, vmap
from torch.nn.functional import cross_entropy

from laplace_debiased.rows.hessian_roots import num_columns, softmax_root


def exact_hessians(output):
    label = torch.tensor(0)
    return vmap(hessian(lambda f: cross_entropy(f, label)))(output)


def outer_products(columns):
    return torch.einsum("kni,knj->nij", columns, columns)


@pytest.mark.parametrize("num_classes", [1, 2, 3, 10, 100])
def test_the_root_is_of_the_hessian(num_classes):
    output = 3 * torch.randn(7, num_classes, dtype=torch.float64)
    columns = softmax_root(output)
    assert columns.shape == (max(1, num_classes - 1), *output.shape)
    assert len(columns) == num_columns(num_classes - 1, None)
    expected = exact_hessians(output)
    assert torch.allclose(outer_products(columns), expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("rank", [1, 2, 5, 8])
def test_one_column_stands_for_the_others(rank):
    output = 3 * torch.randn(4, 8, dtype=torch.float64)
    exact = exact_hessians(output)
    generator = torch.Generator().manual_seed(0)
    draws = [softmax_root(output, rank, generator) for _ in range(2000)]
    assert {len(own) for own in draws} == {min(rank + 1, 7)}
    products = torch.stack([outer_products(own) for own in draws])
    error = (products.mean(0) - exact).abs().amax((1, 2))
    spread = products.std(0).amax((1, 2))
    assert (error <= 0.15 * spread + 1e-12).all()
    # what is left out of the first columns is small in every draw
    largest = exact.diagonal(dim1=1, dim2=2).sum(1)
    deviation = (products - exact).abs().amax((0, 2, 3)) / largest
    assert (deviation < 2).all()


def test_two_confused_classes_take_one_column():
    output = torch.tensor([[5.0, 4.0, -20.0, -21.0]]).double()
    norms = softmax_root(output).square().sum((1, 2))
    assert norms[0] > (1 - 1e-8) * norms.sum()


@pytest.mark.parametrize("margin", [5.0, 20.0, 60.0])
def test_curvature_of_certain_predictions_keeps_its_digits(margin):
    output = torch.tensor([[margin, 0.0, -1.0, 1.0]])
    single = outer_products(softmax_root(output))
    double = exact_hessians(output.double())
    p = output.double().softmax(1)
    # autograd loses those of 1 - p; the tails do not
    double[0, 0, 0] = (p[0, 0] * p[0, 1:].sum()).item()
    lengths = double.diagonal(dim1=1, dim2=2).sqrt()
    scale = lengths[:, :, None] * lengths[:, None]
    assert ((single.double() - double).abs() <= 1e-5 * scale).all()


def test_probabilities_that_underflow_have_no_curvature():
    output = torch.full((2, 5), -200.0).index_fill(1, torch.tensor(3), 200.0)
    for rank in (None, 1):
        columns = softmax_root(output, rank)
        assert columns.isfinite().all() and columns.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_adds_up_many_small_probabilities(dtype):
    output = torch.randn(3, 1000).to(dtype)
    columns = softmax_root(output, 1)
    assert columns.dtype == dtype
    exact = softmax_root(output.double(), 1)
    assert torch.allclose(columns[0].double(), exact[0], rtol=0.02, atol=1e-6)
