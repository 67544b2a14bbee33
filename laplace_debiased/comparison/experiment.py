"""Train, fit, predict: every posterior on every seed."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from time import perf_counter
from typing import cast

import torch
from laplace import KronLaplace
from torch import Tensor, nn
from tqdm import tqdm

from laplace_debiased.comparison.data import TrainTestSplit
from laplace_debiased.comparison.metrics import Scores, score
from laplace_debiased.comparison.posteriors import POSTERIORS
from laplace_debiased.comparison.training import Recipe, train

MAP = "MAP"
PRIOR_PRECISIONS = tuple(10 ** (half / 2) for half in range(-2, 7))

# laplace-torch's Jacobians take time and memory that grow with the batch squared
_PREDICTION_BATCH_SIZE = 8


@dataclass(frozen=True)
class Run:
    """One posterior with one seed, or the network alone.

    Args:
        estimator: Name in ``POSTERIORS``, or ``MAP``.
        seed: The seed.
        scores: Test scores, at the chosen prior precision.
        probabilities: The predictions behind them, ``[points, classes]``.
        num_points: Training points with backward passes for the posterior.
        prior_precision: What the marginal likelihood chose; None without posterior.
        fit_seconds: Time to fit the posterior.
        curve: Test NLL at each of ``PRIOR_PRECISIONS``.
    """

    estimator: str
    seed: int
    scores: Scores
    probabilities: Tensor
    num_points: int = 0
    prior_precision: float | None = None
    fit_seconds: float | None = None
    curve: list[float] | None = None


def compare(
    split: TrainTestSplit, recipe: Recipe, budget: int, num_seeds: int
) -> list[Run]:
    """Fit all posteriors on all seeds; each seed has a network and a draw of its own.

    Args:
        split: Training and test points.
        recipe: How to build and train a network.
        budget: Number of training points for posteriors that do not use all.
        num_seeds: Number of seeds.

    Returns:
        The runs, seed by seed.
    """
    runs = []
    with tqdm(total=num_seeds * (1 + len(POSTERIORS))) as bar:
        for seed in range(num_seeds):
            bar.set_description(f"seed {seed}: training")
            model = train(recipe, split.train, seed).model
            runs.append(_map_run(model, split, seed))
            bar.update()
            for estimator in POSTERIORS:
                bar.set_description(f"seed {seed}: {estimator}")
                runs.append(_laplace_run(estimator, model, split, budget, seed))
                bar.update()
    return runs


def _map_run(model: nn.Module, split: TrainTestSplit, seed: int) -> Run:
    with torch.no_grad():
        probabilities = model(split.test_inputs).softmax(-1)
    return Run(MAP, seed, score(probabilities, split.test_labels), probabilities)


def _laplace_run(
    estimator: str, model: nn.Module, split: TrainTestSplit, budget: int, seed: int
) -> Run:
    start = perf_counter()
    laplace, num_points = POSTERIORS[estimator](model, split.train, budget, seed)
    fit_seconds = perf_counter() - start
    prior_precision = choose_prior_precision(laplace)
    probabilities = predict(laplace, split.test_inputs)
    return Run(
        estimator,
        seed,
        score(probabilities, split.test_labels),
        probabilities,
        num_points,
        prior_precision,
        fit_seconds,
        nll_curve(laplace, split.test_inputs, split.test_labels),
    )


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
