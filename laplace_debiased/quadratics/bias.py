"""How biased the quadratic of a mini-batch is.

Along directions that a mini-batch gave, its slopes and curvatures are compared with
those of other mini-batches and of all data (Tatzel et al., 2024, arXiv 2410.14325,
Section 3 and Figure 2).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from laplace_debiased.curvature.curvlinops_adapter import (
    CURVATURES,
    LinearOperator,
    curvature_operator,
)
from laplace_debiased.curvature.debias import (
    Directions,
    Factors,
    held_out,
    project,
)
from laplace_debiased.curvature.decomposition import eigenvectors
from laplace_debiased.curvature.eigenbasis import by_parameter
from laplace_debiased.curvature.gradient import gradient_and_loss
from laplace_debiased.curvature.streams import KFACCurvature
from laplace_debiased.quadratics.cg import cg
from laplace_debiased.quadratics.derivatives import directional_derivatives
from laplace_debiased.quadratics.eigenspace import top_eigenspace
from laplace_debiased.quadratics.gram import gram_eigenspace, gram_is_cheaper
from laplace_debiased.quadratics.report import BiasReport, Comparison
from laplace_debiased.rows.checks import check_choice
from laplace_debiased.rows.inputs import (
    Batch,
    check_finite_inputs,
    check_targets,
    moved,
    on_device,
)
from laplace_debiased.rows.model_state import check_repeatable
from laplace_debiased.rows.output_curvature import Loss, OutputCurvature, is_counted
from laplace_debiased.rows.positions import standalone
from laplace_debiased.rows.selection import check_real, select
from laplace_debiased.rows.sharing import MATH_ATTENTION, everywhere
from laplace_debiased.rows.substitution import run
from laplace_debiased.sampling.folds import Points, draw_uniformly
from laplace_debiased.sampling.loaders import loader_over

DIRECTIONS = {"eigenvectors": "eigenvectors", "cg": "conjugate directions"}
_NUM_RESAMPLES, _RESAMPLES_AT_ONCE = 1000, 50


@standalone
def bias_report(
    model_func: nn.Module,
    loss_func: Loss,
    params: list[Tensor],
    loader: DataLoader,
    *,
    directions: str = "eigenvectors",
    num_directions: int = 100,
    batch_size: int = 512,
    num_batches: int = 4,
    num_points: int | None = None,
    curvature: str = "ggn",
    damping: float = 0.0,
    tol: float = 1e-4,
    seed: int = 0,
    progress_bar: bool = False,
) -> BiasReport:
    """Measure how biased a mini-batch is along the directions that it gives.

    Args:
        model_func: The neural network; layers with batch statistics or dropout must be
            in eval mode.
        loss_func: The loss, with reduction ``"mean"`` or ``"sum"``; values are those of
            a mean over examples, of whatever the loss sums over in each.
        params: The parameters.
        loader: Yields the training points, as pairs ``(X, y)``.
        directions: ``"eigenvectors"`` (of the mini-batch's curvature, the largest
            first) or ``"cg"`` (those of conjugate gradients on its quadratic).
        num_directions: Number of directions, K; of eigenvectors, fewer than parameters.
        batch_size: Number of points in a mini-batch.
        num_batches: Number of other, disjoint mini-batches.
        num_points: Number of points that are measured; None for all that the loader
            yields. If they are fewer than the data, they stand for all.
        curvature: ``"ggn"`` or ``"hessian"``.
        damping: Damping of the quadratics.
        tol: Relative tolerance for the eigenvalues.
        seed: Seed of the draw of mini-batches.
        progress_bar: Whether to show progress bars.

    Returns:
        The report.

    Raises:
        TypeError: If the loader yields mappings.
        ValueError: If an argument is out of range or not supported, the loss ignores
            a target, or the network mixes examples or is random.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from laplace_debiased import bias_report
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(20, 3)
        >>> points = TensorDataset(torch.randn(500, 20), torch.randint(3, (500,)))
        >>> report = bias_report(
        ...     model,
        ...     torch.nn.CrossEntropyLoss(),
        ...     list(model.parameters()),
        ...     DataLoader(points, batch_size=100),
        ...     num_directions=10,
        ...     batch_size=50,
        ... )
        >>> report.curvature.ratio.shape  # of the batch's own, to that of all points
        torch.Size([10])
        >>> report.curvature.group_ratio(slice(10)) > 1.1
        True
    """
    check_real(params)
    check_repeatable(model_func)
    OutputCurvature(loss_func)  # refuses what is not supported
    _check_kinds(directions, num_directions, curvature, params)
    points = draw_uniformly(loader, num_points, seed)
    needed = (1 + num_batches) * batch_size
    if num_batches < 1 or batch_size < 1 or needed > len(points):
        raise ValueError(
            f"`num_batches` must be at least 1, and {1 + num_batches} mini-batches of "
            f"{batch_size} points need {needed} points, but there are {len(points)}."
        )
    own_batch = _batch(points, batch_size, model_func, loss_func, params[0].device)
    quadratic = _Quadratic(model_func, loss_func, params, own_batch, curvature, damping)
    with everywhere(MATH_ATTENTION):
        if directions == "cg":
            columns = _conjugate_directions(quadratic, num_directions)
        else:
            columns = _eigenvectors(quadratic, num_directions, tol, seed, progress_bar)
    derivatives = directional_derivatives(
        model_func,
        loss_func,
        params,
        _counted(loader_over(points.loader, points.indices), loss_func),
        columns,
        curvature=curvature,
        progress_bar=progress_bar,
    )
    scale = len(points) * derivatives.scale if loss_func.reduction == "mean" else 1.0
    slopes = scale * derivatives.slopes
    # a direction and its opposite are the same: point it uphill
    slopes = slopes * slopes[:batch_size].sum(0).sign()
    generator = torch.Generator().manual_seed(seed)
    damped = scale * derivatives.curvatures + damping * columns.square().sum(0)
    return BiasReport(
        DIRECTIONS[directions],
        batch_size,
        _compare(damped, batch_size, num_batches, points.num_data, generator),
        _compare(slopes, batch_size, num_batches, points.num_data, generator),
    )


def _check_kinds(
    directions: str, num_directions: int, curvature: str, params: Sequence[Tensor]
) -> None:
    """Refuse kinds that are not known, and too many directions."""
    check_choice("directions", directions, DIRECTIONS)
    check_choice("curvature", curvature, CURVATURES)
    num_params = sum(param.numel() for param in params)
    too_many = directions == "eigenvectors" and num_directions >= num_params
    if num_directions < 1 or too_many:
        raise ValueError(
            f"`num_directions` must lie in 1..{num_params - 1}, got {num_directions}: "
            f"there are {num_params} parameters."
        )


def _batch(
    points: Points,
    batch_size: int,
    model: nn.Module,
    loss_func: Loss,
    device: torch.device,
) -> Sequence[Batch]:
    """Read the first mini-batch, with targets as torch's own losses take them."""
    batches = list(loader_over(points.loader, points.indices[:batch_size]))
    if isinstance(batches[0], Mapping):
        raise TypeError(
            "`loader` must yield pairs (X, y), of which X may be a mapping, but yields "
            f"{type(batches[0]).__name__}."
        )
    arranged = []
    for X, y in _counted(batches, loss_func):
        X, y = on_device(X, device), moved(y, device)
        check_finite_inputs(X)
        with torch.no_grad():
            output = run(model, X)
        arranged.append((X, check_targets(output, y, loss_func)))
    return arranged


def _counted(batches: Iterable[Batch], loss_func: Loss) -> Iterator[Batch]:
    """Refuse points that the loss does not count: means are over all points."""
    for X, y in batches:
        if not is_counted(loss_func, y).all():
            raise ValueError(
                "A bias report compares means over points, but some targets are the "
                "loss's `ignore_index`: leave those points out."
            )
        yield X, y


@dataclass(frozen=True)
class _Quadratic:
    """The quadratic of a mini-batch."""

    model: nn.Module
    loss_func: Loss
    params: Sequence[Tensor]
    batches: Sequence[Batch]
    curvature: str
    damping: float

    def operator(self) -> LinearOperator:
        """Return the curvature without damping."""
        return curvature_operator(
            self.curvature, self.model, self.loss_func, self.params, self.batches
        )

    @property
    def num_points(self) -> int:
        """Number of points."""
        return sum(len(y) for _, y in self.batches)


def _eigenvectors(
    quadratic: _Quadratic, count: int, tol: float, seed: int, progress_bar: bool
) -> Tensor:
    """Compute the top eigenvectors ``[D, K]`` of a mini-batch's curvature."""
    params, batches = quadratic.params, quadratic.batches
    lanczos = {"tol": tol, "seed": seed, "progress_bar": progress_bar}
    if quadratic.curvature == "ggn":
        X, y = batches[0]
        selection = select(quadratic.model, params, X, len(y), dense=True)
        loss_func, num_points = quadratic.loss_func, quadratic.num_points
        if gram_is_cheaper(selection, loss_func, params, num_points, count):
            space = gram_eigenspace(
                quadratic.model,
                loss_func,
                params,
                batches,
                count,
                **lanczos,  # type: ignore[arg-type]
            )
            return space.eigenvectors
    space = top_eigenspace(quadratic.operator(), count, **lanczos)  # type: ignore[arg-type]
    return space.eigenvectors


def _conjugate_directions(quadratic: _Quadratic, count: int) -> Tensor:
    """Compute unit directions ``[D, K]`` of conjugate gradients on a mini-batch."""
    loss_func, params = quadratic.loss_func, list(quadratic.params)
    gradients, _ = gradient_and_loss(
        quadratic.model, loss_func, params, quadratic.batches
    )
    gradient = torch.cat([part.reshape(-1) for part in gradients])
    # from the loss of all batches to a mean over examples
    scale = 1.0 if loss_func.reduction == "mean" else 1 / quadratic.num_points
    damped = _Damped(quadratic.operator(), quadratic.damping, scale)
    result = cg(damped, -scale * gradient, rtol=0.0, max_iterations=count)
    if result.num_iterations == 0:
        raise ValueError("The mini-batch's gradient is zero: it gives no directions.")
    return result.directions / result.directions.norm(dim=0)


@dataclass(frozen=True)
class _Damped:
    operator: LinearOperator
    damping: float
    scale: float

    def __matmul__(self, X: Tensor) -> Tensor:
        return self.scale * (self.operator @ X) + self.damping * X


def _compare(
    contributions: Tensor,
    batch_size: int,
    num_batches: int,
    num_data: int,
    generator: torch.Generator,
) -> Comparison:
    """Compare means over the first mini-batch, the following ones, and all data.

    If not all data are measured, the points outside the first mini-batch stand for all
    of the others, so that it has the share in the data's mean that is its own.
    """
    own, *others = (
        contributions[k * batch_size : (k + 1) * batch_size].mean(0)
        for k in range(1 + num_batches)
    )
    weights = contributions.new_ones(len(contributions))
    weights[batch_size:] = (num_data - batch_size) / (len(contributions) - batch_size)
    return Comparison(
        own,
        torch.stack(others),
        weights @ contributions / num_data,
        _resampled_means(contributions, weights, generator),
    )


def _resampled_means(
    contributions: Tensor, weights: Tensor, generator: torch.Generator
) -> Tensor:
    """Draw bootstrap samples of weighted means: ``[samples, K]``."""
    means = []
    for _ in range(_NUM_RESAMPLES // _RESAMPLES_AT_ONCE):
        rates = torch.ones(_RESAMPLES_AT_ONCE, len(contributions))
        counts = torch.poisson(rates, generator=generator).to(contributions)
        counts *= weights
        means.append(counts @ contributions / counts.sum(1, keepdim=True))
    return torch.cat(means)


def kfac_bias(
    curvature: KFACCurvature, num_points: float, num_directions: int
) -> BiasReport:
    """Compare folds of points along the eigenvectors of each other's K-FAC.

    Curvature along the directions that some folds give is that of those folds
    themselves, and that of the held-out one; it takes no further pass over any data.
    There are no intervals: the curvatures are products of two factors, which are sums
    over a fold's points that are not kept apart, and two folds are too few to resample.

    Args:
        curvature: K-FAC's factors of each fold.
        num_points: Number of points in all folds together.
        num_directions: Number of directions with the largest curvature, of all layers.

    Returns:
        The report. Ranks are those on the points that gave the directions.
    """
    folds, shares = curvature.folds, curvature.shares
    measured = range(len(folds)) if curvature.cross_fit else [1]
    own, other = [], []
    for k in measured:
        rest = held_out(folds, shares, k)
        directions = eigenvectors(rest)
        mine, theirs = (
            _spectrum(curvature, directions, factors) for factors in (rest, folds[k])
        )
        order = mine.argsort(descending=True)[:num_directions]
        own.append(mine[order])
        other.append(theirs[order])
    others = torch.stack(other)
    share = 1 - sum(shares[k] for k in measured) / len(measured) / sum(shares)
    return BiasReport(
        "K-FAC eigenvectors",
        round(share * num_points),
        Comparison(torch.stack(own).mean(0), others, others.mean(0)),
        reference="held-out points",
        direction_share=share,
    )


def _spectrum(
    curvature: KFACCurvature, directions: Directions, factors: Factors
) -> Tensor:
    """Return the curvatures ``[params]`` of factors along directions."""
    matrix = by_parameter(curvature.layers, directions, project(factors, directions))
    return torch.cat([values.flatten() for values in matrix.spectra()])
