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

from laplace_debiased.posterior.calibrating import uncertainty
from laplace_debiased.posterior.upstream import inputs_and_targets, loss_of
from laplace_debiased.predictive.conformal import conformal_threshold
from laplace_debiased.predictive.uncertainty import Uncertainty
from laplace_debiased.rows.inputs import Inputs, check_targets
from laplace_debiased.rows.output_curvature import is_counted

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
                f"This is for {self.likelihood.value}, not {str(la.likelihood)!r}."
            )
        self._la = la
        self._state = self._current()
        self.coverage = coverage
        scores = self._scores(loader)
        self.num_points = len(scores)
        self.thresholds = [conformal_threshold(s, coverage) for s in scores.T]

    @torch.no_grad()
    def _scores(self, loader: DataLoader) -> Tensor:
        """Return the scores of the targets ``[points, outputs or 1]``."""
        loss = loss_of(self._la.backend)
        parts = []
        for batch in loader:
            X, y = inputs_and_targets(batch, self._la.backend)
            is_regression = self.likelihood == Likelihood.REGRESSION
            if y.is_floating_point() and not is_regression:
                raise ValueError("Targets of `loader` must be class indices.")
            found = uncertainty(self._la, X)
            y = check_targets(found.mean, y, loss)
            counted = is_counted(loss, y)
            parts.append(self._score(found, y, counted).double().cpu())
        if not parts:
            raise ValueError("`loader` yields no data.")
        return torch.cat(parts)

    @abstractmethod
    def _score(self, found: Uncertainty, y: Tensor, counted: Tensor) -> Tensor:
        """Return the scores of those that are counted ``[points, outputs or 1]``."""

    def _current(self) -> tuple[object, ...]:
        """Return what predictions depend on, besides the network."""
        la = self._la
        prior = la.prior_precision.tolist()
        return la.H, la.mean, la.calibration, la.n_data, prior, float(la.sigma_noise)

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

    def _score(self, found: Uncertainty, y: Tensor, counted: Tensor) -> Tensor:
        assert found.probabilities is not None
        return 1 - found.probabilities[counted].gather(1, y[counted][:, None])

    def __call__(self, x: Inputs) -> Tensor:
        """Return whether each class is in the set, bool ``[batch, classes]``."""
        probabilities = self._predict(x).probabilities
        assert probabilities is not None
        return (1 - probabilities).double() <= self.thresholds[0]


class ConformalIntervals(Conformal):
    """Intervals of each output; call it on inputs."""

    likelihood = Likelihood.REGRESSION

    def _score(self, found: Uncertainty, y: Tensor, counted: Tensor) -> Tensor:
        return ((y - found.mean).abs() / found.total.sqrt())[counted]

    def __call__(self, x: Inputs) -> tuple[Tensor, Tensor]:
        """Return lower and upper ends, each ``[batch, outputs]``."""
        found = self._predict(x)
        thresholds = torch.tensor(self.thresholds, dtype=torch.float64)
        width = found.total.sqrt() * thresholds.to(found.total)
        return found.mean - width, found.mean + width
