import pytest
import torch
from curvlinops import GGNLinearOperator
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from laplace_debiased.quadratics.eigenspace import overlap, principal_angles
from laplace_debiased.quadratics.gram import ggn_rows, gram_eigenspace, gram_is_cheaper
from laplace_debiased.rows.selection import select
from tests.cases import LOSSES, NETWORKS, batch, network, split

SIZE, K = 12, 4


def dense_ggn(model, loss, X, y):
    params = list(model.parameters())
    H = GGNLinearOperator(model, loss, params, [(X, y)], check_deterministic=False)
    with sdpa_kernel(SDPBackend.MATH):
        return H @ torch.eye(H.shape[1]).double()


@pytest.mark.parametrize("name", NETWORKS)
def test_rows_have_the_ggn_as_their_second_moment(name):
    model, (X, y) = network(name), batch(name, SIZE)
    loss = nn.CrossEntropyLoss()
    rows = ggn_rows(model, loss, list(model.parameters()), split(X, y, 5, 7))
    H = dense_ggn(model, loss, X, y)
    assert torch.allclose(rows.T @ rows, H, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("loss_name", LOSSES)
def test_rows_of_all_losses(loss_name, reduction):
    model, (X, y) = network("mlp"), batch("mlp", SIZE, loss_name)
    loss = LOSSES[loss_name](reduction=reduction)
    params = list(model.parameters())[::-1]
    rows = ggn_rows(model, loss, params, [(X, y)])
    H = GGNLinearOperator(model, loss, params, [(X, y)])
    expected = H @ torch.eye(H.shape[1]).double()
    assert torch.allclose(rows.T @ rows, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["mlp", "cnn-stride-padding"])
def test_eigenspace_equals_dense_decomposition(name):
    model, (X, y) = network(name), batch(name, SIZE)
    loss, params = nn.CrossEntropyLoss(), list(model.parameters())
    space = gram_eigenspace(model, loss, params, [(X, y)], K, tol=1e-14)
    H = dense_ggn(model, loss, X, y)
    values, vectors = torch.linalg.eigh(H)
    assert torch.allclose(space.eigenvalues, values.flip(0)[:K], rtol=1e-9)
    residual = H @ space.eigenvectors - space.eigenvectors * space.eigenvalues
    assert residual.abs().max() < 1e-8
    assert overlap(space.eigenvectors, vectors[:, -K:]) == pytest.approx(1, abs=1e-8)


def test_eigenvectors_are_orthonormal_beyond_the_rank():
    model, (X, y) = network("mlp"), batch("mlp", 2)
    X, y = X.repeat(2, 1), y.repeat(2)  # the same points again
    loss, params = nn.CrossEntropyLoss(), list(model.parameters())
    space = gram_eigenspace(model, loss, params, [(X, y)], 5, tol=1e-14)
    assert space.eigenvalues[3] > 1e-3 and (space.eigenvalues[4:] < 1e-12).all()
    products = space.eigenvectors.T @ space.eigenvectors
    assert torch.allclose(products, torch.eye(5).double(), atol=1e-10)


def is_cheaper(model, X, num_data, k):
    params = list(model.parameters())
    selection = select(model, params, X, len(X), dense=True)
    return gram_is_cheaper(selection, nn.CrossEntropyLoss(), params, num_data, k)


def test_gram_matrix_is_cheaper_if_weights_are_shared_and_points_few(monkeypatch):
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    X = torch.randn(20, 1, 16, 16)
    assert is_cheaper(model, X, 20, 5)
    assert not is_cheaper(model, X, 2000, 5)
    assert not is_cheaper(model, X, 20, 80)  # all of the D eigenvectors
    assert not is_cheaper(network("mlp"), batch("mlp", 3)[0], 200, 5)
    monkeypatch.setattr("laplace_debiased.quadratics.gram._MEMORY_LIMIT", 100)
    assert not is_cheaper(model, X, 20, 5)


def test_layers_that_are_not_supported_take_lanczos_iterations():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(8, 2))
    assert not is_cheaper(model, torch.randint(7, (3, 2)), 3, 2)


def test_half_precision():
    model, (X, y) = network("cnn-stride-padding"), batch("cnn-stride-padding", SIZE)
    loss = nn.CrossEntropyLoss()
    exact = gram_eigenspace(model, loss, list(model.parameters()), [(X, y)], K)
    half = model.to(torch.bfloat16)
    space = gram_eigenspace(half, loss, list(half.parameters()), [(X.bfloat16(), y)], K)
    assert torch.allclose(space.eigenvalues.double(), exact.eigenvalues, rtol=0.1)
    bases = space.eigenvectors.bfloat16(), exact.eigenvectors.bfloat16()
    assert principal_angles(*bases).max() < 0.5
