"""What is done with a network when its training ends."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from laplace import Laplace
from torch import nn
from torch.utils.data import DataLoader

from laplace_debiased.posterior.laplace import KronDebiasedLaplace

# options whose values fit one network alone
_OF_THE_NETWORK = ("last_layer_name", "prior_mean", "prior_precision")


@dataclass(frozen=True)
class AfterTraining:
    """Fits a posterior, tunes it, and saves it.

    Args:
        likelihood: ``"classification"``, ``"binary_classification"`` or
            ``"regression"``.
        subset_of_weights: ``"all"`` or ``"last_layer"``.
        path: Where to save the posterior; None if it is not saved.
        options: Further keywords of
            :class:`~laplace_debiased.posterior.laplace.KronDebiasedLaplace`.
    """

    likelihood: str = "classification"
    subset_of_weights: str = "all"
    path: str | os.PathLike[str] | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def fit(self, network: nn.Module, train: DataLoader) -> KronDebiasedLaplace:
        """Fit a posterior.

        Args:
            network: The trained network.
            train: Yields the data that it was trained on.

        Returns:
            The posterior.
        """
        kinds = self.likelihood, self.subset_of_weights, "kron_debiased"
        la = cast("KronDebiasedLaplace", Laplace(network, *kinds, **self.options))
        la.fit(train)
        return la

    def tune(self, la: KronDebiasedLaplace, val: DataLoader | None) -> None:
        """Choose a posterior's prior precision, and what else is to be chosen.

        Probabilities are calibrated by the validation data if there are any. Otherwise,
        the marginal likelihood chooses the prior precision, and with regression the
        noise, too.

        Args:
            la: The posterior.
            val: Yields validation data; None if there are none.
        """
        if self.likelihood == "regression":
            la.optimize_prior_precision(tune_sigma_noise=True)
        elif val is None:
            la.optimize_prior_precision()
        else:
            la.calibrate(val)

    def check(self) -> None:
        """Refuse what no network could have, before any training.

        Raises:
            TypeError: If there is no such keyword, or it has a wrong type.
            ValueError: If likelihood, subset or a keyword are not valid.
        """
        kinds = self.likelihood, self.subset_of_weights, "kron_debiased"
        options = {k: v for k, v in self.options.items() if k not in _OF_THE_NETWORK}
        # the training's random numbers are not to be others
        with torch.random.fork_rng(devices=[]):
            Laplace(nn.Linear(1, 1), *kinds, **options)

    def save(self, la: KronDebiasedLaplace) -> None:
        """Save a posterior, if it is to be saved.

        Args:
            la: The posterior.
        """
        if self.path is not None:
            Path(self.path).parent.mkdir(parents=True, exist_ok=True)
            la.save(self.path)
