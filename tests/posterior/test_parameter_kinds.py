"""Posteriors over embeddings, and over parameters that are used in any way."""

import io

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests import zoo
from tests.cases import batch, network
from tests.dense import ggn_blocks, jacobians, relative_error
from tests.fits import debiased, posterior

SIZE = 24
NAMES = ["vision transformer", "decoder, causal", "weight norm"]


def build(name, size=SIZE, seed=1):
    model, (X, y) = zoo.build(name), zoo.data(name, size, seed)
    return model, X, y


def loader(X, y, batch_size=5):
    return DataLoader(TensorDataset(X, y), batch_size)


@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_those_that_were_frozen_are_told_too(subset):
    model = network("mlp")
    if subset == "last_layer":
        model[2].requires_grad_(False)
    la = debiased(model, subset=subset)
    la.fit(loader(*batch("mlp", SIZE)))
    before = la.parameter_kinds
    model.requires_grad_(False)
    la.model.requires_grad_(False)
    fitted = {name: kind for name, kind in before.items() if kind != "left out"}
    assert set(fitted.values()) == {"kronecker"} and len(fitted) == len(la.params)
    assert la.parameter_kinds == fitted


@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_hold_them(name, magnitudes):
    model, X, y = build(name)
    la = debiased(model, magnitudes=magnitudes, budget=12)
    la.fit(loader(X, y))
    file = io.BytesIO()
    torch.save(la.state_dict(), file)
    file.seek(0)
    restored = debiased(model, magnitudes=magnitudes, budget=12)
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(restored(X), la(X))
    assert restored.parameter_kinds == la.parameter_kinds
    restored.fit(loader(X, y), override=False)


@pytest.mark.parametrize("name", NAMES)
def test_further_data_add_up(name):
    """Points that are seen twice have twice the curvature."""
    model, X, y = build(name)
    half = SIZE // 2
    parts = loader(X[:half], y[:half]), loader(X[half:], y[half:])
    once, twice = debiased(model), debiased(model)
    for la, count in ((once, 1), (twice, 2)):
        la.fit(parts[0], magnitude_loader=parts[1])
        for _ in range(count - 1):
            la.fit(parts[0], override=False, magnitude_loader=parts[1])
    assert twice.n_data == 2 * once.n_data
    assert torch.allclose(twice.H.to_matrix(), 2 * once.H.to_matrix(), rtol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_streams_of_exact_curvature_add_up(name):
    model, X, y = build(name)
    la = debiased(model, magnitudes="ggn")
    for _ in range(2):
        la.partial_fit((X, y))
    once = debiased(model, magnitudes="ggn")
    once.partial_fit((X, y))
    actual, expected = (own.H.to_matrix().trace() for own in (la, once))
    assert relative_error(actual, 2 * expected) < 1e-8


@pytest.mark.parametrize("name", ["norm by 1 + w", "weight norm"])
def test_gradients_flow_to_the_inputs(name):
    model, X, y = build(name)
    la = debiased(model, enable_backprop=True)
    la.fit(loader(X, y))
    x = X[:2].clone().requires_grad_()

    def total(x):
        return la._glm_predictive_distribution(x)[1].sum()

    (gradient,) = torch.autograd.grad(total(x), x)
    step = 1e-5 * torch.randn_like(x)
    slope = (total(x + step) - total(x - step)) / 2
    assert torch.allclose((gradient * step).sum(), slope, rtol=1e-4)


def test_curvature_of_embeddings_is_spread_by_frequency():
    """Tokens that the budget has not, but the pool has, do not look unseen."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 3), nn.Flatten(), nn.Linear(6, 3)).double()
    X = torch.cat([torch.randint(4, (198, 2)), torch.tensor([[4, 1], [1, 4]])])
    y = torch.randint(3, (200,))
    la = debiased(model, magnitudes="ggn", budget=8)
    la.fit(loader(X, y, 50))
    vectors, (values,) = la.H.eigenvectors[0], la.H.eigenvalues[0]
    assert vectors[0].ndim == 1 and values.shape == (6, 3)
    counts = torch.bincount(X.flatten(), minlength=6).double()
    assert torch.allclose(values / values.sum(0), (counts / counts.sum())[:, None])
    assert not values[5].any() and (values[4] > 0).all()


def test_joint_covariances_are_exact():
    model, X, y = build("decoder, causal")
    la = debiased(model)
    la.fit(loader(X, y))
    J = jacobians(model, X[:3], 3, la.fitted_params).flatten(0, 1)
    expected = J @ torch.linalg.solve(posterior(la), J.T)
    _, f_cov = la._glm_predictive_distribution(X[:3], joint=True)
    assert relative_error(f_cov, expected) < 1e-8


def test_kinds_are_listed_and_diagonals_refused(monkeypatch):
    monkeypatch.setattr("laplace_debiased.rows.fallback.LARGEST_EXACT", 10)
    model, X, y = build("vision transformer")
    la = debiased(model)
    la.fit(loader(X, y))
    assert la.parameter_kinds["positions"] == "diagonal"
    assert la.parameter_kinds["token"] == "exact"
    assert set(la.parameter_kinds.values()) == {"diagonal", "exact", "kronecker"}
    blocks = ggn_blocks(model, X, y, nn.CrossEntropyLoss(reduction="sum"))
    position = [name for name, _ in model.named_parameters()].index("positions")
    la.fit(loader(X, y), magnitude_loader=loader(X, y))
    block = la.H.eigenvalues[position][0]
    assert torch.allclose(block, blocks[position].diagonal())
    with pytest.raises(ValueError, match="positions, no more than the diagonal"):
        debiased(model, strict=True).fit(loader(X, y))


class Scaled(nn.Module):
    """Logits times a number, as CLIP has one."""

    def __init__(self):
        super().__init__()
        self.scale, self.linear = nn.Parameter(torch.tensor(0.3)), nn.Linear(4, 3)

    def forward(self, x):
        return self.scale.exp() * self.linear(x)


@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
def test_a_parameter_without_axes_is_exact(magnitudes):
    torch.manual_seed(0)
    model = Scaled().double()
    X, y = torch.randn(SIZE, 4).double(), torch.randint(3, (SIZE,))
    la = debiased(model, magnitudes=magnitudes)
    la.fit(loader(X, y))
    assert la.parameter_kinds["scale"] == "exact"
    blocks = ggn_blocks(model, X, y, nn.CrossEntropyLoss(reduction="sum"))
    found = la.H.to_matrix()[0, 0]
    assert found.item() == pytest.approx(blocks[0].item(), rel=1e-8)
    restored = debiased(model, magnitudes=magnitudes)
    restored.load_state_dict(la.state_dict())
    assert torch.equal(restored(X), la(X))
