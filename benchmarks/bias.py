"""How biased the quadratics of mini-batches are, and what that depends on.

The paper's Figure 2 (``directions``), and its first open question (``dependence``): on
batch size, training progress, width and depth.

    python benchmarks/bias.py directions --data-root DATA
    python benchmarks/bias.py dependence --data-root DATA

An interrupted study resumes where it stopped.
"""

from __future__ import annotations

import argparse
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
    CHECKPOINTS,
    Recipe,
    all_convolutional,
    mlp,
    problem_data,
    train,
    trained,
)
from scipy.stats import gmean, linregress
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import bias_report
from laplace_debiased.bias import BiasReport, Comparison

DATASET = "fashion-mnist"
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


def kept(name: str, recipe: Recipe, points: TensorDataset) -> nn.Module:
    """Train a network, and keep it."""
    path = CHECKPOINTS / "cache" / f"{name}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        model, _ = train(recipe, *points.tensors, 0, mirror=True)
        torch.save(model.state_dict(), path)
    model = recipe.build().eval()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def run_directions(settings: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Measure slopes and curvatures along both kinds of directions."""
    points = problem_data(DATASET, settings.data_root).train
    narrow = Recipe(partial(all_convolutional, 8), 0 if settings.quick else 10, 4e-3)
    networks = {
        "all-convolutional": kept(f"8-1-{narrow.epochs}", narrow, points),
        "MLP": trained("MLP", DATASET, settings.data_root),
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
        "| all data | others / own |",
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
                per_seed = [
                    np.sum(np.mean(run[quantity]["others"], 0)[ranks])
                    / np.sum(run[quantity]["own"][ranks])
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
        "overall": "all data",
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

    def network(self, points: TensorDataset) -> nn.Module:
        """Train the network, and keep it."""
        recipe = Recipe(partial(mlp, [self.width] * self.depth), self.epochs, 2e-3)
        return kept(f"mlp-{self.width}-{self.depth}-{self.epochs}", recipe, points)


VARIATIONS = {
    "batch size": ("batch_size", (64, 128, 256, 512, 1024)),
    "epochs of training": ("epochs", (0, 1, 2, 5, 10, 20)),
    "width": ("width", (16, 32, 64, 128, 256)),
    "depth": ("depth", (1, 2, 3, 4)),
}


def run_dependence(settings: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Measure the bias of the top directions under all variations."""
    points = problem_data(DATASET, settings.data_root).train
    base, variations = Case(), VARIATIONS
    if settings.quick:
        base, variations = Case(epochs=0), {"batch size": ("batch_size", (64, 128))}

    def run(case: Case) -> list[dict]:
        model = case.network(points)
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


def trend(values: dict[str, list[dict[str, Any]]]) -> tuple[float, float]:
    """Fit the exponent of the ratio's excess over one, with its standard error.

    NaN if there are not two values with an excess.
    """
    points = [
        (float(value), ratio - 1)
        for value, runs in values.items()
        for ratio in mean_ratios(runs)
        if float(value) > 0 and ratio > 1
    ]
    if len({value for value, _ in points}) < 2:
        return float("nan"), float("nan")
    fit = linregress(*np.log(np.array(points)).T)
    return fit.slope, fit.stderr


def dependence_table(results: dict[str, Any]) -> str:
    """Format the ratios as a Markdown table."""
    lines = [
        "| varied | value | curvature, own / others | exponent of the excess |",
        "|---|---|---|---|",
    ]
    for label, values in results.items():
        slope, error = trend(values)
        for value, runs in values.items():
            ratios = mean_ratios(runs)
            lines.append(
                f"| {label} | {value} | {np.mean(ratios):.2f} ± "
                f"{np.std(ratios, ddof=1):.2f} | {slope:.2f} ± {error:.2f} |"
            )
    return "\n".join(lines)


def dependence_figure(path: Path, results: dict[str, Any]) -> None:
    """Draw the excess of the ratio over one, with the fitted trend."""
    with rc_context(figure_style(ncols=4)):
        figure = Figure()
        panels = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
        for axis, (label, values) in zip(panels, results.items(), strict=True):
            numbers = [float(value) for value in values]
            shift = 0.5 if min(numbers) == 0 else 0.0
            excess = np.array([mean_ratios(runs) for runs in values.values()]) - 1
            axis.errorbar(
                np.array(numbers) + shift,
                excess.mean(1),
                excess.std(1, ddof=1),
                fmt="o",
            )
            slope, _ = trend(values)
            known = np.array([number for number in numbers if number > 0])
            means = excess.mean(1)[[number > 0 for number in numbers]]
            level = np.exp(np.mean(np.log(means) - slope * np.log(known)))
            trend_line = level * known**slope
            axis.plot(known + shift, trend_line, "--", label=f"exponent {slope:.2f}")
            axis.set(xscale="log", yscale="log", xlabel=label)
            axis.set_xticks(np.array(numbers) + shift, list(values))
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.legend()
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
    settings = parse(parser)
    if settings.quick:
        settings.directions, settings.points = 4, 700
        settings.batch_size, settings.top = 32, 4
    warnings.simplefilter("ignore")
    run, table, figure = STUDIES[settings.study]
    name = f"bias_{settings.study}"
    progress = Progress(settings.out / f"{name}.partial.json")
    results = run(settings, progress)
    recorded = {
        "dataset": DATASET,
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
