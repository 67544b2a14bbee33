"""Quality of predicted probabilities, by scikit-learn, netcal and torchmetrics."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from netcal.metrics import ECE
from sklearn.calibration import calibration_curve
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from laplace_debiased.predictive import scores
from laplace_debiased.predictive.uncertainty import entropy

_ECE_BINS = 15
_RELIABILITY_BINS = 10


@dataclass(frozen=True)
class Scores:
    """Scores of predictions.

    Args:
        accuracy: Share of correct predictions.
        nll: Mean negative log likelihood, in nats.
        brier: Mean squared distance to the one-hot labels, from 0 to 2.
        ece: Expected calibration error over 15 bins of equal width.
    """

    accuracy: float
    nll: float
    brier: float
    ece: float


def score(probabilities: Tensor, labels: Tensor) -> Scores:
    """Score predictions.

    Args:
        probabilities: Class probabilities ``[points, classes]``.
        labels: Class indices ``[points]``.

    Returns:
        The scores.
    """
    p, y = _as_arrays(probabilities, labels)
    classes = range(p.shape[1])
    return Scores(
        accuracy=float(accuracy_score(y, p.argmax(1))),
        nll=float(log_loss(y, p, labels=classes)),
        brier=float(brier_score_loss(y, p, labels=classes, scale_by_half=False)),
        ece=float(ECE(_ECE_BINS).measure(p, y)),
    )


def misclassification_auroc(probabilities: Tensor, labels: Tensor) -> float:
    """Measure how well confidence tells correct predictions from others.

    Args:
        probabilities: Class probabilities ``[points, classes]``.
        labels: Class indices ``[points]``.

    Returns:
        The area under the ROC curve.
    """
    confidence, predicted = probabilities.max(1)
    return binary_auroc(confidence, (predicted == labels).long()).item()


def ood_auroc(inside: Tensor, outside: Tensor) -> float:
    """Measure how well entropy tells points of another distribution.

    Args:
        inside: Class probabilities ``[points, classes]`` of points like those trained
            on.
        outside: Class probabilities of points of another distribution.

    Returns:
        The area under the ROC curve.
    """
    return auroc(entropy(inside), entropy(outside))


def auroc(inside: Tensor, outside: Tensor) -> float:
    """Measure how well an uncertainty tells points of another distribution.

    Args:
        inside: Uncertainties ``[points]`` of points like those trained on.
        outside: Uncertainties of points of another distribution.

    Returns:
        The area under the ROC curve.
    """
    both = torch.cat([inside, outside])
    area = scores.auroc(both, torch.arange(len(both)) >= len(inside))
    assert area is not None  # there are points of both kinds
    return area


def reliability(
    probabilities: Tensor, labels: Tensor
) -> tuple[list[float], list[float]]:
    """Compare confidence with accuracy in bins of as many points each.

    Args:
        probabilities: Class probabilities ``[points, classes]``.
        labels: Class indices ``[points]``.

    Returns:
        Mean confidence and accuracy of each bin that is not empty.
    """
    p, y = _as_arrays(probabilities, labels)
    accuracy, confidence = calibration_curve(
        p.argmax(1) == y,
        p.max(1),
        n_bins=_RELIABILITY_BINS,
        strategy="quantile",
        pos_label=True,
    )
    return confidence.tolist(), accuracy.tolist()


def _as_arrays(probabilities: Tensor, labels: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Convert to NumPy; scikit-learn warns of sums that are 1 in float32 only."""
    p = probabilities.double()
    return (p / p.sum(1, keepdim=True)).numpy(), labels.numpy()
