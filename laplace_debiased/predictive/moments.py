r"""Moments of the linearized network's output, without Jacobians.

With the Jacobian :math:`J_n` of the outputs of example n, the output covariance is
:math:`J_n P^{-1} J_n^\top`. In the eigenbasis of a block, :math:`P^{-1}` is diagonal,
and the rotated Jacobian of output c is :math:`\tilde J_{nc,ij} = \sum_s \tilde g_{ncsi}
\tilde x_{nsj}`, from rotated gradient rows and input rows, so that

.. math::
    \mathrm{Cov}_{ncd} = \sum_{ij} \tilde J_{nc,ij} \tilde J_{nd,ij} / \lambda_{ij}.

Without weight sharing (one position s) this is :math:`\sum_i \tilde g_{nci}
\tilde g_{ndi} r_{ni}` with :math:`r_{ni} = \sum_j \tilde x_{nj}^2 / \lambda_{ij}`: the
rotated Jacobian is never formed. Otherwise it is formed for one layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from laplace.utils import select_rows
from torch import Tensor, nn

from laplace_debiased.curvature.eigenbasis import EigenbasisMatrix
from laplace_debiased.rows.inputs import Inputs
from laplace_debiased.rows.layers import Layer
from laplace_debiased.rows.linearization import (
    contract_positions,
    linearize,
    rows_per_example,
)
from laplace_debiased.rows.substitution import run

# from a block's posterior, gradient rows and rotated input rows to its share
Contraction = Callable[..., Tensor]
KINDS = ("full", "diagonal", "joint")
# the memory allocator uses the same pages for all Jacobians that are no larger
JACOBIAN_BYTES = 2**24


@dataclass(frozen=True)
class BlockPosterior:
    """One block of the posterior precision.

    Args:
        eigenvectors: ``[U_G, U_A]``, or ``[U_G]`` for a vector.
        precisions: Eigenvalues of the precision ``[d_out, d_in]`` or ``[d_out]``.
    """

    eigenvectors: Sequence[Tensor]
    precisions: Tensor

    def rotate_inputs(self, rows: Tensor) -> Tensor:
        """Rotate input rows ``[batch, S, groups, d_in]``."""
        basis = self.eigenvectors[1]
        return rows.to(basis.dtype) @ basis

    def covariance(
        self,
        gradients: Tensor,
        inputs: Tensor | None,
        kind: str,
        jacobian_bytes: int = JACOBIAN_BYTES,
    ) -> Tensor:
        """Compute this block's share of the output covariance.

        Args:
            gradients: Gradient rows of each output ``[batch, C, S, groups, d_out /
                groups]``, or ``[1, C, ...]`` if they are the same for all examples.
            inputs: Rotated input rows ``[batch, S, groups, d_in]``; None for a vector,
                whose only input is one.
            kind: ``"full"``, ``"diagonal"`` or ``"joint"``.
            jacobian_bytes: What the rotated Jacobians of some examples may take, but
                for a single example's and a joint covariance's.

        Returns:
            ``[batch, C, C]``, ``[batch, C]`` or ``[batch * C, batch * C]``.
        """
        gradients, inputs = self._with_inputs(gradients, inputs)
        if kind == "joint":
            jacobians = self._scaled_jacobians(gradients, inputs)
            flat = jacobians.flatten(0, 1).flatten(1)
            return flat @ flat.T
        if gradients.shape[2:4] == (1, 1):
            return self._without_sharing(gradients, inputs, kind, jacobian_bytes)
        parts = self._parts(gradients, inputs, jacobian_bytes)
        return torch.cat([self._with_sharing(*part, kind) for part in parts])

    def variances(
        self,
        gradients: Tensor,
        inputs: Tensor | None,
        shifts: Sequence[float],
        jacobian_bytes: int = JACOBIAN_BYTES,
    ) -> Tensor:
        """Compute this block's share of the output variances for several priors.

        Args:
            gradients: As in :meth:`covariance`.
            inputs: As in :meth:`covariance`.
            shifts: Numbers that are added to the precisions, K of them.
            jacobian_bytes: As in :meth:`covariance`.

        Returns:
            Variances ``[batch, C, K]``.
        """
        gradients, inputs = self._with_inputs(gradients, inputs)
        basis = self.eigenvectors[0]
        precisions = self.precisions.reshape(len(basis), -1)
        if gradients.shape[2:4] == (1, 1):
            squares = (gradients.flatten(2) @ basis) ** 2  # [batch, C, d_out]
            lengths = inputs.flatten(1) ** 2  # [batch, d_in]
            of_shifts = [
                squares @ (lengths @ (precisions + shift).reciprocal().T)[:, :, None]
                for shift in shifts
            ]
            return torch.cat(of_shifts, 2)
        parts = []
        for some, rows in self._parts(gradients, inputs, jacobian_bytes):
            squares = rotated_jacobians(some, rows, basis).square_().flatten(2)
            of_shifts = [
                squares @ (precisions + shift).reciprocal_().flatten()
                for shift in shifts
            ]
            parts.append(torch.stack(of_shifts, 2))
        return torch.cat(parts)

    def _with_inputs(
        self, gradients: Tensor, inputs: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Give a vector its only input, one, and sum its rows."""
        gradients = gradients.to(self.precisions.dtype)
        if inputs is None:
            gradients = gradients.flatten(3).sum(2)[:, :, None, None]
            inputs = gradients.new_ones(len(gradients), 1, 1, 1)
        return gradients, inputs

    def _parts(
        self, gradients: Tensor, inputs: Tensor, jacobian_bytes: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield as many examples as have no larger Jacobians."""
        entries = gradients.shape[1] * self.precisions.numel()
        size = max(1, jacobian_bytes // (entries * gradients.element_size()))
        return zip(gradients.split(size), inputs.split(size), strict=True)

    def _without_sharing(
        self, gradients: Tensor, inputs: Tensor, kind: str, some_bytes: int
    ) -> Tensor:
        """Contract Jacobians of rank one, which are never formed."""
        rotated = gradients.flatten(2) @ self.eigenvectors[0]
        precisions = self.precisions.reshape(rotated.shape[2], -1)
        variances = (inputs.flatten(1) ** 2 @ precisions.reciprocal().T)[:, None]
        if len(rotated) > 1:
            if kind == "diagonal":
                return (variances @ rotated.mT**2).squeeze(1)
            return (rotated * variances) @ rotated.mT
        # the same gradients for all examples make one product for many of them
        (rows,) = rotated
        if kind == "diagonal":
            return variances.squeeze(1) @ rows.T**2
        covariance = variances.new_empty(len(inputs), len(rows), len(rows))
        size = max(1, some_bytes // (rows.numel() * rows.element_size()))
        for start in range(0, len(inputs), size):
            part = slice(start, start + size)
            covariance[part] = (rows * variances[part]) @ rows.T
        return covariance

    def _with_sharing(self, gradients: Tensor, inputs: Tensor, kind: str) -> Tensor:
        """Contract the Jacobians of some examples."""
        flat = self._scaled_jacobians(gradients, inputs).flatten(2)
        # [batch, C, d_out * d_in], contracted over the last
        return flat.square().sum(2) if kind == "diagonal" else flat @ flat.mT

    def _scaled_jacobians(self, gradients: Tensor, inputs: Tensor) -> Tensor:
        """Rotate the Jacobians, and divide by the root of the precision.

        Returns:
            ``[batch, C, d_out, d_in]``.
        """
        basis = self.eigenvectors[0]
        jacobians = rotated_jacobians(gradients, inputs, basis)
        return jacobians.mul_(self.precisions.reshape(len(basis), -1).rsqrt())


def rotated_jacobians(gradients: Tensor, inputs: Tensor, basis: Tensor) -> Tensor:
    """Rotate the Jacobian in a layer's weight into its eigenbasis.

    Args:
        gradients: Gradient rows ``[batch, C, S, groups, d_out / groups]``.
        inputs: Rotated input rows ``[batch, S, groups, d_in]``.
        basis: Eigenvectors for the gradients ``[d_out, d_out]``.

    Returns:
        The Jacobian ``[batch, C, d_out, d_in]``.
    """
    _, positions, num_groups, d_in = inputs.shape
    if num_groups > 1 or positions > d_in:
        return basis.T @ contract_positions(gradients, inputs)
    rotated = gradients.flatten(0, 3) @ basis  # a single matrix product
    return contract_positions(rotated.view(gradients.shape), inputs)


class LinearizedPredictive:
    """Output moments of a network that is linearized in some of its parameters.

    Args:
        model: The network, with output ``[batch, C]``.
        params: The parameters, in the order of the posterior's blocks.
        layers: The layers that they are in.
        posterior: Posterior precision.
        num_outputs: Number of network outputs, C.
        example_size: Number of entries in the input of an example that the layers were
            found with: examples of other sizes have as many more rows.
        memory_limit: Bytes that the rows of a chunk of examples, and the rotated
            Jacobians of some of them in one layer, may take. The examples of a joint
            covariance are not chunked.
        differentiable: Whether gradients flow to the inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Sequence[Tensor],
        layers: Sequence[Layer],
        posterior: EigenbasisMatrix,
        num_outputs: int,
        example_size: int,
        memory_limit: int = 2**30,
        differentiable: bool = False,
    ):
        self._model, self._params, self._layers = model, params, layers
        posteriors = block_posteriors(posterior)
        self._blocks = [
            (layer, position == layer.matrix, posteriors[position])
            for layer in layers
            for position in layer.parameters
        ]
        self._dtype = posteriors[0].precisions.dtype
        self._num_outputs, self._example_size = num_outputs, example_size
        self._memory_limit = memory_limit
        self._jacobian_bytes = min(JACOBIAN_BYTES, memory_limit // 4)
        self._differentiable = differentiable

    def moments(
        self, X: Inputs, batch_size: int, kind: str = "full"
    ) -> tuple[Tensor, Tensor]:
        """Compute mean and covariance of the outputs.

        Args:
            X: Inputs, a tensor or a mapping.
            batch_size: Number of examples.
            kind: ``"full"`` (of each example's outputs), ``"diagonal"`` (their
                variances) or ``"joint"`` (of all examples' outputs).

        Returns:
            The mean ``[batch, C]``, and the covariance ``[batch, C, C]``,
            ``[batch, C]`` or ``[batch * C, batch * C]``, in the posterior's dtype.

        Raises:
            ValueError: If the network's output is not a matrix, or a layer cannot be
                recorded.
        """
        if batch_size == 0:
            return self._of_no_examples(X, kind)
        contract = partial(BlockPosterior.covariance, kind=kind)
        if kind == "joint":
            return self._chunk(X, batch_size, contract)
        return self._chunks(X, batch_size, contract)

    def variances(
        self, X: Inputs, batch_size: int, shifts: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        """Compute mean and variances of the outputs for several priors, in one pass.

        Args:
            X: Inputs, a tensor or a mapping.
            batch_size: Number of examples, at least one.
            shifts: Numbers that are added to the posterior precision, K of them.

        Returns:
            The mean ``[batch, C]``, and the variances ``[batch, C, K]``.

        Raises:
            ValueError: As in :meth:`moments`.
        """
        contract = partial(BlockPosterior.variances, shifts=shifts)
        return self._chunks(X, batch_size, contract)

    def _chunks(
        self, X: Inputs, batch_size: int, contract: Contraction
    ) -> tuple[Tensor, Tensor]:
        size = self._chunk_size(X, batch_size)
        if size >= batch_size:
            return self._chunk(X, batch_size, contract)
        chunks = [
            self._chunk(select_rows(X, indices, batch_size), len(indices), contract)
            for indices in torch.arange(batch_size).split(size)
        ]
        means, covariances = zip(*chunks, strict=True)
        return torch.cat(means), torch.cat(covariances)

    def _chunk(
        self, X: Inputs, batch_size: int, contract: Contraction
    ) -> tuple[Tensor, Tensor]:
        linear = linearize(
            self._model,
            self._params,
            self._layers,
            X,
            batch_size,
            self._differentiable,
        )
        covariances = [
            contract(
                posterior,
                linear.gradients[layer.name],
                posterior.rotate_inputs(linear.inputs.pop(layer.name))
                if is_matrix
                else None,
                jacobian_bytes=self._jacobian_bytes,
            )
            for layer, is_matrix, posterior in self._blocks
            if layer.name in linear.gradients
        ]
        covariance = sum(covariances, self._zeros(batch_size, kind, linear.output))
        if self._differentiable:
            return linear.output, covariance
        return linear.output.detach(), covariance.detach()

    @torch.no_grad()
    def _of_no_examples(self, X: Inputs, kind: str) -> tuple[Tensor, Tensor]:
        """Return empty moments, for which no rows can be recorded."""
        output = run(self._model, X)
        return output, self._zeros(0, kind, output)

    def _zeros(self, batch_size: int, kind: str, output: Tensor) -> Tensor:
        count = output.shape[1]
        shapes = {
            "full": (batch_size, count, count),
            "diagonal": (batch_size, count),
            "joint": 2 * (batch_size * count,),
        }
        return output.new_zeros(shapes[kind], dtype=self._dtype)

    def _chunk_size(self, X: Inputs, batch_size: int) -> int:
        """Tell how many examples fit into the memory limit."""
        count, entry = self._num_outputs, self._dtype.itemsize
        scale = max(1.0, _example_size(X, batch_size) / self._example_size)
        entries = scale * (rows_per_example(self._layers, count) + count**2)
        # with a single position, Jacobians are never formed
        shared = [
            posterior.precisions.numel()
            for layer, is_matrix, posterior in self._blocks
            if is_matrix and layer.num_positions * layer.groups > 1
        ]
        largest = max(shared, default=0)
        jacobians = max(self._jacobian_bytes, entry * count * largest)
        # the transpose comes on top of the Jacobians themselves
        available = self._memory_limit - 2 * jacobians
        return max(1, int(available // (entry * entries)))


def _example_size(X: Inputs, batch_size: int) -> int:
    """Return the number of entries in the input of an example."""
    values = X.values() if isinstance(X, MutableMapping) else [X]
    rows = [v for v in values if isinstance(v, Tensor) and len(v) == batch_size]
    return sum(value[0].numel() for value in rows)


def block_posteriors(posterior: EigenbasisMatrix) -> list[BlockPosterior]:
    """Split a posterior precision into its blocks."""
    return [
        BlockPosterior(vectors, precisions)
        for vectors, precisions in zip(
            posterior.eigenvectors, posterior.spectra(), strict=True
        )
    ]
