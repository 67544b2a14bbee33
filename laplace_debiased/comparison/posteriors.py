"""The posteriors to compare: all data, or the same few points used in different ways.

A seed draws the same points for the single batch and the two batches; by default,
points are drawn by their curvature. With two columns, more points have as many backward
passes together.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from laplace import KronLaplace
from laplace.utils import KronDecomposed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased.curvature.eigenbasis import EigenbasisMatrix
from laplace_debiased.curvature.operator import DebiasedKFACLinearOperator
from laplace_debiased.posterior.laplace import KronDebiasedLaplace

FULL_DATA = "full data"
DEFAULT = "default"

_FIT_BATCH_SIZE = 256


class FittedPosterior(NamedTuple):
    """A fitted posterior.

    Args:
        laplace: The posterior over all weights.
        num_points: Number of training points that got backward passes.
    """

    laplace: KronLaplace
    num_points: int


def full_data(
    model: nn.Module, points: TensorDataset, budget: int, seed: int
) -> FittedPosterior:
    """Fit K-FAC to all training points.

    Args:
        model: The trained network.
        points: The training points.
        budget: Not used.
        seed: Not used.

    Returns:
        The posterior.
    """
    return FittedPosterior(fit_kfac(model, points), len(points))


def single_batch(
    model: nn.Module, points: TensorDataset, budget: int, seed: int
) -> FittedPosterior:
    """Fit K-FAC to one mini-batch, scaled to all training points.

    Args:
        model: The trained network.
        points: The training points.
        budget: Number of points in the mini-batch.
        seed: Seed of the draw.

    Returns:
        The posterior.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(points), generator=generator)[:budget]
    laplace = fit_kfac(model, TensorDataset(*points[drawn]))
    scale_to(laplace, len(points))
    return FittedPosterior(laplace, budget)


def debiased(
    model: nn.Module, points: TensorDataset, budget: int, seed: int, **options: Any
) -> FittedPosterior:
    """Fit ``KronDebiasedLaplace``.

    Args:
        model: The trained network.
        points: The training points.
        budget: Number of points that get backward passes.
        seed: Seed of the draw.
        **options: Further keywords.

    Returns:
        The posterior.
    """
    laplace = KronDebiasedLaplace(
        model, "classification", budget=budget, seed=seed, **options
    )
    laplace.fit(_loader(points))
    return FittedPosterior(laplace, budget)


def two_columns(
    model: nn.Module, points: TensorDataset, budget: int, seed: int
) -> FittedPosterior:
    """Fit ``KronDebiasedLaplace`` to more points, by two backward passes for each.

    Args:
        model: The trained network.
        points: The training points.
        budget: Number of points that would take as many backward passes with all of
            their columns, one less than classes.
        seed: Seed of the draw.

    Returns:
        The posterior.
    """
    num_classes = int(points.tensors[1].max()) + 1
    more = min(len(points), max(budget, budget * (num_classes - 1) // 2))
    return debiased(model, points, more, seed, fisher_rank=1)


def fit_kfac(model: nn.Module, points: TensorDataset) -> KronLaplace:
    """Fit K-FAC to all given points, which give directions and magnitudes.

    By laplace-torch's ``KronLaplace``, or by our operator where it refuses a layer.

    Args:
        model: The trained network.
        points: The points.

    Returns:
        The posterior.
    """
    laplace = KronLaplace(model, "classification")
    try:
        laplace.fit(_loader(points))
    except NotImplementedError:
        laplace = KronDebiasedLaplace(model, "classification")
        laplace.fit(_loader(points))
        laplace.H = same_data_curvature(model, points)
    return laplace


def same_data_curvature(
    model: nn.Module, points: TensorDataset, magnitudes: str = "kfac"
) -> EigenbasisMatrix:
    """Compute the curvature whose directions and magnitudes are of the same points.

    Args:
        model: The trained network.
        points: The points.
        magnitudes: ``"kfac"`` for K-FAC, ``"ggn"`` for EKFAC.

    Returns:
        The curvature of the points' summed loss.
    """
    batches = list(_loader(points))
    operator = DebiasedKFACLinearOperator(
        model,
        nn.CrossEntropyLoss(reduction="sum"),
        list(model.parameters()),
        batches,
        batches,
        magnitudes=magnitudes,
    )
    return EigenbasisMatrix(operator.eigenvectors, [[s] for s in operator.spectra])


def scale_to(laplace: KronLaplace, num_data: int) -> None:
    """Scale curvature and loss of a fit from the points it saw to all data.

    ``KronLaplace`` takes the dataset of its loader for all data; without scaling, the
    posterior of a mini-batch would be too wide by the share of the points it lacks.

    Args:
        laplace: The fit, changed in place.
        num_data: Number of all training points.

    Raises:
        ValueError: If it is not fitted.
    """
    factor = num_data / laplace.n_data
    curvature = laplace.H
    if curvature is None:
        raise ValueError("`laplace` must be fitted before it is scaled.")
    laplace.H = cast(KronDecomposed, curvature * factor)
    laplace.loss = laplace.loss * factor
    laplace.n_data = num_data


def _loader(points: TensorDataset) -> DataLoader:
    return DataLoader(points, batch_size=_FIT_BATCH_SIZE)


# from network, training points, budget and seed
FitPosterior = Callable[[nn.Module, TensorDataset, int, int], FittedPosterior]
POSTERIORS: dict[str, FitPosterior] = {
    FULL_DATA: full_data,
    "single batch": single_batch,
    "two batches": partial(debiased, estimator="two_batch", sampling="uniform"),
    DEFAULT: debiased,
    "two columns": two_columns,
    "default, ggn": partial(debiased, magnitudes="ggn"),
}
