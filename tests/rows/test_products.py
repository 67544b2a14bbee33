"""Rows are multiplied by a matrix at once, in whatever order a network has them."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from laplace_debiased.rows.products import rows_times
from tests import zoo
from tests.fits import debiased
from tests.test_zoo import loader


class OneByOne(TorchDispatchMode):
    """Counts products of many matrices of one row with the same matrix."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.bmm.default:
            rows, matrices = args
            shared = len(matrices) > 1 and matrices.stride(0) == 0
            self.count += shared and rows.shape[1] == 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [(4,), (5, 4), (2, 3, 4), (2, 0, 4), (2, 3, 5, 4)])
@pytest.mark.parametrize("order", [1, -1], ids=["as they are", "reversed"])
def test_products_are_those_of_torch(shape, order):
    axes = list(range(len(shape) - 1))[::order]
    rows = torch.randn(shape, dtype=torch.float64).permute(*axes, -1)
    matrix = torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(rows_times(rows, matrix), rows @ matrix)


def test_rows_in_another_order_are_multiplied_at_once():
    # [batch, C, S, groups, d] of a network whose first axis is the sequence
    rows = torch.randn(5, 3, 4).transpose(0, 1)[:, None, :, None]
    matrix = torch.randn(4, 6)
    with OneByOne() as products:
        rows @ matrix
    assert products.count == 1  # what is counted here
    with OneByOne() as products:
        rows_times(rows, matrix)
    assert products.count == 0


@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
@pytest.mark.parametrize(
    "name", ["attention, batch first", "attention, sequence first", "sequence first"]
)
def test_sequences_are_fitted_and_predicted_at_once(name, magnitudes):
    X, y = zoo.data(name, 10)
    la = debiased(zoo.build(name), magnitudes=magnitudes)
    with OneByOne() as products:
        la.fit(loader(X, y))
        la(X[:3])
    assert products.count == 0
