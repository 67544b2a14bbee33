"""A posterior is of its model's parameters, not of others that take their places."""

import dataclasses

import pytest
import torch

from tests.cases import batch, network
from tests.fits import SIZE, SUBSETS, debiased, loader

X, Y = batch("mlp", SIZE)
MESSAGE = "of the posterior's parameters are no longer the model's"
USES = {
    "predict": lambda la: la(X),
    "nn": lambda la: la(X, "nn", link_approx="mc", n_samples=2),
    "outputs": lambda la: la.functional_samples(X, "nn", 2),
    "sample": lambda la: la.sample(2),
    "uncertainty": lambda la: la.uncertainty(X),
    "calibrate": lambda la: la.calibrate(loader()),
    "evidence": lambda la: la.log_marginal_likelihood(),
    "report": lambda la: la.report(loader()),
    "kinds": lambda la: la.parameter_kinds,
    "save": lambda la: la.state_dict(),
}
FURTHER = {  # of a last layer, there are none
    "further data": lambda la: la.fit(loader(), override=False),
    "stream": lambda la: la.partial_fit((X, Y)),
}
ANEW = {
    "fit": lambda la: la.fit(loader()),
    "load": lambda la: la.load_state_dict(SAVED),
}


def fitted(subset="all"):
    la = debiased(network("mlp"), subset=subset, prior_precision=2.0)
    la.fit(loader())
    return la


SAVED = fitted().state_dict()


def replace(la, assign=True):
    values = {key: 2 * value for key, value in la.model.state_dict().items()}
    la.model.load_state_dict(values, assign=assign)


@pytest.mark.parametrize(
    ("subset", "use"),
    [(subset, use) for subset in SUBSETS for use in USES]
    + [("all", use) for use in FURTHER],
)
def test_replaced_parameters_are_refused(subset, use):
    la = fitted(subset)
    replace(la)
    with pytest.raises(ValueError, match=MESSAGE):
        (USES | FURTHER)[use](la)


def test_predictions_that_keep_no_covariance_are_refused_too():
    la = fitted()
    la._calibration = dataclasses.replace(la.calibrate(loader()), scale=0.0)
    assert la(X).isfinite().all()
    replace(la)
    with pytest.raises(ValueError, match=MESSAGE):
        la(X)


@pytest.mark.parametrize("use", USES | FURTHER | ANEW)
def test_parameters_with_other_values_are_the_same(use):
    la = fitted()
    replace(la, assign=False)
    (USES | FURTHER | ANEW)[use](la)


@pytest.mark.parametrize("subset", SUBSETS)
def test_a_posterior_that_is_fitted_again_is_of_the_new_parameters(subset):
    la = fitted(subset)
    before = la.mean
    if subset == "all":
        replace(la)
    else:  # its network is a copy of this one
        model = network("mlp")
        la = debiased(model, subset=subset, prior_precision=2.0)
        values = {key: 2 * value for key, value in model.state_dict().items()}
        model.load_state_dict(values, assign=True)
    la.fit(loader())
    assert torch.equal(la.mean, 2 * before)
    assert la(X).isfinite().all()


def test_a_posterior_that_is_loaded_again_is_of_the_new_parameters():
    la = fitted()
    before = la(X)
    values = {key: value.clone() for key, value in la.model.state_dict().items()}
    la.model.load_state_dict(values, assign=True)
    la.load_state_dict(SAVED)
    assert torch.equal(la(X), before)
