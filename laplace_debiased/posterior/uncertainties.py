"""How uncertain predictions are, and why: from a posterior and inputs."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from laplace.utils.enums import Likelihood
from torch import Tensor

from laplace_debiased.posterior import predicting
from laplace_debiased.posterior.calibrating import output_moments
from laplace_debiased.predictive.calibration import Calibration
from laplace_debiased.predictive.forward_mode import (
    MANY_OUTPUTS,
    NUM_SAMPLES,
    ForwardModeError,
)
from laplace_debiased.predictive.links import SOFTMAX, Link
from laplace_debiased.predictive.uncertainty import (
    Uncertainty,
    entropies,
    entropies_of_root,
)
from laplace_debiased.rows.batches import select_rows
from laplace_debiased.rows.inputs import (
    Inputs,
    at_least_single,
    check_finite_predictions,
    num_examples,
)
from laplace_debiased.rows.model_state import evaluating
from laplace_debiased.rows.positions import points

if TYPE_CHECKING:
    from laplace_debiased.posterior.laplace import KronDebiasedLaplace

_UNCALIBRATED = Calibration(1.0, 1.0, 0.0, 0, 0.0, ())


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
    values = predicting.of_output(la, X, list(parts.values()))
    return replace(found, **dict(zip(parts, values, strict=True)))


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
    link = la._kind.link
    if link is None:
        mean, variance = output_moments(la, X)
        noise = (la.sigma_noise.detach() ** 2).to(variance).expand_as(variance)
        return Uncertainty(None, mean, variance + noise, noise, variance, variance)
    calibration = la.calibration or _UNCALIBRATED
    parts = [_outputs(la, some, calibration, link) for some in _chunks(la, X)]
    mean, variance, total, aleatoric = map(torch.cat, zip(*parts, strict=True))
    probabilities = link.probit(*calibration.outputs(mean, variance))
    epistemic = total - aleatoric
    return Uncertainty(probabilities, mean, total, aleatoric, epistemic, variance)


def _chunks(la: KronDebiasedLaplace, X: Inputs) -> list[Inputs]:
    """Split examples, so that what their outputs have in common fits into memory."""
    count = num_examples(X, la.dict_key_x)
    width = max(NUM_SAMPLES, min(la.n_outputs, MANY_OUTPUTS))
    # in double precision
    entry = 8 * width * predicting.num_targets(la)
    size = max(1, predicting.memory_limit(la) // entry)
    if size >= count:
        return [X]
    return [select_rows(X, own, count) for own in torch.arange(count).split(size)]


def _outputs(
    la: KronDebiasedLaplace, X: Inputs, calibration: Calibration, link: Link
) -> tuple[Tensor, ...]:
    """Compute means and variances of outputs, total and aleatoric entropies.

    Classes that exclude each other need what outputs have in common: samples of them,
    or their covariance, which positions and very many classes have not.
    """
    wide = calibration.with_whole_posterior()
    if link is SOFTMAX:
        # a network without forward derivatives has exact moments, or fails there, too
        with suppress(ForwardModeError):
            if (samples := _samples(la, X)) is not None:
                mean, root = samples
                variance = (
                    root.square().sum(2)
                    if la._samples_variances
                    else output_moments(la, X)[1]
                )
                T = calibration.temperature
                return mean, variance, *_of_root(mean / T, root / T)
        if la.class_axis is None and la.n_outputs <= MANY_OUTPUTS:
            mean, covariance = output_moments(la, X, "full")
            variance = covariance.diagonal(dim1=1, dim2=2)
            return mean, variance, *entropies(*wide.outputs(mean, covariance), link)
    mean, variance = output_moments(la, X)
    return mean, variance, *entropies(*wide.outputs(mean, variance), link)


def _samples(la: KronDebiasedLaplace, X: Inputs) -> tuple[Tensor, Tensor] | None:
    """Return means ``[points, classes]``, and deviations as a root of covariances."""
    with evaluating(la.model):
        changes = la._output_changes(la._inputs(X))
        if changes is None:
            return None
        deviations = []
        for output, change in changes:
            mean = output
            deviations.append(points(change, la.n_outputs))
    predicting.check_rows(la, X, mean)
    mean = points(at_least_single(mean), la.n_outputs)
    root = torch.stack(deviations, 2).div_(len(deviations) ** 0.5)
    check_finite_predictions(mean, root)
    return mean, root


def _of_root(mean: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """Compute entropies in as few dimensions as there are."""
    if root.shape[1] > root.shape[2]:
        return entropies_of_root(mean, root)
    return entropies(mean, root @ root.mT)
