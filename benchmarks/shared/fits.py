"""Fits of a trained network, and the full-data references they are compared to."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from hashlib import sha256

import torch
from laplace import KronLaplace
from torch import nn

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
from shared.predictions import chosen_prior, nlls
from shared.problems import Problem
from shared.training import CHECKPOINTS

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


def digest(model: nn.Module) -> str:
    """Return a name of a network's parameters and buffers, which changes with them."""
    parts = (tensor.numpy().tobytes() for tensor in model.state_dict().values())
    return sha256(b"".join(parts)).hexdigest()[:12]


def references(
    problem: Problem, keep: bool = True
) -> tuple[dict[str, Result], Factors]:
    """Return the full-data references, and K-FAC's factors.

    Args:
        problem: Network and data.
        keep: Whether to measure them only once, and keep them for all studies.

    Returns:
        Results of ``"kfac"`` and ``"ggn"`` magnitudes, and the factors.
    """
    key = f"{problem.dataset}-{problem.name}-{digest(problem.model)}"
    path = CHECKPOINTS / "cache" / f"references-{key}.pt"
    if keep and path.exists():
        with torch.serialization.safe_globals([Kronecker]):
            results, factors = torch.load(path, weights_only=True)
        return {key: Result(**value) for key, value in results.items()}, factors
    start = time.perf_counter()
    factors = full_data_factors(problem.model, problem.loader())
    fitted = time.perf_counter()
    ekfac = same_data_curvature(problem.model, problem.train, "ggn")
    seconds = {"kfac": fitted - start, "ggn": time.perf_counter() - fitted}
    results = {
        kind: Result.of(problem, with_curvature(problem, curvature), seconds[kind])
        for kind, curvature in (
            ("kfac", factored_curvature(factors)),
            ("ggn", ekfac),
        )
    }
    if keep:
        path.parent.mkdir(parents=True, exist_ok=True)
        plain = {key: asdict(value) for key, value in results.items()}
        torch.save((plain, factors), path)
    return results, factors


def full_data_posterior(problem: Problem, keep: bool = True) -> KronDebiasedLaplace:
    """Return full-data K-FAC as one of our posteriors.

    Args:
        problem: Network and data.
        keep: As in :func:`references`.

    Returns:
        The posterior.
    """
    _, factors = references(problem, keep)
    return with_curvature(problem, factored_curvature(factors))
