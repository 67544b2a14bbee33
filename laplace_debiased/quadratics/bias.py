"""How biased the quadratic of a mini-batch is, in numbers and in a figure.

Along directions that a mini-batch gave, its slopes and curvatures are compared with
those of other mini-batches and of all data (Tatzel et al., 2024, arXiv 2410.14325,
Section 3 and Figure 2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from curvlinops import GGNLinearOperator, HessianLinearOperator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader

from laplace_debiased.curvature.eigenbasis import project, spectrum
from laplace_debiased.curvature.streams import (
    KFACCurvature,
    average,
    held_out_directions,
    without,
)
from laplace_debiased.quadratics.cg import cg
from laplace_debiased.quadratics.derivatives import directional_derivatives
from laplace_debiased.quadratics.eigenspace import top_eigenspace
from laplace_debiased.quadratics.gram import gram_eigenspace, gram_is_cheaper
from laplace_debiased.quadratics.ranks import rank_figure, rank_ranges, save
from laplace_debiased.rows.model_state import check_repeatable
from laplace_debiased.rows.output_curvature import Loss
from laplace_debiased.sampling.folds import draw_uniformly, loader_over

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DIRECTIONS = ("eigenvectors", "cg")
TOLERATED_RATIO = 1.1
_NUM_RESAMPLES, _RESAMPLES_AT_ONCE = 1000, 50


@dataclass(frozen=True)
class Comparison:
    """One quantity along K directions, on the mini-batch that gave them and elsewhere.

    Args:
        own: On the mini-batch that gave the directions, ``[K]``.
        others: On other mini-batches, ``[batches, K]``.
        overall: On all data ``[K]``.
        resampled: On bootstrap samples of all data ``[samples, K]``; None if there are
            none.
    """

    own: Tensor
    others: Tensor
    overall: Tensor
    resampled: Tensor | None = None

    @property
    def ratio(self) -> Tensor:
        """How often the mini-batch has what all data have, ``[K]``."""
        return self.own / self.overall

    @property
    def interval(self) -> Tensor | None:
        """Bounds of the 95 % bootstrap interval of the ratio ``[2, K]``.

        It is over the examples of all data, given those of the mini-batch.
        """
        if self.resampled is None:
            return None
        return _bounds(self.own / self.resampled)

    def group_ratio(self, ranks: slice) -> float:
        """Ratio of the means over some directions."""
        return (self.own[ranks].sum() / self.overall[ranks].sum()).item()

    def group_interval(self, ranks: slice) -> tuple[float, float] | None:
        """Bounds of the 95 % bootstrap interval of :meth:`group_ratio`."""
        if self.resampled is None:
            return None
        low, high = _bounds(self.own[ranks].sum() / self.resampled[:, ranks].sum(1))
        return low.item(), high.item()


def _bounds(samples: Tensor) -> Tensor:
    return samples.quantile(samples.new_tensor([0.025, 0.975]), dim=0)


@dataclass(frozen=True)
class BiasReport:
    """Bias of a mini-batch along its own directions.

    Args:
        directions: What the directions are.
        num_points: Number of points that gave them.
        curvature: Curvatures along them, with damping.
        slope: Slopes along them; None if they are not known.
        reference: What the points are compared with.
        direction_share: Share of a budget that gives directions.
    """

    directions: str
    num_points: int
    curvature: Comparison
    slope: Comparison | None = None
    reference: str = "all data"
    direction_share: float = 1.0

    def sufficient_points(self, count: int = 10) -> int:
        """Estimate which budget overestimates the curvature 1.1 times only.

        The excess of the ratio over one is taken to shrink as one over their number,
        as it does for spiked covariances (Baik and
        Silverstein, 2006).

        Args:
            count: Number of top directions.

        Returns:
            The number of points, with those that give no directions.
        """
        excess = self.curvature.group_ratio(slice(count)) - 1
        budget = self.num_points / self.direction_share
        return max(1, ceil(budget * excess / (TOLERATED_RATIO - 1)))

    def summary(self, count: int = 10) -> str:
        """Say in a sentence how biased the curvature is.

        Args:
            count: Number of top directions.

        Returns:
            The sentence.
        """
        count = min(count, len(self.curvature.own))
        ratio = self.curvature.group_ratio(slice(count))
        message = (
            f"Along their top {count} {self.directions}, {self.num_points} points have "
            f"{ratio:.1f} times the curvature of {self.reference}"
        )
        if ratio <= TOLERATED_RATIO:
            return message + "."
        return (
            f"{message}: a budget of about {self.sufficient_points(count)} points "
            f"would have {TOLERATED_RATIO} times."
        )

    def table(self) -> str:
        """Return the means over ranges of ranks, as a Markdown table."""
        lines = [
            "| quantity | ranks | own points | other points | all data | own / all |",
            "|---|---|---|---|---|---|",
        ]
        for name, values in (("slope", self.slope), ("curvature", self.curvature)):
            if values is None:
                continue
            for first, last in rank_ranges(len(values.own)):
                ranks = slice(first - 1, last)
                own, others, overall = (
                    part[..., ranks].mean().item()
                    for part in (values.own, values.others, values.overall)
                )
                ratio = f"{values.group_ratio(ranks):.2f}"
                # slopes regress to zero, where ratios have no bounds
                interval = values.group_interval(ranks) if name == "curvature" else None
                if interval is not None:
                    ratio += " ({:.2f} to {:.2f})".format(*interval)
                lines.append(
                    f"| {name} | {first} to {last} | {own:.3g} | {others:.3g} "
                    f"| {overall:.3g} | {ratio} |"
                )
        return "\n".join(lines)

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw slopes and curvatures against the directions' rank.

        Args:
            path: Where to save the figure; None for nowhere.

        Returns:
            The figure.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        parts = [("slope", self.slope), ("curvature", self.curvature)]
        parts = [(name, values) for name, values in parts if values is not None]
        figure, panels = rank_figure(len(parts))
        for axis, (name, values) in zip(panels, parts, strict=True):
            ranks = range(1, len(values.own) + 1)
            others = values.others.cpu()
            axis.plot(ranks, values.own.cpu(), label="points that gave the directions")
            (line,) = axis.plot(ranks, others.mean(0), label="other points")
            axis.fill_between(
                ranks,
                others.amin(0),
                others.amax(0),
                color=line.get_color(),
                alpha=0.2,
                lw=0,
            )
            axis.plot(ranks, values.overall.cpu(), "k--", lw=1, label="all data")
            positive = all((v > 0).all() for v in (values.own, others, values.overall))
            axis.set(ylabel=name, yscale="log" if positive else "linear")
        panels[-1].set_xlabel(f"rank of the direction ({self.directions})")
        panels[0].legend()
        return save(figure, path)


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
    progressbar: bool = False,
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
        progressbar: Whether to show progress bars.

    Returns:
        The report.

    Raises:
        TypeError: If the loader yields mappings.
        ValueError: If an argument is out of range or not supported, or the network
            mixes examples or is random.
    """
    check_repeatable(model_func)
    if directions not in DIRECTIONS:
        raise ValueError(
            f"`directions` must be one of {list(DIRECTIONS)}, got {directions!r}."
        )
    num_params = sum(param.numel() for param in params)
    too_many = directions == "eigenvectors" and num_directions >= num_params
    if num_directions < 1 or too_many:
        raise ValueError(
            f"`num_directions` must lie in 1..{num_params - 1}, got {num_directions}: "
            f"there are {num_params} parameters."
        )
    points = draw_uniformly(loader, num_points, seed)
    needed = (1 + num_batches) * batch_size
    if num_batches < 1 or batch_size < 1 or needed > len(points):
        raise ValueError(
            f"`num_batches` must be at least 1, and {1 + num_batches} mini-batches of "
            f"{batch_size} points need {needed} points, but there are {len(points)}."
        )
    own_batch = list(loader_over(points.loader, points.indices[:batch_size]))
    if isinstance(own_batch[0], Mapping):
        raise TypeError(
            "`loader` must yield pairs (X, y), of which X may be a mapping, but yields "
            f"{type(own_batch[0]).__name__}."
        )
    with sdpa_kernel(SDPBackend.MATH):  # fused attention is not twice differentiable
        columns = _directions(
            model_func,
            loss_func,
            params,
            own_batch,
            directions,
            num_directions,
            curvature,
            damping,
            tol,
            seed,
            progressbar,
        )
    derivatives = directional_derivatives(
        model_func,
        loss_func,
        params,
        loader_over(points.loader, points.indices),
        columns,
        curvature=curvature,
        progressbar=progressbar,
    )
    scale = len(points) * derivatives.scale if loss_func.reduction == "mean" else 1.0
    slopes = scale * derivatives.slopes
    # a direction and its opposite are the same: point it uphill
    slopes = slopes * slopes[:batch_size].sum(0).sign()
    generator = torch.Generator().manual_seed(seed)
    damped = scale * derivatives.curvatures + damping * columns.square().sum(0)
    return BiasReport(
        {"eigenvectors": "eigenvectors", "cg": "conjugate directions"}[directions],
        batch_size,
        _compare(damped, batch_size, num_batches, points.num_data, generator),
        _compare(slopes, batch_size, num_batches, points.num_data, generator),
    )


def _directions(
    model_func: nn.Module,
    loss_func: Loss,
    params: list[Tensor],
    batch: Sequence,
    kind: str,
    count: int,
    curvature: str,
    damping: float,
    tol: float,
    seed: int,
    progressbar: bool,
) -> Tensor:
    """Compute unit directions ``[D, K]`` from a mini-batch."""
    of_kind = {"ggn": GGNLinearOperator, "hessian": HessianLinearOperator}
    if curvature not in of_kind:
        raise ValueError(
            f"`curvature` must be one of {list(of_kind)}, got {curvature!r}."
        )
    lanczos = {"tol": tol, "seed": seed, "progressbar": progressbar}
    of_model = model_func, loss_func, params, batch
    eigenvectors = kind == "eigenvectors"
    if (
        eigenvectors
        and curvature == "ggn"
        and gram_is_cheaper(model_func, params, batch, count)
    ):
        return gram_eigenspace(*of_model, count, **lanczos).eigenvectors
    operator = of_kind[curvature](*of_model, check_deterministic=False)
    if eigenvectors:
        return top_eigenspace(operator, count, **lanczos).eigenvectors
    device = params[0].device
    on_device = [
        (X.to(device) if isinstance(X, Tensor) else X, y.to(device)) for X, y in batch
    ]
    gradients = zip(
        *(
            torch.autograd.grad(
                loss_func(model_func(X), y) * _share(loss_func, y, batch),
                params,
                allow_unused=True,
                materialize_grads=True,
            )
            for X, y in on_device
        ),
        strict=True,
    )
    gradient = torch.cat([sum(parts).reshape(-1) for parts in gradients])
    quadratic = _Damped(operator, damping, _per_example(loss_func, batch))
    result = cg(quadratic, -quadratic.scale * gradient, rtol=0.0, max_iterations=count)
    if result.num_iterations == 0:
        raise ValueError("The mini-batch's gradient is zero: it gives no directions.")
    return result.directions / result.directions.norm(dim=0)


def _share(loss_func: Loss, y: Tensor, batches: Sequence) -> float:
    """Weight of a batch's loss in the loss of all batches."""
    if loss_func.reduction == "sum":
        return 1.0
    return len(y) / sum(len(other) for _, other in batches)


def _per_example(loss_func: Loss, batches: Sequence) -> float:
    """Return the factor from the loss of all batches to a mean over examples."""
    if loss_func.reduction == "mean":
        return 1.0
    return 1 / sum(len(y) for _, y in batches)


@dataclass(frozen=True)
class _Damped:
    operator: GGNLinearOperator | HessianLinearOperator
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
    curvature: KFACCurvature, num_points: int, num_directions: int
) -> BiasReport:
    """Compare folds of points along the eigenvectors of each other's K-FAC.

    The directions that some folds give are judged by those folds themselves, and by
    the held-out one; it takes no further pass over any data. There are no intervals:
    the curvatures are products of two factors, which are sums over a fold's points that
    are not kept apart, and two folds are too few to resample.

    Args:
        curvature: K-FAC's factors of each fold.
        num_points: Number of points in all folds together.
        num_directions: Number of directions with the largest curvature, of all layers.

    Returns:
        The report. Ranks are those on the points that gave the directions.
    """
    folds, shares = curvature.folds, curvature.shares
    held_out = range(len(folds)) if curvature.cross_fit else [1]
    own, other = [], []
    for k in held_out:
        rest = average(without(folds, k), without(shares, k))
        directions = held_out_directions(folds, shares, k)
        mine, theirs = (
            torch.cat([spectrum(values).flatten() for values in project(f, directions)])
            for f in (rest, folds[k])
        )
        order = mine.argsort(descending=True)[:num_directions]
        own.append(mine[order])
        other.append(theirs[order])
    others = torch.stack(other)
    share = 1 - sum(shares[k] for k in held_out) / len(held_out) / sum(shares)
    return BiasReport(
        "K-FAC eigenvectors",
        round(share * num_points),
        Comparison(torch.stack(own).mean(0), others, others.mean(0)),
        reference="held-out points",
        direction_share=share,
    )
