"""Directions of equal precision have the share that they have one by one."""

import pytest
import torch

from laplace_debiased.predictive import blocks
from laplace_debiased.predictive.blocks import BlockPosterior
from laplace_debiased.predictive.isotropic import num_equal
from tests.dense import relative_error

BATCH, C, D_OUT, D_IN, EQUAL = 3, 4, 300, 20, 260


def orthogonal(size):
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0]


def block_of(equal=EQUAL, dtype=torch.float64):
    precisions = 0.1 + torch.rand(D_OUT, D_IN, dtype=torch.float64)
    precisions[:equal] = precisions[0].clone() if equal else precisions[:equal]
    vectors = [orthogonal(D_OUT).to(dtype), orthogonal(D_IN).to(dtype)]
    return BlockPosterior(vectors, precisions.to(dtype))


def rows_of(block, positions, same_gradients=False, leading_share=0.0):
    batch = 1 if same_gradients else BATCH
    gradients = torch.randn(batch, C, positions, 1, D_OUT, dtype=torch.float64)
    basis = block.eigenvectors[0][:, EQUAL:].double()
    within = gradients @ basis @ basis.T
    gradients = leading_share * within + (1 - leading_share) * gradients
    inputs = torch.randn(BATCH, positions, 1, D_IN, dtype=torch.float64)
    dtype = block.precisions.dtype
    return gradients.to(dtype), inputs.to(dtype)


def expected(block, gradients, inputs, shift=0.0):
    """The sum over all directions, in double precision."""
    turned = gradients.double().squeeze(3) @ block.eigenvectors[0].double()
    J = torch.einsum("ncsi,nsj->ncij", turned, inputs.double().squeeze(2))
    weights = 1 / (block.precisions.double() + shift)
    return torch.einsum("ncij,ndij,ij->ncd", J, J, weights)


@pytest.fixture
def counted(monkeypatch):
    """How often equal directions were taken together."""
    calls = []

    def residuals(*args):
        calls.append(args)
        return original(*args)

    original = blocks.residuals
    monkeypatch.setattr(blocks, "residuals", residuals)
    return calls


@pytest.mark.parametrize("same_gradients", [False, True])
@pytest.mark.parametrize("equal", [0, 1, 40, EQUAL, D_OUT])
@pytest.mark.parametrize("positions", [2, 5, 40])
def test_covariances_are_sums_over_directions(
    counted, positions, equal, same_gradients
):
    block = block_of(equal)
    gradients, inputs = rows_of(block, positions, same_gradients)
    gradients = gradients.expand(BATCH, -1, -1, -1, -1)
    reference = expected(block, gradients, inputs)
    full = block.covariance(gradients, inputs, "full")
    assert relative_error(full, reference) < 1e-12
    diagonal = reference.diagonal(dim1=1, dim2=2)
    for some_bytes in (1, 2**22):
        own = block.covariance(gradients, inputs, "diagonal", some_bytes)
        assert relative_error(own, diagonal) < 1e-12
        shifted = block.variances(gradients, inputs, [0.0, 3.0], some_bytes)
        assert relative_error(shifted[..., 0], diagonal) < 1e-12
        exact = expected(block, gradients, inputs, 3.0).diagonal(dim1=1, dim2=2)
        assert relative_error(shifted[..., 1], exact) < 1e-12
    assert bool(counted) == (equal == EQUAL and positions < D_IN)


def test_single_precision_is_enough_where_nearly_all_is_in_leading_directions(counted):
    block = block_of(dtype=torch.float32)
    gradients, inputs = rows_of(block, 5, leading_share=0.9999)
    block.precisions[EQUAL:] *= 1e6  # so that the rest has most of the variance
    exact = expected(block, gradients, inputs).diagonal(dim1=1, dim2=2)
    own = block.covariance(gradients, inputs, "diagonal")
    assert counted
    assert relative_error(own.double(), exact) < 1e-5


def test_gradients_flow(counted):
    block = block_of()
    gradients, inputs = rows_of(block, 5)
    inputs.requires_grad_()
    (own,) = torch.autograd.grad(
        block.covariance(gradients, inputs, "diagonal").sum(), inputs
    )
    exact = expected(block, gradients, inputs).diagonal(dim1=1, dim2=2).sum()
    (reference,) = torch.autograd.grad(exact, inputs)
    assert counted
    assert relative_error(own, reference) < 1e-10


@pytest.mark.parametrize("equal", [0, 1, 2, 100, 299, 300])
def test_equal_rows_are_counted(equal):
    precisions = torch.rand(300, 7)
    precisions[:equal] = 0.5
    assert num_equal(precisions) == (equal if 1 < equal < 300 else 0)
    assert num_equal(precisions[:200]) == num_equal(precisions[:, 0]) == 0
