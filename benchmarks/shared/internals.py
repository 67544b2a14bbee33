"""All that the studies use of the library beyond its public names.

Studies that take a method apart, or predict at many prior precisions at once, need what
the library does not export. It is here alone, in functions that a change of the
library's insides leaves as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations

import torch
from laplace import KronLaplace
from torch import Tensor, nn
from torch.utils.data import DataLoader

from laplace_debiased import EigenbasisMatrix, KronDebiasedLaplace
from laplace_debiased.curvature.debias import average, project
from laplace_debiased.curvature.decomposition import decompose, eigenvectors
from laplace_debiased.curvature.jacobians import rotated_jacobians
from laplace_debiased.curvature.kronecker import Kronecker
from laplace_debiased.posterior import sources
from laplace_debiased.posterior.calibrating import output_moments as output_moments
from laplace_debiased.posterior.memory import Scheme, fit_memory
from laplace_debiased.posterior.settings import POOL_FACTOR as POOL_FACTOR
from laplace_debiased.predictive.calibration import calibration_of as calibration_of
from laplace_debiased.predictive.forward_mode import SampledPredictive
from laplace_debiased.predictive.links import probit_logits as probit_logits
from laplace_debiased.predictive.links import (
    probit_probabilities as probit_probabilities,
)
from laplace_debiased.predictive.moments import LinearizedPredictive
from laplace_debiased.predictive.report import (
    classification_scores as classification_scores,
)
from laplace_debiased.predictive.scores import auroc as auroc
from laplace_debiased.predictive.scores import calibration_errors as calibration_errors
from laplace_debiased.predictive.scores import nll as nll
from laplace_debiased.predictive.uncertainty import entropies as entropies
from laplace_debiased.predictive.uncertainty import entropy as entropy
from laplace_debiased.rows.layers import Layer
from laplace_debiased.rows.linearization import linearize
from laplace_debiased.rows.selection import find_layers, select
from laplace_debiased.rows.thinning import num_taken

# the Kronecker factors of each parameter, a bias has G alone
Factors = list[Kronecker]


def full_data_factors(model: nn.Module, loader: DataLoader) -> Factors:
    """Compute K-FAC's factors of all points of a loader.

    By laplace-torch's ``KronLaplace``, or by ours where it refuses a layer.

    Args:
        model: The network.
        loader: Yields the points.

    Returns:
        The factors, whose products are the curvature of the summed loss.
    """
    laplace = KronLaplace(model, "classification")
    try:
        laplace.fit(loader)
    except NotImplementedError:
        ours = KronDebiasedLaplace(model, "classification", estimator="two_batch")
        ours.fit(loader)
        return _factors_of_all_points(ours)
    return [Kronecker(*own) for own in laplace.H_facs.kfacs]


def factored_curvature(factors: Factors) -> EigenbasisMatrix:
    """Decompose K-FAC's factors.

    Args:
        factors: The factors.

    Returns:
        K-FAC.
    """
    directions = eigenvectors(factors)
    return _matrix(directions, project(factors, directions))


def undo_debiasing(laplace: KronDebiasedLaplace) -> None:
    """Let all points of a fit give directions and magnitudes along them.

    Args:
        laplace: The fit, with ``kfac`` magnitudes; its curvature becomes K-FAC's.
    """
    laplace.H = factored_curvature(_factors_of_all_points(laplace))


def replace_magnitudes(laplace: KronDebiasedLaplace, factors: Factors) -> None:
    """Measure the magnitudes along a fit's directions by other points.

    Args:
        laplace: The fit, changed in place.
        factors: K-FAC's factors of the other points.
    """
    directions = [Kronecker(*own) for own in laplace.H.eigenvectors]
    laplace.H = _matrix(directions, project(factors, directions))


def shrink_magnitudes(
    laplace: KronDebiasedLaplace,
    shrink: Callable[[Tensor, int], Tensor],
    num_points: int,
    num_pool: int | None = None,
    positions: bool = False,
    keep_trace: bool = False,
) -> None:
    """Let all points of a fit give directions, and shrink the factors' eigenvalues.

    Args:
        laplace: The fit, with ``kfac`` magnitudes, changed in place.
        shrink: From ascending eigenvalues of a factor, and the number of its rows, to
            magnitudes.
        num_points: Number of points with backward passes.
        num_pool: Number of those that gave input covariances, by some positions of
            each; None if they are the same points.
        positions: Whether each position is a row, and with gradients each class; else a
            point is one.
        keep_trace: Whether magnitudes are scaled to the sum of the eigenvalues.
    """

    def shrunken(values: Tensor, num_rows: int) -> Tensor:
        new = shrink(values, num_rows).to(values)
        return new * (values.sum() / new.sum()) if keep_trace else new

    curvature, classes = laplace.curvature, laplace.n_outputs
    factors = average(curvature.folds, curvature.shares)
    directions, found = decompose(factors)
    magnitudes = []
    for layer, own in zip(curvature.layers, found, strict=True):
        of_inputs = of_gradients = 1
        if positions:
            of_gradients = layer.num_positions * classes
            of_inputs = layer.num_positions
            if num_pool is not None and layer.has_inputs:
                of_inputs = num_taken(layer, sources.POOL_POSITIONS)
        rows = Kronecker(
            num_points * of_gradients, (num_pool or num_points) * of_inputs
        )
        magnitudes.append(own.map(shrunken, rows))
    laplace.H = _matrix(
        _by_parameter(laplace, directions), _by_parameter(laplace, magnitudes)
    )


def average_repeated_splits(laplace: KronDebiasedLaplace) -> None:
    """Average magnitudes over all splits of the folds in two halves (NERCOME).

    Args:
        laplace: A fit by cross-fit with an even number of folds, changed in place.
    """
    folds = [_by_parameter(laplace, fold) for fold in laplace.curvature.folds]
    shares, magnitudes = laplace.curvature.shares, []
    for first in combinations(range(len(folds)), len(folds) // 2):
        second = [k for k in range(len(folds)) if k not in first]
        for_directions, for_magnitudes = (
            average([folds[k] for k in half], [shares[k] for k in half])
            for half in (first, second)
        )
        magnitudes.append(project(for_magnitudes, eigenvectors(for_directions)))
    values = average(magnitudes, [1.0] * len(magnitudes))
    directions = [Kronecker(*own) for own in laplace.H.eigenvectors]
    laplace.H = _matrix(directions, values)


def gradient_covariances(laplace: KronDebiasedLaplace) -> list[Tensor]:
    """Return the gradient covariance G of each weight, of all points of a fit.

    Args:
        laplace: The fit, with ``kfac`` magnitudes.

    Returns:
        The covariances ``[d_out, d_out]``.
    """
    factors = _factors_of_all_points(laplace)
    return [own.gradients for own in factors if own.inputs is not None]


def unsupported_parameters(model: nn.Module, X: Tensor) -> list[str]:
    """List the parameters that a fit would leave at their trained values.

    Args:
        model: The network.
        X: Inputs ``[batch, ...]``.

    Returns:
        Their names.
    """
    left_out = select(model, list(model.parameters()), X, len(X)).left_out
    return [entry.name for entry in left_out]


def output_variances(
    model: nn.Module,
    X: Tensor,
    posteriors: Sequence[tuple[EigenbasisMatrix, Sequence[float]]],
) -> tuple[Tensor, list[Tensor]]:
    """Compute the variances of a batch's outputs by several posteriors.

    The network is linearized once for all of them.

    Args:
        model: The network, all parameters of which are in the posteriors.
        X: Inputs ``[batch, ...]``.
        posteriors: Curvature without prior, and prior precisions of each.

    Returns:
        Outputs ``[batch, classes]``, and variances ``[priors, batch, classes]`` of each
        posterior.
    """
    params = list(model.parameters())
    layers = find_layers(model, params, X, len(X))
    linear = linearize(model, params, layers, X, len(X))
    variances = []
    for curvature, priors in posteriors:
        total: Tensor | float = 0.0
        for layer in layers:
            inputs = linear.inputs.get(layer.name)
            for position in layer.parameters:
                total = total + _block_variances(
                    linear.gradients[layer.name],
                    inputs if position == layer.matrix else None,
                    curvature.eigenvectors[position],
                    curvature.spectra()[position],
                    priors,
                )
        variances.append(total)
    return linear.output.detach(), variances


class _First(nn.Module):
    """A network that returns its first outputs alone."""

    def __init__(self, network: nn.Module, count: int):
        super().__init__()
        self.network, self.count = network, count

    def forward(self, X: Tensor) -> Tensor:
        return self.network(X)[:, : self.count]


def variances_of_first_outputs(
    model: nn.Module, posterior: EigenbasisMatrix, X: Tensor, count: int
) -> Tensor:
    """Compute the exact variances of a few outputs, by a backward pass for each.

    Args:
        model: The network, all parameters of which are in the posterior.
        posterior: Posterior precision.
        X: Inputs ``[batch, ...]``.
        count: Number of outputs.

    Returns:
        Variances ``[batch, count]``.
    """
    first, params = _First(model, count), list(model.parameters())
    layers = find_layers(first, params, X, len(X))
    size = X[0].numel()
    predictive = LinearizedPredictive(first, params, layers, posterior, count, size)
    return predictive.moments(X, len(X), "diagonal")[1]


def sampled_variances(
    model: nn.Module, posterior: EigenbasisMatrix, X: Tensor, num_samples: int
) -> Tensor:
    """Estimate the variances of all outputs by samples of the parameters.

    Args:
        model: As in :func:`variances_of_first_outputs`.
        posterior: Posterior precision.
        X: Inputs ``[batch, ...]``.
        num_samples: Number of samples.

    Returns:
        Variances ``[batch, outputs]``.
    """
    params = list(model.parameters())
    predictive = SampledPredictive(model, params, posterior, num_samples)
    return predictive.moments(X, len(X), "diagonal")[1]


def _matrix(directions: Factors, values: Factors) -> EigenbasisMatrix:
    return EigenbasisMatrix(
        [own.tensors() for own in directions], [own.tensors() for own in values]
    )


def _by_parameter(laplace: KronDebiasedLaplace, factors: Factors) -> Factors:
    """Give each parameter the factors of its layer."""
    of = {}
    for layer, own in zip(laplace.curvature.layers, factors, strict=True):
        if layer.matrix is not None:
            of[layer.matrix] = own
        if layer.vector is not None:
            of[layer.vector] = Kronecker(own.gradients)
    return [of[position] for position in sorted(of)]


def _factors_of_all_points(laplace: KronDebiasedLaplace) -> Factors:
    curvature = laplace.curvature
    return _by_parameter(laplace, average(curvature.folds, curvature.shares))


def _block_variances(
    gradients: Tensor,
    inputs: Tensor | None,
    vectors: list[Tensor],
    values: Tensor,
    priors: Sequence[float],
) -> Tensor:
    """Compute a block's share of the variances, ``[priors, batch, classes]``."""
    inverses = torch.stack([1 / (values + prior) for prior in priors])
    if inputs is None:
        # [batch, C, S, groups, d_out / groups] -> [batch, C, d_out]
        squares = (gradients.flatten(3).sum(2) @ vectors[0]) ** 2
        return torch.einsum("nco,po->pnc", squares, inverses)
    inputs = inputs @ vectors[1]
    if gradients.shape[2:4] == (1, 1):  # of rank one
        squares = (gradients.flatten(2) @ vectors[0]) ** 2
        weights = inputs.flatten(1) ** 2 @ inverses.mT
        return torch.einsum("nco,pno->pnc", squares, weights)
    squares = rotated_jacobians(gradients, inputs, vectors[0]).flatten(2) ** 2
    return (squares @ inverses.flatten(1).T).movedim(2, 0)


def peak_of_fit(shapes: Sequence[tuple[int, int]], folds: int, is_shared: bool) -> int:
    """Tell what a fit takes beside network, data and a pass over a batch.

    Args:
        shapes: Output and input features of the layers, which have no biases.
        folds: Number of folds of cross-fit, from a pool, with ``kfac`` magnitudes.
        is_shared: Whether several processes share the work.

    Returns:
        Bytes at most, in single precision.
    """
    layers = [Layer(str(k), k, None, *own) for k, own in enumerate(shapes)]
    scheme = Scheme(4, folds, is_pooled=True, decomposes_singly=not is_shared)
    return fit_memory(layers, scheme).peak


@contextmanager
def pool_positions(count: int | None) -> Iterator[None]:
    """Let pools give input covariances by another number of positions of an example.

    Args:
        count: The number, at most; None for all positions.

    Yields:
        Nothing.
    """
    default = sources.POOL_POSITIONS
    sources.POOL_POSITIONS = count
    try:
        yield
    finally:
        sources.POOL_POSITIONS = default


@contextmanager
def stages_of_fits(
    clocks: Callable[[], tuple[float, ...]],
) -> Iterator[dict[str, list[float]]]:
    """Time what fits spend on points, and on decompositions.

    Args:
        clocks: Returns the present times.

    Yields:
        By the kind of stage, what each clock has counted.
    """
    spent: dict[str, list[float]] = {}
    kinds = dict.fromkeys(("inputs", "gradients", "factors", "curvatures"), "passes")
    kinds["decompose"] = "decompositions"
    originals = {name: getattr(sources.RowSource, name) for name in kinds}

    def timed(name: str) -> Callable:
        def stage(*args):
            start = clocks()
            result = originals[name](*args)
            own = spent.setdefault(kinds[name], [0.0] * len(start))
            for k, (before, after) in enumerate(zip(start, clocks(), strict=True)):
                own[k] += after - before
            return result

        return stage

    for name in kinds:
        setattr(sources.RowSource, name, timed(name))
    try:
        yield spent
    finally:
        for name, original in originals.items():
            setattr(sources.RowSource, name, original)
