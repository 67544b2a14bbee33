"""How biased slopes and curvatures along a mini-batch's own directions are.

After the paper's Figure 2: along top eigenvectors, and along the directions that
conjugate gradients take.

    python benchmarks/bias_along_directions.py --data-root DATA

An interrupted study resumes where it stopped. ``--redraw`` writes table and figure of
recorded numbers again.
"""

from __future__ import annotations

import argparse
import warnings
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from shared.bias import bias_parser, measured_bias, parse_bias, run_study
from shared.data import problem_data
from shared.figures import legend_below, written_figure
from shared.reports import Progress
from shared.tables import mean_and_std
from shared.training import trained

STUDY = Path(__file__).stem
KINDS = ("eigenvectors", "cg")
MAX_ITERATIONS = 30


def mean_over_seeds(runs: list[dict[str, Any]], quantity: str, part: str) -> np.ndarray:
    """Average a part of the reports: ``[K]``."""
    values = np.array([run[quantity][part] for run in runs])
    return values.reshape(-1, values.shape[-1]).mean(0)


def run(settings: argparse.Namespace, progress: Progress) -> dict[str, Any]:
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
                    measured_bias,
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
        own = {network: {kind: runs}}
        print("\n".join(table(own).splitlines()[2:]), flush=True)
    return results


def table(results: dict[str, Any]) -> str:
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


def write_figure(path: Path, results: dict[str, Any]) -> None:
    """Draw slopes and curvatures against the rank, the paper's Figure 2."""
    with written_figure(path, 4, 2.0) as figure:
        panels = figure.subplots(len(results), 4, squeeze=False)
        cases = [(kind, q) for kind in KINDS for q in ("slope", "curvature")]
        for row, (network, runs) in zip(panels, results.items(), strict=True):
            for axis, (kind, quantity) in zip(row, cases, strict=True):
                _draw_quantity(axis, runs[kind], quantity)
                axis.set(title=f"{quantity}, {kind}")
            row[0].set_ylabel(network)
        for axis in panels[-1]:
            axis.set_xlabel("rank of the direction")
        legend_below(figure, panels[0, 0], 3)


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


def main() -> None:
    """Run the study, and write table, numbers and figure."""
    parser = bias_parser(__doc__, STUDY)
    parser.add_argument("--directions", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument(
        "--networks",
        nargs="+",
        default=["all-convolutional", "MLP"],
        help="names of recipes in shared/training.py",
    )
    settings = parse_bias(parser)
    if settings.quick:
        settings.directions, settings.batch_size = 4, 32
    warnings.simplefilter("ignore")
    recorded = {"batch_size": settings.batch_size}
    run_study(STUDY, settings, run, table, write_figure, recorded)


if __name__ == "__main__":
    main()
