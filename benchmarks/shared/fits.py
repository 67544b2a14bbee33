"""Fits of a trained network, and the full-data references they are compared to."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from hashlib import sha256

import torch
from laplace import KronLaplace
from torch import Tensor

from laplace_debiased import EigenbasisMatrix, KronDebiasedLaplace
from laplace_debiased.comparison.posteriors import (
    FULL_DATA,
    POSTERIORS,
    same_data_curvature,
)
from shared.internals import (
    Factors,
    Kronecker,
    factored_curvature,
    full_data_factors,
)
from shared.predictions import PRIORS, chosen_prior, nlls
from shared.problems import Problem
from shared.training import CHECKPOINTS

CACHE = CHECKPOINTS / "cache"
# what is compared to the posterior of all data
FEW_POINTS = [name for name in POSTERIORS if name != FULL_DATA]


@dataclass
class Result:
    """One posterior.

    Args:
        nll: Test NLL at each of ``PRIORS``.
        prior_precision: What the marginal likelihood chose; None if it was not asked.
        fit_seconds: Time to fit; None if that is not its own.
    """

    nll: list[float]
    prior_precision: float | None = None
    fit_seconds: float | None = None

    @classmethod
    def of(
        cls, problem: Problem, la: KronLaplace, fit_seconds: float | None = None
    ) -> Result:
        """Test a fitted posterior."""
        return cls(*nlls(problem, [la.H]), chosen_prior(la), fit_seconds)


def fit(problem: Problem, **options) -> tuple[KronDebiasedLaplace, float]:
    """Fit our posterior; also return the time it takes."""
    la = KronDebiasedLaplace(problem.model, "classification", **options)
    start = time.perf_counter()
    la.fit(problem.loader())
    return la, time.perf_counter() - start


def fit_few_points(
    name: str, problem: Problem, budget: int, seed: int
) -> KronDebiasedLaplace:
    """Fit one of the comparison's posteriors of few points.

    Args:
        name: Name in ``FEW_POINTS``.
        problem: Network and data.
        budget: Number of points.
        seed: Seed of the draw.

    Returns:
        The posterior; laplace-torch's as one of ours, whose predictions take many
        prior precisions at once.
    """
    laplace, _ = POSTERIORS[name](problem.model, problem.train, budget, seed)
    if isinstance(laplace, KronDebiasedLaplace):
        return laplace
    curvature = EigenbasisMatrix(laplace.H.eigenvectors, laplace.H.eigenvalues)
    return with_curvature(problem, curvature)


def with_curvature(
    problem: Problem, curvature: EigenbasisMatrix
) -> KronDebiasedLaplace:
    """Return one of our posteriors with a given curvature."""
    la, _ = fit(problem, budget=8)
    la.H = curvature
    return la


def fit_time(problem: Problem) -> float:
    """Time laplace-torch's fit to all data, in seconds."""
    la = KronLaplace(problem.model, "classification")
    start = time.perf_counter()
    la.fit(problem.loader())
    return time.perf_counter() - start


def digest(tensors: Iterable[Tensor]) -> str:
    """Return a name of tensors, which changes with them."""
    parts = (tensor.numpy().tobytes() for tensor in tensors)
    return sha256(b"".join(parts)).hexdigest()[:12]


def timed_factors(problem: Problem, keep: bool = True) -> tuple[Factors, float]:
    """Return K-FAC's factors of all data, and the seconds that they took.

    Args:
        problem: Network and data.
        keep: Whether to measure them only once, and keep them for all studies.

    Returns:
        Factors and seconds.
    """
    own = digest(problem.model.state_dict().values())
    path = CACHE / f"factors-{problem.dataset}-{problem.name}-{own}.pt"
    if keep and path.exists():
        with torch.serialization.safe_globals([Kronecker]):
            return torch.load(path, weights_only=True)
    start = time.perf_counter()
    factors = full_data_factors(problem.model, problem.loader())
    seconds = time.perf_counter() - start
    if keep:
        CACHE.mkdir(parents=True, exist_ok=True)
        torch.save((factors, seconds), path)
    return factors, seconds


def references(
    problem: Problem, keep: bool = True
) -> tuple[dict[str, Result], Factors]:
    """Return the full-data references, and K-FAC's factors.

    Args:
        problem: Network and data, with the images that are predicted.
        keep: As in :func:`timed_factors`.

    Returns:
        Results of ``"kfac"`` and ``"ggn"`` magnitudes, and the factors.
    """
    factors, seconds = timed_factors(problem, keep)
    states = problem.model.state_dict().values()
    own = digest([*states, problem.inputs, problem.labels, torch.tensor(PRIORS)])
    path = CACHE / f"references-{problem.dataset}-{problem.name}-{own}.json"
    if keep and path.exists():
        kept = json.loads(path.read_text())
        return {kind: Result(**value) for kind, value in kept.items()}, factors
    la = with_curvature(problem, factored_curvature(factors))
    results = {"kfac": Result.of(problem, la, seconds)}
    start = time.perf_counter()
    ekfac = same_data_curvature(problem.model, problem.train, "ggn")
    seconds = time.perf_counter() - start
    la = with_curvature(problem, ekfac)
    results["ggn"] = Result.of(problem, la, seconds)
    if keep:
        path.write_text(json.dumps({k: asdict(own) for k, own in results.items()}))
    return results, factors


def full_data_posterior(problem: Problem, keep: bool = True) -> KronDebiasedLaplace:
    """Return full-data K-FAC as one of our posteriors.

    Args:
        problem: Network and data.
        keep: As in :func:`timed_factors`.

    Returns:
        The posterior.
    """
    factors, _ = timed_factors(problem, keep)
    return with_curvature(problem, factored_curvature(factors))
