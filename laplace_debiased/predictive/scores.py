"""Scores of class probabilities, as functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_calibration_error,
)

NUM_BINS = 15
# torchmetrics has one more bin for what is one, but in single precision
_LAST_BIN = 1 - torch.finfo(torch.float32).eps / 2


def auroc(scores: Tensor, positive: Tensor) -> float | None:
    """Compute the area under the ROC curve, of scores of any range.

    Args:
        scores: Scores ``[points]``, higher for positive points.
        positive: Whether each point is positive ``[points]``.

    Returns:
        The area; None unless there are positive and negative points.
    """
    if positive.all() or not positive.any():
        return None
    # torchmetrics takes scores beyond one for logits, whose sigmoid has ties
    ranks = scores.unique(return_inverse=True)[1].double()
    return binary_auroc(ranks / ranks.max().clamp(min=1), positive.long()).item()


def foreign_auroc(inside: Tensor, outside: Tensor | None) -> float | None:
    """Compute the area under the ROC curve of foreign points.

    Args:
        inside: Scores of other points ``[points]``.
        outside: Higher scores of foreign ones ``[points]``; None without any.

    Returns:
        The area; None without foreign points.
    """
    if outside is None:
        return None
    both = torch.cat([inside, outside])
    return auroc(both, torch.arange(len(both)) >= len(inside))


def risk_coverage(confidence: Tensor, mistaken: Tensor) -> Tensor:
    """Compute the share of mistakes among the most confident points.

    Points of equal confidence count as if in random order. The mean of the risks is the
    area under the curve (Geifman and El-Yaniv, 2017, arXiv 1705.08500).

    Args:
        confidence: Confidences ``[points]``.
        mistaken: Whether each prediction is wrong ``[points]``.

    Returns:
        Risks ``[points]``, of one point up to all of them.
    """
    _, group, counts = confidence.unique(return_inverse=True, return_counts=True)
    wrong = torch.zeros(len(counts), dtype=torch.float64)
    wrong.scatter_add_(0, group, mistaken.double())
    expected = (wrong / counts).flip(0).repeat_interleave(counts.flip(0))
    return expected.cumsum(0) / torch.arange(1, len(expected) + 1)


def nll(probabilities: Tensor, y: Tensor) -> float:
    """Compute the mean negative log likelihood, of at most 87.3 nats a point.

    Args:
        probabilities: Class probabilities ``[points, classes]``.
        y: Classes ``[points]``.

    Returns:
        The mean.
    """
    likelihood = probabilities.gather(1, y[:, None])
    return -likelihood.clamp(min=torch.finfo(torch.float32).tiny).log().mean().item()


def brier(probabilities: Tensor, y: Tensor) -> float:
    """Compute the mean squared distance from the true classes' indicators.

    Args:
        probabilities: Class probabilities ``[points, classes]``.
        y: Classes ``[points]``.

    Returns:
        The mean, summed over classes: between zero and two.
    """
    truth = torch.nn.functional.one_hot(y, probabilities.shape[1])
    return (probabilities - truth).square().sum(1).mean().item()


def calibration_errors(probabilities: Tensor, y: Tensor) -> tuple[float, float]:
    """Compute expected calibration errors, in 15 bins of equal width.

    Args:
        probabilities: Class probabilities ``[points, classes]``.
        y: Classes ``[points]``.

    Returns:
        That of the most probable class, and the mean of those of each class.
    """
    confidence, predicted = probabilities.max(1)
    classes = [
        calibration_error(p, y == k) for k, p in enumerate(probabilities.T.contiguous())
    ]
    return calibration_error(confidence, predicted == y), sum(classes) / len(classes)


def calibration_error(probabilities: Tensor, happened: Tensor) -> float:
    """Compute the expected calibration error, in 15 bins of equal width.

    Args:
        probabilities: Probabilities ``[points]``.
        happened: Whether that came true which they are of ``[points]``.

    Returns:
        The error.
    """
    p = probabilities.double().clamp(max=_LAST_BIN)
    return binary_calibration_error(p, happened.long(), NUM_BINS).item()
