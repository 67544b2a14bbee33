"""Prior precisions and noise chosen by marginal likelihood.

laplace-torch climbs it by a hundred steps of gradient ascent; Newton's method takes few
(:mod:`~laplace_debiased.posterior.evidence`).
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

import torch
from laplace.utils.enums import Likelihood, PriorStructure, TuningMethod
from torch import Tensor

from laplace_debiased.posterior import predicting
from laplace_debiased.posterior.evidence import best_prior_precision
from laplace_debiased.posterior.noise import best_noise
from laplace_debiased.rows.checks import check_positive
from laplace_debiased.rows.user_warnings import warn_user

if TYPE_CHECKING:
    from laplace_debiased.posterior.laplace import KronDebiasedLaplace

NEEDS_NO_VALIDATION = (
    "The marginal likelihood takes no `val_loader`: pass `method='gridsearch'`, or "
    "call `calibrate(val_loader)`."
)


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
        ValueError: If a single prior precision has no finite maximum, or the start is
            not positive, or of a wrong length.
    """
    check_positive("init_prior_prec", start)
    starts = torch.as_tensor(start, dtype=torch.float64).detach().reshape(-1).tolist()
    params = la.fitted_params
    if len(starts) not in (1, len(params)):
        raise ValueError(
            f"`init_prior_prec` must be one number, or one for each of {len(params)} "
            f"parameter tensors, got {len(starts)}."
        )
    if len(starts) == 1 and layerwise:
        starts = starts * len(params)
    parts = la.prior_offset.double().split([p.numel() for p in params])
    squared_norms = [own.square().sum().item() for own in parts]
    eigenvalues = la.posterior_precision.eigenvalues
    every = list(range(len(params)))
    # at their prior's mean, normalizations tell no prior precision of their own
    groups = [every if k in la._centred else [k] for k in every]
    groups = groups if len(starts) > 1 else [every]
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


def check_prior_structure(prior_structure: PriorStructure | str) -> None:
    """Refuse an unknown structure.

    Args:
        prior_structure: Its name.

    Raises:
        ValueError: If there is none of this name.
    """
    structures = [own.value for own in PriorStructure]
    if prior_structure not in structures:
        raise ValueError(
            f"Invalid prior structure {prior_structure}: it must be one of "
            f"{structures}."
        )


def check_noise_can_be_tuned(
    la: KronDebiasedLaplace, method: str, prior_structure: str
) -> None:
    """Refuse to tune the noise where there is none, or no closed form.

    Args:
        la: The posterior.
        method: How the prior precision is tuned.
        prior_structure: Whether there is one for all parameters.

    Raises:
        ValueError: If one of them does not allow it, the likelihood or ``damping``.
    """
    is_regression = la.likelihood == Likelihood.REGRESSION
    is_newton = method == TuningMethod.MARGLIK and not la.damping
    if not is_regression or not is_newton or prior_structure == PriorStructure.DIAG:
        raise ValueError(
            "`tune_sigma_noise` is for regression, by the marginal likelihood, without "
            "`damping` or a prior precision for each parameter."
        )


@torch.no_grad()
def maximize_over_noise(
    la: KronDebiasedLaplace, start: float | Tensor, layerwise: bool, max_steps: int
) -> None:
    """Set the noise to that with the highest marginal likelihood.

    Each noise has its own best prior precision
    (:mod:`~laplace_debiased.posterior.noise`).

    Args:
        la: The posterior of a regression, whose prior precision and noise are changed.
        start: As in :func:`maximize_marginal_likelihood`.
        layerwise: As in :func:`maximize_marginal_likelihood`.
        max_steps: As in :func:`maximize_marginal_likelihood`.

    Raises:
        ValueError: If there are no residuals, or no prior precision is the best.
    """
    # laplace-torch's loss is half of the sum of squared residuals
    num_targets = la.n_data * predicting.num_targets(la)
    variance = 2 * float(la.loss) / (num_targets * la.temperature)
    if not variance > 0:
        raise ValueError(
            "The network fits its training data without residuals: set `sigma_noise`."
        )

    def log_marginal_likelihood(sigma_noise: float) -> float:
        la.sigma_noise = sigma_noise
        la.prior_precision = maximize_marginal_likelihood(
            la, start, layerwise, max_steps
        )
        return la.log_marginal_likelihood().item()

    la.sigma_noise = best_noise(log_marginal_likelihood, variance**0.5)


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
    warn_user(
        f"The marginal likelihood has no maximum in the prior precisions of {left}, "
        "which are set to `init_prior_prec`: there is no curvature, or the parameters "
        "are at the prior's mean."
    )
    return [own if 0 < own < inf else s for own, s in zip(found, starts, strict=True)]
