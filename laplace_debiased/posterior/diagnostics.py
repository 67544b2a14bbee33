"""What a fitted posterior tells about its own errors."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from laplace_debiased.curvature.leading import MIN_ROWS
from laplace_debiased.curvature.streams import KFACCurvature
from laplace_debiased.posterior.fitting import Seen, assign, source
from laplace_debiased.posterior.measuring import measure
from laplace_debiased.posterior.sampling_error import SamplingError
from laplace_debiased.quadratics.bias import BiasReport, kfac_bias
from laplace_debiased.rows.model_state import measuring, unchanged_on_failure

if TYPE_CHECKING:
    from laplace_debiased.posterior.laplace import KronDebiasedLaplace


def known_sampling_error(la: KronDebiasedLaplace) -> SamplingError:
    """Return the sampling error of a posterior's curvature.

    Args:
        la: The posterior.

    Returns:
        The error.

    Raises:
        AttributeError: If there is no fit yet.
        ValueError: If the backend does not tell what each point contributes.
    """
    la._check_H_init()
    if la.sampling_error is None:
        raise ValueError(
            f"{la._backend_cls.__name__} does not tell what each point contributes: "
            "use `CurvlinopsGGN`."
        )
    return la.sampling_error


def marginal_likelihood_error(la: KronDebiasedLaplace) -> Tensor:
    r"""Estimate the standard error of the log marginal likelihood.

    A relative error e of a layer's scale changes it by :math:`\gamma e / 2`, with the
    layer's effective number of parameters :math:`\gamma = \sum \lambda / (\lambda +
    \delta)` (MacKay, 1992). The loss is taken as independent.

    Args:
        la: The posterior.

    Returns:
        A scalar, at the present prior precision.

    Raises:
        AttributeError: If there is no fit yet.
        ValueError: If the backend does not tell what each point contributes, or the
            posterior has ``damping``.
    """
    error = known_sampling_error(la)
    if la.damping:
        raise ValueError(
            "With `damping`, there is no standard error of the marginal likelihood: it "
            "depends on how the error of a layer's scale is shared by its two factors."
        )
    assert la._selection is not None
    precisions = la.posterior_precision
    gammas = [
        (1 - delta / values).sum()
        for values, delta in zip(precisions.spectra(), precisions.deltas, strict=True)
    ]
    gamma = torch.stack(
        [
            torch.stack([gammas[position] for position in layer.parameters]).sum()
            for layer in la._selection.layers
        ]
    ).to(error.traces)
    # without curvature, a layer has no part in the variance
    relative = error.relative_covariance().nan_to_num(0.0, posinf=inf)
    # scaled to fewer points than were seen, the covariance may be indefinite
    variance = (gamma @ relative @ gamma / 4).clamp(min=0)
    return (variance + la._H_factor**2 * error.loss_variance).sqrt()


@torch.no_grad()
def decomposition_error(la: KronDebiasedLaplace) -> float:
    r"""Bound what changes because large factors are decomposed up to a rest.

    With the rest isotropic, a block's curvature :math:`H_b` is replaced by its
    projection on matrices of that form, to which it is orthogonal. The effective number
    of parameters :math:`\gamma`, which is also the sum of the outputs' variances over
    the training points, each times its curvature, then grows by at most :math:`\sum_b
    \|H_b - \hat H_b\|_F^2 / \delta_b^2`, and the log determinant of the posterior
    precision by half of that. Each large factor has a share :math:`\tau^2` of
    :math:`\|H_b\|_F^2` at most, with the tolerance :math:`\tau`. Norms are those of
    the debiased curvature.

    Args:
        la: The posterior.

    Returns:
        The bound on the relative change of :math:`\gamma` at the present prior
        precision; zero if there are no large factors.

    Raises:
        AttributeError: If there is no fit yet.
        ValueError: If the posterior has ``damping``.
    """
    la._check_H_init()
    if la.damping:
        raise ValueError("With `damping`, there is no bound: fit without.")
    precisions = la.posterior_precision
    squares = gamma = 0.0
    for vectors, values, delta in zip(
        precisions.eigenvectors, precisions.spectra(), precisions.deltas, strict=True
    ):
        gamma += (1 - delta / values).sum().item()
        num_large = sum(len(own) >= MIN_ROWS for own in vectors)
        if num_large:
            norm = torch.linalg.vector_norm(values - delta).item()
            squares += num_large * (norm / delta.item()) ** 2
    return la.settings.decomposition_tolerance**2 * squares / gamma if squares else 0.0


def bias_report(
    la: KronDebiasedLaplace,
    train_loader: DataLoader | None,
    magnitude_loader: DataLoader | None,
    num_directions: int,
) -> BiasReport:
    """Tell how biased a posterior's curvature would be without debiasing.

    Args:
        la: The posterior.
        train_loader: What it was fitted to; None if it has ``kfac`` magnitudes.
        magnitude_loader: As in a fit.
        num_directions: Number of directions with the largest curvature.

    Returns:
        The report.

    Raises:
        AttributeError: If there is no fit yet.
        ValueError: If ``train_loader`` is needed, but not given.
    """
    la._check_H_init()
    curvature, num_points = la.curvature, la._seen.num_points
    if train_loader is not None:
        settings = replace(la.settings, magnitudes="kfac")
        with unchanged_on_failure(la):
            seen = Seen(weight=la._seen.weight)  # layers are known
            folds = assign(la, train_loader, magnitude_loader, seen)
        with measuring(la.model):
            estimate = measure(source(la), folds, settings, settings.seed)
        curvature, num_points = estimate.curvature, settings.num_used(folds)
    if not isinstance(curvature, KFACCurvature):
        raise ValueError(
            "`train_loader` is needed with `magnitudes='ggn'`: the eigenbasis alone "
            "does not tell its bias."
        )
    return kfac_bias(curvature, num_points, num_directions)
