import math

import pytest
import torch
from curvlinops import GGNLinearOperator, HessianLinearOperator
from torch import nn

from laplace_debiased.quadratics.eigenspace import (
    overlap,
    principal_angles,
    top_eigenspace,
)
from tests.cases import batch, network


@pytest.mark.parametrize("kind", [GGNLinearOperator, HessianLinearOperator])
def test_top_eigenspace_equals_dense_decomposition(kind):
    model, (X, y) = network("mlp"), batch("mlp", 20)
    params = list(model.parameters())
    H = kind(model, nn.CrossEntropyLoss(), params, [(X, y)])
    matrix = H @ torch.eye(H.shape[1]).double()
    values, vectors = torch.linalg.eigh(matrix)
    space = top_eigenspace(H, 6, tol=1e-12)
    assert torch.allclose(space.eigenvalues, values.flip(0)[:6], atol=1e-10)
    residual = matrix @ space.eigenvectors - space.eigenvectors * space.eigenvalues
    assert residual.abs().max() < 1e-8
    assert overlap(space.eigenvectors, vectors[:, -6:]) == pytest.approx(1)
    assert torch.equal(top_eigenspace(H, 6, tol=1e-12).eigenvectors, space.eigenvectors)


@pytest.mark.parametrize("k", [0, 43])
def test_number_of_eigenvectors_out_of_range_is_refused(k):
    model, (X, y) = network("mlp"), batch("mlp", 20)
    params = list(model.parameters())
    H = GGNLinearOperator(model, nn.CrossEntropyLoss(), params, [(X, y)])
    assert H.shape[1] == 43
    with pytest.raises(ValueError, match=r"`k` must lie in 1\.\.42"):
        top_eigenspace(H, k)


def test_overlap_and_angles_of_known_planes():
    eye = torch.eye(5).double()
    angle = 0.3
    tilted = eye[:, 1] * math.cos(angle) + eye[:, 2] * math.sin(angle)
    first, second = eye[:, :2], torch.stack([eye[:, 0], tilted], 1)
    assert overlap(first, second) == pytest.approx((1 + math.cos(angle) ** 2) / 2)
    angles = principal_angles(first, second)
    assert torch.allclose(angles, torch.tensor([0, angle]).double(), atol=1e-7)
    assert overlap(first, eye[:, 3:]) == 0


def test_overlap_of_random_subspaces_is_their_share_of_the_space():
    generator = torch.Generator().manual_seed(0)
    bases = [
        torch.linalg.qr(torch.randn(200, 20, generator=generator))[0] for _ in range(20)
    ]
    mean = sum(overlap(a, b) for a, b in zip(bases[::2], bases[1::2], strict=True)) / 10
    assert mean == pytest.approx(0.1, rel=0.1)
