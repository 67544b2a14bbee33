"""Predictions of the linearized network by the probit approximation.

At many prior precisions at once: the posteriors share an eigenbasis, and so a network's
rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, pi

import torch
from laplace import KronLaplace
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, nll_loss

from laplace_debiased import EigenbasisMatrix
from shared.internals import output_variances
from shared.problems import Problem

PRIORS = (1.0, 10.0, 31.6, 100.0, 1000.0)
# small enough for the memory allocator to use the same pages again
_TEST_BATCH_SIZE = 20


@torch.no_grad()
def glm_probabilities(
    posteriors: Sequence[tuple[EigenbasisMatrix, Sequence[float]]],
    model: nn.Module,
    inputs: Tensor,
) -> list[Tensor]:
    """Predict by several posteriors of a network, which is linearized only once.

    Args:
        posteriors: Curvature without prior, and prior precisions of each.
        model: The network, all parameters of which are in the posteriors.
        inputs: Test images.

    Returns:
        Probabilities ``[priors, points, classes]`` of each posterior.
    """
    chunks = []
    for X in inputs.split(_TEST_BATCH_SIZE):
        logits, variances = output_variances(model, X, posteriors)
        chunks.append(
            [(logits / (1 + pi / 8 * v).sqrt()).softmax(-1) for v in variances]
        )
    return [torch.cat(parts, 1) for parts in zip(*chunks, strict=True)]


def nlls(
    problem: Problem,
    curvatures: Sequence[EigenbasisMatrix],
    priors: Sequence[float] = PRIORS,
) -> list[list[float]]:
    """Compute the test NLL of each posterior at each prior precision.

    Args:
        problem: Network and test points.
        curvatures: The curvatures without prior.
        priors: Prior precisions.

    Returns:
        The NLLs of each posterior.
    """
    posteriors = [(curvature, priors) for curvature in curvatures]
    predictions = glm_probabilities(posteriors, problem.model, problem.inputs)
    return [
        [nll_loss(p.log(), problem.labels).item() for p in of_one]
        for of_one in predictions
    ]


def scaled_temperature(outputs: Tensor, y: Tensor) -> float:
    """Choose the temperature of temperature scaling (Guo et al., 2017), without prior.

    Args:
        outputs: The network's outputs ``[points, classes]``.
        y: Classes ``[points]``.

    Returns:
        The temperature.
    """

    def objective(log_temperature: float) -> float:
        return cross_entropy(outputs / exp(log_temperature), y).item()

    return exp(minimize_scalar(objective, bounds=(-2.5, 2.5), method="bounded").x)


def chosen_prior(la: KronLaplace) -> float:
    """Choose the prior precision by the marginal likelihood, to full precision."""

    @torch.no_grad()
    def objective(log_prior: float) -> float:
        prior = torch.tensor([log_prior]).exp()
        return -la.log_marginal_likelihood(prior_precision=prior).item()

    return exp(minimize_scalar(objective, bounds=(-5, 10), method="bounded").x)
