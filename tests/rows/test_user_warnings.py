"""Warnings are at the line of the user's code that led to them."""

import warnings

import pytest
import torch
from torch import nn

from laplace_debiased import DebiasedKFACLinearOperator, curvature_scores
from tests.cases import batch, network
from tests.fits import SIZE, debiased, loader

PROBABILITIES = nn.Sequential(nn.Linear(4, 3), nn.Softmax(1)).double()
LOSS, DATA, VALIDATION = nn.CrossEntropyLoss(), [batch("mlp", SIZE)], loader(seed=3)
ENDS = {"log_prior_prec_min": 8, "log_prior_prec_max": 9, "grid_size": 3}


def of_operator(la):
    params = list(PROBABILITIES.parameters())
    DebiasedKFACLinearOperator(PROBABILITIES, LOSS, params, DATA, DATA).compute()


def of_scores(la):
    curvature_scores(PROBABILITIES, LOSS, DATA)


def of_grid(la):
    la.optimize_prior_precision(method="gridsearch", val_loader=VALIDATION, **ENDS)


def of_validation(la):
    la.optimize_prior_precision(val_loader=VALIDATION)


def of_untuned(la):
    la(DATA[0][0])


def of_calibration(la):
    la.calibrate(VALIDATION)
    la.prior_precision = 3.0


CASES = {
    of_operator: "softmax",
    of_scores: "softmax",
    of_grid: "end of the grid",
    of_validation: "takes no `val_loader`",
    of_untuned: "Predictions use the default",
    of_calibration: "is forgotten",
}


@pytest.mark.parametrize("mode", [False, True])
@pytest.mark.parametrize("act", CASES)
def test_warnings_are_of_the_callers_line(act, mode):
    la = debiased(network("mlp"))
    la.fit(loader())
    with warnings.catch_warnings(record=True) as caught, torch.inference_mode(mode):
        warnings.simplefilter("always")
        act(la)
    places = [own.filename for own in caught if CASES[act] in str(own.message)]
    assert places and set(places) == {__file__}
