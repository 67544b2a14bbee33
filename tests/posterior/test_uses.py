"""Networks survive what is done with their weights, and runs are few."""

import copy
from unittest import mock

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased.posterior import fitting
from laplace_debiased.posterior.measuring import measure
from laplace_debiased.rows.selection import select
from tests import zoo
from tests.cases import network
from tests.fits import debiased

SIZE = 12


def loaders(shape, num_classes):
    X = torch.randn(2 * SIZE, *shape, dtype=torch.float64)
    y = torch.randint(num_classes, (2 * SIZE,))
    return [
        DataLoader(TensorDataset(X[rows], y[rows]), 5)
        for rows in (slice(SIZE), slice(SIZE, None))
    ]


@pytest.mark.parametrize("name", ["aliased modules", "tied weights"])
def test_aliases_survive_an_interrupted_fit(name):
    model = zoo.build(name)
    first, _ = loaders((4,), 3)
    first.dataset.tensors[1][-1] = 1000  # refused in the last batch
    own = [(key, id(p)) for key, p in model.named_parameters(remove_duplicate=False)]
    with pytest.raises(ValueError, match="must lie in"):
        debiased(model).fit(first)
    after = [(key, id(p)) for key, p in model.named_parameters(remove_duplicate=False)]
    assert after == own


def test_old_weight_normalization_leaves_the_weight_that_it_had():
    """It is an attribute, which each pass computes anew, with a gradient."""
    name = "weight norm, by a hook"
    model, (X, y) = zoo.build(name), zoo.data(name, SIZE)
    with torch.no_grad():
        model(X)
    weight, value = model[0].weight, model[0].weight.clone()
    la = debiased(model)
    la.fit(DataLoader(TensorDataset(X, y), 5))
    la(X, "nn", link_approx="mc", n_samples=2)
    assert model[0].weight is weight and torch.equal(weight, value)
    assert torch.equal(copy.deepcopy(model)(X), model(X))


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
