"""What is refused of inputs, outputs and targets."""

import pytest
import torch

from laplace_debiased.rows.inputs import all_finite

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (40, 41, 2)])
def test_one_entry_that_is_not_finite_is_found(dtype, bad, shape):
    tensor = torch.randn(shape).to(dtype)
    assert all_finite(tensor)
    for index in {0, tensor.numel() // 2, tensor.numel() - 1}:
        other = tensor.clone()
        other.view(-1)[index] = bad
        assert not all_finite(other)
        assert not all_finite(other.mT if other.ndim > 1 else other)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.cfloat])
def test_other_kinds_are_finite(dtype):
    assert all_finite(torch.ones(4, dtype=dtype))
    assert all_finite(torch.empty(0, 3, dtype=dtype))
