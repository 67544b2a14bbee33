"""Whether debiasing keeps a Newton step by conjugate gradients from diverging.

The paper's Figure 5: loss of all training points and test accuracy along the iterates,
at equal data: a single batch of m points, or two of m / 2 points.

    python benchmarks/newton_step_stability.py --data-root DATA
"""

from __future__ import annotations

import argparse
import warnings
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from curvlinops import GGNLinearOperator
from shared.command_line import parse, study_parser
from shared.data import problem_data
from shared.figures import draw_range, legend_below, written_figure
from shared.networks import all_convolutional
from shared.reports import Progress, write_report
from shared.tables import mean_and_std
from shared.training import adamw, kept
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.data import TensorDataset

from laplace_debiased import CGResult, cg, debiased_cg
from laplace_debiased.comparison.training import Recipe

STUDY = Path(__file__).stem
DATASET = "fashion-mnist"
WIDTH = 8
SHOWN_DAMPING = 1e-2
METHODS = ("single batch", "debiased", "debiased, subspace")
# a loss of all points takes two seconds: not all iterates have one
EVALUATED = (0, 1, 2, 4, 8, 20)


# number of training points that a network has seen, once each
STAGES = {"after 50 steps": 6400, "after one epoch": 50_000}


def half_trained(data_root: Path, num_points: int) -> nn.Module:
    """Train a network on some points, and keep it."""
    recipe = Recipe(partial(all_convolutional, WIDTH), 1, 4e-3, optimizer=adamw)
    points = TensorDataset(*problem_data(DATASET, data_root).train[:num_points])
    return kept(f"{WIDTH}-first-{num_points}", recipe, points)


class Damped:
    """Curvature of a mini-batch with damping, and its negative gradient.

    Args:
        model: The network.
        X: Images.
        y: Their classes.
        damping: The damping.
    """

    def __init__(self, model: nn.Module, X: Tensor, y: Tensor, damping: float):
        params, loss = list(model.parameters()), nn.CrossEntropyLoss()
        self.operator = GGNLinearOperator(
            model, loss, params, [(X, y)], check_deterministic=False
        )
        gradients = torch.autograd.grad(loss(model(X), y), params)
        self.descent = -parameters_to_vector(gradients)
        self.damping = damping

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """Multiply vectors ``[D]`` or ``[D, K]``."""
        return self.operator @ vectors + self.damping * vectors


def steps(
    model: nn.Module, X: Tensor, y: Tensor, damping: float, iterations: int
) -> dict[str, CGResult]:
    """Compute the iterates of one step from m points, by each of ``METHODS``."""
    options = {"rtol": 0.0, "max_iterations": iterations}
    half = len(X) // 2
    all_points, first, other = (
        Damped(model, X[part], y[part], damping)
        for part in (slice(None), slice(half), slice(half, None))
    )
    single = cg(all_points, all_points.descent, **options)
    pair = first, first.descent, other, other.descent
    results = (
        single,
        debiased_cg(*pair, **options),
        debiased_cg(*pair, subspace=True, **options),
    )
    return dict(zip(METHODS, results, strict=True))


@torch.no_grad()
def evaluate(
    model: nn.Module, iterates: Tensor, X: Tensor, y: Tensor
) -> tuple[list[float], list[float]]:
    """Compute loss and accuracy at each iterate, and leave the network as it was."""
    params = list(model.parameters())
    start = parameters_to_vector(params).clone()
    losses, accuracies = [], []
    for change in iterates.T:
        vector_to_parameters(start + change, params)
        output = torch.cat([model(images) for images in X.split(100)])
        losses.append(cross_entropy(output, y).item())
        accuracies.append((output.argmax(1) == y).float().mean().item())
    vector_to_parameters(start, params)
    return losses, accuracies


def evaluated(iterations: int) -> list[int]:
    """List the iterates that are evaluated."""
    return [k for k in EVALUATED if k < iterations] + [iterations]


def run(settings: argparse.Namespace, progress: Progress) -> list[dict[str, Any]]:
    """Run all methods at all stages, dampings, batch sizes and seeds."""
    data = problem_data(DATASET, settings.data_root)
    X, y = data.train.tensors

    def measure(stage: str, damping: float, size: int, seed: int) -> dict[str, Any]:
        model = half_trained(settings.data_root, STAGES[stage])
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(len(X), generator=generator)[:size]
        results = steps(model, X[drawn], y[drawn], damping, settings.iterations)
        evaluated_on = {
            "loss": (X[: settings.points], y[: settings.points]),
            "accuracy": (data.test_inputs, data.test_labels),
        }
        # all begin at the same point, and after convergence the last iterate stays
        _, *shown = evaluated(settings.iterations)
        at = [
            result.iterates[:, [min(k, result.num_iterations) for k in shown]]
            for result in results.values()
        ]
        iterates = torch.cat([next(iter(results.values())).start[:, None], *at], 1)
        curves: dict[str, dict[str, list[float]]] = {method: {} for method in results}
        for position, (quantity, points) in enumerate(evaluated_on.items()):
            first, *others = evaluate(model, iterates, *points)[position]
            for k, method in enumerate(results):
                part = others[k * len(shown) : (k + 1) * len(shown)]
                curves[method][quantity] = [first, *part]
        return curves

    rows = []
    for case in product(settings.stages, settings.dampings, settings.sizes):
        runs = [
            progress.run(
                " ".join(map(str, (*case, seed))), partial(measure, *case, seed)
            )
            for seed in range(settings.seeds)
        ]
        row = dict(zip(("stage", "damping", "size"), case, strict=True))
        rows += [row | {"method": m, "runs": [r[m] for r in runs]} for m in METHODS]
        print("\n".join(table(rows[-len(METHODS) :]).splitlines()[2:]), flush=True)
    return rows


def curves(row: dict[str, Any], quantity: str) -> np.ndarray:
    """Return a quantity along the iterates of each seed ``[seeds, iterates]``."""
    return np.array([run[quantity] for run in row["runs"]])


def table(rows: list[dict[str, Any]]) -> str:
    """Format the rows as a Markdown table."""
    lines = [
        "| network | damping | points | method | loss at the start | lowest "
        "| at the end | accuracy % at the start | highest | at the end |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        loss, accuracy = curves(row, "loss"), 100 * curves(row, "accuracy")
        columns = [
            loss[:, 0],
            loss.min(1),
            loss[:, -1],
            accuracy[:, 0],
            accuracy.max(1),
            accuracy[:, -1],
        ]
        digits = [3, 3, 3, 1, 1, 1]
        cells = [
            mean_and_std(column, d) for column, d in zip(columns, digits, strict=True)
        ]
        lines.append(
            f"| {row['stage']} | {row['damping']:g} | {row['size']} "
            f"| {row['method']} | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines)


def write_figure(path: Path, rows: list[dict[str, Any]], shown: list[int]) -> None:
    """Draw the loss along the iterates, stages in rows, sizes in columns."""
    stages, sizes, dampings = (
        list(dict.fromkeys(row[key] for row in rows))
        for key in ("stage", "size", "damping")
    )
    damping = SHOWN_DAMPING if SHOWN_DAMPING in dampings else dampings[0]
    with written_figure(path, 3, 0.7 * len(stages)) as figure:
        panels = figure.subplots(len(stages), len(sizes), squeeze=False)
        for row in rows:
            if row["damping"] != damping:
                continue
            axis = panels[stages.index(row["stage"]), sizes.index(row["size"])]
            loss = curves(row, "loss")
            draw_range(axis, shown, loss, row["method"], marker=".")
            start = loss[:, 0].mean()
            axis.set(ylim=(0.9 * start, 1.5 * start))
            axis.set_title(f"{row['stage']}, {row['size']} points")
        for axis in panels[-1]:
            axis.set_xlabel("iteration")
        for axis in panels[:, 0]:
            axis.set_ylabel("loss of all points")
        legend_below(figure, panels[0, 0], 3)


def main() -> None:
    """Run all steps, and write table, numbers and figure."""
    parser = study_parser(__doc__, STUDY)
    parser.add_argument("--stages", nargs="+", default=list(STAGES))
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument(
        "--points", type=int, help="how many the loss is of; all if not given"
    )
    parser.add_argument("--dampings", type=float, nargs="+", default=[1e-2, 1e-1])
    settings = parse(parser)
    if settings.quick:
        settings.dampings, settings.sizes, settings.iterations = [1e-2], [128], 3
        settings.stages, settings.points = settings.stages[:1], 500
    warnings.simplefilter("ignore")
    progress = Progress(settings, STUDY)
    rows = run(settings, progress)
    recorded = {
        "dataset": DATASET,
        "seeds": settings.seeds,
        "points": settings.points,
        "iterates": evaluated(settings.iterations),
        "width": WIDTH,
    }
    write_report(settings.out, STUDY, recorded, rows, table(rows))
    write_figure(settings.out / f"{STUDY}.png", rows, evaluated(settings.iterations))
    progress.clear()


if __name__ == "__main__":
    main()
