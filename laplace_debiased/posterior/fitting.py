"""What a fit does to a posterior: assign points, measure, add to what was seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from laplace_debiased.curvature.decomposition import Decompose
from laplace_debiased.curvature.streams import GGNCurvature
from laplace_debiased.posterior.asdl_backpack import BackendSource, check_installed
from laplace_debiased.posterior.identity import (
    check_not_replaced,
    check_same_fit,
    identity,
)
from laplace_debiased.posterior.measuring import Earlier, Estimate, measure
from laplace_debiased.posterior.memory import check_limit, of_fit
from laplace_debiased.posterior.resuming import ResumedSource
from laplace_debiased.posterior.sources import (
    RowSource,
    Source,
    total_output_curvature,
)
from laplace_debiased.posterior.upstream import (
    is_curvlinops,
    is_stochastic,
    output_curvature,
    split_batch,
)
from laplace_debiased.rows.batch_warnings import (
    warn_of_ignored_keys,
    warn_of_own_tokens,
)
from laplace_debiased.rows.inputs import check_finite_inputs, check_is_batch
from laplace_debiased.rows.left_out import refusal, refusal_of_diagonals, warning
from laplace_debiased.rows.model_state import check_repeatable, measuring
from laplace_debiased.rows.output_curvature import ends_in_link
from laplace_debiased.rows.positions import check_positions, set_class_axis
from laplace_debiased.rows.seeds import mixed_seed
from laplace_debiased.rows.selection import Selection, select
from laplace_debiased.rows.substitution import output_shape
from laplace_debiased.rows.targets import label_targets
from laplace_debiased.sampling.folds import (
    Folds,
    Points,
    draw_uniformly,
    explicit_folds,
)
from laplace_debiased.sampling.processes import ALONE, Alone, own_module
from laplace_debiased.sampling.shares import best_share, effective_rank

if TYPE_CHECKING:
    from laplace_debiased.posterior.laplace import KronDebiasedLaplace


@dataclass(frozen=True)
class Seen:
    """What a posterior was fitted to so far.

    Args:
        weight: Number of points that it stands for, less what was forgotten.
        num_points: Number of points that got backward passes, likewise.
        num_updates: Number of fits and updates since all was forgotten.
    """

    weight: float = 0.0
    num_points: float = 0.0
    num_updates: int = 0

    def merge(self, other: Seen) -> Seen:
        """Add what another posterior has seen."""
        return Seen(
            self.weight + other.weight,
            self.num_points + other.num_points,
            self.num_updates + other.num_updates,
        )

    def seed(self, own: int) -> int:
        """Seed of the next draws: all further data have their own."""
        return mixed_seed(own, self.num_updates) if self.num_updates else own


def check_backend(la: KronDebiasedLaplace) -> None:
    """Refuse a backend that is missing, or that the settings do not go with.

    Args:
        la: The posterior.

    Raises:
        ModuleNotFoundError: If the backend's library is missing.
        ValueError: If a setting needs another backend.
    """
    backend = la._backend_cls
    la.settings.check_backend(backend, is_stochastic(la._backend_kwargs))
    if not is_curvlinops(backend):
        check_installed(backend)
    check_limit(la)


def assign(
    la: KronDebiasedLaplace,
    loader: DataLoader,
    magnitude_loader: DataLoader | None,
    seen: Seen,
    is_batch: bool = False,
    group: Alone = ALONE,
) -> Folds:
    """Assign points to folds: those to use, or those to draw from.

    If nothing was seen yet, find out first what the posterior is over.

    Args:
        la: The posterior.
        loader: Yields the points, or those that give directions.
        magnitude_loader: Yields those that give magnitudes.
        seen: What was seen so far.
        is_batch: Whether they are a batch of a stream. The points of both loaders are
            then all data, and their order means nothing; otherwise a point has the same
            fold if it is seen again.
        group: The processes whose loaders together yield the points.

    Returns:
        The folds.

    Raises:
        ValueError: If data or model are not valid.
    """
    settings = la.settings
    set_class_axis(la.model, la.class_axis)
    points: Points | Folds
    if magnitude_loader is not None:
        points = explicit_folds(
            loader, magnitude_loader, is_batch, la.dict_key_y, group
        )
    else:
        draws = settings.draws(la._backend_cls)
        num_points = settings.num_candidates if draws else settings.budget
        seed, draw_seed = settings.seed, None
        if is_batch:
            seed = seen.seed(seed)
        elif seen.num_updates:
            draw_seed = seen.seed(seed)
        name = "batch" if is_batch else "train_loader"
        points = draw_uniformly(
            loader, num_points, seed, name, draw_seed, la.dict_key_y, group
        )
    if seen.weight:
        check_not_replaced(la.model, la.fitted_params)
    else:
        choose_parameters(la, points.first_batch())
    if isinstance(points, Folds):
        return points
    best = _best_share(la, points) if settings.finds_share else None
    return points.split(settings.shares(best))


def choose_parameters(la: KronDebiasedLaplace, batch: Any) -> None:
    """Find out, by running the network, what the posterior is over.

    Args:
        la: The posterior, whose parameters and layers are set.
        batch: Points of the training data.

    Raises:
        ValueError: If the network mixes examples or is random, or no parameter is
            supported, or not all are and the posterior is strict.
    """
    own_module(la.model)  # refuses parameters that were divided since
    with measuring(la.model):
        check_repeatable(la.model)
    X, y = split_batch(batch, la.dict_key_y)
    check_is_batch(y)
    X = la._inputs(X)
    warn_of_ignored_keys(la._network, X, la.dict_key_y)
    warn_of_own_tokens(la._network, X, y, la.dict_key_x)
    check_finite_inputs(X)
    if la.class_axis is not None:
        with measuring(la.model):
            shape = output_shape(la.model, X)
        y = label_targets(y, la._kind.loss_func())
        check_positions(y, shape, la.class_axis)
        la.n_outputs = shape[la.class_axis]
    with measuring(la.model):
        candidates = la._find_candidates(X, len(y))
    check_not_replaced(la.model, candidates)
    with measuring(la.model):  # if this fails, a last layer that was found stays so
        # other backends give factors of matrices and vectors alone
        dense = not is_curvlinops(la._backend_cls)
        selection = select(la.model, candidates, X, len(y), dense)
    if selection.left_out and la.strict:
        raise ValueError(refusal(selection.left_out))
    diagonals = [layer.name for layer in selection.layers if layer.is_diagonal]
    if diagonals and la.strict:
        raise ValueError(refusal_of_diagonals(diagonals))
    _fit_selected(la, candidates, selection)


def _fit_selected(
    la: KronDebiasedLaplace, candidates: list[Tensor], selection: Selection
) -> None:
    """Make a posterior one over the parameters that take part."""
    gone = {entry.position for entry in selection.left_out}
    params = [param for k, param in enumerate(candidates) if k not in gone]
    if not params:
        reasons = f": {refusal(selection.left_out)}" if selection.left_out else ""
        raise ValueError(
            "The model has no parameters with `requires_grad=True` that are supported: "
            f"there is nothing to fit{reasons or '.'}"
        )
    # a prior may have been given for all of them, before it was known who takes part
    sizes = [param.numel() for param in candidates]
    la._prior_mean = selection.of_fitted(la._prior_mean, sizes)
    ones = [1] * len(candidates)
    la._prior_precision = selection.of_fitted(la._prior_precision, ones)
    set_params(la, params)
    la._selection = selection.without_left_out(len(candidates))


def set_params(la: KronDebiasedLaplace, params: list[Tensor]) -> None:
    """Let a posterior be over some parameters, and check the prior against them.

    Args:
        la: The posterior.
        params: The parameters.

    Raises:
        ValueError: If prior precision or mean have a length that does not fit.
    """
    la.params = params
    la.is_subset_params = len(params) < len(list(la.model.parameters()))
    la.n_params = sum(param.numel() for param in params)
    la.n_layers = len(params)
    # checked with the parameters that are known by now, in the dtype that they have
    la._set_prior_precision(la._prior_precision)
    la.prior_mean = torch.as_tensor(la._prior_mean, dtype=la._dtype)
    la.sigma_noise = la._sigma_noise


def _best_share(la: KronDebiasedLaplace, points: Points) -> float:
    """Find out, by a forward pass, which share should give directions."""
    assert la._selection is not None
    num_used = min(la.settings.budget or len(points), len(points))
    with measuring(la.model):
        total = total_output_curvature(
            la.model,
            points.some(num_used),
            la.backend,
            output_curvature(la.backend),
            mixed_seed(la.settings.seed, 1),
        )
    dimensions = [
        layer.d_out for layer in la._selection.layers for _ in layer.parameters
    ]
    return best_share(num_used, dimensions, effective_rank(total))


def source(
    la: KronDebiasedLaplace,
    progress_bar: bool = False,
    room: int = 0,
    group: Alone = ALONE,
) -> Source:
    """Return what measures the curvature of a posterior's backend.

    Args:
        la: The posterior, whose layers are known.
        progress_bar: Whether to show progress bars.
        room: Bytes that rows may take which are needed again.
        group: The processes that share the work. With another backend than curvlinops',
            each does all of it.

    Returns:
        The source.
    """
    assert la._selection is not None
    common = (
        la.model,
        la.fitted_params,
        la._selection.layers,
        la.backend,
        la._asdl_fisher_kwargs,
    )
    tolerance = la.settings.decomposition_tolerance
    if is_curvlinops(la._backend_cls):
        options = progress_bar, room, tolerance, group
        return RowSource(*common, la.settings.fisher_rank, *options)
    return BackendSource(*common, progress_bar, tolerance)


def update(
    la: KronDebiasedLaplace,
    folds: Folds,
    seen: Seen,
    decay: float = 1.0,
    num_data: float | None = None,
    progress_bar: bool = False,
    checkpoint: Path | None = None,
    group: Alone = ALONE,
) -> None:
    """Add new points to the earlier ones, at the model's parameters.

    Args:
        la: The posterior, which takes the estimate over.
        folds: The new points, which stand for ``folds.num_data``.
        seen: What was seen so far.
        decay: Factor on the weight of earlier points.
        num_data: Number of points that curvature and loss are scaled to; None for the
            weight of all.
        progress_bar: Whether to show progress bars.
        checkpoint: A folder for what is done, if it is to be resumed there.
        group: The processes that share the work.

    Raises:
        ValueError: If the checkpoint is of another fit, or is damaged, or processes
            differ in what they fit.
    """
    remembered = decay * seen.weight
    weight = remembered + folds.num_data
    share = remembered / weight
    earlier: Estimate | None = None
    directions: Earlier | None = None
    if remembered and la._estimate is not None:
        earlier = la._estimate.scaled(remembered / la.n_data, decay)
        if isinstance(earlier.curvature, GGNCurvature):
            directions = Earlier(earlier.curvature.factors(), share)
    written = checkpoint is not None
    memory = of_fit(la, folds, earlier is not None, written, group)
    own = source(la, progress_bar, memory.room, group)
    progress = seen, decay, num_data, memory.at_a_time
    if group.size > 1:
        check_same_fit(la, folds, progress, group)
    if checkpoint is not None:
        own = ResumedSource(own, checkpoint, identity(la, folds, progress), group)
    seed = seen.seed(la.settings.seed)
    with measuring(la.model):
        estimate = measure(own, folds, la.settings, seed, directions, memory.at_a_time)
    if earlier is not None:
        estimate = earlier.merge(estimate, share)
    num_data = weight if num_data is None else num_data
    estimate = estimate.scaled(num_data / weight)
    take_over(la, estimate, num_data, own.decompose, memory.decomposed_at_a_time)
    num_used = la.settings.num_used(folds)
    la._seen = Seen(weight, decay * seen.num_points + num_used, seen.num_updates + 1)


def take_over(
    la: KronDebiasedLaplace,
    estimate: Estimate,
    num_data: float,
    decomposition: Decompose,
    at_a_time: Sequence[int],
) -> None:
    """Make an estimate the posterior, at the model's parameters.

    Args:
        la: The posterior.
        estimate: The estimate.
        num_data: Number of points that it is scaled to.
        decomposition: Decomposes factors.
        at_a_time: Of how many layers at a time.
    """
    mean = torch.cat([param.reshape(-1) for param in la.fitted_params])
    la.H = estimate.curvature.decompose(la.damping, decomposition, at_a_time)
    la._estimate = estimate
    la.mean = mean if la.enable_backprop else mean.detach()
    la.loss, la.n_outputs, la.n_data = estimate.loss, estimate.num_outputs, num_data
    # torch declares that modules have no attributes of this type
    cast("Any", la.model).output_size = estimate.num_outputs


def messages(la: KronDebiasedLaplace, before: Seen, explicit: bool) -> list[str]:
    """Say what a user should know of a fit.

    Args:
        la: The posterior after the fit.
        before: What had been seen before.
        explicit: Whether the user chose the points.

    Returns:
        The messages: of parameters that were left out, of a softmax, and of a small
        budget.
    """
    found = []
    if la._selection is not None and la._selection.left_out and not before.weight:
        found.append(warning(la._selection.left_out, la.n_params))
    if la._estimate is not None and la._estimate.are_probabilities:
        found.append(ends_in_link(la._kind.loss_func()))
    if not explicit and la.settings.budget is not None and la.sampling_error:
        message = la.sampling_error.warning(round(la._seen.num_points))
        found += [message] if message else []
    return found
