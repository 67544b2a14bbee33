"""Probabilities that validation data agree with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from laplace.utils.enums import Likelihood
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from laplace_debiased.posterior.predicting import check_rows
from laplace_debiased.posterior.upstream import (
    counted_targets,
    inputs_and_targets,
    loss_of,
)
from laplace_debiased.predictive.calibration import Calibration, calibration_of
from laplace_debiased.rows.checks import plain_text
from laplace_debiased.rows.digests import digest
from laplace_debiased.rows.inputs import (
    Inputs,
    at_least_single,
    check_finite_predictions,
)
from laplace_debiased.rows.model_state import evaluating
from laplace_debiased.rows.positions import points
from laplace_debiased.rows.user_warnings import warn_user
from laplace_debiased.sampling.loaders import different
from laplace_debiased.sampling.processes import present_group

if TYPE_CHECKING:
    from laplace_debiased.posterior.laplace import KronDebiasedLaplace


@torch.no_grad()
def calibrate(
    la: KronDebiasedLaplace,
    val_loader: DataLoader,
    tolerance: float,
    progress_bar: bool,
) -> Calibration:
    """Choose temperature and scale of the posterior by one pass over validation data.

    Args:
        la: The posterior, of a classification, or of labels.
        val_loader: Yields the data.
        tolerance: Negative log likelihood that may be given up.
        progress_bar: Whether to show a progress bar.

    Returns:
        The calibration.

    Raises:
        ValueError: If it is no classification, targets are not class indices, or there
            are none.
    """
    link = la._kind.link
    if link is None or not la._kind.is_classification:
        raise ValueError(
            f"`calibrate` is for classification, not {plain_text(la.likelihood)!r}: "
            "for regression, use `optimize_prior_precision(tune_sigma_noise=True)`."
        )
    loss, group = loss_of(la.backend), present_group()
    parts: list[tuple[Tensor, ...]] = []
    data: list[str] = []
    for batch in tqdm(val_loader, disable=not progress_bar, desc="[Calibration]"):
        X, y = inputs_and_targets(batch, la.backend)
        data.append(digest([X, y]) if group.size > 1 else "")
        mean, variance = output_moments(la, X)
        y, counted = counted_targets(la.model, loss, y, mean)
        parts.append((mean[counted], variance[counted], y[counted]))
    gathered = group.gathered(parts, la._device)
    # processes with the same data count as one
    parts = [part for own in different(gathered, group.gathered(data)) for part in own]
    if not parts:
        raise ValueError("`val_loader` yields no data.")
    mean, variance, y = (torch.cat(part) for part in zip(*parts, strict=True))
    return calibration_of(mean, variance, y, tolerance, link)


def output_moments(
    la: KronDebiasedLaplace, X: Inputs, kind: str = "diagonal"
) -> tuple[Tensor, Tensor]:
    """Compute means and covariances of the outputs by the whole posterior.

    Args:
        la: The posterior.
        X: Inputs, a tensor or a mapping.
        kind: ``"diagonal"`` or ``"full"``.

    Returns:
        Means ``[batch, outputs]``, and variances of the same shape or covariances
        ``[batch, outputs, outputs]``; with positions, means and variances ``[batch *
        positions, classes]``. All whatever the calibration.
    """
    with evaluating(la.model):
        mean, covariance = la._output_moments(la._inputs(X), kind)
    check_rows(la, X, mean)
    check_finite_predictions(mean, covariance)
    if la.class_axis is not None:
        mean, covariance = (points(own, la.n_outputs) for own in (mean, covariance))
    return at_least_single(mean), covariance


def warn_if_untuned(la: KronDebiasedLaplace) -> None:
    """Say once that predictions use what nobody chose.

    Args:
        la: The posterior.
    """
    is_regression = la.likelihood == Likelihood.REGRESSION
    untuned = [] if la._is_tuned else ["prior_precision"]
    if is_regression and la.sigma_noise == 1:
        untuned.append("sigma_noise")
    if la._is_warned or not untuned:
        return
    la._is_warned = True
    remedy = (
        "optimize_prior_precision(tune_sigma_noise=True)"
        if is_regression
        else "calibrate(val_loader)`, or without validation data "
        "`optimize_prior_precision()"
    )
    values = " and ".join(f"`{name}` 1" for name in untuned)
    warn_user(
        f"Predictions use the default {values}, which may be far from what fits the "
        f"data: call `{remedy}` after `fit`, or set it."
    )
