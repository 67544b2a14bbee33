"""Prior precisions chosen by validation data, in one pass over them where possible.

laplace-torch's grid search never resets its running metric, so that the scores of all
earlier grid points add to the present one, and judges regression by squared error,
which no prior precision changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from math import inf, isfinite
from typing import TYPE_CHECKING, Any

import torch
import torchmetrics
from laplace.utils import RunningNLLMetric
from laplace.utils.enums import Likelihood, LinkApprox, PredType
from torch import Tensor
from torch.distributions import MultivariateNormal
from torch.nn.functional import binary_cross_entropy
from torch.utils.data import DataLoader
from tqdm import tqdm

from laplace_debiased.posterior import predicting
from laplace_debiased.posterior.likelihoods import BINARY
from laplace_debiased.posterior.upstream import inputs_and_targets, loss_of
from laplace_debiased.predictive.prior_path import TOLERANCE, PriorInterval
from laplace_debiased.rows.output_curvature import is_counted
from laplace_debiased.rows.positions import points
from laplace_debiased.rows.targets import targets_of_points
from laplace_debiased.rows.user_warnings import warn_user

if TYPE_CHECKING:
    from laplace_debiased.posterior.laplace import KronDebiasedLaplace

Loss = torchmetrics.Metric | Callable[..., Tensor]
# of variances between the nodes of a path, where those at the nodes are by samples
_SAMPLED_TOLERANCE = 1e-2


class _MeanNLL(torchmetrics.Metric):
    """Mean of negative logarithms, in double precision."""

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        zero = torch.zeros((), dtype=torch.float64)
        for name in ("total", "count"):
            self.add_state(name, zero, dist_reduce_fx="sum")

    def compute(self) -> Tensor:
        """Return the mean over all that was added."""
        return self.total / self.count


class GaussianNLL(_MeanNLL):
    """Mean negative log density of targets in a regression.

    The predictive distribution is a Gaussian, whose covariance is that of the network's
    output and the noise.

    Args:
        noise_variance: Variance of the noise in each output, a scalar.
    """

    def __init__(self, noise_variance: Tensor):
        super().__init__()
        self.noise_variance = noise_variance.detach().double()

    def update(self, mean: Tensor, covariance: Tensor, y: Tensor) -> None:
        """Add a batch.

        Args:
            mean: Mean of the outputs ``[batch, outputs]``.
            covariance: Their covariance ``[batch, outputs, outputs]``, or variance
                ``[batch, outputs]``, without noise.
            y: Targets ``[batch, outputs]``, or ``[batch]`` of one output.

        Raises:
            ValueError: If the targets have another shape.
        """
        y = y[:, None] if y.shape == mean.shape[:1] and mean.shape[1] == 1 else y
        if y.shape != mean.shape:
            raise ValueError(
                f"Targets must have the outputs' shape {tuple(mean.shape)}, got "
                f"{tuple(y.shape)}."
            )
        mean, covariance = mean.double(), covariance.double()
        if covariance.ndim == 2:
            covariance = torch.diag_embed(covariance)
        noise = self.noise_variance * torch.eye(mean.shape[1]).to(mean)
        density = MultivariateNormal(mean, covariance + noise)
        self.total = self.total - density.log_prob(y.double()).sum()
        self.count = self.count + len(y)


class LabelNLL(_MeanNLL):
    """Mean negative log likelihood of a label, in nats."""

    def update(self, probabilities: Tensor, y: Tensor) -> None:
        """Add a batch.

        Args:
            probabilities: Probabilities of the labels ``[batch, labels]``.
            y: Labels, of the same shape, or ``[batch]`` if there is one.
        """
        p = probabilities.double()
        y = y.to(p).reshape(p.shape)
        # torch's logarithm of a probability is at least -100
        self.total = self.total + binary_cross_entropy(p, y, reduction="sum")
        self.count = self.count + y.numel()


def default_loss(la: KronDebiasedLaplace) -> Loss | None:
    """Return what validation predictions are judged by, unless users say so.

    Args:
        la: The posterior.

    Returns:
        The loss; None where laplace-torch's own is right.
    """
    if la.likelihood == Likelihood.REGRESSION:
        return GaussianNLL(la.sigma_noise**2)
    return LabelNLL() if la.likelihood == BINARY else None


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
        ValueError: If no prior precision has a finite loss, or outputs have positions
            and predictions are neither by moments nor judged by a metric.
    """
    if _is_known_from_one_pass(la, loss, **predictive):
        assert isinstance(loss, torchmetrics.Metric)
        losses = _losses_from_one_pass(la, loss, interval, val_loader, progress_bar)
    else:
        if la.class_axis is not None:
            raise ValueError(
                "Of outputs with positions, a grid search judges probabilities by "
                "`pred_type='glm'`, `link_approx='probit'` and a metric as the loss."
            )
        losses = []
        for prior_precision in tqdm(
            interval, disable=not progress_bar, desc="[Grid search]"
        ):
            la.prior_precision = prior_precision
            losses.append(_loss(la, loss, val_loader, predictive))
    losses = [own if isfinite(own) else inf for own in losses]
    best = min(range(len(losses)), key=losses.__getitem__)
    if not isfinite(losses[best]):
        raise ValueError("The validation loss is not finite for any prior precision.")
    if len(losses) > 1 and best in (0, len(losses) - 1):
        bound = "log_prior_prec_max" if best else "log_prior_prec_min"
        warn_user(
            f"The best prior precision, {interval[best].item():.3g}, is at the end of "
            f"the grid: extend it by `{bound}`."
        )
    return interval[best]


def _is_known_from_one_pass(
    la: KronDebiasedLaplace,
    loss: Loss,
    pred_type: PredType | str,
    link_approx: LinkApprox | str,
    **_: Any,
) -> bool:
    """Whether predictions follow from means and variances, whatever the prior."""
    if la.damping or pred_type != PredType.GLM:
        return False
    if not isinstance(loss, torchmetrics.Metric):  # needs all predictions at once
        return False
    if la._kind.link is None:
        return la.n_outputs == 1
    return link_approx == LinkApprox.PROBIT


def _losses_from_one_pass(
    la: KronDebiasedLaplace,
    metric: torchmetrics.Metric,
    interval: Tensor,
    val_loader: DataLoader,
    progress_bar: bool,
) -> list[float]:
    """Compute a metric at all prior precisions from one pass over the data."""
    ends = interval.min().item(), interval.max().item()
    # with samples, each node takes a pass for each of them, and has their error
    is_sampled = predicting.samples_variances(la)
    path = PriorInterval(*ends, _SAMPLED_TOLERANCE if is_sampled else TOLERANCE)
    metric.reset()
    metrics, link = [deepcopy(metric) for _ in interval], la._kind.link
    for batch in tqdm(val_loader, disable=not progress_bar, desc="[Grid search]"):
        X, y = inputs_and_targets(batch, la.backend)
        if not len(y):
            continue
        mean, at_nodes = la._variances_by_prior(X, path.nodes)
        if la.class_axis is not None:
            mean = points(mean, la.n_outputs)
            at_nodes = at_nodes.reshape(*mean.shape, -1)
        y, counted = _targets(la, y, mean, metric)
        mean, at_nodes, y = mean[counted], at_nodes[counted], y[counted]
        variances = path.at(at_nodes, interval.to(mean))  # [batch, C, grid]
        for own, variance in zip(metrics, variances.unbind(2), strict=True):
            if link is not None:
                own.update(link.probit(mean, variance), y)
                continue
            _update(own, mean, variance[:, :, None], y)
    return [own.compute().sum().item() for own in metrics]


def _targets(
    la: KronDebiasedLaplace, y: Tensor, output: Tensor, loss: Loss
) -> tuple[Tensor, Tensor]:
    """Arrange targets as predictions are; tell which of them count ``[points]``."""
    own = loss_of(la.backend)
    # metrics may take labels as integers alone
    y = targets_of_points(la.model, y, own, output).to(y.dtype)
    if la.likelihood == Likelihood.CLASSIFICATION and not y.is_floating_point():
        y = y.long()
    elif isinstance(loss, RunningNLLMetric):
        raise ValueError(
            f"Validation targets must be class indices, got {y.dtype}: of "
            "probabilities, pass `y.argmax(1)`, or a `loss` of your own."
        )
    return y, is_counted(own, y)


def _loss(
    la: KronDebiasedLaplace,
    loss: Loss,
    val_loader: DataLoader,
    predictive: dict[str, Any],
) -> float:
    """Compute the loss at the present prior precision.

    laplace-torch's own ``validate`` compares targets ``[batch]`` with a column.
    """
    judged = _judged(la, loss, val_loader, predictive)
    try:
        if isinstance(loss, torchmetrics.Metric):
            loss.reset()
            for own in judged:
                _update(loss, *own)
            return loss.compute().sum().item()
        parts = list(judged)
        if not parts:
            raise ValueError("`val_loader` yields no data.")
        return loss(*map(torch.cat, zip(*parts, strict=True))).item()
    except torch.linalg.LinAlgError:  # the covariance is singular
        return inf


def _judged(
    la: KronDebiasedLaplace,
    loss: Loss,
    val_loader: DataLoader,
    predictive: dict[str, Any],
) -> Iterator[tuple[Tensor, ...]]:
    """Yield predictions and targets of batches, but for those that do not count."""
    for batch in val_loader:
        X, y = inputs_and_targets(batch, la.backend)
        if not len(y):
            continue
        prediction = la(X, fitting=True, **predictive)
        found = prediction if isinstance(prediction, tuple) else (prediction,)
        y, counted = _targets(la, y, found[0], loss)
        yield tuple(own[counted] for own in (*found, y))


def _update(metric: torchmetrics.Metric, *predictions_and_targets: Tensor) -> None:
    """Add a batch to a metric, which may be one of means and targets alone."""
    mean, *others, y = predictions_and_targets
    try:
        metric.update(mean, *others, y)
    except TypeError:
        if not others:
            raise
        metric.update(mean, y)
