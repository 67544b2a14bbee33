"""Calibration against the prior precision: few points against all data.

The paper's Figure 6 in kind: the posteriors of full-data K-FAC, of a single mini-batch,
of two, and of the defaults, at several budgets, with the linearized (``glm``) and the
sampled (``nn``) predictive.

    python benchmarks/calibration.py --data-root DATA

An interrupted study resumes where it stopped.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
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
from posteriors import Problem, fit, glm_probabilities, references, undo_debiasing
from torch import Tensor

from laplace_debiased import EigenbasisMatrix, KronDebiasedLaplace
from laplace_debiased.comparison.metrics import score
from laplace_debiased.eigenbasis import decompose, project

DATASET = "fashion-mnist"
PREDICTIVES = ("glm", "nn")
NUM_SAMPLES = 20
NN_BUDGET = 128
FULL = "full data"
METRICS = {"nll": "NLL", "ece": "ECE", "brier": "Brier", "accuracy": "accuracy"}
SHOWN_PRIORS = (1.0, 10.0, 100.0, 1000.0)

# from a problem, a budget and a seed to a fit
Estimator = Callable[[Problem, int, int], KronDebiasedLaplace]


def single_batch(problem: Problem, budget: int, seed: int) -> KronDebiasedLaplace:
    """Use a uniform mini-batch for directions and magnitudes."""
    la, _ = fit(problem, budget=budget, seed=seed, sampling="uniform")
    undo_debiasing(la)
    return la


def debiased(
    problem: Problem, budget: int, seed: int, **options: str
) -> KronDebiasedLaplace:
    """Fit our posterior."""
    return fit(problem, budget=budget, seed=seed, **options)[0]


ESTIMATORS: dict[str, Estimator] = {
    "single batch": single_batch,
    "two batches": partial(debiased, estimator="two_batch", sampling="uniform"),
    "default": debiased,
    "default, ggn": partial(debiased, magnitudes="ggn"),
}


def full_data(name: str, problem: Problem, keep: bool) -> KronDebiasedLaplace:
    """Return full-data K-FAC as one of our posteriors."""
    _, kfacs = references(name, problem, keep)
    la, _ = fit(problem, budget=8)
    vectors = decompose(kfacs)
    la.H = EigenbasisMatrix(vectors, project(kfacs, vectors))
    return la


def predictions(
    la: KronDebiasedLaplace,
    problem: Problem,
    predictive: str,
    priors: Sequence[float],
    seed: int,
) -> Tensor:
    """Predict at each prior precision: probabilities ``[priors, points, classes]``."""
    if predictive == "glm":
        return glm_probabilities(problem.model, la.H, problem.inputs, priors)
    chunks = []
    for prior in priors:
        la.prior_precision = prior
        generator = torch.Generator().manual_seed(seed)
        options = {"pred_type": "nn", "link_approx": "mc", "n_samples": NUM_SAMPLES}
        chunks.append(la(problem.inputs, generator=generator, **options))
    return torch.stack(chunks)


def scores(
    la: KronDebiasedLaplace,
    problem: Problem,
    predictive: str,
    priors: Sequence[float],
    seed: int,
) -> dict[str, list[float]]:
    """Score a posterior at each prior precision, by each metric."""
    rows = [
        asdict(score(p, problem.labels))
        for p in predictions(la, problem, predictive, priors, seed)
    ]
    return {metric: [row[metric] for row in rows] for metric in METRICS}


def run_network(
    name: str, settings: argparse.Namespace, progress: Progress
) -> dict[str, Any]:
    """Score all estimators with all budgets, predictives and seeds."""
    problem = Problem.load(name, DATASET, settings.data_root, settings.quick)

    def measure(
        build: Callable[[int], KronDebiasedLaplace], predictive: str, seeds: int
    ) -> list[dict]:
        return [
            scores(build(seed), problem, predictive, settings.priors, seed)
            for seed in range(seeds)
        ]

    results: dict[str, Any] = {}
    for predictive in PREDICTIVES:
        full = partial(
            measure,
            lambda _: full_data(name, problem, keep=not settings.quick),
            predictive,
            seeds=1,
        )
        own = {FULL: progress.run(f"{name}, {predictive}, {FULL}", full)}
        budgets = settings.budgets if predictive == "glm" else [NN_BUDGET]
        for budget, (label, build) in product(budgets, ESTIMATORS.items()):
            key = f"{label}, {budget}"
            own[key] = progress.run(
                f"{name}, {predictive}, {key}",
                partial(
                    measure,
                    partial(build, problem, budget),
                    predictive,
                    seeds=settings.seeds,
                ),
            )
            print(f"{name}, {predictive}, {key}", flush=True)
        results[predictive] = own
    return results


def values(runs: list[dict], metric: str) -> np.ndarray:
    """Return a metric ``[seeds, priors]``."""
    return np.array([run[metric] for run in runs])


def table(networks: dict[str, Any], priors: Sequence[float]) -> str:
    """Format NLL at some prior precisions, and ECE at one, as a Markdown table."""
    columns = [k for k, prior in enumerate(priors) if prior in SHOWN_PRIORS]
    shown = [f"NLL at {priors[k]:g}" for k in columns]
    lines = [
        f"| network | predictive | points | estimator | {' | '.join(shown)} "
        "| ECE at 10 | lowest NLL |",
        "|---" * (6 + len(columns)) + "|",
    ]
    at_ten = list(priors).index(10.0)
    for name, predictives in networks.items():
        for predictive, rows in predictives.items():
            for key, runs in rows.items():
                label, _, budget = key.rpartition(", ")
                nll = values(runs, "nll")
                parts = [nll[:, k] for k in columns]
                parts += [values(runs, "ece")[:, at_ten], nll.min(1)]
                cells = " | ".join(mean_and_std(part, 3) for part in parts)
                points = f"{budget} | {label}" if label else f"all | {key}"
                lines.append(f"| {name} | {predictive} | {points} | {cells} |")
    return "\n".join(lines)


def write_figure(
    path: Path, predictives: dict[str, Any], priors: Sequence[float]
) -> None:
    """Draw NLL and ECE against the prior precision, a column for each budget."""
    cases = []
    for predictive, rows in predictives.items():
        budgets = dict.fromkeys(k.rpartition(", ")[2] for k in rows if k != FULL)
        cases += [(predictive, budget) for budget in budgets]
    with rc_context(figure_style(ncols=len(cases), height_to_width_ratio=2.2)):
        figure = Figure()
        panels = figure.subplots(2, len(cases), sharex=True, sharey="row")
        for column, (predictive, budget) in enumerate(cases):
            for axis, metric in zip(panels[:, column], ("nll", "ece"), strict=True):
                _draw(axis, predictives[predictive], budget, metric, priors)
            panels[0, column].set_title(f"{predictive}, {budget} points")
            panels[1, column].set_xlabel("prior precision")
        full = values(predictives["glm"][FULL], "nll")[0]
        panels[0, 0].set(ylim=(0.9 * full.min(), 2.5), yscale="log", ylabel="test NLL")
        panels[1, 0].set_ylabel("ECE")
        figure.legend(
            *panels[0, 0].get_legend_handles_labels(),
            loc="outside lower center",
            ncols=5,
        )
        figure.savefig(path, dpi=200)


def _draw(
    axis: Axes, rows: dict[str, Any], budget: str, metric: str, priors: Sequence[float]
) -> None:
    for label in ESTIMATORS:
        curve = values(rows[f"{label}, {budget}"], metric)
        mean, std = curve.mean(0), curve.std(0)
        axis.plot(priors, mean, label=label)
        axis.fill_between(priors, mean - std, mean + std, alpha=0.2, lw=0)
    full = values(rows[FULL], metric)[0]
    axis.plot(priors, full, "k--", lw=1, label=FULL)
    axis.set_xscale("log")


def main() -> None:
    """Run the study, and write table, numbers and figures."""
    parser = study_parser(__doc__)
    parser.add_argument("--networks", nargs="*", default=["MLP", "all-convolutional"])
    parser.add_argument("--budgets", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument(
        "--priors",
        type=float,
        nargs="+",
        default=[10 ** (half / 2) for half in range(-8, 9)],
    )
    settings = parse(parser)
    if settings.quick:
        settings.networks, settings.budgets = ["MLP"], [32]
        settings.priors = [1.0, 10.0]
    warnings.simplefilter("ignore")
    progress = Progress(settings.out / "calibration.partial.json")
    networks = {n: run_network(n, settings, progress) for n in settings.networks}
    recorded = {
        "dataset": DATASET,
        "seeds": settings.seeds,
        "priors": settings.priors,
        "samples": NUM_SAMPLES,
    }
    report = table(networks, settings.priors)
    write_report(settings.out, "calibration", recorded, networks, report)
    for name, predictives in networks.items():
        path = settings.out / f"calibration_{name}.png"
        write_figure(path, predictives, settings.priors)
    progress.clear()


if __name__ == "__main__":
    main()
