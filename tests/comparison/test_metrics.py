import math
import warnings

import pytest
import torch
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
)

from laplace_debiased.comparison.metrics import (
    misclassification_auroc,
    ood_auroc,
    reliability,
    score,
)

PROBABILITIES = torch.tensor(
    [[0.7, 0.2, 0.1], [0.7, 0.2, 0.1], [0.1, 0.5, 0.4], [0.25, 0.25, 0.5]]
)
LABELS = torch.tensor([0, 1, 1, 2])


def test_scores_equal_hand_computed_ones():
    scores = score(PROBABILITIES, LABELS)
    assert scores.accuracy == 3 / 4
    expected = -sum(map(math.log, [0.7, 0.2, 0.5, 0.5])) / 4
    assert scores.nll == pytest.approx(expected, abs=1e-6)
    squares = [0.09 + 0.04 + 0.01, 0.49 + 0.64 + 0.01, 0.01 + 0.25 + 0.16, 0.375]
    assert scores.brier == pytest.approx(sum(squares) / 4, abs=1e-6)
    # confidence 0.7 is right in half of the cases, confidence 0.5 always
    assert scores.ece == pytest.approx((2 * 0.2 + 2 * 0.5) / 4, abs=1e-6)


def test_scores_equal_those_of_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    p = (3 * torch.randn(5000, 10, generator=generator)).softmax(-1)
    y = p.multinomial(1, generator=generator).squeeze(1)
    scores = score(p, y)
    expected = multiclass_calibration_error(p, y, 10, n_bins=15, norm="l1")
    assert scores.ece == pytest.approx(expected.item(), abs=1e-5)
    expected = multiclass_accuracy(p, y, 10, average="micro")
    assert scores.accuracy == pytest.approx(expected.item())


def test_confidence_tells_correct_predictions():
    # correct with confidence 0.7, 0.5, 0.5, wrong with 0.7: half a point of three
    assert misclassification_auroc(PROBABILITIES, LABELS) == pytest.approx(1 / 6)


def test_entropy_tells_points_of_another_distribution():
    sure, unsure = torch.eye(3), torch.full((4, 3), 1 / 3)
    assert ood_auroc(sure, unsure) == 1
    assert ood_auroc(unsure, sure) == 0
    assert ood_auroc(unsure, unsure) == 0.5


def test_perfect_predictions_have_perfect_scores():
    scores = score(torch.eye(3), torch.arange(3))
    assert scores.accuracy == 1
    assert max(scores.nll, scores.brier, scores.ece) < 1e-12


def test_labels_need_not_cover_all_classes():
    probabilities = torch.tensor([[0.7, 0.1, 0.1, 0.1]]).repeat(3, 1)
    scores = score(probabilities, torch.tensor([0, 2, 3]))
    expected = -(math.log(0.7) + 2 * math.log(0.1)) / 3
    assert scores.nll == pytest.approx(expected, abs=1e-6)


def test_single_precision_rounding_is_no_reason_to_warn():
    probabilities = torch.randn(200, 10).softmax(-1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score(probabilities, torch.randint(10, (200,)))


def test_reliability_compares_confidence_with_accuracy():
    """In ten bins of as many points."""
    confident = torch.linspace(0.6, 0.99, 100)
    p = torch.stack([confident, 1 - confident], 1)
    confidence, accuracy = reliability(p, (torch.arange(100) % 10 == 0).long())
    assert confidence == pytest.approx(confident.view(10, 10).mean(1).tolist())
    assert accuracy == pytest.approx([0.9] * 10)


def test_reliability_of_predictions_that_are_all_right():
    assert reliability(torch.eye(3), torch.arange(3)) == ([1], [1])


def test_brier_of_two_classes_is_summed_over_both():
    p, y = torch.tensor([[0.8, 0.2], [0.3, 0.7]]), torch.tensor([0, 0])
    assert score(p, y).brier == pytest.approx((2 * 0.2**2 + 2 * 0.7**2) / 2)
