"""Gaussian outputs, and probabilities that are made of them in several ways."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from laplace_debiased import Calibration, KronDebiasedLaplace
from shared.internals import (
    calibration_of,
    entropies,
    output_moments,
    probit_logits,
    probit_probabilities,
)
from shared.predictions import scaled_temperature

BATCH_SIZE = 125


@dataclass(frozen=True)
class Moments:
    """Gaussian outputs.

    Args:
        mean: Their means ``[points, classes]``.
        covariance: Their covariances ``[points, classes, classes]``.
    """

    mean: Tensor
    covariance: Tensor

    @property
    def variance(self) -> Tensor:
        """Variances ``[points, classes]``."""
        return self.covariance.diagonal(dim1=1, dim2=2)

    def __getitem__(self, rows: slice) -> Moments:
        """Return those of some points."""
        return Moments(self.mean[rows], self.covariance[rows])

    def probabilities(self, calibration: Calibration) -> Tensor:
        """Return calibrated probabilities ``[points, classes]``."""
        return probit_probabilities(*calibration.outputs(self.mean, self.variance))

    def nll(self, calibration: Calibration, y: Tensor) -> float:
        """Return the negative log likelihood of classes by calibrated probabilities.

        It follows from logits: a probability in single precision may be zero.
        """
        outputs = calibration.outputs(self.mean.double(), self.variance.double())
        return cross_entropy(probit_logits(*outputs), y).item()

    def information(self, calibration: Calibration) -> Tensor:
        """Return the mutual information of class and parameters ``[points]``."""
        wide = calibration.with_whole_posterior()
        total, aleatoric = entropies(*wide.outputs(self.mean, self.covariance))
        return total - aleatoric


MAP_OUTPUTS = Calibration(1.0, 0.0, 0.0, 0, 0.0, ())
UNCALIBRATED = replace(MAP_OUTPUTS, scale=1.0)


def moments(la: KronDebiasedLaplace, X: Tensor) -> Moments:
    """Compute the outputs' moments by the whole posterior, in batches."""
    parts = [output_moments(la, part, "full") for part in X.split(BATCH_SIZE)]
    return Moments(*map(torch.cat, zip(*parts, strict=True)))


def scaled(outputs: Moments, y: Tensor) -> Calibration:
    """Choose a temperature alone, without prior."""
    temperature = scaled_temperature(outputs.mean, y)
    return Calibration(temperature, 0.0, 0.0, len(y), 0.0, ())


def calibrated(outputs: Moments, y: Tensor, **options: float) -> Calibration:
    """Choose as ``la.calibrate`` does."""
    return calibration_of(outputs.mean, outputs.variance, y, **options)


def certain(model: nn.Module, X: Tensor) -> Moments:
    """Compute the outputs of the network alone."""
    mean = torch.cat([model(part) for part in X.split(BATCH_SIZE)])
    return Moments(mean, mean.new_zeros(*mean.shape, mean.shape[1]))
