"""What a report of bias says, in numbers and in a figure."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from laplace_debiased.predictive.figures import save
from laplace_debiased.quadratics.ranks import rank_figure, rank_ranges

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOLERATED_RATIO = 1.1


@dataclass(frozen=True)
class Comparison:
    """One quantity along K directions, on the mini-batch that gave them and elsewhere.

    Args:
        own: On the mini-batch that gave the directions, ``[K]``.
        others: On other mini-batches, ``[batches, K]``.
        overall: On all data, or what stands for them, ``[K]``.
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

        Raises:
            ValueError: If there is no curvature to estimate.
        """
        excess = self.curvature.group_ratio(slice(count)) - 1
        if not isfinite(excess):
            raise ValueError(f"{self.reference.capitalize()} have no curvature.")
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
        if not isfinite(ratio):
            return (
                f"Along the top {count} {self.directions} of {self.num_points} points, "
                f"{self.reference} have no curvature."
            )
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
        reference = self.reference
        lines = [
            f"| quantity | ranks | own points | other batches | {reference} | ratio |",
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
        quantities = (("slope", self.slope), ("curvature", self.curvature))
        parts = [(name, values) for name, values in quantities if values is not None]
        figure, panels = rank_figure(len(parts))
        for axis, (name, values) in zip(panels, parts, strict=True):
            ranks = range(1, len(values.own) + 1)
            others = values.others.cpu()
            axis.plot(ranks, values.own.cpu(), label="points that gave the directions")
            (line,) = axis.plot(ranks, others.mean(0), label="other batches")
            axis.fill_between(
                ranks,
                others.amin(0),
                others.amax(0),
                color=line.get_color(),
                alpha=0.2,
                lw=0,
            )
            overall = values.overall.cpu()
            axis.plot(ranks, overall, "k--", lw=1, label=self.reference)
            positive = all((v > 0).all() for v in (values.own, others, values.overall))
            axis.set(ylabel=name, yscale="log" if positive else "linear")
        panels[-1].set_xlabel(f"rank of the direction ({self.directions})")
        panels[0].legend()
        return save(figure, path)
