"""Sets of classes, and intervals, that hold the truth with a given probability.

Split conformal prediction (Vovk et al., 2005): scores of data that neither the network
nor the calibration has seen give a threshold. Classes are scored by one minus their
probability (Sadinle et al., 2019), values by their distance from the mean in standard
deviations.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from laplace.utils.enums import Likelihood
from torch import Tensor
from torch.utils.data import DataLoader

from laplace_debiased.posterior.evaluation import predictions
from laplace_debiased.predictive.conformal import conformal_threshold
from laplace_debiased.predictive.uncertainty import Uncertainty
from laplace_debiased.rows.checks import plain_text
from laplace_debiased.rows.inputs import Inputs

if TYPE_CHECKING:
    from laplace_debiased.posterior.laplace import KronDebiasedLaplace


class Conformal(ABC):
    """What predictions of a posterior must have, to hold the truth.

    Args:
        la: The posterior.
        loader: Yields data that neither network nor calibration has seen.
        coverage: Probability that the truth is held, in (0, 1).

    Raises:
        ValueError: If the likelihood, the data or the probability are not valid.
    """

    likelihood: Likelihood

    def __init__(
        self, la: KronDebiasedLaplace, loader: DataLoader, coverage: float
    ) -> None:
        """Score the data."""
        if la.likelihood != self.likelihood:
            raise ValueError(
                f"This is for {self.likelihood.value}, not "
                f"{plain_text(la.likelihood)!r}."
            )
        if la.class_axis is not None:
            raise ValueError(
                "The positions of an example are not exchangeable: conformal sets and "
                "intervals are for outputs [batch, outputs], without `class_axis`."
            )
        self._la = la
        self._state = self._current()
        self.coverage = coverage
        found, y = predictions(la, loader)
        assert y is not None
        scores = self._score(found, y)
        self.num_points = len(scores)
        self.thresholds = [conformal_threshold(s, coverage) for s in scores.T]

    @abstractmethod
    def _score(self, found: Uncertainty, y: Tensor) -> Tensor:
        """Return the scores of targets ``[points, outputs or 1]``."""

    def _current(self) -> tuple[object, ...]:
        """Return what predictions depend on, besides the network."""
        la = self._la
        prior = la.prior_precision.tolist()
        numbers = la.n_data, prior, float(la.sigma_noise), float(la.temperature)
        return la.H, la.mean, la.calibration, *numbers

    def _predict(self, x: Inputs) -> Uncertainty:
        """Predict by the posterior that gave the thresholds."""
        same = all(
            a is b if isinstance(a, Tensor) or i == 0 else a == b
            for i, (a, b) in enumerate(zip(self._state, self._current(), strict=True))
        )
        if not same:
            raise RuntimeError(
                "The posterior, its calibration or its prior has changed since the "
                "thresholds were computed: compute them again."
            )
        return self._la.uncertainty(x)


class ConformalSets(Conformal):
    """Sets of classes; call it on inputs."""

    likelihood = Likelihood.CLASSIFICATION

    def _score(self, found: Uncertainty, y: Tensor) -> Tensor:
        assert found.probabilities is not None
        return 1 - found.probabilities.gather(1, y[:, None])

    def __call__(self, x: Inputs) -> Tensor:
        """Tell which classes are in the sets of examples.

        Args:
            x: Inputs, a tensor or a mapping.

        Returns:
            Whether each class is ``[batch, classes]``; a set may have none.

        Raises:
            RuntimeError: If the posterior has changed.
        """
        probabilities = self._predict(x).probabilities
        assert probabilities is not None
        return 1 - probabilities.double() <= self.thresholds[0]


class ConformalIntervals(Conformal):
    """Intervals of each output; call it on inputs."""

    likelihood = Likelihood.REGRESSION

    def _score(self, found: Uncertainty, y: Tensor) -> Tensor:
        return (y - found.mean).abs() / found.total.sqrt()

    def __call__(self, x: Inputs) -> tuple[Tensor, Tensor]:
        """Compute the intervals of examples.

        Args:
            x: Inputs, a tensor or a mapping.

        Returns:
            Lower and upper ends, each ``[batch, outputs]``.

        Raises:
            RuntimeError: If the posterior has changed.
        """
        found = self._predict(x)
        thresholds = torch.tensor(self.thresholds, dtype=torch.float64)
        width = found.total.sqrt() * thresholds.to(found.total)
        return found.mean - width, found.mean + width
