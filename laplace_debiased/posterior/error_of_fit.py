"""The sampling error of a fit, from what its passes told of each point.

The *terms* of a point are its influences on the traces of the layers' curvature, whose
spread over the points is the error of the draw. What sampled labels and random signs
can change of them is *drawn*: the part of a backward pass, without that of the input
covariance. Where points were drawn from pools, those add an error of their own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from laplace_debiased.posterior.influences import (
    InputScale,
    not_told,
    of_factors,
    of_pools,
    scale_of_gradients,
    scores_of,
)
from laplace_debiased.posterior.sampling_error import SamplingError
from laplace_debiased.posterior.settings import Settings
from laplace_debiased.posterior.sources import Source
from laplace_debiased.rows.sweep import SweepSummary
from laplace_debiased.sampling.folds import Fold, Folds


class Passes(NamedTuple):
    """What the passes of a fit told of the points.

    Args:
        used: The points with backward passes, by fold.
        seen: A summary for each fold that gave magnitudes.
        surveys: Passes over the pools of each fold; None if points were not drawn.
    """

    used: list[Fold]
    seen: list[SweepSummary]
    surveys: list[SweepSummary] | None


def error_of_fit(
    source: Source, folds: Folds, passes: Passes, settings: Settings
) -> SamplingError | None:
    """Estimate the sampling error, if the source tells what each point contributes.

    Args:
        source: What measured the curvature.
        folds: The points to use, or to draw from.
        passes: What the passes told.
        settings: How directions and magnitudes were obtained.

    Returns:
        The error of the traces and the loss; None if the source does not tell.
    """
    if not source.takes_weights:
        return None
    used, measured, shares = passes.used, passes.seen, folds.shares
    pools = passes.surveys or []
    surveys = pools or measured
    if folds.explicit or not settings.cross_fit:
        # only the second fold gives magnitudes
        used, measured, shares, pools = used[1:], measured[1:], [1.0], pools[1:]
    contributions = [
        share * summary.contributions
        for share, summary in zip(shares, measured, strict=True)
        if summary.contributions is not None
    ]
    is_exact, inputs = settings.magnitudes == "ggn", None
    drawn = torch.cat(contributions)
    if is_exact:
        terms = drawn
    elif pools:  # input covariances are those of the last pool
        inputs = InputScale.of_pass(pools[-1], torch.ones(pools[-1].num_data))
        terms = drawn = scale_of_gradients(source.layers, [inputs], [1.0]) * drawn
    else:
        pairs = zip(measured, used, strict=True)
        scales = [InputScale.of_pass(own, fold.weights) for own, fold in pairs]
        terms = of_factors(source.layers, contributions, scales, shares)
        drawn = scale_of_gradients(source.layers, scales, shares) * drawn
    of_pool = pool_noise = None
    if pools:
        traces = terms.double().sum(0)
        of_pool, pool_noise = of_pools(source.layers, traces, pools, shares, inputs)
    random = zip(shares, used, measured, strict=True)
    return SamplingError.of_points(
        [layer.name for layer in source.layers],
        terms,
        torch.cat([own.losses for own in surveys if own.losses is not None]),
        folds.num_data,
        of_pool,
        _noise(source, random, drawn, is_exact),
        pool_noise,
        folds.apart,
    )


def _noise(
    source: Source,
    passes: Iterable[tuple[float, Fold, SweepSummary]],
    drawn: Tensor,
    is_exact: bool,
) -> Tensor | None:
    """Find what random numbers gave of contributions, at most; None without any."""
    scores = [
        share
        * fold.weights.to(drawn.device)[:, None]
        * scores_of(source.layers, own, is_exact)
        for share, fold, own in passes
        if own.is_random
    ]
    return not_told(drawn, torch.cat(scores)) if scores else None
