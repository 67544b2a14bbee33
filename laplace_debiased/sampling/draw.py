"""Draw points with probabilities that grow with their scores."""

from __future__ import annotations

import torch
from torch import Tensor

from laplace_debiased.rows.checks import check_between


def draw_points(
    scores: Tensor,
    num_points: int,
    floor: float = 0.1,
    seed: int = 0,
    strata: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Draw points with probabilities that grow with their scores.

    Inclusion probabilities are :math:`\pi_n \propto (1 - f) s_n / \sum s + f / M`,
    capped at one, and the draw is systematic: exactly ``num_points`` distinct points,
    spread evenly over strata and scores. With the weights :math:`1 / \pi_n`, weighted
    sums over the points are unbiased estimates of sums over the pool (Horvitz and
    Thompson, 1952).

    Args:
        scores: Non-negative scores ``[M]``.
        num_points: Number of points to draw, at most M.
        floor: Share f of the uniform distribution, which bounds the weights.
        seed: Seed of the draw.
        strata: Number of each point's stratum ``[M]``, such as its class: each stratum
            gets points in proportion to its scores. None for one stratum.

    Returns:
        Sorted positions in the pool, and their weights, both ``[num_points]``.

    Raises:
        ValueError: If scores are negative or not finite, there are fewer of them than
            points to draw, or the floor is out of range.

    Example:
        Half of all scores are those of the first point, which is always drawn:

        >>> import torch
        >>> from laplace_debiased import draw_points
        >>> scores = torch.tensor([9.0, 1.0, 3.0, 1.0, 4.0])
        >>> draws = [draw_points(scores, 3, seed=seed) for seed in range(1000)]
        >>> {positions[0].item() for positions, _ in draws}
        {0}
        >>> sums = [(weights * scores[positions]).sum() for positions, weights in draws]
        >>> abs(torch.stack(sums).mean() - scores.sum()) < 0.2
        tensor(True)
    """
    check_between("floor", floor, "(0, 1]")
    if not (scores.isfinite() & (scores >= 0)).all():
        raise ValueError("`scores` must be finite and at least zero.")
    if strata is not None and strata.shape != scores.shape:
        raise ValueError(
            f"`strata` must have the shape of `scores`, {tuple(scores.shape)}, got "
            f"{tuple(strata.shape)}."
        )
    if not 0 < num_points <= len(scores):
        raise ValueError(
            f"`num_points` must lie in 1..{len(scores)}, the number of scores, got "
            f"{num_points}."
        )
    probabilities = inclusion_probabilities(scores.double().cpu(), num_points, floor)
    order = probabilities.argsort(stable=True)
    if strata is not None:
        order = order[strata.cpu()[order].argsort(stable=True)]
    generator = torch.Generator().manual_seed(int(seed))
    ticks = torch.arange(num_points, dtype=torch.float64)
    ticks += torch.rand(1, generator=generator, dtype=torch.float64)
    ends = probabilities[order].cumsum(0)
    ends *= num_points / ends[-1].clone()
    places = torch.searchsorted(ends, ticks, right=True)
    # by rounding, the last tick may lie at the very end
    positions = order[places.clamp(max=len(ends) - 1)].sort()[0]
    return positions, probabilities[positions].reciprocal()


def inclusion_probabilities(scores: Tensor, num_points: int, floor: float) -> Tensor:
    """Scale scores to probabilities that add up to the number of points.

    Args:
        scores: Non-negative scores ``[M]``.
        num_points: Number of points to draw.
        floor: Share of the uniform distribution.

    Returns:
        Probabilities ``[M]``, none above one.
    """
    uniform = torch.full_like(scores, 1 / len(scores))
    total = scores.sum()
    mixture = (1 - floor) * scores / total + floor * uniform if total > 0 else uniform
    certain = torch.zeros_like(scores, dtype=torch.bool)
    while True:
        rest = num_points - int(certain.sum())
        scaled = mixture * (rest / mixture[~certain].sum())
        probabilities = torch.where(certain, 1.0, scaled)
        above = ~certain & (probabilities > 1)
        if not above.any():
            return probabilities
        certain |= above
