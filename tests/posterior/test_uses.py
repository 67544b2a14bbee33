"""Whatever a network does with its weights, fits and predictions are exact."""

from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased.posterior import fitting
from laplace_debiased.posterior.measuring import measure
from laplace_debiased.rows.selection import select
from tests import dense
from tests.cases import network
from tests.fits import debiased, posterior
from tests.rows.test_recorder import EXACT

SIZE = 12


def loaders(shape, num_classes):
    X = torch.randn(2 * SIZE, *shape, dtype=torch.float64)
    y = torch.randint(num_classes, (2 * SIZE,))
    return [
        DataLoader(TensorDataset(X[rows], y[rows]), 5)
        for rows in (slice(SIZE), slice(SIZE, None))
    ]


def jacobians(model, X):
    """By autograd, ``[batch, outputs, params]``."""
    params = list(model.parameters())

    def gradient(f):
        parts = torch.autograd.grad(f, params, retain_graph=True)
        return torch.cat([part.flatten() for part in parts])

    return torch.stack(
        [torch.stack([gradient(f) for f in model(x[None])[0]]) for x in X]
    )


@pytest.mark.parametrize("name", EXACT)
def test_curvature_and_moments_are_exact(name):
    build, shape = EXACT[name]
    torch.manual_seed(0)
    model = build().double().eval()
    own = list(model.parameters())
    first, second = loaders(shape, model(torch.randn(1, *shape).double()).shape[1])
    la = debiased(model, magnitudes="ggn", strict=True)
    la.fit(first, magnitude_loader=second)

    # the trace is that of the exact GGN, along whatever directions
    X, y = second.dataset.tensors
    blocks = dense.ggn_blocks(model, X, y, nn.CrossEntropyLoss(reduction="sum"))
    expected = sum(block.trace() for block in blocks)
    assert torch.allclose(la.H.to_matrix().trace(), expected)

    J = jacobians(model, X[:2])
    f_mu, f_var = la._glm_predictive_distribution(X[:2])
    assert torch.allclose(f_mu, model(X[:2]))
    expected = J @ torch.linalg.solve(posterior(la), J.mT)
    assert dense.relative_error(f_var, expected) < 1e-10

    generator = torch.Generator().manual_seed(0)
    samples = la.functional_samples(X[:2], "nn", 2, generator=generator)
    weights = la.sample(2, generator=generator.manual_seed(0))
    after = list(model.parameters())
    assert all(a is b and a.requires_grad for a, b in zip(own, after, strict=True))
    nn.utils.vector_to_parameters(weights[1], own)
    assert torch.allclose(model(X[:2]), samples[1])


@pytest.mark.parametrize("name", ["aliased modules", "tied weights"])
def test_aliases_survive_an_interrupted_fit(name):
    build, shape = EXACT[name]
    model = build().double().eval()
    first, _ = loaders(shape, 3)
    first.dataset.tensors[1][-1] = 1000  # refused in the last batch
    own = [(key, id(p)) for key, p in model.named_parameters(remove_duplicate=False)]
    with pytest.raises(ValueError, match="must lie in"):
        debiased(model).fit(first)
    after = [(key, id(p)) for key, p in model.named_parameters(remove_duplicate=False)]
    assert after == own


def test_layers_are_found_once_for_a_fit_and_not_for_predictions():
    model, (first, _) = network("mlp"), loaders((4,), 3)
    la = debiased(
        model, budget=8, estimator="two_batch", direction_fraction="auto", pool_size=16
    )
    with mock.patch(
        "laplace_debiased.posterior.fitting.select", wraps=select
    ) as selecting:
        la.fit(first)
        assert selecting.call_count == 1
        calls = []
        handle = model.register_forward_hook(lambda *_: calls.append(1))
        la(first.dataset.tensors[0])
        handle.remove()
        assert selecting.call_count == 1
    assert len(calls) == 1  # nor does a chunk size take a pass


@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
def test_measuring_is_a_function(magnitudes):
    first, _ = loaders((4,), 3)
    la = debiased(network("mlp"), magnitudes=magnitudes, budget=8, pool_size=16)
    la.fit(first)
    folds = fitting.assign(la, first, None, la._seen)
    source = fitting.source(la)
    H, again = (
        measure(source, folds, la.settings, seed=3).curvature.to_matrix()
        for _ in range(2)
    )
    assert torch.equal(H, again)
