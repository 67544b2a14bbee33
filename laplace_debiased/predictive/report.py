"""What predictions of test data are worth, in numbers and in a figure."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from laplace_debiased.predictive.figures import new_figure, save
from laplace_debiased.predictive.label_scores import LabelScores
from laplace_debiased.predictive.scores import (
    NUM_BINS,
    auroc,
    brier,
    calibration_errors,
    foreign_auroc,
    nll,
    risk_coverage,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SMALLEST = 1e-5
_CONFIDENCE = "confidence", "accuracy"
LEVELS = (0.5, 0.8, 0.9, 0.95)


@dataclass(frozen=True)
class ClassificationScores:
    """Scores of class probabilities.

    Args:
        accuracy: Share of correct predictions.
        nll: Mean negative log likelihood in nats.
        brier: Mean squared distance to the one-hot classes, from 0 to 2.
        ece: Expected calibration error over 15 bins of equal width (Guo et al., 2017,
            arXiv 1706.04599).
        classwise_ece: Mean over the classes of that of each against all others (Kull et
            al., 2019, arXiv 1910.12656).
        aurc: Area under the risk-coverage curve, by confidence.
        mistakes: AUROC of mistakes, by confidence; None unless there are both.
        foreign: AUROC of foreign data by total uncertainty; None without any.
        foreign_epistemic: That by epistemic uncertainty; None without posterior, too.
    """

    accuracy: float
    nll: float
    brier: float
    ece: float
    classwise_ece: float
    aurc: float
    mistakes: float | None
    foreign: float | None
    foreign_epistemic: float | None


@dataclass(frozen=True)
class RegressionScores:
    """Scores of predictive means and variances, with the noise.

    Args:
        nll: Mean negative log density of an output in nats.
        rmse: Root of the mean squared error.
        coverage_50: Share of targets in the central intervals at 50 %.
        coverage_80: That at 80 %.
        coverage_90: That at 90 %.
        coverage_95: That at 95 %.
        width_95: Mean width of the intervals at 95 %.
        foreign_epistemic: AUROC of foreign data by epistemic variance, the mean over
            the outputs; None without any.
    """

    nll: float
    rmse: float
    coverage_50: float
    coverage_80: float
    coverage_90: float
    coverage_95: float
    width_95: float
    foreign_epistemic: float | None


@dataclass(frozen=True, eq=False)
class PredictionReport:
    """What a posterior's predictions are worth, beside those of the network alone.

    Args:
        num_points: Number of test points.
        posterior: Scores of the posterior.
        network: Scores of the trained network without it.
        calibration: What calibration chose; None if there was none.
        curvature_error: Largest relative standard error of the curvature's scale in a
            layer; None if it is not known.
        expected: Confidences of test points ``[points]``, probabilities of all labels
            ``[points * labels]``, or levels of intervals.
        observed: Whether each prediction was right, the labels, or the coverage of each
            level.
        risks: Share of mistakes among the most confident points ``[points]``, or labels
            ``[points * labels]``; None of a regression.
        epistemic: Epistemic uncertainty of test points ``[points]``, summed over
            labels.
        epistemic_of_foreign: That of foreign ones; None without any.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from laplace_debiased import Laplace
        >>> _ = torch.manual_seed(0)
        >>> X = torch.randn(300, 2)
        >>> y = (X[:, 0] + torch.randn(300) > 0).long()
        >>> train, test = (DataLoader(TensorDataset(X[s], y[s]), 50) for s in (
        ...     slice(200), slice(200, 300)))
        >>> la = Laplace(
        ...     torch.nn.Linear(2, 2), "classification", "all", "kron_debiased"
        ... )
        >>> la.fit(train)
        >>> la.optimize_prior_precision()
        >>> report = la.report(test, foreign_loader=[X + 30 * torch.tensor([0, 1])])
        >>> print(report.table().splitlines()[0])
        | score | posterior | network alone |
        >>> report.posterior.foreign_epistemic > 0.9
        True
    """

    num_points: int
    posterior: ClassificationScores | LabelScores | RegressionScores
    network: ClassificationScores | LabelScores | RegressionScores
    calibration: str | None
    curvature_error: float | None
    expected: Tensor
    observed: Tensor
    risks: Tensor | None
    epistemic: Tensor
    epistemic_of_foreign: Tensor | None

    def table(self) -> str:
        """Return the scores as a Markdown table."""
        lines = ["| score | posterior | network alone |", "|---|---|---|"]
        for field in fields(self.posterior):
            cells = (
                _cell(getattr(own, field.name))
                for own in (self.posterior, self.network)
            )
            lines.append(f"| {field.name.replace('_', ' ')} | {' | '.join(cells)} |")
        return "\n".join(lines)

    def __str__(self) -> str:
        """Return the table, and how far to trust it."""
        lines = [f"{self.num_points} test points", "", self.table(), ""]
        if self.calibration is not None:
            lines.append(self.calibration)
        elif self.risks is not None:
            lines.append("Probabilities are not calibrated.")
        if self.curvature_error is not None:
            lines.append(
                "Standard error of the curvature's scale, in the worst layer: "
                f"{100 * self.curvature_error:.2g} %."
            )
        return "\n".join(lines)

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw reliability, risk against coverage, and epistemic uncertainty.

        Args:
            path: Where to save the figure; None for nowhere.

        Returns:
            The figure.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        count = 2 if self.risks is None else 3
        figure = new_figure(3 * count, 2.6)
        first, *middle, last = figure.subplots(1, count)
        first.plot([0, 1], [0, 1], "k:", lw=1)
        first.plot(*self._reliability(), ".-")
        if self.risks is None:
            first.set(xlabel="level", ylabel="coverage")
        else:
            is_labels = isinstance(self.posterior, LabelScores)
            names = ("probability", "share") if is_labels else _CONFIDENCE
            first.set(xlabel=names[0], ylabel=names[1])
            shares = torch.arange(1, len(self.risks) + 1) / len(self.risks)
            middle[0].plot(shares, self.risks)
            middle[0].set(xlabel="coverage", ylabel="share of mistakes", ylim=(0, None))
        self._draw_epistemic(last)
        return save(figure, path)

    def _reliability(self) -> tuple[Tensor, Tensor]:
        """Mean confidence and accuracy in bins; levels and coverages as they are."""
        if self.risks is None:
            return self.expected, self.observed
        bins = (self.expected * NUM_BINS).long().clamp(max=NUM_BINS - 1)
        counts = bins.bincount(minlength=NUM_BINS)
        means = [
            bins.bincount(values.double(), NUM_BINS)[counts > 0] / counts[counts > 0]
            for values in (self.expected, self.observed)
        ]
        return means[0], means[1]

    def _draw_epistemic(self, axis: Axes) -> None:
        """Draw histograms of logarithms, for test and foreign data."""
        parts = {"test": self.epistemic}
        if self.epistemic_of_foreign is not None:
            parts["foreign"] = self.epistemic_of_foreign
        # what is smaller is rounding
        logs = {k: v.clamp(min=_SMALLEST).log10() for k, v in parts.items()}
        together = torch.cat(list(logs.values()))
        edges = torch.linspace(together.min().item(), together.max().item() + 1e-6, 40)
        for label, values in logs.items():
            shares = torch.full_like(values, 1 / len(values)).numpy()
            axis.hist(
                values.numpy(), edges.tolist(), weights=shares, alpha=0.6, label=label
            )
        axis.set(xlabel=r"$\log_{10}$ of epistemic uncertainty", ylabel="share")
        axis.legend()


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def classification_scores(
    probabilities: Tensor,
    y: Tensor,
    total: tuple[Tensor, Tensor | None],
    epistemic: tuple[Tensor, Tensor | None] | None,
) -> ClassificationScores:
    """Score class probabilities.

    Args:
        probabilities: Probabilities ``[points, classes]``.
        y: Classes ``[points]``.
        total: Total uncertainty of these points, and of foreign ones, if there are any.
        epistemic: Epistemic uncertainty of both; None without posterior.

    Returns:
        The scores.
    """
    p = probabilities.double()
    confidence, predicted = p.max(1)
    mistaken = predicted != y
    ece, classwise_ece = calibration_errors(p, y)
    return ClassificationScores(
        accuracy=1 - mistaken.double().mean().item(),
        nll=nll(p, y),
        brier=brier(p, y),
        ece=ece,
        classwise_ece=classwise_ece,
        aurc=risk_coverage(confidence, mistaken).mean().item(),
        mistakes=auroc(-confidence, mistaken),
        foreign=foreign_auroc(*total),
        foreign_epistemic=None if epistemic is None else foreign_auroc(*epistemic),
    )


def regression_scores(
    mean: Tensor,
    variance: Tensor,
    y: Tensor,
    epistemic: tuple[Tensor, Tensor | None] | None,
) -> RegressionScores:
    """Score predictive means and variances.

    Args:
        mean: Means ``[points, outputs]``.
        variance: Variances with the noise, of the same shape.
        y: Targets, of the same shape.
        epistemic: Epistemic uncertainty of these points, and of foreign ones, if there
            are any; None without posterior.

    Returns:
        The scores.
    """
    normal = torch.distributions.Normal(mean.double(), variance.double().sqrt())
    half, eighty, ninety, most = coverage(mean, variance, y).tolist()
    return RegressionScores(
        nll=-normal.log_prob(y.double()).mean().item(),
        rmse=(mean - y).double().square().mean().sqrt().item(),
        coverage_50=half,
        coverage_80=eighty,
        coverage_90=ninety,
        coverage_95=most,
        width_95=2 * _half_width(LEVELS[-1]) * normal.stddev.mean().item(),
        foreign_epistemic=None if epistemic is None else foreign_auroc(*epistemic),
    )


def coverage(mean: Tensor, variance: Tensor, y: Tensor) -> Tensor:
    """Compute which share of targets central intervals hold, at each of ``LEVELS``.

    Args:
        mean: Means of any shape.
        variance: Variances with the noise, of the same shape.
        y: Targets, of the same shape.

    Returns:
        The shares ``[levels]``.
    """
    distance = (y - mean).abs() / variance.sqrt()
    held = [(distance <= _half_width(level)).double().mean() for level in LEVELS]
    return torch.stack(held)


def _half_width(level: float) -> float:
    return torch.special.ndtri(torch.tensor((1 + level) / 2).double()).item()
