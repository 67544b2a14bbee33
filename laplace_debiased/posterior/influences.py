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
    vector = has_vector(layers).to(inputs[0].traces)
    A = sum_of([share * own.traces for share, own in zip(shares, inputs, strict=True)])
    G = sum_of([own.double().sum(0) for own in gradients])
    return torch.cat(
        [
            (A + vector) * own + G * share * scale.influences
            for own, scale, share in zip(gradients, inputs, shares, strict=True)
        ]
    )


def of_pools(
    layers: Sequence[Layer],
    traces: Tensor,
    pools: Sequence[SweepSummary],
    shares: Sequence[float],
    inputs: InputScale | None,
) -> Tensor:
    """Estimate the influences of the points of pools that others are drawn from.

    A point's curvature is not known without a backward pass. Its score stands for it;
    that of exact curvature for the score times the squared length of its input rows.

    Args:
        layers: The layers.
        traces: Trace of each layer's curvature ``[layers]``.
        pools: Passes over the pools of each fold.
        shares: Each fold's share.
        inputs: Scale of K-FAC's input covariances by the last pool; None for exact
            curvature.

    Returns:
        The influences ``[points, layers]``.
    """
    vector = has_vector(layers).to(traces)
    parts = []
    for pool, share in zip(pools, shares, strict=True):
        assert pool.traces is not None
        scores = pool.traces.double()[:, None].expand(-1, len(traces))
        if inputs is None:
            scores = scores * _squared_lengths(pool, vector)
        means = scores.mean(0)
        relative = torch.where(means > 0, scores / means - 1, 0.0) / len(scores)
        parts.append(share * traces * relative)
    if inputs is not None:
        scale = inputs.traces + vector
        parts[-1] = parts[-1] + traces / scale * inputs.influences
    return torch.cat(parts)


def _squared_lengths(pool: SweepSummary, vector: Tensor) -> Tensor:
    """Squared lengths of the input rows, that of a vector included."""
    assert pool.squared_inputs is not None and pool.num_rows is not None
    squares = pool.squared_inputs.double() + vector * pool.num_rows
    # layers without input rows have gradient rows alone
    return torch.where(pool.num_rows > 0, squares, 1.0)


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    """Add tensors of one shape."""
    return torch.stack(list(tensors)).sum(0)
