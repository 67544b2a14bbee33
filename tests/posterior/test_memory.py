"""Fits under a limit, and what they take."""

import pytest
import torch
from torch.utils.data import TensorDataset

from laplace_debiased.posterior import memory
from tests.cases import batch
from tests.fits import TWO_BATCH, debiased
from tests.posterior.test_processes import FITS, data, loader, model_of, same, summary

CASES = {name: own for name, own in FITS.items() if name != "last layer"} | {
    "ggn, two batches": ("mlp", {"magnitudes": "ggn", "estimator": "two_batch"}),
    "paper's": ("cnn-stride-padding", TWO_BATCH),
    "ggn of convolutions": ("cnn-padding", {"magnitudes": "ggn", "budget": 16}),
    "regression": ("mlp", {"likelihood": "regression", "budget": 16}),
}


def dataset(name, likelihood="classification"):
    if likelihood == "regression":
        return TensorDataset(*batch(name, 37, "mse"))
    return data(name)


def posterior(name, limit=None):
    case, settings = CASES[name]
    torch.manual_seed(0)
    return debiased(model_of(case).double(), fit_memory_limit=limit, **settings)


def train(name):
    case, settings = CASES[name]
    return dataset(case, settings.get("likelihood", "classification"))


@pytest.fixture
def one_by_one(monkeypatch):
    """Let each layer have passes of its own, whatever it takes."""
    monkeypatch.setattr(
        memory, "_next", lambda *known: memory_next(*known[:-1], limit=0)
    )


memory_next = memory._next


@pytest.mark.parametrize("name", CASES)
def test_layers_one_by_one_give_the_same_posterior(name, monkeypatch, one_by_one):
    points, found = train(name), posterior(name)
    assert set(found.fit_memory(loader(points)).at_a_time) == {1}
    found.fit(loader(points))
    monkeypatch.undo()
    expected = posterior(name)
    expected.fit(loader(points))
    (X, *_) = points.tensors
    assert same(summary(found, X), summary(expected, X))
