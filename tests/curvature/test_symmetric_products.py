import pytest
import torch

from laplace_debiased.curvature.symmetric_products import summed_outer_products
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
