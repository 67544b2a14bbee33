"""Split conformal prediction from given probabilities (Vovk et al., 2005).

By hand: MAPIE takes estimators of scikit-learn and refuses small samples, TorchCP needs
graph networks and compiled sorting, and crepes changes the process's warning filters.
"""

from __future__ import annotations

from math import ceil, inf

from torch import Tensor

from laplace_debiased.rows.checks import check_between


def conformal_threshold(scores: Tensor, coverage: float) -> float:
    """Compute what a further score stays below, with a probability.

    The scores and the further one must be exchangeable.

    Args:
        scores: Scores ``[points]``.
        coverage: The probability, in (0, 1).

    Returns:
        The threshold, itself included; infinite where there are too few scores.

    Raises:
        ValueError: If the probability is out of range.
    """
    check_between("coverage", coverage, "(0, 1)")
    rank = ceil((len(scores) + 1) * coverage - 1e-9)
    if rank > len(scores):
        return inf
    return scores.double().kthvalue(rank).values.item()
