"""Scores of class probabilities, as functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc


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
