r"""What each point contributes to the scale of a layer's curvature.

With K-FAC's factors, the trace of a layer's curvature is a product, :math:`T =
\mathrm{tr}\, G\, (\mathrm{tr}\, A + b)`, where b is one for a layer with a vector. G is
a weighted sum over points, A a weighted mean over rows. To first order, the error of
the product is a sum over points of their influences:

.. math::
    (\mathrm{tr}\, A + b)\, g_n + \mathrm{tr}\, G\,
    \frac{w_n (a_n - S_n \mathrm{tr}\, A)}{\sum_m w_m S_m},

with the contributions :math:`g_n` to tr G, and the squared lengths :math:`a_n` of the
:math:`S_n` input rows of a point. Exact curvature is a sum over points itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from laplace_debiased.rows.layers import Layer
from laplace_debiased.rows.sweep import SweepSummary


@dataclass(frozen=True)
class InputScale:
    """Scale of the layers' input covariances, and what each point contributes to it.

    Args:
        traces: Trace of A of each layer ``[layers]``, zero without a matrix.
        influences: Influence of each point on it ``[points, layers]``.
    """

    traces: Tensor
    influences: Tensor

    @classmethod
    def of_pass(cls, summary: SweepSummary, weights: Tensor) -> InputScale:
        """Take it from what a pass has seen.

        Args:
            summary: The pass's summary.
            weights: The weight of each point ``[points]``.

        Returns:
            The scale.
        """
        assert summary.squared_inputs is not None and summary.num_rows is not None
        squares, counts = summary.squared_inputs.double(), summary.num_rows.double()
        weights = weights.to(squares)[:, None]
        total = (weights * counts).sum(0).clamp(min=torch.finfo(squares.dtype).tiny)
        traces = (weights * squares).sum(0) / total
        return cls(traces, weights * (squares - traces * counts) / total)


def has_vector(layers: Sequence[Layer]) -> Tensor:
    """Return one for each layer with a vector, zero for others, ``[layers]``."""
    flags = [float(layer.vector is not None) for layer in layers]
    return torch.tensor(flags, dtype=torch.float64)


def of_factors(
    layers: Sequence[Layer],
    gradients: Sequence[Tensor],
    inputs: Sequence[InputScale],
    shares: Sequence[float],
) -> Tensor:
    """Compute the influences of points that give both factors of K-FAC.

    Args:
        layers: The layers.
        gradients: Each fold's weighted contributions to tr G ``[points, layers]``,
            times its share.
        inputs: The scale of each fold's input covariances.
        shares: Each fold's share.

    Returns:
        The influences of all points ``[points, layers]``; their sum is the trace.
    """
    scale = scale_of_gradients(layers, inputs, shares)
    G = sum_of([own.double().sum(0) for own in gradients])
    return torch.cat(
        [
            scale * own + G * share * of_inputs.influences
            for own, of_inputs, share in zip(gradients, inputs, shares, strict=True)
        ]
    )


def scale_of_gradients(
    layers: Sequence[Layer], inputs: Sequence[InputScale], shares: Sequence[float]
) -> Tensor:
    """Compute the factor from tr G to the trace of each layer's curvature.

    Args:
        layers: The layers.
        inputs: The scale of each fold's input covariances.
        shares: Each fold's share.

    Returns:
        The factors ``[layers]``.
    """
    A = sum_of([share * own.traces for share, own in zip(shares, inputs, strict=True)])
    return A + has_vector(layers).to(A)


def of_pools(
    layers: Sequence[Layer],
    traces: Tensor,
    pools: Sequence[SweepSummary],
    shares: Sequence[float],
    inputs: InputScale | None,
) -> tuple[Tensor, Tensor]:
    """Estimate the influences of the points of pools that others are drawn from.

    A point's curvature is not known without a backward pass. Its score stands for it.

    Args:
        layers: The layers.
        traces: Trace of each layer's curvature ``[layers]``.
        pools: Passes over the pools of each fold.
        shares: Each fold's share.
        inputs: Scale of K-FAC's input covariances by the last pool; None for exact
            curvature.

    Returns:
        The influences ``[points, layers]``, and what of them is not of all data even if
        all are in the pools, likewise: inputs of the last pool stand for all.
    """
    parts = []
    for pool, share in zip(pools, shares, strict=True):
        scores = scores_of(layers, pool, inputs is None)
        means = scores.mean(0)
        relative = torch.where(means > 0, scores / means - 1, 0.0) / len(scores)
        parts.append(share * traces * relative)
    total = torch.cat(parts)
    of_inputs = torch.zeros_like(total)
    if inputs is not None:
        scale = scale_of_gradients(layers, [inputs], [1.0])
        of_inputs[-len(parts[-1]) :] = traces / scale * inputs.influences
    share_apart = 1 - len(parts[-1]) / len(total)
    return total + of_inputs, share_apart**0.5 * of_inputs


def scores_of(layers: Sequence[Layer], summary: SweepSummary, is_exact: bool) -> Tensor:
    """Compute what stands for the points' contributions, without random numbers.

    Args:
        layers: The layers.
        summary: A pass over the points.
        is_exact: Whether contributions are those to exact curvature, not to tr G: then
            the scores are times the squared length of the input rows, that of a vector
            included.

    Returns:
        The scores ``[points, layers]``.
    """
    assert summary.traces is not None
    scores = summary.traces.double()[:, None].expand(-1, len(layers))
    if not is_exact:
        return scores
    assert summary.squared_inputs is not None and summary.num_rows is not None
    vector = has_vector(layers).to(scores)
    squares = summary.squared_inputs.double() + vector * summary.num_rows
    # layers without input rows have gradient rows alone
    return scores * torch.where(summary.num_rows > 0, squares, 1.0)


def not_told(contributions: Tensor, scores: Tensor) -> Tensor:
    """Take out of contributions what scores tell of them, by least squares.

    Args:
        contributions: Weighted contributions of each point ``[points, layers]``.
        scores: Weighted scores of each point, likewise.

    Returns:
        The rest, likewise.
    """
    terms, scores = contributions.double(), scores.to(contributions.device)
    terms, scores = terms - terms.mean(0), scores - scores.mean(0)
    squares = scores.square().sum(0).clamp(min=torch.finfo(scores.dtype).tiny)
    return terms - scores * ((scores * terms).sum(0) / squares)


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    """Add tensors of one shape."""
    return torch.stack(list(tensors)).sum(0)
