"""Scores of probabilities of labels that are 0 or 1."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from laplace_debiased.predictive.scores import (
    auroc,
    calibration_error,
    foreign_auroc,
    risk_coverage,
)


@dataclass(frozen=True)
class LabelScores:
    """Scores of probabilities of labels, each a prediction by itself.

    Args:
        accuracy: Share of labels that are told right.
        exact_match: Share of points whose labels are all told right.
        nll: Mean negative log likelihood of a label in nats, of at most 87.3.
        brier: Mean squared distance of a label's probability from it, from 0 to 1.
        ece: Expected calibration error of the probabilities of all labels over 15 bins
            of equal width (Guo et al., 2017, arXiv 1706.04599).
        labelwise_ece: Mean over the labels of that of each.
        auroc: Mean over the labels of each one's AUROC, by its probability; None if
            none is 0 of some points and 1 of others.
        aurc: Area under the risk-coverage curve of all labels, by confidence.
        mistakes: AUROC of mistakes of all labels, by confidence; None unless there are
            both.
        foreign: AUROC of foreign data by total uncertainty, summed over labels; None
            without any.
        foreign_epistemic: That by epistemic uncertainty; None without posterior, too.
    """

    accuracy: float
    exact_match: float
    nll: float
    brier: float
    ece: float
    labelwise_ece: float
    auroc: float | None
    aurc: float
    mistakes: float | None
    foreign: float | None
    foreign_epistemic: float | None


def label_scores(
    probabilities: Tensor,
    y: Tensor,
    total: tuple[Tensor, Tensor | None],
    epistemic: tuple[Tensor, Tensor | None] | None,
) -> LabelScores:
    """Score probabilities of labels.

    Args:
        probabilities: Probabilities ``[points, labels]``.
        y: Labels, of the same shape.
        total: Total uncertainty of these points, and of foreign ones, if there are any.
        epistemic: Epistemic uncertainty of both; None without posterior.

    Returns:
        The scores.
    """
    p, y = probabilities.double(), y.double()
    right = told_right(p, y)
    tiny = torch.finfo(torch.float32).tiny
    likelihood = torch.where(y == 1, p, 1 - p).clamp(min=tiny)
    of_labels = list(zip(p.T.contiguous(), y.T.contiguous(), strict=True))
    found = [auroc(own, labels == 1) for own, labels in of_labels]
    areas = [area for area in found if area is not None]
    errors = [calibration_error(*own) for own in of_labels]
    return LabelScores(
        accuracy=right.double().mean().item(),
        exact_match=right.all(1).double().mean().item(),
        nll=-likelihood.log().mean().item(),
        brier=(p - y).square().mean().item(),
        ece=calibration_error(p.flatten(), y.flatten()),
        labelwise_ece=sum(errors) / len(errors),
        auroc=sum(areas) / len(areas) if areas else None,
        aurc=risk_coverage(confidence(p).flatten(), ~right.flatten()).mean().item(),
        mistakes=auroc(-confidence(p).flatten(), ~right.flatten()),
        foreign=foreign_auroc(*total),
        foreign_epistemic=None if epistemic is None else foreign_auroc(*epistemic),
    )


def told_right(probabilities: Tensor, y: Tensor) -> Tensor:
    """Tell which labels are those that are more probable."""
    return (probabilities > 0.5) == (y == 1)


def confidence(probabilities: Tensor) -> Tensor:
    """Return the probability of what is more probable, 0 or 1."""
    return torch.maximum(probabilities, 1 - probabilities)
