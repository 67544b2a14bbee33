"""From Gaussian outputs to class probabilities, in closed form."""

from __future__ import annotations

from math import pi

from torch import Tensor


def probit_probabilities(mean: Tensor, variance: Tensor) -> Tensor:
    """Approximate the expected softmax of Gaussian outputs.

    The multi-class form of MacKay's probit approximation (MacKay, 1992; Lu, Ie and Sha,
    2020, arXiv 2006.07584).

    Args:
        mean: Means of the outputs ``[..., classes]``.
        variance: Their variances, of the same shape.

    Returns:
        Probabilities ``[..., classes]``.
    """
    return probit_logits(mean, variance).softmax(-1)


def probit_logits(mean: Tensor, variance: Tensor) -> Tensor:
    """Return the logits of :func:`probit_probabilities`.

    Args:
        mean: Means of the outputs ``[..., classes]``.
        variance: Their variances, of the same shape.

    Returns:
        Logits ``[..., classes]``.
    """
    return mean / (1 + pi / 8 * variance).sqrt()
