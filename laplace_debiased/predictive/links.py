"""From Gaussian outputs to probabilities, in closed form."""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import pi

import torch
from torch import Tensor
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    one_hot,
    softplus,
)


class Link(ABC):
    """How probabilities are made of a network's outputs, which are their logits."""

    @abstractmethod
    def probabilities(self, logits: Tensor, dim: int = -1) -> Tensor:
        """Compute the probabilities.

        Args:
            logits: Logits of any shape.
            dim: Their axis of classes or labels.

        Returns:
            Probabilities of the same shape.
        """

    @abstractmethod
    def indicators(self, y: Tensor, num_outputs: int) -> Tensor:
        """Turn targets into probabilities.

        Args:
            y: Targets as the loss takes them.
            num_outputs: Number of outputs.

        Returns:
            The probabilities ``[points, outputs]``.
        """

    @abstractmethod
    def losses(self, logits: Tensor, targets: Tensor, dim: int = -1) -> Tensor:
        """Compute each point's negative log likelihood.

        Args:
            logits: Logits.
            targets: Probabilities of the same shape.
            dim: Their axis of classes or labels.

        Returns:
            The sum over that axis.
        """

    @abstractmethod
    def entropy(self, probabilities: Tensor) -> Tensor:
        """Compute the entropy in nats of each variable.

        Args:
            probabilities: Probabilities ``[..., outputs]``.

        Returns:
            That of the class ``[...]``, or of each label ``[..., labels]``.
        """

    @abstractmethod
    def with_entropies(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Compute probabilities, and their entropy from the logits.

        Args:
            logits: Logits ``[..., outputs]``.

        Returns:
            Probabilities ``[..., outputs]``, and entropies as :meth:`entropy`.
        """

    @abstractmethod
    def num_together(self, num_outputs: int) -> int:
        """Return how many outputs the probabilities of a variable depend on."""

    def probit(self, mean: Tensor, variance: Tensor) -> Tensor:
        """Approximate the expected probabilities of Gaussian outputs.

        Args:
            mean: Means of the outputs ``[..., outputs]``.
            variance: Their variances, of the same shape.

        Returns:
            Probabilities of the same shape.
        """
        return self.probabilities(probit_logits(mean, variance))


class Softmax(Link):
    """Classes that exclude each other."""

    def probabilities(self, logits: Tensor, dim: int = -1) -> Tensor:
        """See :meth:`Link.probabilities`."""
        return logits.softmax(dim)

    def indicators(self, y: Tensor, num_outputs: int) -> Tensor:
        """See :meth:`Link.indicators`."""
        return one_hot(y, num_outputs)

    def losses(self, logits: Tensor, targets: Tensor, dim: int = -1) -> Tensor:
        """See :meth:`Link.losses`."""
        return -(targets * logits.log_softmax(dim)).sum(dim)

    def entropy(self, probabilities: Tensor) -> Tensor:
        """See :meth:`Link.entropy`."""
        return torch.special.entr(probabilities).sum(-1)

    def with_entropies(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Link.with_entropies`."""
        logs = logits.log_softmax(-1)
        p = logs.exp()
        return p, -(p * logs).sum(-1)

    def num_together(self, num_outputs: int) -> int:
        """See :meth:`Link.num_together`."""
        return num_outputs


class Sigmoid(Link):
    """Labels that are independent of each other, given the outputs."""

    def probabilities(self, logits: Tensor, dim: int = -1) -> Tensor:  # noqa: ARG002
        """See :meth:`Link.probabilities`."""
        return logits.sigmoid()

    def indicators(self, y: Tensor, num_outputs: int) -> Tensor:  # noqa: ARG002
        """See :meth:`Link.indicators`."""
        return y

    def losses(self, logits: Tensor, targets: Tensor, dim: int = -1) -> Tensor:
        """See :meth:`Link.losses`."""
        losses = binary_cross_entropy_with_logits(logits, targets, reduction="none")
        return losses.sum(dim)

    def entropy(self, probabilities: Tensor) -> Tensor:
        """See :meth:`Link.entropy`."""
        entr = torch.special.entr
        return entr(probabilities) + entr(1 - probabilities)

    def with_entropies(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Link.with_entropies`."""
        size = logits.abs()
        entropies = softplus(-size) + size * (-size).sigmoid()
        return logits.sigmoid(), entropies

    def num_together(self, num_outputs: int) -> int:  # noqa: ARG002
        """See :meth:`Link.num_together`."""
        return 1


SOFTMAX, SIGMOID = Softmax(), Sigmoid()


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
    return SOFTMAX.probit(mean, variance)


def probit_logits(mean: Tensor, variance: Tensor) -> Tensor:
    """Return the logits of MacKay's approximation (:func:`probit_probabilities`).

    Args:
        mean: Means of the outputs ``[..., outputs]``.
        variance: Their variances, of the same shape.

    Returns:
        Logits ``[..., outputs]``.
    """
    return mean / (1 + pi / 8 * variance).sqrt()
