"""Probabilities that validation data agree with, and what is uncertain about them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any
from warnings import warn

import torch
from laplace.utils.enums import Likelihood
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from laplace_debiased.posterior.predicting import of_output
from laplace_debiased.posterior.upstream import inputs_and_targets, loss_of
from laplace_debiased.predictive.calibration import Calibration, calibration_of
from laplace_debiased.predictive.forward_mode import MANY_OUTPUTS
from laplace_debiased.predictive.links import SOFTMAX
from laplace_debiased.predictive.uncertainty import Uncertainty, entropies
from laplace_debiased.rows.inputs import (
    Inputs,
    at_least_single,
    check_finite_predictions,
    check_targets,
    num_examples,
)
from laplace_debiased.rows.model_state import evaluating
from laplace_debiased.rows.output_curvature import is_counted
from laplace_debiased.rows.positions import points
from laplace_debiased.rows.targets import targets_of_points
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
            f"`calibrate` is for classification, not {str(la.likelihood)!r}: for "
            "regression, use `optimize_prior_precision(tune_sigma_noise=True)`."
        )
    loss = loss_of(la.backend)
    parts: list[tuple[Tensor, ...]] = []
    for batch in tqdm(val_loader, disable=not progress_bar, desc="[Calibration]"):
        X, y = inputs_and_targets(batch, la.backend)
        if la.likelihood == Likelihood.CLASSIFICATION and y.is_floating_point():
            raise ValueError("Validation targets must be class indices.")
        mean, variance = output_moments(la, X)
        y = targets_of_points(la.model, y, loss, mean)
        y = check_targets(mean, y, loss)
        counted = is_counted(loss, y)
        parts.append((mean[counted], variance[counted], y[counted]))
    gathered = present_group().gathered(parts, la._device)
    parts = [part for own in gathered for part in own]
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
    check_finite_predictions(mean, covariance)
    if la.class_axis is not None:
        mean, covariance = (points(own, la.n_outputs) for own in (mean, covariance))
    return at_least_single(mean), covariance


def uncertainty(la: KronDebiasedLaplace, X: Inputs) -> Uncertainty:
    """Tell how uncertain predictions are, and why.

    Args:
        la: The posterior.
        X: Inputs, a tensor or a mapping.

    Returns:
        The uncertainty, of the output's shape if it has positions.

    Raises:
        ValueError: As :func:`uncertainty_of_points`.
    """
    found = uncertainty_of_points(la, X)
    if la.class_axis is None:
        return found
    parts: dict[str, Any] = {k: v for k, v in vars(found).items() if v is not None}
    shaped = dict(zip(parts, of_output(la, X, list(parts.values())), strict=True))
    return replace(found, **shaped)


def uncertainty_of_points(la: KronDebiasedLaplace, X: Inputs) -> Uncertainty:
    """Tell how uncertain predictions are, each position by itself.

    Args:
        la: The posterior.
        X: Inputs, a tensor or a mapping.

    Returns:
        The uncertainty, with positions of all examples as points.

    Raises:
        ValueError: If the posterior is that of a reward model.
    """
    if la.likelihood == Likelihood.REWARD_MODELING:
        raise ValueError("There is no `uncertainty` of reward models.")
    if num_examples(X, la.dict_key_x) == 0:
        raise ValueError("There are no examples to be uncertain about.")
    calibration, link = la.calibration, la._kind.link
    is_joint = has_joint_outputs(la)
    mean, covariance = output_moments(la, X, "full" if is_joint else "diagonal")
    variance = covariance.diagonal(dim1=1, dim2=2) if is_joint else covariance
    if link is None:
        noise = (la.sigma_noise**2).to(variance).expand_as(variance)
        return Uncertainty(None, mean, variance + noise, noise, variance, variance)
    if calibration is None:
        probabilities = link.probit(mean, variance)
        total, aleatoric = entropies(mean, covariance, link)
    else:
        probabilities = link.probit(*calibration.outputs(mean, variance))
        wide = calibration.with_whole_posterior()
        total, aleatoric = entropies(*wide.outputs(mean, covariance), link)
    epistemic = total - aleatoric
    return Uncertainty(probabilities, mean, total, aleatoric, epistemic, variance)


def has_joint_outputs(la: KronDebiasedLaplace) -> bool:
    """Whether entropies need covariances of the outputs, and there are some.

    Args:
        la: The posterior.

    Returns:
        Whether its classes exclude each other, are not too many, and have no positions.
    """
    return (
        la._kind.link is SOFTMAX
        and la.class_axis is None
        and la.n_outputs <= MANY_OUTPUTS
    )


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
    warn(
        f"Predictions use the default {values}, which may be far from what fits the "
        f"data: call `{remedy}` after `fit`, or set it.",
        stacklevel=4,
    )
