"""From folds of points to debiased curvature.

A fit makes up to three sets of passes. *Pools*, if points are drawn, take forward
passes alone: for scores to draw by, input covariances and the loss. The points that are
*used* take backward passes, for gradient covariances; with ``ggn``, they take them
again, along the directions of other folds. In cross-fit, each fold makes all of them;
with two batches, the second one alone gives magnitudes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, count
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from laplace_debiased.curvature.debias import (
    Directions,
    Factors,
    add_data,
    cross_fit,
    joined,
    two_batch,
)
from laplace_debiased.curvature.eigenbasis import check_finite
from laplace_debiased.curvature.kronecker import Kronecker, Spectrum
from laplace_debiased.curvature.streams import Curvature, GGNCurvature, KFACCurvature
from laplace_debiased.posterior.error_of_fit import Passes, error_of_fit
from laplace_debiased.posterior.sampling_error import SamplingError
from laplace_debiased.posterior.settings import Settings
from laplace_debiased.posterior.sources import Source
from laplace_debiased.rows.inputs import at_least_single
from laplace_debiased.rows.seeds import mixed_seed
from laplace_debiased.rows.sweep import SweepSummary
from laplace_debiased.sampling.draw import draw_points
from laplace_debiased.sampling.folds import Fold, Folds, fold_sizes
from laplace_debiased.sampling.loaders import subset_of

LayerTensors = TypeVar("LayerTensors", Kronecker, Spectrum)


@dataclass(frozen=True)
class Estimate:
    """What a fit measures.

    Args:
        curvature: The curvature, scaled to all data.
        loss: The negative log likelihood, scaled to all data.
        num_outputs: Number of network outputs.
        error: The sampling error of both, None if the backend does not tell.
        are_probabilities: Whether the outputs were probabilities, not logits.
    """

    curvature: Curvature
    loss: Tensor
    num_outputs: int
    error: SamplingError | None
    are_probabilities: bool = False

    def merge(self, other: Estimate, share: float) -> Estimate:
        """Add further data.

        Args:
            other: The estimate from the further data.
            share: Number of points here, as a share of all.

        Returns:
            The estimate for all data.
        """
        return Estimate(
            self.curvature.merge(other.curvature, share),  # type: ignore[arg-type]
            self.loss + other.loss,
            other.num_outputs,
            self.error and other.error and self.error.merge(other.error),
            other.are_probabilities,
        )

    def combined(self, other: Estimate, share: float) -> Estimate:
        """Add other data, which know nothing of these.

        Args:
            other: The estimate from the other data, along directions of their own.
            share: Number of points here, as a share of all.

        Returns:
            The estimate for all data, along directions of all.
        """
        turned = other.curvature.turned(self.curvature, share)  # type: ignore[arg-type]
        return self.merge(replace(other, curvature=turned), share)

    def scaled(self, factor: float, decay: float = 1.0) -> Estimate:
        """Scale curvature and loss to more or fewer data.

        Args:
            factor: The factor.
            decay: Weight of the data in the factor; the rest changes their number.

        Returns:
            The scaled estimate.
        """
        return Estimate(
            self.curvature.scaled(factor),
            factor * self.loss,
            self.num_outputs,
            self.error and self.error.scaled(factor, decay),
            self.are_probabilities,
        )


class Earlier(NamedTuple):
    """What earlier points contribute to the directions of all.

    Args:
        factors: Their Kronecker factors, G scaled to their number.
        share: Their number, as a share of all.
    """

    factors: Factors
    share: float


class Pool(NamedTuple):
    """What forward passes over a pool of points give.

    Args:
        inputs: Input covariances of each layer, for each fold.
        summaries: A summary for each fold.
    """

    inputs: list[Factors]
    summaries: list[SweepSummary]


class _Measured(NamedTuple):
    """What passes give of some of the layers.

    Args:
        curvature: Their curvature.
        passes: What the passes told of the points.
    """

    curvature: Curvature
    passes: Passes


def measure(
    source: Source,
    folds: Folds,
    settings: Settings,
    seed: int,
    earlier: Earlier | None = None,
    at_a_time: Sequence[int] | None = None,
) -> Estimate:
    """Measure debiased curvature and loss.

    Args:
        source: Measures curvature on given points.
        folds: The points to use, or to draw from.
        settings: How directions and magnitudes are obtained.
        seed: Seed of the draw, and of sampled labels, which are others in each fold:
            what gives directions must not share its noise with magnitudes.
        earlier: What earlier points contribute to the directions, with ``ggn``
            magnitudes.
        at_a_time: How many of the layers are measured at a time, one number after the
            other, each by passes of its own; None for all.

    Returns:
        The estimate of these points alone, along directions of all.

    Raises:
        ValueError: If data are not valid, or curvature is not finite.
    """
    found = _of_all_layers(source, folds, settings, seed, earlier, at_a_time)
    surveys = found.passes.surveys or found.passes.seen
    loss = torch.stack([at_least_single(summary.loss) for summary in surveys])
    weights = torch.tensor(folds.shares, dtype=loss.dtype, device=loss.device)
    return Estimate(
        found.curvature,
        (weights * loss).sum(),
        found.passes.seen[0].num_outputs,
        error_of_fit(source, folds, found.passes, settings),
        all(summary.are_probabilities for summary in surveys),
    )


def _of_all_layers(
    source: Source,
    folds: Folds,
    settings: Settings,
    seed: int,
    earlier: Earlier | None,
    at_a_time: Sequence[int] | None,
) -> _Measured:
    """Measure all layers, or some after the others by the same points."""
    if at_a_time is None or len(at_a_time) == 1:
        return _of_layers(source, folds, settings, seed, earlier)
    parts: list[_Measured] = []
    for index, (size, end) in enumerate(
        zip(at_a_time, accumulate(at_a_time), strict=True)
    ):
        own = source.part(source.layers[end - size : end], index)
        before = earlier and earlier._replace(factors=earlier.factors[end - size : end])
        used = parts[0].passes.used if parts else None
        parts.append(_of_layers(own, folds, settings, seed, before, used))
    first, curvatures = parts[0], [own.curvature for own in parts]
    kind: Any = type(first.curvature)  # that of all parts
    seen, surveys = (
        [SweepSummary.of_layers(own) for own in zip(*summaries, strict=True)]
        for summaries in (
            [own.passes.seen for own in parts],
            [own.passes.surveys or [] for own in parts],
        )
    )
    curvature = kind.of_layers(curvatures)
    return _Measured(curvature, Passes(first.passes.used, seen, surveys or None))


def _of_layers(
    source: Source,
    folds: Folds,
    settings: Settings,
    seed: int,
    earlier: Earlier | None,
    drawn: list[Fold] | None = None,
) -> _Measured:
    """Measure a source's layers, by points that were drawn before, if there are any."""
    seeds = (mixed_seed(seed, index) for index in count(1))
    used, pool, shares = list(folds.folds), None, folds.shares
    num_used = settings.num_used(folds)
    if num_used < folds.num_points:
        pool = Pool(*_unzipped(source.inputs(f, next(seeds)) for f in used))
        used = drawn or _drawn(used, pool, num_used, shares, settings, seed)
    is_cross_fit = settings.cross_fit and not folds.explicit
    if settings.magnitudes == "kfac":
        factors, seen = _factors(source, used, pool, seeds)
        curvature: Curvature = KFACCurvature(
            source.layers, factors, shares, is_cross_fit, pool is not None
        )
    else:
        curvature, seen = _ggn(source, used, pool, shares, is_cross_fit, seeds, earlier)
    surveys = None if pool is None else pool.summaries
    return _Measured(curvature, Passes(used, seen, surveys))


def _drawn(
    folds: list[Fold],
    pool: Pool,
    num_points: int,
    shares: Sequence[float],
    settings: Settings,
    seed: int,
) -> list[Fold]:
    """Draw points from each fold with probabilities that grow with their curvature.

    The score of a point is the trace of its output curvature, which takes a forward
    pass. Classes are strata.
    """
    drawn = []
    sizes = fold_sizes(num_points, shares)
    for k, (fold, size) in enumerate(zip(folds, sizes, strict=True)):
        summary = pool.summaries[k]
        assert summary.traces is not None
        positions, weights = draw_points(
            summary.traces,
            size,
            settings.sampling_floor,
            seed=mixed_seed(seed, k),
            strata=summary.classes,
        )
        loader = subset_of(fold.loader, positions)
        drawn.append(Fold(loader, fold.weights[positions] * weights))
    return drawn


def _ggn(
    source: Source,
    folds: list[Fold],
    pool: Pool | None,
    shares: Sequence[float],
    is_cross_fit: bool,
    seeds: Iterator[int],
    earlier: Earlier | None,
) -> tuple[GGNCurvature, list[SweepSummary]]:
    """Measure exact curvature along directions; return what gave magnitudes, too."""
    giving = folds if is_cross_fit else folds[:1]
    # one for all passes of a fold, whether its rows are kept or computed again
    of_folds = [next(seeds) for _ in folds]
    factors, seen = _factors(source, giving, pool, iter(of_folds))
    if earlier is not None:
        factors = [add_data(earlier.factors, own, earlier.share) for own in factors]
    if is_cross_fit:
        seen = []  # the same points again

    def along(k: int, directions: Directions, _: Factors) -> list[Spectrum]:
        spectra, summary = source.curvatures(folds[k], directions, of_folds[k])
        seen.append(summary)
        return _finite(spectra, source)

    measures = [partial(along, k) for k in range(len(folds))]
    how = pool is not None, source.decompose
    if is_cross_fit:
        debiased = cross_fit(factors, measures, shares, *how)
    else:
        debiased = two_batch(factors[0], measures[1], *how)
    found = debiased.directions, debiased.magnitudes, debiased.own
    return GGNCurvature(source.layers, *found), seen


def _factors(
    source: Source, folds: Sequence[Fold], pool: Pool | None, seeds: Iterator[int]
) -> tuple[list[Factors], list[SweepSummary]]:
    """Compute the factors of some folds; the pool, if there is one, gives inputs."""
    compute = source.factors if pool is None else source.gradients
    found, seen = _unzipped(compute(fold, next(seeds)) for fold in folds)
    if pool is not None:
        pairs = zip(found, pool.inputs[: len(folds)], strict=True)
        found = [joined(*pair) for pair in pairs]
    return [_finite(factors, source) for factors in found], seen


def _finite(own: list[LayerTensors], source: Source) -> list[LayerTensors]:
    """Refuse curvature that overflowed; turn half precision into single."""
    check_finite(source.layers, own)
    return [layer.map(at_least_single) for layer in own]


def _unzipped(pairs: Iterator[tuple[Factors, SweepSummary]]) -> tuple[list, list]:
    """Turn pairs into two lists."""
    first, second = zip(*pairs, strict=True)
    return list(first), list(second)
