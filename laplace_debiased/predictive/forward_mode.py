r"""Moments of many outputs by samples of the parameters, without backward passes.

For a sample :math:`\delta \sim \mathcal N(0, P^{-1})` of the parameters' deviation, the
linearized network's outputs deviate by :math:`J_n \delta`, a Jacobian-vector product:
one pass in forward mode gives it for all outputs of all examples, which costs as much
as about three forward passes. Exact moments take a backward pass for each output.

The samples are the same for all examples. They are drawn in the eigenbasis of P, one at
a time: all of them together would be as large as that many networks. The coordinates
there are dealt to S buckets. Sample s has random signs :math:`\sigma`, times
:math:`\sqrt{S / \lambda_i}`, in bucket s, and zeros elsewhere: fewer coordinates are
faster to rotate. :math:`\tfrac1S \sum_s \delta_s \delta_s^\top` has then the diagonal
of :math:`P^{-1}`, and of its other entries those of two coordinates of a bucket, with
random signs: variances have no bias. With :math:`a = P^{-1/2} J^\top`, the squared
error of a variance :math:`|a|^2` is :math:`2 \sum_{i \neq j} a_i^2 a_j^2 \mathrm{Pr}
(b(i) = b(j))`, about :math:`\tfrac2S |a|^4` at most: that of S independent Gaussian
samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import sqrt

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from laplace_debiased.curvature.eigenbasis import EigenbasisMatrix
from laplace_debiased.predictive.blocks import Covariance
from laplace_debiased.rows.batches import select_rows
from laplace_debiased.rows.chunks import at_once
from laplace_debiased.rows.inputs import Inputs, at_least_single
from laplace_debiased.rows.seeds import mixed_seed
from laplace_debiased.rows.separation import some_examples
from laplace_debiased.rows.sharing import (
    DUAL_LEVEL,
    MATH_ATTENTION,
    NO_CUDNN,
    everywhere,
)
from laplace_debiased.rows.substitution import (
    Substitution,
    largest_activation,
    run,
    stand_ins,
)

# with more outputs than that, samples take far less time than backward passes
NUM_SAMPLES, MANY_OUTPUTS = 64, 256
# a layer's input and output, their tangents, and what computes them
_ACTIVATIONS_HELD = 8
_COPIED_ENTRIES = 2**19
_CHECK_SEED = 0xC4
_REMEDY = "Predict by backward passes: set `la.forward_samples = None`."


def relative_error(num_samples: int) -> float:
    """Bound the relative standard error of a variance by samples."""
    return sqrt(2 / num_samples)


def sampled_change(
    posterior: EigenbasisMatrix,
    params: Sequence[Tensor],
    number: int,
    count: int,
    seed: int,
) -> list[Tensor]:
    """Draw a deviation of the parameters from their mean.

    Args:
        posterior: Posterior precision.
        params: The parameters, in the order of its blocks.
        number: Which of the samples, from zero.
        count: Their number, S.
        seed: Seed of all of them.

    Returns:
        A tensor of each parameter's shape and dtype.
    """
    device = params[0].device
    # which coordinates are in which bucket is the same for all samples
    generators = [
        torch.Generator(device).manual_seed(own)
        for own in (seed, mixed_seed(seed, number))
    ]
    blocks = zip(posterior.eigenvectors, posterior.spectra(), params, strict=True)
    changes = []
    for vectors, precisions, param in blocks:
        basis = vectors
        if precisions.ndim == 1:  # a matrix of one row
            basis, precisions = [precisions.new_ones(1), *vectors], precisions[None]
        is_tall = len(precisions) > precisions.shape[1]
        if is_tall:  # the larger basis gets fewer coordinates
            basis, precisions = basis[::-1], precisions.T
        change = _bucket(basis, precisions, number, count, generators)
        change = change.T if is_tall else change
        changes.append(change.reshape(param.shape).to(param.dtype))
    return changes


def _bucket(
    basis: Sequence[Tensor],
    precisions: Tensor,
    number: int,
    count: int,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Draw a block's coordinates in a bucket, and rotate them out of the eigenbasis.

    Rows and columns are dealt to groups at random, and each group of rows has another
    group of columns in each of the buckets: each coordinate is in exactly one.
    """
    for_places, for_signs = generators
    (left, right), device = basis, precisions.device
    groups = min(count, len(precisions))
    rows = _dealt(len(precisions), groups, for_places)  # [groups, rows]
    columns = _dealt(precisions.shape[1], count, for_places)
    start = torch.randint(count, (1,), generator=for_places, device=device)
    spread = torch.arange(groups, device=device) * count // groups
    columns = columns[(spread + start + number) % count]  # [groups, columns]
    change = torch.zeros_like(precisions)
    # what fits into a processor's cache
    entries = at_once(_COPIED_ENTRIES, device)
    size = max(1, entries // (columns.shape[1] * len(right)))
    for own, places in zip(rows.split(size), columns.split(size), strict=True):
        values = precisions[own[:, :, None], places[:, None]].reciprocal_().mul_(count)
        values = values.sqrt_() * ((own >= 0)[:, :, None] & (places >= 0)[:, None])
        bits = torch.randint(2, values.shape, generator=for_signs, device=device)
        values *= 2 * bits - 1
        if right.ndim == 1:
            change.index_put_((own[:, :, None], places[:, None]), values, True)
        else:
            product = (values @ right.T[places]).flatten(0, 1)
            change.index_add_(0, own.flatten() % len(change), product)
    return change if left.ndim == 1 else left @ change


def _dealt(size: int, count: int, generator: torch.Generator) -> Tensor:
    """Deal indices to groups of nearly equal sizes, filled up with -1."""
    device = generator.device
    order = torch.randperm(size, generator=generator, device=device)
    filled = torch.full((-(-size // count) * count,), -1, device=device)
    filled[:size] = order
    return filled.view(-1, count).T


class ForwardModeError(ValueError):
    """A network has no forward derivative, or another one than its backward pass."""


def output_change(
    model: nn.Module,
    params: Sequence[Tensor],
    changes: Sequence[Tensor],
    X: Inputs,
    differentiable: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run a network, and compute by how much its output changes with the parameters.

    Args:
        model: The network.
        params: Some of its parameters.
        changes: A change of each.
        X: Inputs, a tensor or a mapping.
        differentiable: Whether gradients flow to the inputs.

    Returns:
        The output, and the Jacobian-vector product, of the same shape.

    Raises:
        ForwardModeError: If the network fails in forward mode.
    """
    if torch.is_inference_mode_enabled():  # tangents would be lost silently
        raise ForwardModeError(
            "There are no derivatives in `torch.inference_mode()`: use "
            "`torch.no_grad()` instead."
        )
    values = stand_ins(model)
    with (
        torch.set_grad_enabled(differentiable),
        everywhere(MATH_ATTENTION),
        everywhere(NO_CUDNN),
        everywhere(DUAL_LEVEL),
    ):
        for param, change in zip(params, changes, strict=True):
            values[id(param)] = forward_ad.make_dual(values[id(param)], change)
        try:
            with Substitution(values):
                dual = run(model, X)
        except (RuntimeError, NotImplementedError) as error:
            raise ForwardModeError(
                f"The network fails in forward mode: {error} {_REMEDY}"
            ) from error
        output, change = forward_ad.unpack_dual(dual)
        return output, torch.zeros_like(output) if change is None else change


@torch.enable_grad()
def check_forward_mode(model: nn.Module, params: Sequence[Tensor], X: Inputs) -> None:
    """Compare a derivative in forward mode with one by a backward pass.

    They differ where a network runs a part without gradients, for example.

    Args:
        model: The network.
        params: Some of its parameters.
        X: Few inputs.

    Raises:
        ForwardModeError: If they differ.
    """
    changes = [_normal(param.shape).to(param) for param in params]
    output, change = output_change(model, params, changes, X)
    weights = _normal(output.shape)
    forward = (weights.to(output.device) * change.double()).sum().item()
    backward = _backward_change(model, params, changes, X, weights.to(output))
    size = (weights.norm() * change.double().norm().cpu()).item() + abs(backward)
    if abs(forward - backward) > torch.finfo(output.dtype).eps ** 0.25 * size:
        raise ForwardModeError(
            "The network's forward derivative is another one than that of its backward "
            f"pass, as where it runs a part under `torch.no_grad()`. {_REMEDY}"
        )


def _normal(shape: torch.Size) -> Tensor:
    """Return normal numbers that are always the same."""
    generator = torch.Generator().manual_seed(_CHECK_SEED)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _backward_change(
    model: nn.Module,
    params: Sequence[Tensor],
    changes: Sequence[Tensor],
    X: Inputs,
    weights: Tensor,
) -> float:
    """Compute the change of a weighted sum of outputs by a backward pass."""
    values = stand_ins(model, params)
    with everywhere(NO_CUDNN), Substitution(values):
        output = run(model, X)
    if not output.requires_grad:
        return 0.0
    own = [values[id(param)] for param in params]
    gradients = torch.autograd.grad(output, own, weights, allow_unused=True)
    return sum(
        (gradient.double() * change.double()).sum().item()
        for gradient, change in zip(gradients, changes, strict=True)
        if gradient is not None
    )


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
        memory_limit: Bytes that activations of a chunk of examples may take, about.
        differentiable: Whether gradients flow to the inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Sequence[Tensor],
        posterior: EigenbasisMatrix,
        num_samples: int = NUM_SAMPLES,
        seed: int = 0,
        memory_limit: int = 2**30,
        differentiable: bool = False,
    ):
        self._model, self._params, self._posterior = model, params, posterior
        self._num_samples, self._seed = num_samples, seed
        self._memory_limit, self._differentiable = memory_limit, differentiable

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
            ForwardModeError: If the network has no forward derivative.
        """
        return self._moments(self.changes(X, batch_size), kind)

    def _moments(
        self, changes: Iterable[tuple[Tensor, Tensor]], kind: str
    ) -> tuple[Tensor, Tensor]:
        """Estimate the moments from what :meth:`changes` yields."""
        mean, total = torch.empty(0), torch.zeros(())
        for output, change in changes:
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
            ForwardModeError: As in :meth:`moments`.
        """
        own, chunks = self._posterior, self._chunks(X, batch_size)
        mean, variances = torch.empty(0), []
        for shift in shifts:
            shifted = own + torch.as_tensor(shift).to(own.deltas)
            changes = self._changes(shifted, chunks)
            mean, variance = self._moments(changes, "diagonal")
            variances.append(variance)
        return mean, torch.stack(variances, -1)

    def changes(self, X: Inputs, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the output, and its change by each sample.

        Args:
            X: Inputs, a tensor or a mapping.
            batch_size: Number of examples.

        Yields:
            Both of the output's shape, the change in the posterior's dtype.

        Raises:
            ForwardModeError: As in :meth:`moments`.
        """
        yield from self._changes(self._posterior, self._chunks(X, batch_size))

    def _changes(
        self, posterior: EigenbasisMatrix, chunks: Sequence[Inputs]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Do so for a posterior precision, and examples in chunks."""
        for number in range(self._num_samples):
            changes = sampled_change(
                posterior, self._params, number, self._num_samples, self._seed
            )
            parts = [
                output_change(
                    self._model, self._params, changes, some, self._differentiable
                )
                for some in chunks
            ]
            outputs, deviations = zip(*parts, strict=True)
            yield torch.cat(outputs), at_least_single(torch.cat(deviations))

    def _chunks(self, X: Inputs, batch_size: int) -> list[Inputs]:
        """Split examples, once the network is known to have forward derivatives."""
        if batch_size == 0:
            return [X]
        count = min(batch_size, 2)
        few = some_examples(X, batch_size, count)
        check_forward_mode(self._model, self._params, few)
        entry = largest_activation(self._model, few) / count
        size = max(1, int(self._memory_limit // (_ACTIVATIONS_HELD * entry)))
        if size >= batch_size:
            return [X]
        parts = torch.arange(batch_size).split(size)
        return [select_rows(X, indices, batch_size) for indices in parts]


def _term(change: Tensor, kind: str) -> Tensor:
    """Return what a sample adds to a covariance ``[batch, C]`` or ``[..., C, C]``."""
    if kind == "diagonal":
        return change.square()
    own = change.flatten() if kind == "joint" else change
    return own[..., :, None] * own[..., None, :]
