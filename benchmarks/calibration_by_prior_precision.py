"""How calibration depends on the prior precision: few points against all data.

The paper's Figure 6 in kind: the posteriors of full-data K-FAC, of a single mini-batch,
of two, and of the defaults, at several budgets, with the linearized (``glm``) and the
sampled (``nn``) predictive.

    python benchmarks/calibration_by_prior_precision.py --data-root DATA

``--problems fashion-mnist/MLP`` restricts it to one network. An interrupted study
resumes where it stopped.
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
from matplotlib.axes import Axes
from shared.command_line import (
    NETWORKS,
    add_problems,
    parse,
    run_problems,
    study_parser,
)
from shared.figures import draw_band, legend_below, written_figure
from shared.fits import FEW_POINTS, fit_few_points, full_data_posterior
from shared.predictions import glm_probabilities
from shared.problems import Problem
from shared.reports import Progress, write_report
from shared.tables import mean_and_std
from torch import Tensor

from laplace_debiased import KronDebiasedLaplace
from laplace_debiased.comparison.metrics import score
from laplace_debiased.comparison.posteriors import FULL_DATA

STUDY = Path(__file__).stem
PREDICTIVES = ("glm", "nn")
NUM_SAMPLES = 20
NN_BUDGET = 128
METRICS = {"nll": "NLL", "ece": "ECE", "brier": "Brier", "accuracy": "accuracy"}
SHOWN_PRIORS = (1.0, 10.0, 100.0, 1000.0)


def priors_of(predictive: str, priors: Sequence[float]) -> list[float]:
    """Return the prior precisions of a predictive: every second if it is sampled.

    Each takes ``NUM_SAMPLES`` passes over the test images then.
    """
    return list(priors[:: 2 if predictive == "nn" else 1])


def predictions(
    las: Sequence[KronDebiasedLaplace],
    problem: Problem,
    predictive: str,
    priors: Sequence[float],
) -> list[Tensor]:
    """Predict by the posterior of each seed, at each prior precision.

    Returns:
        Probabilities ``[priors, points, classes]`` of each.
    """
    if predictive == "glm":
        posteriors = [(la.H, priors) for la in las]
        return glm_probabilities(posteriors, problem.model, problem.inputs)
    return [sampled(la, problem, priors, seed) for seed, la in enumerate(las)]


def sampled(
    la: KronDebiasedLaplace, problem: Problem, priors: Sequence[float], seed: int
) -> Tensor:
    """Predict by sampled networks: probabilities ``[priors, points, classes]``."""
    chunks = []
    for prior in priors:
        la.prior_precision = prior
        generator = torch.Generator().manual_seed(seed)
        options = {"pred_type": "nn", "link_approx": "mc", "n_samples": NUM_SAMPLES}
        chunks.append(la(problem.inputs, generator=generator, **options))
    return torch.stack(chunks)


def scores(probabilities: Tensor, problem: Problem) -> dict[str, list[float]]:
    """Score predictions at each prior precision, by each metric."""
    rows = [asdict(score(p, problem.labels)) for p in probabilities]
    return {metric: [row[metric] for row in rows] for metric in METRICS}


def run_network(
    dataset: str, name: str, settings: argparse.Namespace, progress: Progress
) -> dict[str, Any]:
    """Score all estimators with all budgets, predictives and seeds."""
    problem = Problem.load(name, dataset, settings.data_root, settings.quick)

    def measure(
        build: Callable[[int], KronDebiasedLaplace], predictive: str, seeds: int
    ) -> list[dict]:
        las = [build(seed) for seed in range(seeds)]
        priors = priors_of(predictive, settings.priors)
        return [
            scores(probabilities, problem)
            for probabilities in predictions(las, problem, predictive, priors)
        ]

    results: dict[str, Any] = {}
    for predictive in PREDICTIVES:
        full = partial(
            measure,
            lambda _: full_data_posterior(problem, keep=not settings.quick),
            predictive,
            # of the samples: there is no draw of points
            seeds=settings.seeds if predictive == "nn" else 1,
        )
        own = {FULL_DATA: progress.run(f"{problem}, {predictive}, {FULL_DATA}", full)}
        budgets = settings.budgets if predictive == "glm" else [NN_BUDGET]
        for budget, label in product(budgets, FEW_POINTS):
            key = f"{label}, {budget}"
            own[key] = progress.run(
                f"{problem}, {predictive}, {key}",
                partial(
                    measure,
                    partial(fit_few_points, label, problem, budget),
                    predictive,
                    seeds=settings.seeds,
                ),
            )
            print(f"{problem}, {predictive}, {key}", flush=True)
        results[predictive] = own
    return results


def values(runs: list[dict], metric: str) -> np.ndarray:
    """Return a metric ``[seeds, priors]``."""
    return np.array([run[metric] for run in runs])


def table(datasets: dict[str, Any], priors: Sequence[float]) -> str:
    """Format NLL at some prior precisions, and ECE at one, as a Markdown table."""
    shown = [prior for prior in SHOWN_PRIORS if prior in priors]
    titles = [f"NLL at {prior:g}" for prior in shown]
    lines = [
        f"| dataset | network | predictive | points | estimator | {' | '.join(titles)} "
        "| ECE at 10 | lowest NLL |",
        "|---" * (7 + len(shown)) + "|",
    ]
    cases = [
        (f"{dataset} | {name} | {predictive}", priors_of(predictive, priors), key, runs)
        for dataset, networks in datasets.items()
        for name, predictives in networks.items()
        for predictive, rows in predictives.items()
        for key, runs in rows.items()
    ]
    for case, own_priors, key, runs in cases:
        label, _, budget = key.rpartition(", ")
        nll = values(runs, "nll")
        parts = [nll[:, own_priors.index(prior)] for prior in shown]
        parts += [values(runs, "ece")[:, own_priors.index(10.0)], nll.min(1)]
        cells = " | ".join(mean_and_std(part, 3) for part in parts)
        points = f"{budget} | {label}" if label else f"all | {key}"
        lines.append(f"| {case} | {points} | {cells} |")
    return "\n".join(lines)


def write_figure(
    path: Path, predictives: dict[str, Any], priors: Sequence[float]
) -> None:
    """Draw each metric against the prior precision, a column for each budget."""
    cases = []
    for predictive, rows in predictives.items():
        budgets = dict.fromkeys(k.rpartition(", ")[2] for k in rows if k != FULL_DATA)
        cases += [(predictive, budget) for budget in budgets]
    with written_figure(path, len(cases), 4) as figure:
        panels = figure.subplots(len(METRICS), len(cases), sharex=True, sharey="row")
        for column, (predictive, budget) in enumerate(cases):
            for axis, metric in zip(panels[:, column], METRICS, strict=True):
                own_priors = priors_of(predictive, priors)
                _draw(axis, predictives[predictive], budget, metric, own_priors)
            panels[0, column].set_title(f"{predictive}, {budget} points")
            panels[-1, column].set_xlabel("prior precision")
        full = values(predictives["glm"][FULL_DATA], "nll")[0]
        panels[0, 0].set(ylim=(0.9 * full.min(), 2.5), yscale="log")
        for axis, name in zip(panels[:, 0], METRICS.values(), strict=True):
            axis.set_ylabel(name)
        legend_below(figure, panels[0, 0], 5)


def _draw(
    axis: Axes, rows: dict[str, Any], budget: str, metric: str, priors: Sequence[float]
) -> None:
    for label in FEW_POINTS:
        draw_band(axis, priors, values(rows[f"{label}, {budget}"], metric), label)
    full = values(rows[FULL_DATA], metric)
    axis.plot(priors, full.mean(0), "k--", lw=1, label=FULL_DATA)
    axis.set_xscale("log")


def main() -> None:
    """Run the study, and write table, numbers and figures."""
    parser = study_parser(__doc__, STUDY)
    add_problems(parser, [*NETWORKS[:2], "mnist/MLP"])
    parser.add_argument("--budgets", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument(
        "--priors",
        type=float,
        nargs="+",
        default=[10 ** (half / 2) for half in range(-8, 9)],
    )
    settings = parse(parser)
    if settings.quick:
        settings.budgets = [32]
        settings.priors = [1.0, 3.0, 10.0]
    warnings.simplefilter("ignore")
    progress = Progress(settings, STUDY)
    results = run_problems(settings, partial(run_network, progress=progress))
    recorded = {
        "seeds": settings.seeds,
        "priors": settings.priors,
        "samples": NUM_SAMPLES,
    }
    report = table(results, settings.priors)
    write_report(settings.out, STUDY, recorded, results, report)
    for dataset, networks in results.items():
        for name, predictives in networks.items():
            path = settings.out / f"{STUDY}_{dataset}_{name}.png"
            write_figure(path, predictives, settings.priors)
    progress.clear()


if __name__ == "__main__":
    main()
