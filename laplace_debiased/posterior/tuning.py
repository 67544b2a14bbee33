"""Prior precisions chosen by marginal likelihood, or by validation data.

laplace-torch climbs the marginal likelihood by a hundred steps of gradient ascent;
Newton's method takes few (:mod:`~laplace_debiased.posterior.evidence`). Its grid search
never resets its running metric, so that the scores of all earlier grid points add to
the present one, and judges regression by squared error, which no prior precision
changes.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf, isfinite
from typing import TYPE_CHECKING, Any
from warnings import warn

import torch
import torchmetrics
from laplace.utils import validate
from torch import Tensor
from torch.distributions import MultivariateNormal
from torch.utils.data import DataLoader
from tqdm import tqdm

from laplace_debiased.posterior.evidence import best_prior_precision

if TYPE_CHECKING:
    from laplace_debiased.posterior.laplace import KronDebiasedLaplace

Loss = torchmetrics.Metric | Callable[..., Tensor]


class GaussianNLL:
    """Mean negative log density of targets in a regression.

    The predictive distribution is a Gaussian, whose covariance is that of the network's
    output and the noise.

    Args:
        la: The posterior, which knows the noise.
    """

    def __init__(self, la: KronDebiasedLaplace):
        self._la = la

    def __call__(self, mean: Tensor, covariance: Tensor, y: Tensor) -> Tensor:
        """Compute it.

        Args:
            mean: Mean of the outputs ``[batch, outputs]``.
            covariance: Their covariance ``[batch, outputs, outputs]``, or variance
                ``[batch, outputs]``, without noise.
            y: Targets ``[batch, outputs]``.

        Returns:
            A scalar.

        Raises:
            ValueError: If the targets have another shape.
        """
        if y.shape != mean.shape:
            raise ValueError(
                f"Targets must have the outputs' shape {tuple(mean.shape)}, got "
                f"{tuple(y.shape)}."
            )
        mean, covariance = mean.double(), covariance.double()
        if covariance.ndim == 2:
            covariance = torch.diag_embed(covariance)
        noise = self._la.sigma_noise.double() ** 2
        noise = noise * torch.eye(mean.shape[1], dtype=mean.dtype, device=mean.device)
        return -MultivariateNormal(mean, covariance + noise).log_prob(y.double()).mean()


@torch.no_grad()
def maximize_marginal_likelihood(
    la: KronDebiasedLaplace, start: float | Tensor, layerwise: bool, max_steps: int
) -> Tensor:
    """Find the prior precision with the highest marginal likelihood.

    Args:
        la: The posterior.
        start: Where to start, a scalar or one for each parameter tensor.
        layerwise: Whether to turn a scalar into one for each parameter tensor.
        max_steps: Largest number of Newton's steps.

    Returns:
        The prior precision ``[1]`` or ``[parameter tensors]``. Those of tensors
        without a finite maximum stay where they start, and a warning names them.

    Raises:
        ValueError: If a single prior precision has no finite maximum.
    """
    starts = torch.as_tensor(start, dtype=torch.float64).detach().reshape(-1).tolist()
    params = la.fitted_params
    if len(starts) == 1 and layerwise:
        starts = starts * len(params)
    parts = (la.mean - la.prior_mean).double().split([p.numel() for p in params])
    squared_norms = [own.square().sum().item() for own in parts]
    eigenvalues = la.posterior_precision.eigenvalues
    every = range(len(params))
    groups = [[k] for k in every] if len(starts) > 1 else [list(every)]
    found = [
        best_prior_precision(
            [eigenvalues[k] for k in group],
            sum(squared_norms[k] for k in group),
            own,
            max_steps,
        )
        for group, own in zip(groups, starts, strict=True)
    ]
    return torch.tensor(_with_finite_maximum(la, found, starts), dtype=torch.float64)


def _with_finite_maximum(
    la: KronDebiasedLaplace, found: list[float], starts: list[float]
) -> list[float]:
    """Keep the start where there is no maximum, and say so."""
    without = [k for k, own in enumerate(found) if not 0 < own < inf]
    if not without:
        return found
    if len(found) == 1:
        raise ValueError(
            "The marginal likelihood has no maximum: there is no curvature, or all "
            "parameters are at the prior's mean."
        )
    names = {id(param): name for name, param in la.model.named_parameters()}
    params = la.fitted_params
    left = ", ".join(names.get(id(params[k]), str(k)) for k in without)
    warn(
        f"The marginal likelihood has no maximum in the prior precisions of {left}, "
        "which stay as they were: there is no curvature, or the parameters are at the "
        "prior's mean.",
        stacklevel=2,
    )
    return [own if 0 < own < inf else s for own, s in zip(found, starts, strict=True)]


def grid_search(
    la: KronDebiasedLaplace,
    loss: Loss,
    interval: Tensor,
    val_loader: DataLoader,
    progress_bar: bool = False,
    **predictive: Any,
) -> Tensor:
    """Find the prior precision with the smallest loss on validation data.

    Args:
        la: The posterior, whose prior precision changes.
        loss: A metric, or a function of predictions and targets.
        interval: The prior precisions, in ascending order.
        val_loader: Yields validation data.
        progress_bar: Whether to show a progress bar.
        **predictive: How to predict, as laplace-torch's ``validate`` takes it.

    Returns:
        The best of them, a scalar. If it is the first or the last, a warning says so.

    Raises:
        ValueError: If no prior precision has a finite loss.
    """
    losses = []
    bar = tqdm(interval, disable=not progress_bar, desc="[Grid search]")
    for prior_precision in bar:
        la.prior_precision = prior_precision
        losses.append(_loss(la, loss, val_loader, predictive))
        bar.set_postfix(prior_precision=prior_precision.item(), loss=losses[-1])
    best = min(range(len(losses)), key=losses.__getitem__)
    if not isfinite(losses[best]):
        raise ValueError("The validation loss is not finite for any prior precision.")
    if len(losses) > 1 and best in (0, len(losses) - 1):
        bound = "log_prior_prec_max" if best else "log_prior_prec_min"
        warn(
            f"The best prior precision, {interval[best].item():.3g}, is at the end of "
            f"the grid: extend it by `{bound}`.",
            stacklevel=2,
        )
    return interval[best]


def _loss(
    la: KronDebiasedLaplace,
    loss: Loss,
    val_loader: DataLoader,
    predictive: dict[str, Any],
) -> float:
    """Compute the loss at the present prior precision, infinite if it is NaN."""
    if isinstance(loss, torchmetrics.Metric):
        loss.reset()
    try:
        value = validate(la, val_loader, loss, dict_key_y=la.dict_key_y, **predictive)
    except torch.linalg.LinAlgError:  # the covariance is singular
        return inf
    return value if isfinite(value) else inf
