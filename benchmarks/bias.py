"""How biased the quadratics of mini-batches are, and what that depends on.

The paper's Figure 2 (``directions``), and its first open question (``dependence``): on
batch size, training progress, width and depth.

    python benchmarks/bias.py directions --data-root DATA
    python benchmarks/bias.py dependence --data-root DATA

An interrupted study resumes where it stopped. ``--redraw`` writes table and figure of
recorded numbers again.
"""

from __future__ import annotations

import argparse
import json
import warnings
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import (
    Progress,
    deviation,
    figure_style,
    mean_and_std,
    parse,
    study_parser,
    write_report,
)
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from networks import (
    IMAGES,
    Images,
    Recipe,
    kept,
    mlp,
    problem_data,
    trained,
)
from scipy.stats import gmean, linregress
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import bias_report
from laplace_debiased.quadratics.bias import BiasReport, Comparison

KINDS = ("eigenvectors", "cg")
MAX_ITERATIONS = 30


def measure(
    model: nn.Module, points: TensorDataset, settings: argparse.Namespace, **options
) -> dict[str, Any]:
    """Compute a bias report, as plain values."""
    report = bias_report(
        model,
        nn.CrossEntropyLoss(),
        list(model.parameters()),
        DataLoader(points, batch_size=256),
        num_points=settings.points,
        **options,
    )

    def plain(values: Comparison) -> dict[str, Any]:
        return {
            name: getattr(values, name).tolist()
            for name in ("own", "others", "overall")
        }

    return {"curvature": plain(report.curvature), "slope": plain(report.slope)}


def restored(values: dict[str, Any], directions: str, num_points: int) -> BiasReport:
    """Build a report from plain values."""

    def comparison(parts: dict[str, Any]) -> Comparison:
        return Comparison(**{name: torch.tensor(part) for name, part in parts.items()})

    return BiasReport(
        directions,
        num_points,
        comparison(values["curvature"]),
        comparison(values["slope"]),
    )


def mean_over_seeds(runs: list[dict[str, Any]], quantity: str, part: str) -> np.ndarray:
    """Average a part of the reports: ``[K]``."""
    values = np.array([run[quantity][part] for run in runs])
    return values.reshape(-1, values.shape[-1]).mean(0)


def run_directions(settings: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Measure slopes and curvatures along both kinds of directions."""
    points = problem_data(settings.dataset, settings.data_root).train
    networks = {
        name: trained(name, settings.dataset, settings.data_root)
        for name in settings.networks
    }
    results: dict[str, Any] = {}
    for (network, model), kind in product(networks.items(), KINDS):
        count = settings.directions
        count = count if kind == "eigenvectors" else min(count, MAX_ITERATIONS)
        runs = [
            progress.run(
                f"{network} {kind} {seed}",
                partial(
                    measure,
                    model,
                    points,
                    settings,
                    directions=kind,
                    num_directions=count,
                    batch_size=settings.batch_size,
                    damping=1e-2 if kind == "cg" else 0.0,
                    seed=seed,
                ),
            )
            for seed in range(settings.seeds)
        ]
        results.setdefault(network, {})[kind] = runs
        print(network, restored(runs[0], kind, settings.batch_size).table(), flush=True)
    return results


def directions_table(results: dict[str, Any]) -> str:
    """Format means over the seeds as a Markdown table."""
    lines = [
        "| network | directions | quantity | ranks | own batch | other batches "
        "| large sample | others / own |",
        "|---|---|---|---|---|---|---|---|",
    ]
    cases = [(n, k, runs) for n, own in results.items() for k, runs in own.items()]
    for network, kind, runs in cases:
        for quantity in ("slope", "curvature"):
            own, others, overall = (
                mean_over_seeds(runs, quantity, part)
                for part in ("own", "others", "overall")
            )
            edges = [e for e in (1, 5, 10, 20, 50) if e < len(own)] + [len(own)]
            for first, last in zip([0, *edges[:-1]], edges, strict=True):
                ranks = slice(first, last)
                means = [part[ranks].mean() for part in (own, others, overall)]
                # over the mean of all seeds, since a seed's slope may be next to zero
                per_seed = [
                    np.mean(run[quantity]["others"], 0)[ranks].mean() / means[0]
                    for run in runs
                ]
                lines.append(
                    f"| {network} | {kind} | {quantity} | {first + 1} to {last} | "
                    + " | ".join(f"{mean:.3g}" for mean in means)
                    + f" | {mean_and_std(np.array(per_seed), 2)} |"
                )
    return "\n".join(lines)


def directions_figure(path: Path, results: dict[str, Any]) -> None:
    """Draw slopes and curvatures against the rank, the paper's Figure 2."""
    with rc_context(figure_style(ncols=4, height_to_width_ratio=2.0)):
        figure = Figure()
        panels = figure.subplots(len(results), 4, squeeze=False)
        cases = [(kind, q) for kind in KINDS for q in ("slope", "curvature")]
        for row, (network, runs) in zip(panels, results.items(), strict=True):
            for axis, (kind, quantity) in zip(row, cases, strict=True):
                _draw_quantity(axis, runs[kind], quantity)
                axis.set(title=f"{quantity}, {kind}")
            row[0].set_ylabel(network)
        for axis in panels[-1]:
            axis.set_xlabel("rank of the direction")
        figure.legend(
            *panels[0, 0].get_legend_handles_labels(),
            loc="outside lower center",
            ncols=3,
        )
        figure.savefig(path, dpi=200)


def _draw_quantity(axis: Axes, runs: list[dict[str, Any]], quantity: str) -> None:
    labels = {
        "own": "batch that gave the directions",
        "others": "other batches",
        "overall": "large sample",
    }
    for part, label in labels.items():
        values = np.array([run[quantity][part] for run in runs])
        values = values.reshape(-1, values.shape[-1])
        ranks = np.arange(1, values.shape[1] + 1)
        style = {"ls": "--", "color": "black"} if part == "overall" else {}
        (line,) = axis.plot(ranks, values.mean(0), label=label, **style)
        if part != "overall":
            axis.fill_between(
                ranks,
                np.quantile(values, 0.1, 0),
                np.quantile(values, 0.9, 0),
                color=line.get_color(),
                alpha=0.2,
                lw=0,
            )
    if quantity == "curvature":
        axis.set_yscale("log")


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
        recipe = Recipe(partial(self._build, IMAGES[dataset]), self.epochs, 2e-3)
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


def run_dependence(settings: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Measure the bias of the top directions under all variations."""
    points = problem_data(settings.dataset, settings.data_root).train
    base, variations = Case(), VARIATIONS
    if settings.quick:
        base, variations = Case(epochs=0), {"batch size": ("batch_size", (64, 128))}

    def run(case: Case) -> list[dict]:
        model = case.network(points, settings.dataset)
        return [
            typical(
                measure(
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
            runs = progress.run(str(case), partial(run, case))
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


def dependence_table(results: dict[str, Any]) -> str:
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


def dependence_figure(path: Path, results: dict[str, Any]) -> None:
    """Draw the excess of the ratio over one, with the fitted trend."""
    with rc_context(figure_style(ncols=4)):
        figure = Figure()
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
        figure.savefig(path, dpi=200)


STUDIES = {
    "directions": (run_directions, directions_table, directions_figure),
    "dependence": (run_dependence, dependence_table, dependence_figure),
}


def main() -> None:
    """Run a study, and write table, numbers and figure."""
    parser = study_parser(__doc__)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--directions", type=int, default=100)
    parser.add_argument(
        "--top", type=int, default=50, help="directions of the study of dependence"
    )
    parser.add_argument(
        "--batch-size", type=int, default=512, help="of the study of directions"
    )
    parser.add_argument(
        "--points",
        type=int,
        default=6000,
        help="how many stand for all data, the mini-batches among them",
    )
    parser.add_argument("--dataset", choices=IMAGES, default="fashion-mnist")
    parser.add_argument(
        "--networks",
        nargs="+",
        default=["all-convolutional", "MLP"],
        help="of the study of directions, by the names of benchmarks/networks.py",
    )
    parser.add_argument(
        "--redraw", action="store_true", help="write table and figure alone"
    )
    settings = parse(parser)
    if settings.quick:
        settings.directions, settings.points = 4, 700
        settings.batch_size, settings.top = 32, 4
    warnings.simplefilter("ignore")
    run, table, figure = STUDIES[settings.study]
    name = f"bias_{settings.study}"
    if settings.dataset != parser.get_default("dataset"):
        name += f"_{settings.dataset}"
    if settings.redraw:
        results = json.loads((settings.out / f"{name}.json").read_text())["results"]
        (settings.out / f"{name}.md").write_text(table(results) + "\n")
        figure(settings.out / f"{name}.png", results)
        return
    progress = Progress(settings, name)
    results = run(settings, progress)
    recorded = {
        "dataset": settings.dataset,
        "batch_size": settings.batch_size,
        "base": asdict(Case()),
        "seeds": settings.seeds,
        "points": settings.points,
    }
    write_report(settings.out, name, recorded, results, table(results))
    figure(settings.out / f"{name}.png", results)
    progress.clear()


if __name__ == "__main__":
    main()
