"""Training from initialization: conjugate gradients, debiased or not, SGD and Adam.

At an equal number of gradient-equivalent passes, with settings tuned by validation data
for each method by the same budget.

    python benchmarks/optimization.py --data-root DATA
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
from matplotlib.figure import Figure
from networks import mlp, problem_data
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from laplace_debiased import DebiasedCG

DATASET = "fashion-mnist"
NUM_VALIDATION = 5000
CG_POINTS, CG_ITERATIONS = 512, 5
FIRST_ORDER_POINTS = 128
NUM_CHECKS = 12
TUNING_SEED = 100
# part, score, factor and digits of the table's columns
SHOWN = (("train", "nll", 1, 3), ("test", "nll", 1, 3), ("test", "accuracy", 100, 1))
# costs of an example in units of a forward and a backward pass
FORWARD, BACKWARD, PRODUCT, JACOBIAN_PRODUCT = 1 / 3, 2 / 3, 4 / 3, 2 / 3


@dataclass(frozen=True)
class Method:
    """A way to train.

    Args:
        settings: What is tuned.
        optimizer: Builds the optimizer from parameters and settings.
        debiased: Whether a step takes two mini-batches.
        first_order: Whether a step takes a gradient alone.
    """

    settings: list[dict[str, Any]]
    optimizer: Callable[..., Optimizer]
    debiased: bool = False
    first_order: bool = False

    @property
    def num_points(self) -> int:
        """Number of points in a step."""
        return FIRST_ORDER_POINTS if self.first_order else CG_POINTS

    def passes(self, adapts: bool) -> float:
        """Gradient-equivalent passes of a step, in examples."""
        if self.first_order:
            return self.num_points
        # gradient, and the transposed Jacobian that products differentiate
        base, judged = 1 + BACKWARD, FORWARD + PRODUCT if adapts else 0.0
        products = CG_ITERATIONS * PRODUCT
        if not self.debiased:
            return self.num_points * (base + products + judged)
        along = (CG_ITERATIONS + 1) * JACOBIAN_PRODUCT
        return self.num_points / 2 * (2 * base + products + along + judged)


_CG_SETTINGS = [
    {"damping": damping, "adapt_damping": adapt}
    for damping, adapt in product((0.01, 0.1, 1.0), (False, True))
]
_cg = partial(DebiasedCG, max_iterations=CG_ITERATIONS, rtol=0.0)
METHODS = {
    "SGD with momentum": Method(
        [{"lr": lr} for lr in (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)],
        partial(SGD, momentum=0.9),
        first_order=True,
    ),
    "Adam": Method(
        [{"lr": lr} for lr in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)],
        Adam,
        first_order=True,
    ),
    "CG, single batch": Method(_CG_SETTINGS, partial(_cg, debias=False)),
    "CG, debiased": Method(_CG_SETTINGS, _cg, debiased=True),
    "CG, debiased, subspace": Method(
        _CG_SETTINGS, partial(_cg, subspace=True), debiased=True
    ),
}


def batches(count: int, size: int) -> Iterator[Tensor]:
    """Yield random mini-batches of indices without end."""
    while True:
        for batch in torch.randperm(count).split(size):
            if len(batch) == size:
                yield batch


@torch.no_grad()
def scores(model: nn.Module, X: Tensor, y: Tensor) -> dict[str, float]:
    """Compute NLL and accuracy."""
    output = model(X)
    return {
        "nll": cross_entropy(output, y).item(),
        "accuracy": (output.argmax(1) == y).float().mean().item(),
    }


def train(
    method: Method, settings: dict[str, Any], data: dict, epochs: float, seed: int
) -> dict[str, Any]:
    """Train a network from initialization.

    Args:
        method: How.
        settings: Settings of the optimizer.
        data: Points ``(X, y)`` by purpose.
        epochs: Number of gradient-equivalent passes over the training points.
        seed: Seed of initialization and batches.

    Returns:
        Scores along training, against passes and seconds.
    """
    torch.manual_seed(seed)
    model = mlp()
    X, y = data["train"]
    optimizer = method.optimizer(model.parameters(), **settings)
    cost = method.passes(settings.get("adapt_damping", False)) / len(X)
    steps = max(1, round(epochs / cost))
    schedule = LambdaLR(optimizer, lambda step: 1 - step / steps)

    def closure(batch: Tensor) -> tuple[Tensor, Tensor]:
        output = model(X[batch])
        return cross_entropy(output, y[batch], reduction="none"), output

    def make_step(batch: Tensor) -> None:
        if method.first_order:
            optimizer.zero_grad()
            closure(batch)[0].mean().backward()
            optimizer.step()
        elif method.debiased:
            halves = batch.chunk(2)
            optimizer.step(*(partial(closure, half) for half in halves))
        else:
            optimizer.step(partial(closure, batch))
        schedule.step()

    checks = {round(k * steps / NUM_CHECKS) for k in range(1, NUM_CHECKS + 1)}
    curve, seconds = [], 0.0
    source = batches(len(X), method.num_points)
    for step in range(1, steps + 1):
        start = time.perf_counter()
        try:
            make_step(next(source))
        except ValueError as error:  # the loss is not finite
            return {"curve": curve, "diverged": str(error)}
        seconds += time.perf_counter() - start
        if step in checks:
            parts = {name: scores(model, *part) for name, part in data.items()}
            curve.append({"passes": step * cost, "seconds": seconds, **parts})
    return {"curve": curve}


def final(result: dict[str, Any], part: str, score: str) -> float:
    """Return a score at the end of training; infinity if it diverged."""
    if "diverged" in result or not result["curve"]:
        return float("inf")
    value = result["curve"][-1][part][score]
    return value if np.isfinite(value) else float("inf")


def run(settings: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Tune each method, then train it on all seeds."""
    loaded = problem_data(DATASET, settings.data_root)
    X, y = loaded.train.tensors
    data = {
        "train": (X[NUM_VALIDATION:], y[NUM_VALIDATION:]),
        "validation": (X[:NUM_VALIDATION], y[:NUM_VALIDATION]),
        "test": (loaded.test_inputs, loaded.test_labels),
    }
    results = {}
    for name, method in METHODS.items():
        tuned = []
        for number, options in enumerate(method.settings[: settings.candidates]):
            result = progress.run(
                f"{name}, setting {number}",
                partial(train, method, options, data, settings.epochs, TUNING_SEED),
            )
            tuned.append(final(result, "validation", "nll"))
        best = method.settings[int(np.argmin(tuned))]
        runs = [
            progress.run(
                f"{name}, seed {seed}",
                partial(train, method, best, data, settings.epochs, seed),
            )
            for seed in range(settings.seeds)
        ]
        results[name] = {"tuned": tuned, "settings": best, "runs": runs}
        print(table({name: results[name]}).splitlines()[-1], flush=True)
    return results


def table(results: dict[str, Any]) -> str:
    """Format the scores of runs that did not diverge as a Markdown table."""
    lines = [
        "| method | tuned settings | diverged | training loss | test NLL "
        "| test accuracy % | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        runs = [r for r in result["runs"] if np.isfinite(final(r, "train", "nll"))]
        diverged = f"{len(result['runs']) - len(runs)} of {len(result['runs'])}"
        cells = [
            mean_and_std(
                factor * np.array([final(run, part, score) for run in runs]), digits
            )
            if runs
            else "-"
            for part, score, factor, digits in SHOWN
        ]
        seconds = np.median(
            [run["curve"][-1]["seconds"] for run in runs] or [float("nan")]
        )
        chosen = ", ".join(
            f"{key}={value}" for key, value in result["settings"].items()
        )
        lines.append(
            f"| {name} | {chosen} | {diverged} | {' | '.join(cells)} | {seconds:.0f} |"
        )
    return "\n".join(lines)


def write_figure(path: Path, results: dict[str, Any]) -> None:
    """Draw training loss, test NLL and accuracy against passes and time."""
    cases = [
        ("train", "nll", "passes"),
        ("test", "nll", "passes"),
        ("test", "accuracy", "passes"),
        ("test", "nll", "seconds"),
    ]
    with rc_context(figure_style(ncols=4)):
        figure = Figure()
        panels = figure.subplots(1, len(cases))
        for axis, (part, score, over) in zip(panels, cases, strict=True):
            for name, result in results.items():
                finished = [run for run in result["runs"] if "diverged" not in run]
                if not finished:
                    continue
                curves = [run["curve"] for run in finished]
                x = np.mean([[p[over] for p in curve] for curve in curves], 0)
                y = np.array([[p[part][score] for p in curve] for curve in curves])
                axis.plot(x, y.mean(0), label=name)
                low, high = y.min(0), y.max(0)
                axis.fill_between(x, low, high, alpha=0.2, lw=0)
            axis.set(xlabel=over, title=f"{part} {score}")
            if score == "nll":
                axis.set_yscale("log")
        figure.legend(
            *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5
        )
        figure.savefig(path, dpi=200)


def main() -> None:
    """Run all methods, and write table, numbers and figure."""
    parser = study_parser(__doc__)
    parser.add_argument("--epochs", type=float, default=10.0)
    parser.add_argument(
        "--candidates", type=int, help="how many settings of each method to try"
    )
    settings = parse(parser)
    if settings.quick:
        settings.epochs, settings.candidates = 0.02, 1
    warnings.simplefilter("ignore")
    progress = Progress(settings.out / "optimization.partial.json")
    results = run(settings, progress)
    recorded = {
        "dataset": DATASET,
        "seeds": settings.seeds,
        "epochs": settings.epochs,
        "cg_points": CG_POINTS,
        "cg_iterations": CG_ITERATIONS,
    }
    write_report(settings.out, "optimization", recorded, results, table(results))
    write_figure(settings.out / "optimization.png", results)
    progress.clear()


if __name__ == "__main__":
    main()
