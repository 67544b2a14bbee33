"""How far conjugate gradients train, debiased or not, beside SGD and Adam.

From initialization, at an equal number of gradient-equivalent passes, with settings
tuned by validation data for each method by as many trials.

    python benchmarks/training_by_conjugate_gradients.py --data-root DATA
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
from shared.command_line import parse, study_parser
from shared.data import problem_data
from shared.figures import legend_below, written_figure
from shared.networks import mlp
from shared.reports import Progress, write_report
from shared.tables import mean_and_std
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from laplace_debiased import DebiasedCG

STUDY = Path(__file__).stem
DATASET = "fashion-mnist"
NUM_VALIDATION = 5000
CG_POINTS, CG_ITERATIONS = 512, 5
NUM_CHECKS = 12
TUNING_SEED = 100  # the first one
# part, score, factor and digits of the table's columns
SHOWN = (("train", "nll", 1, 3), ("test", "nll", 1, 3), ("test", "accuracy", 100, 1))
# costs of an example in units of a forward and a backward pass
FORWARD, BACKWARD, PRODUCT, JACOBIAN_PRODUCT = 1 / 3, 2 / 3, 4 / 3, 2 / 3


@dataclass(frozen=True)
class Method:
    """A way to train.

    Args:
        grid: Values of each setting that is tuned; ``batch_size`` is no option of the
            optimizer.
        optimizer: Builds the optimizer from parameters and settings.
        debiased: Whether a step takes two mini-batches.
        first_order: Whether a step takes a gradient alone.
    """

    grid: dict[str, tuple]
    optimizer: Callable[..., Optimizer]
    debiased: bool = False
    first_order: bool = False

    @property
    def settings(self) -> list[dict[str, Any]]:
        """All that are tried."""
        return [
            dict(zip(self.grid, values, strict=True))
            for values in product(*self.grid.values())
        ]

    def at_edge(self, settings: dict[str, Any]) -> list[str]:
        """Names of settings that are the first or last of more than two values."""
        return [
            name
            for name, values in self.grid.items()
            if len(values) > 2 and settings[name] in (values[0], values[-1])
        ]

    def passes(self, settings: dict[str, Any]) -> float:
        """Gradient-equivalent passes of a step, in examples."""
        if self.first_order:
            return settings["batch_size"]
        # gradient, and the transposed Jacobian that products differentiate
        base = 1 + BACKWARD
        tested = FORWARD + PRODUCT if settings["adapt_damping"] else 0.0
        products = CG_ITERATIONS * PRODUCT
        if not self.debiased:
            return CG_POINTS * (base + products + tested)
        along = (CG_ITERATIONS + 1) * JACOBIAN_PRODUCT
        return CG_POINTS / 2 * (2 * base + products + along + tested)


_CG_GRID = {
    "damping": (0.1, 0.3, 1.0, 3.0, 10.0),
    "lr": (0.3, 1.0),
    "adapt_damping": (False, True),
}
_cg = partial(DebiasedCG, max_iterations=CG_ITERATIONS, rtol=0.0)
METHODS = {
    "SGD": Method(
        {
            "lr": (0.01, 0.03, 0.1, 0.3, 1.0),
            "momentum": (0.0, 0.9),
            "batch_size": (64, 128),
        },
        SGD,
        first_order=True,
    ),
    "Adam": Method(
        {
            "lr": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
            "betas": ((0.9, 0.99), (0.9, 0.999)),
            "batch_size": (64, 128),
        },
        Adam,
        first_order=True,
    ),
    "CG, single batch": Method(_CG_GRID, partial(_cg, debias=False)),
    "CG, debiased": Method(_CG_GRID, _cg, debiased=True),
    "CG, debiased, subspace": Method(
        _CG_GRID, partial(_cg, subspace=True), debiased=True
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
        settings: Settings of the optimizer, and perhaps ``batch_size``.
        data: Points ``(X, y)`` by purpose.
        epochs: Number of gradient-equivalent passes over the training points.
        seed: Seed of initialization and batches.

    Returns:
        Scores along training, against passes and seconds.
    """
    torch.manual_seed(seed)
    model = mlp()
    X, y = data["train"]
    options = {name: v for name, v in settings.items() if name != "batch_size"}
    optimizer = method.optimizer(model.parameters(), **options)
    cost = method.passes(settings) / len(X)
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
    source = batches(len(X), settings.get("batch_size", CG_POINTS))
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
        tuned = [
            [
                final(
                    progress.run(
                        f"{name}, setting {number}, seed {seed}",
                        partial(train, method, options, data, settings.epochs, seed),
                    ),
                    "validation",
                    "nll",
                )
                for seed in range(TUNING_SEED, TUNING_SEED + settings.tuning_seeds)
            ]
            for number, options in enumerate(method.settings[: settings.candidates])
        ]
        best = method.settings[int(np.argmin(np.mean(tuned, 1)))]
        runs = [
            progress.run(
                f"{name}, seed {seed}",
                partial(train, method, best, data, settings.epochs, seed),
            )
            for seed in range(settings.seeds)
        ]
        results[name] = {
            "tuned": tuned,
            "settings": best,
            "at_edge": method.at_edge(best),
            "runs": runs,
        }
        print(table({name: results[name]}).splitlines()[-1], flush=True)
    return results


def _plain(value: Any) -> Any:
    """Return a setting as it was before JSON turned tuples into lists."""
    return tuple(value) if isinstance(value, list) else value


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
            f"{key}={_plain(value)}" + " (edge)" * (key in result["at_edge"])
            for key, value in result["settings"].items()
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
    with written_figure(path, 4) as figure:
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
        legend_below(figure, panels[0], 5)


def main() -> None:
    """Run all methods, and write table, numbers and figure."""
    parser = study_parser(__doc__, STUDY)
    parser.add_argument("--epochs", type=float, default=10.0)
    parser.add_argument("--tuning-seeds", type=int, default=2)
    parser.add_argument(
        "--candidates", type=int, help="how many settings of each method to try"
    )
    settings = parse(parser)
    if settings.quick:
        settings.epochs, settings.candidates, settings.tuning_seeds = 0.005, 1, 1
    warnings.simplefilter("ignore")
    progress = Progress(settings, STUDY)
    results = run(settings, progress)
    recorded = {
        "dataset": DATASET,
        "seeds": settings.seeds,
        "epochs": settings.epochs,
        "cg_points": CG_POINTS,
        "cg_iterations": CG_ITERATIONS,
        "tuning_seeds": settings.tuning_seeds,
        "grids": {name: method.grid for name, method in METHODS.items()},
    }
    write_report(settings.out, STUDY, recorded, results, table(results))
    write_figure(settings.out / f"{STUDY}.png", results)
    progress.clear()


if __name__ == "__main__":
    main()
