import pytest
import torch

from laplace_debiased.curvature.symmetric_products import Sums, summed_outer_products
from tests.dense import relative_error


@pytest.mark.parametrize("size", [1, 40, 255, 256, 300, 2100])
@pytest.mark.parametrize("count", [0, 3, 50])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_products_are_those_of_all_entries(size, count, is_transposed):
    rows = torch.randn(count, size, dtype=torch.float64)
    if is_transposed:
        rows = torch.randn(size, count, dtype=torch.float64).T
    product = summed_outer_products(rows)
    assert product.shape == (size, size)
    assert torch.allclose(product, rows.T @ rows, rtol=1e-12, atol=1e-12)
    assert torch.equal(product, product.T) or relative_error(product, product.T) < 1e-15


@pytest.mark.parametrize("counts", [[1], [3, 0, 5], [600, 600, 2], [5000, 1]])
def test_sums_have_all_rows_whenever_they_are_read(counts):
    sums, rows = Sums(), [torch.randn(count, 7) for count in counts]
    for own in rows:
        sums.add_outer_products("a", own)
    sums.add("a", torch.eye(7))
    joined = torch.cat(rows).double()
    expected = joined.T @ joined + torch.eye(7)
    assert torch.allclose(sums.tensors()["a"], expected, rtol=1e-4, atol=1e-4)
    sums.add_outer_products("a", rows[0])
    expected += rows[0].double().T @ rows[0].double()
    assert torch.allclose(sums.tensors()["a"], expected, rtol=1e-4, atol=1e-4)
    assert sums.tensors()["a"].dtype == torch.float64


def test_sums_are_by_name():
    sums = Sums()
    sums.add_outer_products("a", torch.randn(10, 3))
    sums.add_outer_products("b", torch.randn(10, 2))
    assert {name: own.shape for name, own in sums.tensors().items()} == {
        "a": (3, 3),
        "b": (2, 2),
    }
