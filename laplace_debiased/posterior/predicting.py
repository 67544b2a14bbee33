"""Whether the moments of outputs are exact, or estimated by samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from laplace.utils.enums import Likelihood, LinkApprox
from torch import Tensor

from laplace_debiased.curvature.eigenbasis import EigenbasisMatrix
from laplace_debiased.predictive.forward_mode import (
    MANY_OUTPUTS,
    NUM_SAMPLES,
    ForwardModeError,
    SampledPredictive,
    relative_error,
)
from laplace_debiased.predictive.moments import LinearizedPredictive
from laplace_debiased.rows.checks import check_integer
from laplace_debiased.rows.inputs import NEED_EXAMPLES, Inputs
from laplace_debiased.rows.model_state import evaluating
from laplace_debiased.rows.positions import points, restored
from laplace_debiased.rows.substitution import output_shape
from laplace_debiased.rows.user_warnings import warn_user

if TYPE_CHECKING:
    from laplace_debiased.posterior.laplace import KronDebiasedLaplace

AUTO = "auto"
_VARIANCES_ALONE = (
    "Of outputs with positions, there are variances alone: predict with `joint=False` "
    "and `link_approx='probit'`, or with `pred_type='nn'`."
)


class Predictive(Protocol):
    """Moments of the linearized network's outputs."""

    def moments(
        self, X: Inputs, batch_size: int, kind: str = "full"
    ) -> tuple[Tensor, Tensor]:
        """Compute mean and covariance of the outputs."""

    def variances(
        self, X: Inputs, batch_size: int, shifts: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        """Compute mean and variances of the outputs for several priors."""


class SampledIfPossible:
    """Samples, or exact moments where a network has no forward derivative.

    Args:
        sampled: Moments by samples.
        exact: Exact moments.
    """

    def __init__(self, sampled: SampledPredictive, exact: Predictive):
        self._sampled, self._exact = sampled, exact

    def moments(
        self, X: Inputs, batch_size: int, kind: str = "full"
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`Predictive.moments`."""
        try:
            return self._sampled.moments(X, batch_size, kind)
        except ForwardModeError as error:
            _warn_of(error)
            return self._exact.moments(X, batch_size, kind)

    def changes(self, X: Inputs, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """See :meth:`SampledPredictive.changes`."""
        return self._sampled.changes(X, batch_size)

    def variances(
        self, X: Inputs, batch_size: int, shifts: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`Predictive.variances`."""
        try:
            return self._sampled.variances(X, batch_size, shifts)
        except ForwardModeError as error:
            _warn_of(error)
            return self._exact.variances(X, batch_size, shifts)


def _warn_of(error: ForwardModeError) -> None:
    warn_user(f"{error} For now, there is one for each output.")


def check_forward_samples(value: int | str | None) -> None:
    """Refuse a number of samples that is none.

    Args:
        value: The number; ``"auto"`` and None are allowed, too.

    Raises:
        TypeError: If it is something else.
        ValueError: If it is less than two.
    """
    if value is not None and value != AUTO:
        check_integer("forward_samples", value, 2)


def num_samples(la: KronDebiasedLaplace) -> int | None:
    """Return the number of samples that moments are estimated by; None if exact."""
    if la.forward_samples != AUTO:
        return None if la.forward_samples is None else int(la.forward_samples)
    assert la._selection is not None
    many = max(la.n_outputs, la._selection.num_outputs) > MANY_OUTPUTS
    return NUM_SAMPLES if many else None


def samples_variances(la: KronDebiasedLaplace) -> bool:
    """Tell if variances by prior are estimated by samples.

    Args:
        la: The posterior.

    Returns:
        Whether they are. False where a last layer may have a closed form, which is
        known only from a pass: one without may be sampled even so.
    """
    if num_samples(la) is None:
        return False
    return la._samples_variances or num_targets(la) > la.n_outputs


def memory_limit(la: KronDebiasedLaplace) -> int:
    """Return the bytes that a chunk of examples may take."""
    if la.memory_limit is not None:
        return la.memory_limit
    if la._device.type != "cuda":
        return 2**30
    return torch.cuda.get_device_properties(la._device).total_memory // 4


def predictive(la: KronDebiasedLaplace, posterior: EigenbasisMatrix) -> Predictive:
    """Return what computes moments of a posterior's outputs.

    Args:
        la: The posterior, whose layers are known.
        posterior: Posterior precision.

    Returns:
        The predictive.
    """
    assert la._selection is not None
    exact = LinearizedPredictive(
        la.model,
        la.fitted_params,
        la._selection.layers,
        posterior,
        la._selection.num_outputs,
        la._selection.example_size,
        memory_limit(la),
        la._keeps_graphs,
    )
    count = num_samples(la)
    if count is None:
        return exact
    sampled = SampledPredictive(
        la.model,
        la.fitted_params,
        posterior,
        count,
        la.settings.seed,
        memory_limit(la),
        la._keeps_graphs,
    )
    return SampledIfPossible(sampled, exact) if la.forward_samples == AUTO else sampled


def num_targets(la: KronDebiasedLaplace) -> int:
    """Return the number of outputs of an example, at all its positions."""
    assert la._selection is not None
    return la.n_outputs if la.class_axis is None else la._selection.num_outputs


def check_has_covariances(la: KronDebiasedLaplace) -> None:
    """Refuse covariances of all outputs where they are of many positions.

    Args:
        la: The posterior.

    Raises:
        ValueError: If outputs have positions.
    """
    if la._selection is not None and num_targets(la) > la.n_outputs:
        raise ValueError(_VARIANCES_ALONE)


def check_rows(la: KronDebiasedLaplace, X: Inputs, output: Tensor) -> None:
    """Refuse outputs that are not those of a batch of examples.

    Args:
        la: The posterior.
        X: Inputs, a tensor or a mapping.
        output: The network's output for them ``[batch, outputs]``.

    Raises:
        ValueError: If it has another shape.
    """
    rows = len(X) if isinstance(X, Tensor) and X.ndim else len(output)
    # rewards are fitted by two, and predicted one by one
    is_reward = la.likelihood == Likelihood.REWARD_MODELING
    varies = is_reward or la.class_axis is not None
    shape = [rows, output.shape[1] if varies else la.n_outputs]
    if list(output.shape) != shape:
        raise ValueError(
            f"The model's output must have shape {shape} for the inputs, got "
            f"{list(output.shape)}. {NEED_EXAMPLES}"
        )


def by_position(
    la: KronDebiasedLaplace, X: Inputs, joint: bool, link_approx: str
) -> Tensor | tuple[Tensor, ...]:
    """Predict each position.

    Args:
        la: The posterior.
        X: Inputs, a tensor or a mapping.
        joint: Must be false.
        link_approx: Must be ``"probit"`` for classes.

    Returns:
        Probabilities of the output's shape, or mean and variance of regressions.

    Raises:
        ValueError: If something else is asked for.
    """
    link = la._kind.link
    if joint or not (link is None or link_approx == LinkApprox.PROBIT):
        raise ValueError(_VARIANCES_ALONE)
    f_mu, f_var = la._glm_predictive_distribution(X, diagonal_output=True)
    mean, variance = (points(own, la.n_outputs) for own in (f_mu, f_var))
    if link is None:
        return tuple(of_output(la, X, [mean, variance]))
    return of_output(la, X, [link.probit(mean, variance)])[0]


def of_output(
    la: KronDebiasedLaplace, X: Inputs, values: Sequence[Tensor]
) -> list[Tensor]:
    """Give values of all positions the shape of the network's output.

    Args:
        la: The posterior.
        X: Inputs, a tensor or a mapping.
        values: Values of all outputs, or ``[batch * positions]``.

    Returns:
        The values; as they are if there is no class axis.
    """
    if la.class_axis is None:
        return list(values)
    with evaluating(la.model):
        shape = output_shape(la.model, la._inputs(X))
    rows = [own if own.ndim == 1 else points(own, la.n_outputs) for own in values]
    return [restored(own, shape, la.class_axis) for own in rows]


def probabilities(la: KronDebiasedLaplace, outputs: Tensor) -> Tensor:
    """Compute probabilities of outputs ``[batch, outputs]`` at each position."""
    link = la._kind.link
    assert link is not None
    if la.class_axis is None:
        return link.probabilities(outputs)
    return link.probabilities(points(outputs, la.n_outputs)).view_as(outputs)


def are_sampled(count: int, num_outputs: int) -> str:
    """Say that variances are estimated by samples, and how well."""
    return (
        f"The variances of {num_outputs:,} outputs are estimated by {count} samples of "
        f"the weights, to {relative_error(count):.0%} each: `forward_samples` sets "
        "another number, and None a backward pass for each output."
    )
