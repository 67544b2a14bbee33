"""Made-up runs whose means and standard errors are easy to see."""

import torch

from laplace_debiased.comparison.experiment import (
    CALIBRATED,
    ESTIMATORS,
    MAP,
    PRIOR_PRECISIONS,
    SCALED,
    Run,
)
from laplace_debiased.comparison.metrics import Scores
from laplace_debiased.comparison.posteriors import FULL_DATA

LABELS = torch.tensor([0, 1, 1])
NLLS = {
    FULL_DATA: [0.3, 0.5],
    "single batch": [0.4, 0.7],
    "two batches": [0.35, 0.6],
    "default": [0.25, 0.4],
    "two columns": [0.25, 0.38],
    "default, ggn": [0.25, 0.35],
}
FLAT = {MAP: 0.2, SCALED: 0.15, CALIBRATED: 0.15}


def _run(estimator, seed, nll):
    probabilities = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]])
    scores = Scores(accuracy=2 / 3, nll=nll, brier=0.2, ece=0.1)
    if estimator in (MAP, SCALED):
        return Run(estimator, seed, scores, probabilities, 0.7)
    curve = None if estimator == CALIBRATED else [nll] * len(PRIOR_PRECISIONS)
    return Run(estimator, seed, scores, probabilities, 0.9, 40, 2.5, 0.01, curve)


def runs(num_seeds):
    return [
        _run(estimator, seed, nll)
        for seed in range(num_seeds)
        for estimator in ESTIMATORS
        for nll in [FLAT[estimator] if estimator in FLAT else NLLS[estimator][seed]]
    ]
