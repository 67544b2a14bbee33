r"""Moments of the linearized network's output, without Jacobians.

With the Jacobian :math:`J_n` of the outputs of example n, the output covariance is
:math:`J_n P^{-1} J_n^\top`: the sum of the blocks' shares
(:mod:`~laplace_debiased.predictive.blocks`).
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence

import torch
from torch import Tensor, nn

from laplace_debiased.curvature.eigenbasis import EigenbasisMatrix
from laplace_debiased.predictive.blocks import (
    JACOBIAN_BYTES,
    Covariance,
    Moment,
    Variances,
    block_posteriors,
)
from laplace_debiased.rows.batches import select_rows
from laplace_debiased.rows.chunks import at_once
from laplace_debiased.rows.inputs import Inputs
from laplace_debiased.rows.layers import Layer
from laplace_debiased.rows.linearization import linearize, rows_per_example
from laplace_debiased.rows.one_hot import OneHotRows
from laplace_debiased.rows.substitution import run

# rows of a chunk, which the memory allocator uses again for the next one; and examples
# that a network runs on without waste
ROW_BYTES, MANY = 2**26, 32


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
            (layer, position == layer.matrix, posteriors[position].of_rows(layer))
            for layer in layers
            for position in layer.parameters
        ]
        self._bases = {
            layer.name: posterior.eigenvectors[1]
            for layer, is_matrix, posterior in self._blocks
            if is_matrix
        }
        self._dtype = posteriors[0].precisions.dtype
        self._num_outputs, self._example_size = num_outputs, example_size
        self._memory_limit = memory_limit
        self._device = posteriors[0].precisions.device
        some = at_once(JACOBIAN_BYTES, self._device)
        self._jacobian_bytes = min(some, memory_limit // 4)
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
        covariance = Covariance(kind)
        if kind == "joint":
            return self._chunk(X, batch_size, covariance, self._num_outputs)
        return self._chunks(X, batch_size, covariance)

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
        return self._chunks(X, batch_size, Variances(tuple(shifts)))

    def _chunks(
        self, X: Inputs, batch_size: int, moment: Moment
    ) -> tuple[Tensor, Tensor]:
        size, outputs = self._sizes(X, batch_size, moment)
        if size >= batch_size:
            return self._chunk(X, batch_size, moment, outputs)
        chunks = [
            self._chunk(
                select_rows(X, indices, batch_size), len(indices), moment, outputs
            )
            for indices in torch.arange(batch_size).split(size)
        ]
        means, covariances = zip(*chunks, strict=True)
        return torch.cat(means), torch.cat(covariances)

    def _chunk(
        self, X: Inputs, batch_size: int, moment: Moment, outputs: int
    ) -> tuple[Tensor, Tensor]:
        """Compute moments of some examples, by the rows of so many outputs at once."""
        linear = linearize(
            self._model,
            self._params,
            self._layers,
            X,
            batch_size,
            self._differentiable,
            bases=self._bases,
        )
        shares = [
            self._share(moment, gradients, linear.inputs, linear.output[:, some])
            for some, gradients in linear.backward(outputs)
        ]
        covariance = torch.cat(shares, 1) if len(shares) > 1 else shares[0]
        if self._differentiable:
            return linear.output, covariance
        return linear.output.detach(), covariance.detach()

    def _share(
        self,
        moment: Moment,
        gradients: dict[str, Tensor],
        inputs: dict[str, Tensor | OneHotRows],
        output: Tensor,
    ) -> Tensor:
        """Add the shares of all blocks in the moment of some outputs."""
        shares = [
            moment.of_block(
                posterior,
                gradients[layer.name],
                inputs[layer.name] if is_matrix else None,
                self._jacobian_bytes,
            )
            for layer, is_matrix, posterior in self._blocks
            # layers that a batch does not use have no part in it
            if layer.name in gradients
        ]
        return sum(shares, self._zeros(moment, output))

    @torch.no_grad()
    def _of_no_examples(self, X: Inputs, kind: str) -> tuple[Tensor, Tensor]:
        """Return empty moments, for which no rows can be recorded."""
        output = run(self._model, X)
        return output, self._zeros(Covariance(kind), output)

    def _zeros(self, moment: Moment, output: Tensor) -> Tensor:
        return output.new_zeros(moment.shape(*output.shape), dtype=self._dtype)

    def _sizes(self, X: Inputs, batch_size: int, moment: Moment) -> tuple[int, int]:
        """Tell how many examples, and outputs of them, have their rows at once."""
        if not moment.is_by_output:
            return self._chunk_size(X, batch_size), self._num_outputs
        of_rows = min(at_once(ROW_BYTES, self._device), self._memory_limit // 2)
        each = self._scale(X, batch_size) * rows_per_example(self._layers, 1)
        examples = min(
            batch_size,
            self._chunk_size(X, batch_size, num_outputs=1),
            max(MANY, int(of_rows // (each * self._dtype.itemsize))),
        )
        outputs = int(of_rows // (examples * each * self._dtype.itemsize))
        return examples, min(max(1, outputs), self._num_outputs)

    def _scale(self, X: Inputs, batch_size: int) -> float:
        """Tell how much larger examples are than those that the layers are known of."""
        return max(1.0, _example_size(X, batch_size) / self._example_size)

    def _chunk_size(
        self, X: Inputs, batch_size: int, num_outputs: int | None = None
    ) -> int:
        """Tell how many examples fit into the memory limit."""
        count = self._num_outputs if num_outputs is None else num_outputs
        entry, scale = self._dtype.itemsize, self._scale(X, batch_size)
        entries = scale * (rows_per_example(self._layers, count) + count**2)
        # with a single position, Jacobians are never formed
        shared = [
            layer.d_out * (layer.num_positions if layer.is_embedding else layer.d_in)
            for layer, is_matrix, _ in self._blocks
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
    tensors = [v for v in values if isinstance(v, Tensor)]
    rows = [v for v in tensors if v.shape[:1] == (batch_size,)]
    return sum(value[0].numel() for value in rows)
