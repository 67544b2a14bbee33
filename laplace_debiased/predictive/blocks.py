r"""Share of each block of the posterior in the moments of the outputs.

In the eigenbasis of a block, :math:`P^{-1}` is diagonal, and the rotated Jacobian of
output c is :math:`\tilde J_{nc,ij} = \sum_s \tilde g_{ncsi} \tilde x_{nsj}`, from
rotated gradient rows and input rows, so that

.. math::
    \mathrm{Cov}_{ncd} = \sum_{ij} \tilde J_{nc,ij} \tilde J_{nd,ij} / \lambda_{ij}.

Without weight sharing (one position s) this is :math:`\sum_i \tilde g_{nci}
\tilde g_{ndi} r_{ni}` with :math:`r_{ni} = \sum_j \tilde x_{nj}^2 / \lambda_{ij}`: the
rotated Jacobian is never formed. Otherwise it is formed for one layer at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from laplace_debiased.curvature.bases import rotated
from laplace_debiased.curvature.eigenbasis import EigenbasisMatrix, transposed
from laplace_debiased.curvature.jacobians import jacobians_by_rows, rotated_jacobians
from laplace_debiased.predictive.isotropic import num_equal, pays, residuals, shares
from laplace_debiased.rows.layers import Layer
from laplace_debiased.rows.one_hot import OneHotRows

# what fits into a processor's cache
JACOBIAN_BYTES = 2**22
# examples that a layer's precisions are read for at once
FEW = 8


@dataclass(frozen=True)
class BlockPosterior:
    """One block of the posterior precision.

    Args:
        eigenvectors: ``[U_G, U_A]``, or ``[U_G]`` for a vector.
        precisions: Eigenvalues of the precision ``[d_out, d_in]`` or ``[d_out]``.
    """

    eigenvectors: Sequence[Tensor]
    precisions: Tensor

    @cached_property
    def _variances(self) -> Tensor:
        """``[d_out, d_in]``, with one input for a vector."""
        matrix = self.precisions.reshape(len(self.eigenvectors[0]), -1)
        return matrix.reciprocal()

    @cached_property
    def _num_equal(self) -> int:
        """Number of directions of gradients, the first ones, of equal precisions."""
        return num_equal(self.precisions)

    def _leading(self, count: int) -> BlockPosterior:
        """Return the part of the block without so many first directions."""
        basis, *others = self.eigenvectors
        return BlockPosterior([basis[:, count:], *others], self.precisions[count:])

    def of_rows(self, layer: Layer) -> BlockPosterior:
        """Return the block of the matrix that rows give, ``[d_out, d_in]``.

        Args:
            layer: The layer that the block's parameter belongs to.

        Returns:
            The block, transposed if that is how a layer's matrix is stored.
        """
        if not (layer.is_transposed and self.precisions.ndim == 2):
            return self
        vectors, (precisions,) = transposed(self.eigenvectors, [self.precisions])
        return BlockPosterior(vectors, precisions)

    def rotate_inputs(self, rows: Tensor | OneHotRows) -> Tensor | OneHotRows:
        """Rotate input rows ``[batch, S, groups, d_in]``."""
        basis = self.eigenvectors[1]
        if isinstance(rows, OneHotRows):
            return rows.to(basis.dtype)
        return rotated(rows.to(basis.dtype), basis)

    def covariance(
        self,
        gradients: Tensor,
        inputs: Tensor | OneHotRows | None,
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
            block, rows = self._dense(inputs)
            jacobians = block._scaled_jacobians(gradients, rows)
            flat = jacobians.flatten(0, 1).flatten(1)
            return flat @ flat.T
        if gradients.shape[2:4] == (1, 1) and isinstance(inputs, Tensor):
            return self._without_sharing(gradients, inputs, kind, jacobian_bytes)
        parts = []
        least = 1 if kind == "full" else FEW
        for block, some, rows in self._parts(gradients, inputs, jacobian_bytes, least):
            if kind == "full":
                parts.append(block._full_covariance(some, rows))
            else:
                own = block._weighted(some, rows, [block._variances], jacobian_bytes)
                parts.append(own.squeeze(2))
        return torch.cat(parts)

    def variances(
        self,
        gradients: Tensor,
        inputs: Tensor | OneHotRows | None,
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
        if gradients.shape[2:4] == (1, 1) and isinstance(inputs, Tensor):
            precisions = self.precisions.reshape(len(basis), -1)
            squares = rotated(gradients.flatten(2), basis) ** 2  # [batch, C, d_out]
            lengths = inputs.flatten(1) ** 2  # [batch, d_in]
            of_shifts = [
                _by_output(squares, lengths @ (precisions + shift).reciprocal().T)
                for shift in shifts
            ]
            return torch.stack(of_shifts, 2)
        parts = []
        for block, some, rows in self._parts(gradients, inputs, jacobian_bytes, FEW):
            inverses = [(block.precisions + shift).reciprocal_() for shift in shifts]
            parts.append(block._weighted(some, rows, inverses, jacobian_bytes))
        return torch.cat(parts)

    def _with_inputs(
        self, gradients: Tensor, inputs: Tensor | OneHotRows | None
    ) -> tuple[Tensor, Tensor | OneHotRows]:
        """Give a vector its only input, one, and sum its rows."""
        gradients = gradients.to(self.precisions.dtype)
        if inputs is None:
            gradients = gradients.flatten(3).sum(2)[:, :, None, None]
            inputs = gradients.new_ones(len(gradients), 1, 1, 1)
        return gradients, inputs

    def _dense(self, inputs: Tensor | OneHotRows) -> tuple[BlockPosterior, Tensor]:
        """Return dense input rows, and the part of the block that they have."""
        if isinstance(inputs, Tensor):
            return self, inputs
        rows, numbers = inputs.compressed()
        return BlockPosterior(self.eigenvectors, self.precisions[:, numbers]), rows

    def _parts(
        self,
        gradients: Tensor,
        inputs: Tensor | OneHotRows,
        jacobian_bytes: int,
        least: int = 1,
    ) -> Iterator[tuple[BlockPosterior, Tensor, Tensor]]:
        """Yield as many examples as have no larger Jacobians, or a least number."""
        num_inputs = inputs.shape[3] if isinstance(inputs, Tensor) else inputs.shape[1]
        entries = gradients.shape[1] * len(self.eigenvectors[0]) * num_inputs
        size = max(least, jacobian_bytes // (entries * gradients.element_size()))
        for some, rows in zip(gradients.split(size), inputs.split(size), strict=True):
            block, dense = self._dense(rows)
            yield block, some, dense

    def _without_sharing(
        self, gradients: Tensor, inputs: Tensor, kind: str, some_bytes: int
    ) -> Tensor:
        """Contract Jacobians of rank one, which are never formed."""
        turned = rotated(gradients.flatten(2), self.eigenvectors[0])
        variances = inputs.flatten(1) ** 2 @ self._variances.T  # [batch, d_out]
        if kind == "diagonal":
            return _by_output(turned**2, variances)
        if len(turned) > 1:
            return (turned * variances[:, None]) @ turned.mT
        (rows,) = turned
        covariance = variances.new_empty(len(inputs), len(rows), len(rows))
        size = max(1, some_bytes // (rows.numel() * rows.element_size()))
        for start in range(0, len(inputs), size):
            part = slice(start, start + size)
            covariance[part] = (rows * variances[part, None]) @ rows.T
        return covariance

    def _full_covariance(self, gradients: Tensor, inputs: Tensor) -> Tensor:
        """Compute the covariance of the outputs of some examples."""
        count = self._num_equal
        if not pays(gradients, inputs, count):
            flat = self._scaled_jacobians(gradients, inputs).flatten(2)
            return flat @ flat.mT
        leading = self._leading(count)
        flat = leading._scaled_jacobians(gradients, inputs).flatten(2)
        residual = residuals(gradients, leading.eigenvectors[0])
        weights = self.precisions[0].reciprocal()
        return flat @ flat.mT + shares(residual, inputs, weights, full=True)

    def _weighted(
        self,
        gradients: Tensor,
        inputs: Tensor,
        weights: Sequence[Tensor],
        jacobian_bytes: int,
    ) -> Tensor:
        """Sum the squares of the Jacobians of some examples, by weights.

        Args:
            gradients: As in :meth:`covariance`.
            inputs: As in :meth:`covariance`.
            weights: Weights ``[d_out, d_in]``, K times.
            jacobian_bytes: As in :meth:`covariance`.

        Returns:
            Sums ``[batch, C, K]``.
        """
        count = self._num_equal if pays(gradients, inputs, self._num_equal) else 0
        basis, terms = self.eigenvectors[0][:, count:], []
        for rows, jacobians in jacobians_by_rows(
            gradients, inputs, basis, jacobian_bytes
        ):
            squares = jacobians.square_().flatten(2)
            own = [squares @ matrix[count:][rows].flatten() for matrix in weights]
            terms.append(torch.stack(own, 2))
        if count:
            residual = residuals(gradients, basis)
            own = [shares(residual, inputs, matrix[0]) for matrix in weights]
            terms.append(torch.stack(own, 2))
        return sum(terms[1:], terms[0])

    def _scaled_jacobians(self, gradients: Tensor, inputs: Tensor) -> Tensor:
        """Rotate the Jacobians, and divide by the root of the precision.

        Returns:
            ``[batch, C, d_out, d_in]``.
        """
        basis = self.eigenvectors[0]
        jacobians = rotated_jacobians(gradients, inputs, basis)
        precisions = self.precisions.reshape(len(self.precisions), -1)
        return jacobians.mul_(precisions.rsqrt())


class Moment(Protocol):
    """What is asked of the outputs: the sum of the blocks' shares."""

    @property
    def is_by_output(self) -> bool:
        """Whether each output has its own, without the rows of others."""

    def shape(self, batch_size: int, num_outputs: int) -> tuple[int, ...]:
        """Its shape."""

    def of_block(
        self,
        block: BlockPosterior,
        gradients: Tensor,
        inputs: Tensor | OneHotRows | None,
        jacobian_bytes: int,
    ) -> Tensor:
        """A block's share."""


@dataclass(frozen=True)
class Covariance:
    """See :meth:`BlockPosterior.covariance`."""

    kind: str

    @property
    def is_by_output(self) -> bool:
        """See :attr:`Moment.is_by_output`."""
        return self.kind == "diagonal"

    def shape(self, batch_size: int, num_outputs: int) -> tuple[int, ...]:
        """See :meth:`Moment.shape`."""
        return {
            "full": (batch_size, num_outputs, num_outputs),
            "diagonal": (batch_size, num_outputs),
            "joint": 2 * (batch_size * num_outputs,),
        }[self.kind]

    def of_block(
        self,
        block: BlockPosterior,
        gradients: Tensor,
        inputs: Tensor | OneHotRows | None,
        jacobian_bytes: int,
    ) -> Tensor:
        """See :meth:`Moment.of_block`."""
        return block.covariance(gradients, inputs, self.kind, jacobian_bytes)


@dataclass(frozen=True)
class Variances:
    """See :meth:`BlockPosterior.variances`."""

    shifts: tuple[float, ...]
    is_by_output: ClassVar[bool] = True

    def shape(self, batch_size: int, num_outputs: int) -> tuple[int, ...]:
        """See :meth:`Moment.shape`."""
        return batch_size, num_outputs, len(self.shifts)

    def of_block(
        self,
        block: BlockPosterior,
        gradients: Tensor,
        inputs: Tensor | OneHotRows | None,
        jacobian_bytes: int,
    ) -> Tensor:
        """See :meth:`Moment.of_block`."""
        return block.variances(gradients, inputs, self.shifts, jacobian_bytes)


def _by_output(squares: Tensor, variances: Tensor) -> Tensor:
    """Sum variances ``[batch, d_out]``, weighted by squares ``[batch, C, d_out]``.

    Squares ``[1, C, d_out]`` of all examples make one product for many of them.
    """
    if len(squares) > 1:
        return (variances[:, None] @ squares.mT).squeeze(1)
    return variances @ squares[0].T


def block_posteriors(posterior: EigenbasisMatrix) -> list[BlockPosterior]:
    """Split a posterior precision into its blocks."""
    return [
        BlockPosterior(vectors, precisions)
        for vectors, precisions in zip(
            posterior.eigenvectors, posterior.spectra(), strict=True
        )
    ]
