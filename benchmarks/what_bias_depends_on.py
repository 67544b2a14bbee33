"""What the bias of a mini-batch's curvature depends on.

The paper's first open question: batch size, training progress, width and depth.

    python benchmarks/what_bias_depends_on.py --data-root DATA

An interrupted study resumes where it stopped. ``--redraw`` writes table and figure of
recorded numbers again.
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import NullFormatter
from scipy.stats import gmean, linregress
from shared.bias import bias_parser, measured_bias, parse_bias, run_study
from shared.data import IMAGES, Images, problem_data
from shared.figures import written_figure
from shared.networks import mlp
from shared.reports import Progress
from shared.tables import deviation, mean_and_std
from shared.training import adamw, kept
from torch import nn
from torch.utils.data import TensorDataset

from laplace_debiased.comparison.training import Recipe

STUDY = Path(__file__).stem


@dataclass(frozen=True)
class Case:
    """A network of linear layers and the size of a mini-batch.

    Args:
        batch_size: Size of the mini-batch.
        epochs: Number of passes that the network is trained for.
        width: Units of each hidden layer.
        depth: Number of hidden layers.
    """

    batch_size: int = 256
    epochs: int = 5
    width: int = 64
    depth: int = 2

    def network(self, points: TensorDataset, dataset: str) -> nn.Module:
        """Train the network, and keep it."""
        recipe = Recipe(
            partial(self._build, IMAGES[dataset]), self.epochs, 2e-3, optimizer=adamw
        )
        name = f"{dataset}-mlp-{self.width}-{self.depth}-{self.epochs}"
        return kept(name, recipe, points)

    def _build(self, images: Images) -> nn.Module:
        widths = [self.width] * self.depth
        return mlp(widths, images.channels * images.size**2, images.classes)


VARIATIONS = {
    "batch size": ("batch_size", (64, 128, 256, 512, 1024)),
    "epochs of training": ("epochs", (0, 1, 2, 5, 10, 20)),
    "width": ("width", (16, 32, 64, 128, 256)),
    "depth": ("depth", (1, 2, 3, 4)),
}


def run(settings: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Measure the bias of the top directions under all variations."""
    points = problem_data(settings.dataset, settings.data_root).train
    base, variations = Case(), VARIATIONS
    if settings.quick:
        base, variations = Case(epochs=0), {"batch size": ("batch_size", (64, 128))}

    def measure(case: Case) -> list[dict]:
        model = case.network(points, settings.dataset)
        return [
            typical(
                measured_bias(
                    model,
                    points,
                    settings,
                    num_directions=settings.top,
                    batch_size=case.batch_size,
                    num_batches=settings.points // case.batch_size - 1,
                    seed=seed,
                )
            )
            for seed in range(settings.seeds)
        ]

    results: dict[str, Any] = {}
    for label, (name, values) in variations.items():
        for value in values:
            case = replace(base, **{name: value})
            runs = progress.run(str(case), partial(measure, case))
            results.setdefault(label, {})[str(value)] = runs
            print(label, value, mean_ratios(runs), flush=True)
    return results


def typical(run: dict[str, Any]) -> dict[str, Any]:
    """Keep the geometric mean over other mini-batches, which are many.

    Few points carry most of the curvature, so that a typical mini-batch has less than
    the mean, along its own directions and others'.
    """
    curvature = run["curvature"]
    others = gmean(curvature["others"], 0).tolist()
    return {"own": curvature["own"], "others": others, "all": curvature["overall"]}


def mean_ratios(runs: list[dict[str, Any]]) -> list[float]:
    """Return the ratios of curvatures, own to others: geometric mean of each seed."""
    return [float(gmean(np.divide(run["own"], run["others"]))) for run in runs]


def mean_excess(values: dict[str, list[dict[str, Any]]]) -> np.ndarray:
    """Return the ratio's excess over one: ``[settings, seeds]``."""
    return np.array([mean_ratios(runs) for runs in values.values()]) - 1


def exponent(numbers: np.ndarray, excess: np.ndarray) -> float:
    """Fit the exponent of the seeds' mean excess over one; NaN if one is not positive.

    Args:
        numbers: What is varied ``[settings]``, positive.
        excess: Excess ``[settings, seeds]``.
    """
    means = excess.mean(1)
    if (means <= 0).any():
        return float("nan")
    return linregress(np.log(numbers), np.log(means)).slope


def trend(values: dict[str, list[dict[str, Any]]]) -> tuple[float, float]:
    """Fit the exponent of the excess, with its standard error over the seeds.

    Each setting's excess is the mean over the seeds, whether these are positive or not.
    The error is the jackknife's, which leaves one seed out of all settings at a time;
    that the trend may not be a power is not in it. NaN if a mean is not positive.
    """
    numbers, excess = np.array([float(v) for v in values]), mean_excess(values)
    numbers, excess = numbers[numbers > 0], excess[numbers > 0]
    seeds = excess.shape[1]
    if seeds == 1:
        return exponent(numbers, excess), float("nan")
    left_out = [exponent(numbers, np.delete(excess, k, 1)) for k in range(seeds)]
    return exponent(numbers, excess), np.sqrt(seeds - 1) * np.std(left_out)


def table(results: dict[str, Any]) -> str:
    """Format the ratios as a Markdown table."""
    lines = [
        "| varied | value | curvature, own / others | exponent of the excess |",
        "|---|---|---|---|",
    ]
    for label, values in results.items():
        slope, error = trend(values)
        fit = f"{slope:.2f} ± {error:.2f}"
        means = mean_excess(values).mean(1)
        none = [v for v, mean in zip(values, means, strict=True) if mean <= 0]
        if none:
            fit = f"none: no excess at {', '.join(none)}"
        for value, runs in values.items():
            ratios = mean_and_std(np.array(mean_ratios(runs)), 2)
            lines.append(f"| {label} | {value} | {ratios} | {fit} |")
    return "\n".join(lines)


def write_figure(path: Path, results: dict[str, Any]) -> None:
    """Draw the excess of the ratio over one, with the fitted trend."""
    with written_figure(path, 4) as figure:
        panels = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
        for axis, (label, values) in zip(panels, results.items(), strict=True):
            numbers, excess = np.array([float(v) for v in values]), mean_excess(values)
            shift = 0.5 if min(numbers) == 0 else 0.0
            means, spread = excess.mean(1), deviation(excess, 1)
            axis.errorbar(numbers + shift, means, spread, fmt="o")
            slope, _ = trend(values)
            if np.isfinite(slope):
                known = numbers > 0
                logs = np.log(numbers[known])
                line = np.exp(
                    slope * (logs - logs.mean()) + np.log(means[known]).mean()
                )
                label_of_line = f"exponent {slope:.2f}"
                axis.plot(numbers[known] + shift, line, "--", label=label_of_line)
                axis.legend()
            axis.set(xscale="log", yscale="log", xlabel=label)
            axis.set_xticks(numbers + shift, list(values))
            axis.xaxis.set_minor_formatter(NullFormatter())
        panels[0].set_ylabel("curvature,\nown / others $-$ 1")


def main() -> None:
    """Run the study, and write table, numbers and figure."""
    parser = bias_parser(__doc__, STUDY)
    parser.add_argument(
        "--top", type=int, default=50, help="how many directions, the top ones"
    )
    settings = parse_bias(parser)
    if settings.quick:
        settings.top = 4
    warnings.simplefilter("ignore")
    recorded = {"base": asdict(Case())}
    run_study(STUDY, settings, run, table, write_figure, recorded)


if __name__ == "__main__":
    main()
