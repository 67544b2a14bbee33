"""Mistakes of a caller are refused by a sentence that says what is wrong."""

import pytest
import torch
from torch import nn
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


@pytest.mark.parametrize("kind", ["a loader", "an iterable"])
def test_batches_of_three_entries(kind, X):
    """What stands second might be a further input."""
    site, y = torch.randint(2, (4,)), torch.zeros(4).long()
    data = [(X, site, y)]
    if kind == "a loader":
        data = DataLoader(TensorDataset(X, site, y), 4)
    la = fitted()
    for call in (la.fit, la.calibrate, la.report):
        with pytest.raises(ValueError, match="several inputs go into a mapping"):
            call(data)


def test_targets_that_are_arrays(X):
    with pytest.raises(TypeError, match="targets that are a tensor, got ndarray"):
        fitted().fit([(X, torch.zeros(4).long().numpy())])


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


class MeanToken(nn.Module):
    """Takes an example by itself, too."""

    def forward(self, x):
        return x.mean(-2)


@pytest.mark.parametrize("forward_samples", [None, 8])
def test_an_example_of_tokens_without_axis_of_examples(forward_samples):
    X, y = batch("mlp", 2 * SIZE)
    X = X.view(SIZE, 2, -1)
    model = nn.Sequential(MeanToken(), network("mlp"))
    la = debiased(model, prior_precision=2.0, forward_samples=forward_samples)
    la.fit(DataLoader(TensorDataset(X, y[:SIZE]), 20))
    for call in (la, la.uncertainty):
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


def test_a_class_axis_that_is_no_integer():
    for axis in (2.0, True, "1"):
        with pytest.raises(TypeError, match="`class_axis` must be an int, got"):
            debiased(network("mlp"), class_axis=axis)


@pytest.mark.parametrize("axis", [0, 2, 5, -2, -3])
def test_a_class_axis_that_a_matrix_has_not(axis):
    with pytest.raises(ValueError, match=f"must be an axis of the model's.*got {axis}"):
        fitted(class_axis=axis)


def test_a_class_axis_that_a_matrix_has(X):
    expected = fitted()(X)
    for axis in (1, -1):
        assert torch.equal(fitted(class_axis=axis)(X), expected)


@pytest.mark.parametrize("subset", SUBSETS)
def test_keywords_that_linearized_predictions_do_not_take(subset, X):
    la = fitted(subset)
    with pytest.raises(TypeError, match=r"no arguments \['link_aprox', 'n_sample'\]"):
        la(X, n_sample=3, link_aprox="mc")
    with pytest.raises(TypeError, match="scale"):  # the network's own error
        la(X, pred_type="nn", link_approx="mc", scale=2.0)


BEFORE_A_FIT = {
    "evidence": lambda la, _: la.log_marginal_likelihood(),
    "likelihood": lambda la, _: la.log_likelihood,
    "scatter": lambda la, _: la.scatter,
    "offset": lambda la, _: la.prior_offset,
    "sample": lambda la, _: la.sample(),
    "predict": lambda la, X: la(X),
    "uncertainty": lambda la, X: la.uncertainty(X),
    "save": lambda la, _: la.state_dict(),
}


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("call", BEFORE_A_FIT)
def test_nothing_is_known_before_a_fit(call, subset, X):
    la = debiased(network("mlp"), subset=subset)
    with pytest.raises(AttributeError, match=r"not fitted. Run fit\(\) first"):
        BEFORE_A_FIT[call](la, X)


IMPROPER = {
    "evidence": lambda la, _: la.log_marginal_likelihood(),
    "its error": lambda la, _: la.log_marginal_likelihood_standard_error(),
    "sample": lambda la, _: la.sample(3),
    "networks": lambda la, X: la(X, pred_type="nn", link_approx="mc"),
    "predict": lambda la, X: la(X),
    "uncertainty": lambda la, X: la.uncertainty(X),
}


@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
@pytest.mark.parametrize("call", IMPROPER)
def test_without_prior_a_direction_may_be_open(call, magnitudes, X):
    inputs, y = batch("mlp", SIZE)
    inputs[:, 0] = 0  # tells nothing of its weights
    la = debiased(network("mlp"), magnitudes=magnitudes)
    la.fit(DataLoader(TensorDataset(inputs, y), 20))
    IMPROPER[call](la, X)
    la.prior_precision = 0.0
    with pytest.raises(ValueError, match="prior precision"):
        IMPROPER[call](la, X)


def test_an_evidence_that_is_refused_leaves_the_prior(X):
    la = fitted()
    with pytest.raises(ValueError, match="is not finite: the prior precision"):
        la.log_marginal_likelihood(torch.zeros(()))
    assert la.prior_precision == 2


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["sigma_noise", "temperature"])
@pytest.mark.parametrize("subset", SUBSETS)
def test_scales_must_be_positive(name, value, subset):
    message = f"`{name}` must be finite and above zero, got"
    with pytest.raises(ValueError, match=message):
        debiased(network("mlp"), "regression", subset, **{name: value})
    la = fitted(subset, "regression")
    before = la.log_marginal_likelihood()
    with pytest.raises(ValueError, match=message):
        setattr(la, name, value)
    assert getattr(la, name) == 1 and la.log_marginal_likelihood() == before


@pytest.mark.parametrize("subset", SUBSETS)
def test_the_noise_of_a_classification_stays_one(subset):
    la = fitted(subset)
    before = la.log_marginal_likelihood()
    with pytest.raises(ValueError, match="`sigma_noise` is for regression"):
        la.sigma_noise = 0.1
    assert la.sigma_noise == 1 and la.log_marginal_likelihood() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_prior_prec": 0.0}, "`init_prior_prec` must be finite and above zero"),
        ({"init_prior_prec": -torch.ones(1)}, "`init_prior_prec` must be .* above"),
        ({"init_prior_prec": torch.ones(3)}, "one for each of 4 .*tensors, got 3"),
        ({"prior_structure": "layerwis"}, "Invalid prior structure layerwis"),
    ],
)
def test_searches_that_cannot_start(options, message):
    la = fitted()
    with pytest.raises(ValueError, match=message):
        la.optimize_prior_precision(**options)
    assert la.prior_precision == 2


def test_a_report_of_bias_without_curvature():
    model = network("mlp")
    model[2].weight.data *= 1e9
    X, _ = batch("mlp", SIZE)
    la = debiased(model)
    la.fit(DataLoader(TensorDataset(X, model(X).argmax(1)), 20))
    report = la.bias_report()
    assert report.summary().endswith("held-out points have no curvature.")
    with pytest.raises(ValueError, match="Held-out points have no curvature"):
        report.sufficient_points()
    assert "curvature" in report.table()
