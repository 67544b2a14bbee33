"""Mistakes of a caller are refused by a sentence that says what is wrong."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from tests.cases import batch, network
from tests.fits import SIZE, SUBSETS, debiased, loader

NEED_EXAMPLES = r"`x\[None\]` is a batch of one"


def fitted(subset="all", likelihood="classification", **options):
    la = debiased(network("mlp"), likelihood, subset, prior_precision=2.0, **options)
    la.fit(loader("mlp", likelihood))
    return la


@pytest.fixture
def X():
    return batch("mlp", 4)[0]


@pytest.mark.parametrize("kind", ["tuple", "list", "array"])
@pytest.mark.parametrize("call", ["fit", "predict", "uncertainty"])
def test_other_kinds_of_inputs(kind, call, X):
    made = {"tuple": (X, X), "list": [X, X], "array": X.numpy()}[kind]
    la = fitted()
    with pytest.raises(
        TypeError, match=r"must be a tensor, or a mapping.*got (tup|li|nd)"
    ):
        if call == "fit":
            la.fit([(made, torch.zeros(4).long())])
        elif call == "predict":
            la(made)
        else:
            la.uncertainty(made)


def test_targets_that_are_no_tensor(X):
    with pytest.raises(TypeError, match="Targets must be a tensor, got ndarray"):
        fitted().calibrate([(X, torch.zeros(4).long().numpy())])


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_an_example_without_axis_of_examples(subset, likelihood, X):
    la = fitted(subset, likelihood)
    calls = [
        lambda x: la(x),
        lambda x: la(x, pred_type="nn", link_approx="mc"),
        lambda x: la.uncertainty(x),
        lambda x: la.predictive_samples(x, pred_type="nn"),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=NEED_EXAMPLES):
            call(X[0])
        call(X[:1])


def test_an_example_of_a_network_that_is_certain(X):
    la = fitted()
    la.calibrate(loader(), tolerance=0)
    if la.calibration.scale:
        la._calibration = la.calibration.__class__(
            **vars(la.calibration) | {"scale": 0}
        )
    with pytest.raises(ValueError, match=NEED_EXAMPLES):
        la(X[0])


def test_inputs_where_a_loader_is_meant(X):
    la = fitted()
    with pytest.raises(TypeError, match=r"must yield batches, got a Tensor: `\[X\]`"):
        la.report(loader(), foreign_loader=X)
    with pytest.raises(TypeError, match=r"must yield batches, got a Tensor"):
        la.report(X)
    la.report(loader(), foreign_loader=[X])


@pytest.mark.parametrize("kind", ["of inputs", "of tensors"])
@pytest.mark.parametrize("call", ["fit", "magnitudes", "calibrate", "report", "grid"])
def test_batches_without_targets(kind, call):
    X, la = batch("mlp", SIZE)[0], fitted()
    data = DataLoader(TensorDataset(X) if kind == "of inputs" else X, 20)
    with pytest.raises(ValueError, match=r"must be pairs \(X, y\).*without targets"):
        if call == "fit":
            la.fit(data)
        elif call == "magnitudes":
            la.fit(loader(), magnitude_loader=data)
        elif call == "grid":
            la.optimize_prior_precision(method="gridsearch", val_loader=data)
        else:
            getattr(la, call)(data)


def test_a_mapping_without_targets(X):
    with pytest.raises(ValueError, match=r"'labels'; got .'x'. without targets"):
        fitted().calibrate([{"x": X}])
