"""Train, fit, predict: every posterior on every seed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any, cast

import numpy as np
import torch
from laplace import KronLaplace
from netcal.scaling import TemperatureScaling
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from laplace_debiased.comparison.data import TrainTestSplit, shuffled_rows
from laplace_debiased.comparison.metrics import Scores, auroc, score
from laplace_debiased.comparison.posteriors import DEFAULT, POSTERIORS
from laplace_debiased.comparison.training import Recipe, train
from laplace_debiased.posterior.laplace import KronDebiasedLaplace
from laplace_debiased.predictive.uncertainty import entropies, entropy

MAP = "MAP"
SCALED = "temperature scaling"
CALIBRATED = "default, calibrated"
ESTIMATORS = (MAP, SCALED, *POSTERIORS, CALIBRATED)
PRIOR_PRECISIONS = tuple(10 ** (half / 2) for half in range(-2, 7))

# laplace-torch's Jacobians take time and memory that grow with the batch squared
_PREDICTION_BATCH_SIZE = 8
# of the training points, for validation
_VALIDATION_SHARE, _MAX_VALIDATION = 0.2, 5000


@dataclass(frozen=True)
class Run:
    """One posterior with one seed, or the network alone.

    Args:
        estimator: Name in ``ESTIMATORS``.
        seed: The seed.
        scores: Test scores, at the chosen prior precision.
        probabilities: The predictions behind them, ``[points, classes]``.
        foreign_auroc: How well epistemic uncertainty, or without posterior entropy,
            tells foreign inputs: the area under the ROC curve.
        num_points: Training points with backward passes for the posterior.
        prior_precision: What the marginal likelihood chose; None without posterior.
        fit_seconds: Time to fit the posterior.
        curve: Test NLL at each of ``PRIOR_PRECISIONS``; None where there is none.
    """

    estimator: str
    seed: int
    scores: Scores
    probabilities: Tensor
    foreign_auroc: float
    num_points: int = 0
    prior_precision: float | None = None
    fit_seconds: float | None = None
    curve: list[float] | None = None


@dataclass(frozen=True)
class Trial:
    """A trained network, and what it is judged by.

    Args:
        model: The network.
        train: The points that it was trained on.
        validation: Points that it was not trained on.
        test_inputs: Test inputs ``[points, ...]``.
        test_labels: Their class indices.
        seed: The seed.
    """

    model: nn.Module
    train: TensorDataset
    validation: TensorDataset
    test_inputs: Tensor
    test_labels: Tensor
    seed: int

    @property
    def foreign(self) -> Tensor:
        """What the network was not trained for."""
        return shuffled_rows(self.test_inputs)

    def run(
        self,
        estimator: str,
        probabilities: Tensor,
        own: Tensor,
        foreign: Tensor,
        **details: Any,
    ) -> Run:
        """Score predictions of test inputs, and uncertainties of both kinds."""
        scores = score(probabilities, self.test_labels)
        return Run(
            estimator, self.seed, scores, probabilities, auroc(own, foreign), **details
        )


def compare(
    split: TrainTestSplit, recipe: Recipe, budget: int, num_seeds: int
) -> list[Run]:
    """Fit all posteriors on all seeds; each seed has a network and a draw of its own.

    A part of the training points is held out, to calibrate by.

    Args:
        split: Training and test points.
        recipe: How to build and train a network.
        budget: Number of training points for posteriors that do not use all.
        num_seeds: Number of seeds.

    Returns:
        The runs, seed by seed.
    """
    runs = []
    points, validation = held_out(split.train)
    with tqdm(total=num_seeds * len(ESTIMATORS)) as bar:
        for seed in range(num_seeds):
            bar.set_description(f"seed {seed}: training")
            model = train(recipe, points, seed).model
            trial = Trial(model, points, validation, *split[1:], seed)
            for estimator, run in _runs(trial, budget):
                bar.set_description(f"seed {seed}: {estimator}")
                runs.append(run)
                bar.update()
    return runs


def held_out(points: TensorDataset) -> tuple[TensorDataset, TensorDataset]:
    """Split training points from those for validation, always in the same way.

    Args:
        points: All of them.

    Returns:
        Both parts.
    """
    size = min(int(_VALIDATION_SHARE * len(points)), _MAX_VALIDATION)
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))
    return TensorDataset(*points[order[size:]]), TensorDataset(*points[order[:size]])


def _runs(trial: Trial, budget: int) -> Iterator[tuple[str, Run]]:
    yield MAP, _map_run(trial)
    yield SCALED, _scaled_run(trial)
    for estimator in POSTERIORS:
        laplace, run = _laplace_run(estimator, trial, budget)
        yield estimator, run
        if estimator == DEFAULT:
            calibrated = _calibrated_run(trial, cast(KronDebiasedLaplace, laplace), run)
    yield CALIBRATED, calibrated


@torch.no_grad()
def _map_run(trial: Trial) -> Run:
    p = trial.model(trial.test_inputs).softmax(-1)
    return trial.run(
        MAP, p, entropy(p), entropy(trial.model(trial.foreign).softmax(-1))
    )


@torch.no_grad()
def _scaled_run(trial: Trial) -> Run:
    def probabilities(X: Tensor) -> np.ndarray:
        # netcal differentiates numerically: in single precision it sees no slope
        return trial.model(X).double().softmax(-1).numpy()

    X, y = trial.validation.tensors
    scaling = TemperatureScaling()
    scaling.fit(probabilities(X), y.numpy(), tensorboard=False)
    p, foreign = (
        torch.as_tensor(scaling.transform(probabilities(inputs)))
        for inputs in (trial.test_inputs, trial.foreign)
    )
    return trial.run(SCALED, p, entropy(p), entropy(foreign))


def _laplace_run(estimator: str, trial: Trial, budget: int) -> tuple[KronLaplace, Run]:
    start = perf_counter()
    laplace, num_points = POSTERIORS[estimator](
        trial.model, trial.train, budget, trial.seed
    )
    fit_seconds = perf_counter() - start
    prior_precision = choose_prior_precision(laplace)
    probabilities = predict(laplace, trial.test_inputs)
    run = trial.run(
        estimator,
        probabilities,
        mutual_information(laplace, trial.test_inputs),
        mutual_information(laplace, trial.foreign),
        num_points=num_points,
        prior_precision=prior_precision,
        fit_seconds=fit_seconds,
        curve=nll_curve(laplace, trial.test_inputs, trial.test_labels),
    )
    return laplace, run


def _calibrated_run(trial: Trial, la: KronDebiasedLaplace, default: Run) -> Run:
    start = perf_counter()
    la.calibrate(DataLoader(trial.validation, batch_size=256))
    seconds = perf_counter() - start
    own, foreign = la.uncertainty(trial.test_inputs), la.uncertainty(trial.foreign)
    assert own.probabilities is not None and default.fit_seconds is not None
    return trial.run(
        CALIBRATED,
        own.probabilities,
        own.epistemic,
        foreign.epistemic,
        num_points=default.num_points,
        prior_precision=la.prior_precision.item(),
        fit_seconds=default.fit_seconds + seconds,
    )


def mutual_information(laplace: KronLaplace, inputs: Tensor) -> Tensor:
    """Compute the mutual information of class and parameters.

    Args:
        laplace: A fitted posterior.
        inputs: Inputs ``[points, ...]``.

    Returns:
        The mutual information ``[points]``.
    """
    parts = []
    for X in inputs.split(_PREDICTION_BATCH_SIZE):
        mean, covariance = laplace._glm_predictive_distribution(X)
        total, aleatoric = entropies(mean, covariance)
        parts.append((total - aleatoric).detach())
    return torch.cat(parts)


def choose_prior_precision(laplace: KronLaplace) -> float:
    """Maximize the marginal likelihood over a scalar prior precision.

    Args:
        laplace: A fitted posterior, which takes the prior precision over.

    Returns:
        The prior precision.
    """
    with warnings.catch_warnings():
        # probit is what `predict` uses
        warnings.filterwarnings(
            "ignore", "By default `link_approx` is `probit`", UserWarning, "laplace"
        )
        laplace.optimize_prior_precision(method="marglik", pred_type="glm")
    return laplace.prior_precision.item()


def predict(laplace: KronLaplace, inputs: Tensor) -> Tensor:
    """Predict by the linearized network with the probit approximation.

    Args:
        laplace: A fitted posterior.
        inputs: Test inputs ``[points, ...]``.

    Returns:
        Class probabilities ``[points, classes]``.
    """
    parts = [laplace(X) for X in inputs.split(_PREDICTION_BATCH_SIZE)]
    return torch.cat(cast(list[Tensor], parts))


def nll_curve(laplace: KronLaplace, inputs: Tensor, labels: Tensor) -> list[float]:
    """Measure the test NLL at each of ``PRIOR_PRECISIONS``.

    Args:
        laplace: A fitted posterior, left at the last of the prior precisions.
        inputs: Test inputs ``[points, ...]``.
        labels: Class indices ``[points]``.

    Returns:
        The NLLs.
    """
    nlls = []
    for prior_precision in PRIOR_PRECISIONS:
        laplace.prior_precision = prior_precision
        nlls.append(score(predict(laplace, inputs), labels).nll)
    return nlls
