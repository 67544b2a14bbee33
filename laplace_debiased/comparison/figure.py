"""The comparison's figure: NLL against prior precision, and reliability."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import sem
from torch import Tensor
from tueplots.constants.color import palettes

from laplace_debiased.comparison.experiment import (
    CALIBRATED,
    MAP,
    PRIOR_PRECISIONS,
    SCALED,
    Run,
)
from laplace_debiased.comparison.posteriors import FULL_DATA, POSTERIORS
from laplace_debiased.comparison.report import group_by_estimator, reliabilities
from laplace_debiased.comparison.style import figure_style

# differences of the NLL below this one, in nats, are drawn on a linear scale
_SMALL = 1e-2
_COLORS = {
    MAP: "grey",
    SCALED: "black",
    CALIBRATED: "black",
    **dict(zip(POSTERIORS, (f"#{c}" for c in palettes.paultol_bright), strict=False)),
}


def write_figure(path: Path, runs: list[Run], labels: Tensor, title: str) -> None:
    """Draw the figure.

    Left: mean test NLL of each posterior, with its standard error shaded and a dot
    where the marginal likelihood is largest. Without a choice of the prior precision,
    it is flat. Middle: the NLL's difference to the
    full-data posterior, which a seed shares network and test points with. Right:
    accuracy over confidence where the marginal likelihood is largest.

    Args:
        path: The image file.
        runs: The runs.
        labels: Test labels ``[points]``.
        title: What was compared.
    """
    style = figure_style(num_columns=3)
    style |= {"figure.titlesize": style["axes.titlesize"], "lines.markersize": 4}
    with rc_context(style):
        figure = Figure()
        nll_axis, excess_axis, reliability_axis = figure.subplots(1, 3)
        _draw_nll(nll_axis, runs)
        _draw_excess_nll(excess_axis, runs)
        _draw_reliability(reliability_axis, runs, labels)
        figure.suptitle(title)
        figure.legend(
            *nll_axis.get_legend_handles_labels(), loc="outside lower center", ncols=5
        )
        figure.savefig(path, dpi=200)


def _draw_nll(axis: Axes, runs: list[Run]) -> None:
    for estimator, group in group_by_estimator(runs).items():
        nll = [run.scores.nll for run in group]
        if group[0].curve is None:
            flat = np.tile(nll, (len(PRIOR_PRECISIONS), 1)).T
            _draw_band(axis, flat, estimator)
            continue
        _draw_band(axis, _curves(group), estimator)
        chosen = np.mean([run.prior_precision for run in group])
        axis.plot(chosen, np.mean(nll), "o", color=_COLORS[estimator])
    axis.set(
        xscale="log", yscale="log", xlabel="prior precision", ylabel="test NLL (nats)"
    )


def _draw_excess_nll(axis: Axes, runs: list[Run]) -> None:
    groups = group_by_estimator(runs)
    full = _curves(groups[FULL_DATA])
    for estimator in POSTERIORS:
        _draw_band(axis, _curves(groups[estimator]) - full, estimator)
    axis.set(xscale="log", xlabel="prior precision", ylabel="NLL $-$ full data")
    axis.set_yscale("symlog", linthresh=_SMALL)


def _draw_reliability(axis: Axes, runs: list[Run], labels: Tensor) -> None:
    axis.plot([0, 1], [0, 1], ":", color="black")
    for estimator, (confidence, accuracy) in reliabilities(runs, labels).items():
        axis.plot(
            confidence,
            accuracy,
            _line_style(estimator),
            marker=".",
            color=_COLORS[estimator],
        )
    axis.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02))


def _curves(group: list[Run]) -> np.ndarray:
    """Return NLLs ``[seeds, prior precisions]``."""
    return np.array([run.curve for run in group])


def _draw_band(axis: Axes, curves: np.ndarray, estimator: str) -> None:
    """Draw mean and standard error of curves ``[seeds, prior precisions]``."""
    color = _COLORS[estimator]
    mean = curves.mean(0)
    axis.plot(
        PRIOR_PRECISIONS, mean, _line_style(estimator), color=color, label=estimator
    )
    if len(curves) > 1:
        error = sem(curves)
        axis.fill_between(
            PRIOR_PRECISIONS, mean - error, mean + error, color=color, alpha=0.2, lw=0
        )


def _line_style(estimator: str) -> str:
    return {MAP: "--", SCALED: ":", CALIBRATED: "-."}.get(estimator, "-")
