"""The posteriors to compare: all data, or the same few points used in different ways.

A seed draws the same points for the single batch and the two batches; by default,
points are drawn by their curvature.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from laplace import KronLaplace
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from laplace_debiased.posterior.laplace import KronDebiasedLaplace

FULL_DATA = "full data"

_FIT_BATCH_SIZE = 256


class Fit(NamedTuple):
    """A fitted posterior.

    Args:
        laplace: The posterior over all weights.
        num_points: Number of training points that got backward passes.
    """

    laplace: KronLaplace
    num_points: int


def full_data(model: nn.Module, points: Dataset, budget: int, seed: int) -> Fit:
    """Fit laplace-torch's ``KronLaplace`` to all training points.

    Args:
        model: The trained network.
        points: The training points.
        budget: Not used.
        seed: Not used.

    Returns:
        The fit.
    """
    laplace = KronLaplace(model, "classification")
    laplace.fit(_loader(points))
    return Fit(laplace, len(points))


def single_batch(model: nn.Module, points: Dataset, budget: int, seed: int) -> Fit:
    """Fit ``KronLaplace`` to one mini-batch, scaled to all training points.

    Args:
        model: The trained network.
        points: The training points.
        budget: Number of points in the mini-batch.
        seed: Seed of the draw.

    Returns:
        The fit.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(points), generator=generator)[:budget]
    laplace = KronLaplace(model, "classification")
    laplace.fit(_loader(Subset(points, drawn.tolist())))
    scale_to(laplace, len(points))
    return Fit(laplace, budget)


def debiased(
    model: nn.Module, points: Dataset, budget: int, seed: int, **options: str
) -> Fit:
    """Fit ``KronDebiasedLaplace``.

    Args:
        model: The trained network.
        points: The training points.
        budget: Number of points that get backward passes.
        seed: Seed of the draw.
        **options: Further keywords.

    Returns:
        The fit.
    """
    laplace = KronDebiasedLaplace(
        model, "classification", budget=budget, seed=seed, **options
    )
    laplace.fit(_loader(points))
    return Fit(laplace, budget)


def scale_to(laplace: KronLaplace, num_data: int) -> None:
    """Scale curvature and loss of a fit from the points it saw to all data.

    ``KronLaplace`` takes the dataset of its loader for all data; without scaling, the
    posterior of a mini-batch would be too wide by the share of the points it lacks.

    Args:
        laplace: The fit, changed in place.
        num_data: Number of all training points.
    """
    factor = num_data / laplace.n_data
    laplace.H = laplace.H * factor
    laplace.loss = laplace.loss * factor
    laplace.n_data = num_data


def _loader(points: Dataset) -> DataLoader:
    return DataLoader(points, batch_size=_FIT_BATCH_SIZE)


ESTIMATORS: dict[str, Callable[[nn.Module, Dataset, int, int], Fit]] = {
    FULL_DATA: full_data,
    "single batch": single_batch,
    "two batches": partial(debiased, estimator="two_batch", sampling="uniform"),
    "default": debiased,
    "default, ggn": partial(debiased, magnitudes="ggn"),
}
