"""Predictions side by side, and in other processes."""

import copy
import pickle
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import pytest
import torch

from tests.cases import batch
from tests.faults import differences, leftovers, snapshot
from tests.fits import SUBSETS
from tests.posterior.test_faults import fitted

X, _ = batch("mlp", 5)
CALLS = 200
KINDS = {
    "probit": lambda la, g: la(X),
    "mc": lambda la, g: la(X, link_approx="mc", n_samples=3, generator=g),
    "bridge": lambda la, g: la(X, link_approx="bridge"),
    "bridge_norm": lambda la, g: la(X, link_approx="bridge_norm"),
    "nn": lambda la, g: la(X, "nn", link_approx="mc", n_samples=3, generator=g),
    "sample": lambda la, g: la.sample(3, g),
    "functional": lambda la, g: la.functional_samples(X, "glm", 3, generator=g),
    "functional-nn": lambda la, g: la.functional_samples(X, "nn", 3, generator=g),
    "predictive": lambda la, g: la.predictive_samples(X, "glm", 3, generator=g),
}


def predict(la, number):
    kind = list(KINDS.values())[number % len(KINDS)]
    return kind(la, torch.Generator().manual_seed(number % 7))


@pytest.mark.parametrize("num_threads", [2, 8])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("subset", SUBSETS)
def test_predictions_side_by_side_equal_sequential_ones(subset, training, num_threads):
    la = fitted(subset)
    la.model.train(training)
    expected = [predict(la, number) for number in range(CALLS)]
    before, clean = snapshot(la.model), leftovers()
    with ThreadPoolExecutor(num_threads) as pool:
        actual = list(pool.map(lambda number: predict(la, number), range(CALLS)))
    for first, second in zip(actual, expected, strict=True):
        assert torch.equal(first, second)
    assert not differences(la.model, before)
    assert leftovers() == clean


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("enable_backprop", [True, False])
def test_copies_predict_alike(subset, enable_backprop):
    la = fitted(subset, enable_backprop=enable_backprop)
    expected = la(X)
    assert torch.equal(copy.deepcopy(la)(X), expected)


def predict_glm(la):
    return la(X)


def test_posteriors_survive_pickling_and_new_processes():
    posteriors = [fitted(subset) for subset in SUBSETS]
    for la in posteriors:
        for module in la.model.modules():
            for key, hook in list(module._forward_hooks.items()):
                if getattr(hook, "__name__", "") == "<lambda>":
                    del module._forward_hooks[key]
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        actual = list(pool.map(predict_glm, posteriors))
    for la, prediction in zip(posteriors, actual, strict=True):
        assert torch.equal(prediction, la(X))
        assert torch.equal(pickle.loads(pickle.dumps(la))(X), la(X))
