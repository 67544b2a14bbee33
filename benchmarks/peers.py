"""Debiased Laplace beside its peers, on the same trained networks.

What a user gets from each: prior precision by the marginal likelihood, predictions of
test images and of another dataset, time and memory. Each case runs in a process of its
own, whose peak memory the operating system counts.

    python benchmarks/peers.py --data-root DATA

An interrupted study resumes where it stopped.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Progress, mean_and_std, parse, study_parser, write_report
from laplace import Laplace
from laplace.curvature import AsdlGGN
from netcal.scaling import TemperatureScaling
from networks import CHECKPOINTS, trained, validation_data
from posteriors import Problem
from torch import Tensor

from laplace_debiased.comparison.data import raw_images
from laplace_debiased.comparison.metrics import (
    misclassification_auroc,
    ood_auroc,
    score,
)

DATASET, OTHER = "fashion-mnist", "mnist"
NETWORKS = ("MLP", "all-convolutional")
ENSEMBLE_SIZE = 5
NUM_VALIDATION = 5000
NUM_OUTSIDE = 500
BUDGET = 128
COLUMNS = {
    "accuracy": ("accuracy %", 100, 1),
    "nll": ("NLL", 1, 3),
    "ece": ("ECE", 1, 3),
    "brier": ("Brier", 1, 3),
    "misclassification": ("AUROC of errors", 1, 3),
    "ood": ("AUROC of MNIST", 1, 3),
}

Predictor = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Method:
    """A way to get probabilities.

    Args:
        fit: From a problem, settings and a seed to a predictor, and the number of
            points with backward passes.
        seeded: Whether it depends on the seed.
        batch_size: Number of images in a prediction: Jacobians take memory.
    """

    fit: Callable[[Problem, argparse.Namespace, int], tuple[Predictor, int]]
    seeded: bool = False
    batch_size: int = 100


def without_posterior(
    problem: Problem, settings: argparse.Namespace, seed: int
) -> tuple[Predictor, int]:
    """Predict by the network alone."""
    return lambda X: problem.model(X).softmax(-1), 0


def temperature_scaling(
    problem: Problem, settings: argparse.Namespace, seed: int
) -> tuple[Predictor, int]:
    """Divide logits by a temperature that validation images give."""
    X, y = validation_data(DATASET, settings.data_root)
    X, y = X[:NUM_VALIDATION], y[:NUM_VALIDATION]
    scaling = TemperatureScaling()
    scaling.fit(problem.model(X).softmax(-1).numpy(), y.numpy(), tensorboard=False)

    def predict(X: Tensor) -> Tensor:
        probabilities = problem.model(X).softmax(-1).numpy()
        return torch.as_tensor(scaling.transform(probabilities)).float()

    return predict, 0


def ensemble(
    problem: Problem, settings: argparse.Namespace, seed: int
) -> tuple[Predictor, int]:
    """Average networks that were trained from several initializations."""
    models = [
        trained(settings.network, DATASET, settings.data_root, seed)
        for seed in range(ENSEMBLE_SIZE)
    ]
    return lambda X: sum(m(X).softmax(-1) for m in models) / len(models), 0


def laplace(
    problem: Problem,
    settings: argparse.Namespace,
    seed: int,
    subset: str,
    structure: str,
    **options: Any,
) -> tuple[Predictor, int]:
    """Fit a Laplace approximation, and tune its prior precision."""
    ours = structure == "kron_debiased"
    options |= {"budget": BUDGET, "seed": seed} if ours else {}
    la = Laplace(problem.model, "classification", subset, structure, **options)
    with torch.enable_grad():
        la.fit(problem.loader())
        la.optimize_prior_precision(method="marglik", pred_type="glm")
    return la, BUDGET if ours else len(problem.train)


_ours = partial(Method, seeded=True)
_theirs = partial(Method, batch_size=8)
METHODS = {
    "MAP": Method(without_posterior),
    "temperature scaling": Method(temperature_scaling),
    "deep ensemble of 5": Method(ensemble),
    "laplace-torch, kron": _theirs(partial(laplace, subset="all", structure="kron")),
    "laplace-torch, kron, ASDL": _theirs(
        partial(laplace, subset="all", structure="kron", backend=AsdlGGN)
    ),
    "laplace-torch, diag, ASDL": _theirs(
        partial(laplace, subset="all", structure="diag", backend=AsdlGGN)
    ),
    "laplace-torch, last layer, kron": _theirs(
        partial(laplace, subset="last_layer", structure="kron")
    ),
    "debiased, kfac": _ours(partial(laplace, subset="all", structure="kron_debiased")),
    "debiased, ggn": _ours(
        partial(laplace, subset="all", structure="kron_debiased", magnitudes="ggn")
    ),
    "debiased, last layer": _ours(
        partial(laplace, subset="last_layer", structure="kron_debiased")
    ),
}


def outside_images(data_root: Path) -> Tensor:
    """Load test images of another dataset, scaled as those trained on were."""
    trained_on, _ = raw_images(DATASET, data_root, train=True)
    X, _ = raw_images(OTHER, data_root, train=False)
    return (X[:NUM_OUTSIDE] - trained_on.mean()) / trained_on.std()


def predicted(method: Method, predict: Predictor, X: Tensor) -> Tensor:
    """Predict in batches."""
    return torch.cat([predict(part).detach() for part in X.split(method.batch_size)])


def run_case(settings: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Fit, predict and score in this process."""
    method = METHODS[settings.method]
    problem = Problem.load(
        settings.network, DATASET, settings.data_root, settings.quick
    )
    outside = outside_images(settings.data_root)
    start = time.perf_counter()
    with torch.no_grad():
        predict, num_points = method.fit(problem, settings, seed)
        fitted = time.perf_counter()
        inside = predicted(method, predict, problem.inputs)
        seconds = time.perf_counter() - fitted
        of_others = predicted(method, predict, outside)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        **asdict(score(inside, problem.labels)),
        "misclassification": misclassification_auroc(inside, problem.labels),
        "ood": ood_auroc(inside, of_others),
        "points": num_points,
        "fit_seconds": fitted - start,
        "predict_seconds": 1000 * seconds / len(problem.inputs),
        "peak_mb": peak,
    }


def run_apart(
    settings: argparse.Namespace, network: str, method: str, seed: int
) -> dict[str, Any]:
    """Run a case in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--network", network]
    command += ["--method", method, "--case", str(seed)]
    command += ["--data-root", str(settings.data_root)]
    command += ["--quick"] if settings.quick else []
    output = subprocess.run(command, capture_output=True, text=True)
    if output.returncode:
        error = output.stderr.strip().splitlines()[-1]
        return {"error": error or f"ended with code {output.returncode}"}
    return json.loads(output.stdout.strip().splitlines()[-1])


def affordable(network: str, method: str) -> bool:
    """Whether all networks of an ensemble have been trained."""
    if METHODS[method].fit is not ensemble:
        return True
    paths = [
        CHECKPOINTS / DATASET / f"{network}-{k}.safetensors"
        for k in range(ENSEMBLE_SIZE)
    ]
    return all(path.exists() for path in paths)


def run(settings: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Run all methods on all networks."""
    results: dict[str, Any] = {}
    for network in settings.networks:
        rows = results.setdefault(network, {})
        for name in filter(partial(affordable, network), settings.methods):
            seeds = settings.seeds if METHODS[name].seeded else 1
            rows[name] = [
                progress.run(
                    f"{network}, {name}, {seed}",
                    partial(run_apart, settings, network, name, seed),
                )
                for seed in range(seeds)
            ]
            print(table({network: {name: rows[name]}}).splitlines()[-1], flush=True)
    return results


def table(results: dict[str, Any]) -> str:
    """Format the scores as a Markdown table: means ± standard deviations."""
    titles = [title for title, *_ in COLUMNS.values()]
    lines = [
        f"| network | method | points | {' | '.join(titles)} | fit s "
        "| predict s | peak GB |",
        "|---" * (6 + len(titles)) + "|",
    ]
    for network, rows in results.items():
        for name, runs in rows.items():
            failed = [run["error"] for run in runs if "error" in run]
            if failed:
                cells = ["", failed[0], *[""] * (len(titles) + 2)]
            else:
                cells = [str(runs[0]["points"])]
                for key, (_, factor, digits) in COLUMNS.items():
                    column = factor * np.array([run[key] for run in runs])
                    cells.append(mean_and_std(column, digits))
                medians = [
                    np.median([run[key] for run in runs])
                    for key in ("fit_seconds", "predict_seconds", "peak_mb")
                ]
                cells += [f"{medians[0]:.1f}", f"{medians[1]:.1f}"]
                cells.append(f"{medians[2] / 1024:.1f}")
            lines.append(f"| {network} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run all cases, each in its own process, and write table and numbers."""
    parser = study_parser(__doc__)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--network", help="network of a single case")
    parser.add_argument("--method", help="method of a single case")
    parser.add_argument("--case", type=int, help="run one seed in this process")
    settings = parse(parser)
    warnings.simplefilter("ignore")
    if settings.case is not None:
        print(json.dumps(run_case(settings, settings.case)))
        return
    if settings.quick:
        settings.networks, settings.methods = ["MLP"], ["debiased, kfac"]
    progress = Progress(settings.out / "peers.partial.json")
    results = run(settings, progress)
    recorded = {
        "dataset": DATASET,
        "other_dataset": OTHER,
        "seeds": settings.seeds,
        "budget": BUDGET,
        "validation": NUM_VALIDATION,
    }
    write_report(settings.out, "peers", recorded, results, table(results))
    progress.clear()


if __name__ == "__main__":
    main()
