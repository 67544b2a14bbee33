r"""Moments of many outputs by samples of the parameters, without backward passes.

For a sample :math:`\delta \sim \mathcal N(0, P^{-1})` of the parameters' deviation, the
linearized network's outputs deviate by :math:`J_n \delta`, a Jacobian-vector product:
one pass in forward mode gives it for all outputs of all examples, which costs as much
as about three forward passes. Exact moments take a backward pass for each output.

The samples are the same for all examples. They are drawn in the eigenbasis of P, one at
a time: all of them together would be as large as that many networks. A variance is the
mean of S independent squares, of a relative standard error of :math:`\sqrt{2 / S}`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import sqrt

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from laplace_debiased.curvature.eigenbasis import EigenbasisMatrix, from_eigenbasis
from laplace_debiased.predictive.blocks import Covariance
from laplace_debiased.rows.inputs import Inputs, at_least_single
from laplace_debiased.rows.seeds import mixed_seed
from laplace_debiased.rows.sharing import MATH_ATTENTION, everywhere
from laplace_debiased.rows.substitution import Substitution, run

# with more outputs than that, samples take far less time than backward passes
NUM_SAMPLES, MANY_OUTPUTS = 64, 256


def relative_error(num_samples: int) -> float:
    """Return the relative standard error of a variance by samples."""
    return sqrt(2 / num_samples)


def sampled_change(
    posterior: EigenbasisMatrix, params: Sequence[Tensor], seed: int
) -> list[Tensor]:
    """Draw a deviation of the parameters from their mean.

    Args:
        posterior: Posterior precision.
        params: The parameters, in the order of its blocks.
        seed: Seed of the draw.

    Returns:
        A tensor of each parameter's shape and dtype.
    """
    generator = torch.Generator(device=params[0].device).manual_seed(seed)
    blocks = zip(posterior.eigenvectors, posterior.spectra(), params, strict=True)
    changes = []
    for vectors, precisions, param in blocks:
        noise = torch.randn(
            precisions.shape,
            dtype=precisions.dtype,
            device=precisions.device,
            generator=generator,
        )
        change = from_eigenbasis(noise * precisions.rsqrt(), vectors)
        changes.append(change.reshape(param.shape).to(param.dtype))
    return changes


def output_change(
    model: nn.Module, params: Sequence[Tensor], changes: Sequence[Tensor], X: Inputs
) -> tuple[Tensor, Tensor]:
    """Run a network, and compute by how much its output changes with the parameters.

    Args:
        model: The network.
        params: Some of its parameters.
        changes: A change of each.
        X: Inputs, a tensor or a mapping.

    Returns:
        The output, and the Jacobian-vector product, of the same shape.

    Raises:
        NotImplementedError: If a function of the network has no forward mode.
    """
    with everywhere(MATH_ATTENTION), forward_ad.dual_level():
        duals = {
            id(param): forward_ad.make_dual(param.detach(), change)
            for param, change in zip(params, changes, strict=True)
        }
        with Substitution(duals):
            output, change = forward_ad.unpack_dual(run(model, X))
    return output, torch.zeros_like(output) if change is None else change


class SampledPredictive:
    """Output moments of a linearized network by samples of its parameters.

    It stands for :class:`~laplace_debiased.predictive.moments.LinearizedPredictive`
    where there are many outputs.

    Args:
        model: The network, with output ``[batch, C]``.
        params: The parameters, in the order of the posterior's blocks.
        posterior: Posterior precision.
        num_samples: Number of samples, S.
        seed: Their seed.
        differentiable: Whether gradients flow to the inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Sequence[Tensor],
        posterior: EigenbasisMatrix,
        num_samples: int = NUM_SAMPLES,
        seed: int = 0,
        differentiable: bool = False,
    ):
        self._model, self._params, self._posterior = model, params, posterior
        self._num_samples, self._seed = num_samples, seed
        self._differentiable = differentiable

    def moments(
        self, X: Inputs, batch_size: int, kind: str = "full"
    ) -> tuple[Tensor, Tensor]:
        r"""Estimate mean and covariance of the outputs.

        Variances are without bias. Covariances of different outputs are shrunk by
        :math:`1 / S`, so that they have a Cholesky factor.

        Args:
            X: Inputs, a tensor or a mapping.
            batch_size: Number of examples.
            kind: As in
                :meth:`~laplace_debiased.predictive.moments.LinearizedPredictive.moments`.

        Returns:
            The mean ``[batch, C]``, and the covariance of the kind's shape.

        Raises:
            NotImplementedError: If a function of the network has no forward mode.
        """
        mean, total = torch.empty(0), torch.zeros(())
        for output, change in self.changes(X):
            mean, total = output, total.to(change) + _term(change, kind)
        covariance = total / self._num_samples
        if kind != "diagonal":
            shrinkage = 1 / self._num_samples
            diagonal = torch.diag_embed(covariance.diagonal(dim1=-2, dim2=-1))
            covariance = torch.lerp(covariance, diagonal, shrinkage)
        return mean, covariance.reshape(Covariance(kind).shape(*mean.shape))

    def variances(
        self, X: Inputs, batch_size: int, shifts: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        """Estimate mean and variances of the outputs for several priors.

        Args:
            X: Inputs, a tensor or a mapping.
            batch_size: Number of examples.
            shifts: Numbers that are added to the posterior precision, K of them.

        Returns:
            The mean ``[batch, C]``, and the variances ``[batch, C, K]``.

        Raises:
            NotImplementedError: As in :meth:`moments`.
        """
        own = self._posterior
        mean, variances = torch.empty(0), []
        try:
            for shift in shifts:
                self._posterior = own + torch.as_tensor(shift).to(own.deltas)
                mean, variance = self.moments(X, batch_size, "diagonal")
                variances.append(variance)
        finally:
            self._posterior = own
        return mean, torch.stack(variances, -1)

    def changes(self, X: Inputs) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the output, and its change by each sample.

        Args:
            X: Inputs, a tensor or a mapping.

        Yields:
            Both of the output's shape, the change in the posterior's dtype.
        """
        for number in range(self._num_samples):
            seed = mixed_seed(self._seed, number)
            changes = sampled_change(self._posterior, self._params, seed)
            with torch.set_grad_enabled(self._differentiable):
                output, change = output_change(self._model, self._params, changes, X)
            yield output, at_least_single(change)


def _term(change: Tensor, kind: str) -> Tensor:
    """Return what a sample adds to a covariance ``[batch, C]`` or ``[..., C, C]``."""
    if kind == "diagonal":
        return change.square()
    own = change.flatten() if kind == "joint" else change
    return own[..., :, None] * own[..., None, :]
