"""Which method gives the best predictions for its time, on the same trained networks.

What a user gets from each: predictions of test images and of another dataset, with the
prior precision that laplace-torch's marginal likelihood chooses, time and memory. Each
case runs in a process of its own, whose peak memory Linux counts. A method that does
not support a network, or takes too much time or memory, says so in its row.

    python benchmarks/comparison_with_peers.py --data-root DATA

An interrupted study resumes where it stopped.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from laplace import Laplace
from laplace.curvature import AsdlGGN
from netcal.scaling import TemperatureScaling
from shared.command_line import (
    NETWORKS,
    add_problems,
    parse,
    run_problems,
    study_parser,
)
from shared.data import FOREIGN, foreign_images, validation_data
from shared.figures import legend_below, written_figure
from shared.problems import FIT_BATCH_SIZE, Problem
from shared.processes import in_own_process, peak_megabytes, reset_peak
from shared.reports import Progress, write_report
from shared.tables import deviation, mean_and_std
from shared.training import CHECKPOINTS, trained
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased.comparison.metrics import (
    misclassification_auroc,
    ood_auroc,
    score,
)

STUDY = Path(__file__).stem
ENSEMBLE_SIZE = 5
NUM_VALIDATION = 5000
NUM_IMAGES = 1000
NUM_FOREIGN = 500
BUDGET = 128
COLUMNS = {
    "accuracy": ("accuracy %", 100, 1),
    "nll": ("NLL", 1, 3),
    "ece": ("ECE", 1, 3),
    "brier": ("Brier", 1, 3),
    "misclassification": ("AUROC of errors", 1, 3),
    "ood": ("AUROC of other images", 1, 3),
}
COSTS = {
    "fit_seconds": ("fit s", 1),
    "predict_seconds": ("predict 1,000 s", 1),
    "peak_gb": ("peak GB", 1),
}

FIGURE = {
    "nll": ("test NLL", "linear"),
    "ood": ("AUROC of other images", "linear"),
    "fit_seconds": ("fit (s)", "log"),
    "predict_seconds": ("predict 1,000 images (s)", "log"),
}

Predictor = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """What a method gets.

    Args:
        problem: The network with its data.
        validation: Images that it was not trained on, and their classes.
        members: The networks of an ensemble.
        seed: Seed of a draw.
    """

    problem: Problem
    validation: tuple[Tensor, Tensor]
    members: list[torch.nn.Module]
    seed: int


@dataclass(frozen=True)
class Method:
    """A way to get probabilities.

    Args:
        fit: From a case to a predictor, and the number of points with backward passes.
        has_fit: Whether it takes time, but for the training of networks.
        seeded: Whether it depends on the seed.
        batch_size: Number of images in a prediction: Jacobians take memory.
        ensemble: Whether it needs several trained networks.
    """

    fit: Callable[[Case], tuple[Predictor, int]]
    has_fit: bool = True
    seeded: bool = False
    batch_size: int = 100
    ensemble: bool = False


def without_posterior(case: Case) -> tuple[Predictor, int]:
    """Predict by the network alone."""
    return lambda X: case.problem.model(X).softmax(-1), 0


def temperature_scaling(case: Case) -> tuple[Predictor, int]:
    """Divide logits by a temperature that validation images give."""

    def probabilities(X: Tensor) -> np.ndarray:
        # netcal differentiates numerically: in single precision it sees no slope
        return case.problem.model(X).double().softmax(-1).numpy()

    X, y = case.validation
    scaling = TemperatureScaling()
    scaling.fit(probabilities(X), y.numpy(), tensorboard=False)
    return lambda X: torch.as_tensor(scaling.transform(probabilities(X))), 0


def ensemble(case: Case) -> tuple[Predictor, int]:
    """Average networks that were trained from several initializations."""
    return lambda X: torch.stack([m(X).softmax(-1) for m in case.members]).mean(0), 0


def laplace(
    case: Case,
    subset: str,
    structure: str,
    batch_size: int = FIT_BATCH_SIZE,
    **options: Any,
) -> tuple[Predictor, int]:
    """Fit a Laplace approximation, and tune its prior precision."""
    la = Laplace(case.problem.model, "classification", subset, structure, **options)
    with torch.enable_grad():
        la.fit(DataLoader(case.problem.train, batch_size))
        la.optimize_prior_precision(method="marglik", pred_type="glm")
    return la, len(case.problem.train)


def debiased(case: Case, subset: str = "all", **options: Any) -> tuple[Predictor, int]:
    """Fit ours."""
    options |= {"budget": BUDGET, "seed": case.seed}
    return laplace(case, subset, "kron_debiased", **options)[0], BUDGET


def calibrated(case: Case) -> tuple[Predictor, int]:
    """Fit ours, and calibrate it with the validation images."""
    predict, count = debiased(case)
    predict.calibrate(DataLoader(TensorDataset(*case.validation), FIT_BATCH_SIZE))
    return predict, count


def _theirs(structure: str, subset: str = "all", **options: Any) -> Method:
    fit = partial(laplace, subset=subset, structure=structure, **options)
    # the fastest number at once, see `prediction_cost.py`
    return Method(fit, batch_size=2 if subset == "all" else 100)


METHODS = {
    "MAP": Method(without_posterior, has_fit=False),
    "temperature scaling": Method(temperature_scaling),
    "deep ensemble of 5": Method(ensemble, has_fit=False, ensemble=True),
    "laplace-torch, kron": _theirs("kron"),
    "laplace-torch, kron, ASDL": _theirs("kron", backend=AsdlGGN),
    # its time and memory grow with the batch squared
    "laplace-torch, diag": _theirs("diag", batch_size=1),
    "laplace-torch, diag, ASDL": _theirs("diag", backend=AsdlGGN),
    "laplace-torch, last layer": _theirs("kron", "last_layer"),
    "laplace-torch, last layer, ASDL": _theirs("kron", "last_layer", backend=AsdlGGN),
    "debiased, kfac": Method(debiased, seeded=True),
    "debiased, kfac, calibrated": Method(calibrated, seeded=True),
    "debiased, ggn": Method(partial(debiased, magnitudes="ggn"), seeded=True),
    "debiased, last layer": Method(partial(debiased, subset="last_layer"), seeded=True),
}
QUICK_METHODS = ["debiased, kfac"]


def predicted(method: Method, predict: Predictor, X: Tensor) -> Tensor:
    """Predict in batches."""
    return torch.cat([predict(part).detach() for part in X.split(method.batch_size)])


def run_case(settings: argparse.Namespace) -> dict[str, Any]:
    """Fit, predict and score in this process."""
    memory = round(settings.memory * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    ((dataset, network),), (name,) = settings.problems, settings.methods
    method, root = METHODS[name], settings.data_root
    seeds = range(ENSEMBLE_SIZE if method.ensemble else 0)
    X, y = validation_data(dataset, root)
    case = Case(
        Problem.load(network, dataset, root, settings.quick),
        (X[:NUM_VALIDATION], y[:NUM_VALIDATION]),
        [trained(network, dataset, root, seed) for seed in seeds],
        settings.case,
    )
    others = foreign_images(dataset, root, NUM_FOREIGN)
    inside = case.problem.inputs[:NUM_IMAGES]
    labels = case.problem.labels[:NUM_IMAGES]
    reset_peak()
    with torch.no_grad():
        start = time.perf_counter()
        predict, num_points = method.fit(case)
        fitted = time.perf_counter()
        p = predicted(method, predict, inside)
        seconds = time.perf_counter() - fitted
        of_others = predicted(method, predict, others)
    return {
        **asdict(score(p, labels)),
        "misclassification": misclassification_auroc(p, labels),
        "ood": ood_auroc(p, of_others),
        "points": num_points,
        "fit_seconds": (fitted - start) if method.has_fit else 0.0,
        "predict_seconds": 1000 * seconds / len(inside),
        "peak_gb": peak_megabytes() / 1024,
    }


def run_apart(
    settings: argparse.Namespace, dataset: str, network: str, method: str, seed: int
) -> dict[str, Any]:
    """Run a case in a process of its own."""
    options = ["--problems", f"{dataset}/{network}", "--methods", method]
    options += ["--case", str(seed), "--memory", str(settings.memory)]
    options += ["--data-root", str(settings.data_root)]
    options += ["--quick"] if settings.quick else []
    return in_own_process(Path(__file__), options, 60 * settings.minutes)


def affordable(dataset: str, network: str, method: str) -> bool:
    """Whether all networks that a method needs have been trained."""
    if not METHODS[method].ensemble:
        return True
    names = [f"{network}-{seed}.safetensors" for seed in range(ENSEMBLE_SIZE)]
    return all((CHECKPOINTS / dataset / name).exists() for name in names)


def run_network(
    dataset: str, network: str, settings: argparse.Namespace, progress: Progress
) -> dict[str, Any]:
    """Run all methods on all seeds."""
    rows: dict[str, Any] = {}
    for name in filter(partial(affordable, dataset, network), settings.methods):
        seeds = settings.seeds if METHODS[name].seeded else 1
        rows[name] = [
            progress.run(
                f"{dataset}, {network}, {name}, {seed}",
                partial(run_apart, settings, dataset, network, name, seed),
            )
            for seed in range(seeds)
        ]
        own = {dataset: {network: {name: rows[name]}}}
        print(table(own).splitlines()[-1], flush=True)
    return rows


def table(results: dict[str, Any]) -> str:
    """Format scores and costs as a Markdown table: means ± standard deviations.

    Of the costs, medians.
    """
    titles = [title for title, *_ in [*COLUMNS.values(), *COSTS.values()]]
    lines = [
        f"| dataset | network | method | points | {' | '.join(titles)} |",
        "|---" * (4 + len(titles)) + "|",
    ]
    for dataset, networks in results.items():
        for network, rows in networks.items():
            for name, runs in rows.items():
                cells = " | ".join(_cells(runs))
                lines.append(f"| {dataset} | {network} | {name} | {cells} |")
    return "\n".join(lines)


def _cells(runs: list[dict[str, Any]]) -> list[str]:
    failed = [run["error"] for run in runs if "error" in run]
    if failed:
        return ["", failed[0], *[""] * (len(COLUMNS) + len(COSTS) - 1)]
    cells = [f"{runs[0]['points']:,}"]
    for key, (_, factor, digits) in COLUMNS.items():
        column = factor * np.array([run[key] for run in runs])
        cells.append(mean_and_std(column, digits))
    for key, (_, digits) in COSTS.items():
        cells.append(f"{np.median([run[key] for run in runs]):.{digits}f}")
    return cells


def write_figure(path: Path, results: dict[str, Any]) -> None:
    """Draw quality and time of each method, a row for each, on all networks."""
    cases = {
        f"{dataset}, {network}": rows
        for dataset, networks in results.items()
        for network, rows in networks.items()
    }
    methods = list(dict.fromkeys(chain(*cases.values())))
    with written_figure(path, len(FIGURE), 1.4) as figure:
        panels = figure.subplots(1, len(FIGURE), sharey=True)
        for axis, (key, (title, scale)) in zip(panels, FIGURE.items(), strict=True):
            for marker, (label, rows) in zip(
                cycle("osD^v"), cases.items(), strict=False
            ):
                shown = [m for m in rows if all(run.get(key) for run in rows[m])]
                values = [[run[key] for run in rows[m]] for m in shown]
                axis.errorbar(
                    [np.mean(v) for v in values],
                    [methods.index(m) for m in shown],
                    xerr=[deviation(v) for v in values],
                    fmt=marker,
                    markersize=3,
                    label=label,
                )
            axis.set(xscale=scale, xlabel=title)
        panels[0].set_yticks(range(len(methods)), methods)
        panels[0].invert_yaxis()
        legend_below(figure, panels[0], len(cases))


def main() -> None:
    """Run all cases, each in its own process, and write table, numbers and figure."""
    parser = study_parser(__doc__, STUDY)
    add_problems(parser, NETWORKS)
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--minutes", type=float, default=15, help="limit of a case")
    parser.add_argument("--memory", type=float, default=12, help="limit of a case, GB")
    parser.add_argument("--case", type=int, help="run one seed in this process")
    settings = parse(parser)
    warnings.simplefilter("ignore")
    if settings.case is not None:
        print(json.dumps(run_case(settings)))
        return
    if settings.quick:
        settings.methods = QUICK_METHODS
    progress = Progress(settings, STUDY)
    results = run_problems(settings, partial(run_network, progress=progress))
    recorded = {
        "other_dataset": {
            dataset: FOREIGN[dataset] for dataset, _ in settings.problems
        },
        "seeds": settings.seeds,
        "budget": BUDGET,
        "validation": NUM_VALIDATION,
        "images": NUM_IMAGES,
        "outside": NUM_FOREIGN,
        "minutes": settings.minutes,
        "memory_gb": settings.memory,
    }
    write_report(settings.out, STUDY, recorded, results, table(results))
    write_figure(settings.out / f"{STUDY}.png", results)
    progress.clear()


if __name__ == "__main__":
    main()
