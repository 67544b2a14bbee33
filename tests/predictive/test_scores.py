import math
from itertools import permutations

import pytest
import torch
from netcal.metrics import ECE

from laplace_debiased.predictive import scores
from laplace_debiased.predictive.label_scores import label_scores
from laplace_debiased.predictive.scores import (
    auroc,
    calibration_errors,
    risk_coverage,
)


def test_auroc_counts_pairs_also_of_scores_that_saturate_a_sigmoid():
    scores = torch.tensor([50.0, 60.0, 70.0, 70.0, -3.0, 80.0])
    positive = torch.tensor([False, True, False, True, False, True])
    pairs = [
        1.0 if a > b else 0.5 if a == b else 0.0
        for a in scores[positive].tolist()
        for b in scores[~positive].tolist()
    ]
    assert auroc(scores, positive) == pytest.approx(sum(pairs) / len(pairs))


@pytest.mark.parametrize("value", [False, True])
def test_there_is_no_auroc_of_one_kind_of_points(value):
    assert auroc(torch.rand(4), torch.full((4,), value)) is None


def test_equal_scores_tell_nothing():
    assert auroc(torch.ones(4), torch.arange(4) > 1) == pytest.approx(0.5)


def test_risks_are_means_over_the_orders_of_equal_confidences():
    confidence = [0.9, 0.5, 0.5, 0.7, 0.5, 0.9]
    mistaken = [False, True, False, True, True, True]
    curves = []
    for order in permutations(range(6)):
        ranked = [confidence[k] for k in order]
        if ranked == sorted(confidence, reverse=True):
            wrong = [mistaken[k] for k in order]
            curves.append([sum(wrong[: n + 1]) / (n + 1) for n in range(6)])
    expected = torch.tensor(curves, dtype=torch.float64).mean(0)
    found = risk_coverage(torch.tensor(confidence), torch.tensor(mistaken))
    assert torch.allclose(found, expected)


@pytest.mark.parametrize("count", [1, 200])
def test_scores_of_probabilities_are_those_of_their_definitions(count):
    g = torch.Generator().manual_seed(0)
    p = torch.randn(count, 5, generator=g).double().softmax(1)
    y = torch.randint(4, (count,), generator=g)  # the last class is missing
    own = [p[i, k].item() for i, k in enumerate(y)]
    assert scores.nll(p, y) == pytest.approx(-sum(map(math.log, own)) / count)
    squares = sum(
        (p[i, k].item() - (y[i].item() == k)) ** 2
        for i in range(count)
        for k in range(5)
    )
    assert scores.brier(p, y) == pytest.approx(squares / count)

    def error(confidence, right):
        bins = (confidence * 15).floor()
        gaps = [(confidence - right)[bins == b].sum().abs() for b in bins.unique()]
        return sum(gaps).item() / count

    top, classwise = scores.calibration_errors(p, y)
    assert top == pytest.approx(error(p.amax(1), (p.argmax(1) == y).double()))
    each = [error(p[:, k], (y == k).double()) for k in range(5)]
    assert classwise == pytest.approx(sum(each) / 5)


def test_impossible_targets_have_a_finite_likelihood():
    assert scores.nll(torch.eye(2), torch.tensor([1, 1])) == pytest.approx(87.3365 / 2)


@pytest.mark.parametrize("certain", [1.0, 1 - 1e-9])
def test_certain_predictions_are_in_the_last_bin(certain):
    p = torch.tensor([[certain, 1 - certain]] * 50 + [[0.95, 0.05]] * 50).double()
    y = torch.tensor([0] * 45 + [1] * 5 + [0] * 50)
    assert calibration_errors(p, y)[0] == pytest.approx(0.025, abs=1e-6)
    assert ECE(15).measure(p.numpy(), y.numpy()) == pytest.approx(0.025, abs=1e-6)
    labels = label_scores(p[:, :1], (y == 0)[:, None], (y, None), None)
    assert labels.ece == pytest.approx(0.025, abs=1e-6)
