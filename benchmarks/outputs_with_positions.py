"""Segmentation and a causal language model: fits and predictions of all positions.

A small U-Net on 64 x 64 mosaics of FashionMNIST's garments, and a causal transformer of
two layers on the text of Python's own language reference, with 1,000 words. Posteriors
take 64 of the training images or sequences (`budget=64`); 64 others calibrate them, and
a further 64 score them. Each runs in a process of its own, whose peak memory Linux
counts, on the same trained network. Seconds are the processor's.

    python benchmarks/outputs_with_positions.py --data-root DATA
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from laplace import DiagLaplace
from shared.command_line import parse, study_parser
from shared.internals import (
    auroc,
    calibration_errors,
    entropy,
    nll,
)
from shared.position_networks import HELD_OUT, TASKS, Task, train
from shared.processes import in_own_process, peak_megabytes, reset_peak
from shared.reports import Progress, write_report
from shared.tables import mean_and_std
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import Laplace

STUDY = Path(__file__).stem
FIT, AT_ONCE, STEPS, RANK = 64, 16, 600, 10
NETWORK, PEER = "network alone", "diag (laplace-torch)"
SUBSETS = {"last layer": "last_layer", "all weights": "all"}
CALIBRATED = ", calibrated"
POSTERIORS = (
    NETWORK,
    "last layer",
    "last layer" + CALIBRATED,
    "all weights",
    "all weights" + CALIBRATED,
    PEER,
)
QUICK = (NETWORK, "all weights" + CALIBRATED)
MINUTES, SMALL = 20, 8


def made(name: str, seed: int, root: Path, quick: bool) -> Task:
    """Make a task, in the same way in each process."""
    torch.manual_seed(seed)
    if not quick:
        return TASKS[name](root)
    task = TASKS[name](root, 4)
    few = [tuple(part[:2] for part in own) for own in (task.validation, task.test)]
    return task._replace(validation=few[0], test=few[1])


def loader(data: tuple[Tensor, Tensor], at_once: int = AT_ONCE) -> DataLoader:
    """Yield examples in small batches."""
    return DataLoader(TensorDataset(*data), at_once)


def fitted(kind: str, task: Task) -> Any:
    """Fit a posterior, and choose its prior precision by marginal likelihood.

    Args:
        kind: One of ``POSTERIORS`` but the first and the last.
        task: Network and data.

    Returns:
        The posterior.
    """
    la = Laplace(
        task.network,
        "classification",
        SUBSETS[kind.removesuffix(CALIBRATED)],
        "kron_debiased",
        budget=FIT,
        fisher_rank=RANK,
        class_axis=task.class_axis,
    )
    la.fit(loader(task.train))
    if kind.endswith(CALIBRATED):
        la.calibrate(loader(task.validation))
    else:
        la.optimize_prior_precision()
    return la


def predictor(kind: str, task: Task) -> Callable[[Tensor], list[Tensor]]:
    """Fit what predicts.

    Args:
        kind: One of ``POSTERIORS`` but the last.
        task: Network and data.

    Returns:
        From inputs to probabilities, total and epistemic uncertainty of each position.
    """
    axis = task.class_axis

    def by_network(X: Tensor) -> list[Tensor]:
        p = task.network(X).softmax(axis)
        return [p, entropy(p.movedim(axis, -1))]

    def by_posterior(X: Tensor) -> list[Tensor]:
        found = la.uncertainty(X)
        return [found.probabilities, found.total, found.epistemic]

    if kind == NETWORK:
        return by_network
    la = fitted(kind, task)
    return by_posterior


def refusal(task: Task) -> str:
    """Say why laplace-torch's diagonal does not take the network, also a small input.

    Args:
        task: Network and data.

    Returns:
        The error of a fit to one example of few pixels or words.
    """
    X, y = (part[:1] for part in task.train)
    for axis in range(-1, -1 - y[0].ndim, -1):
        X, y = (part.narrow(axis, 0, SMALL) for part in (X, y))
    la = DiagLaplace(task.network, "classification")
    try:
        la.fit(loader((X, y)))
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        return shorten(f"{type(error).__name__}: {error}", 100)
    raise AssertionError("It fits by now: the study should score it.")


@torch.no_grad()
def predictions(predict: Callable, task: Task) -> list[Tensor]:
    """Predict all test positions, on few examples at a time.

    Args:
        predict: Returned by :func:`predictor`.
        task: Network and data.

    Returns:
        Probabilities ``[points, classes]``, and uncertainties ``[points]``.
    """
    parts = []
    for X in task.test[0].split(AT_ONCE):
        p, *uncertainties = predict(X)
        rows = p.movedim(task.class_axis, -1).flatten(0, -2)
        parts.append([rows, *(own.flatten() for own in uncertainties)])
    return [torch.cat(own) for own in zip(*parts, strict=True)]


def scores(found: list[Tensor], y: Tensor) -> dict[str, float | None]:
    """Score probabilities, and how uncertainties tell mistakes.

    Args:
        found: From :func:`predictions`.
        y: Classes ``[points]``.

    Returns:
        Accuracy, NLL, calibration error, and the areas under three curves.
    """
    p, *uncertainties = found
    confidence, predicted = p.max(1)
    mistaken = predicted != y
    signals = [-confidence, *uncertainties]
    names = ("by_confidence", "by_total", "by_epistemic")
    result = {
        "accuracy": 1 - mistaken.double().mean().item(),
        "nll": nll(p, y),
        "ece": calibration_errors(p, y)[0],
    }
    # the network alone has no epistemic uncertainty
    return result | {
        k: auroc(v, mistaken) for k, v in zip(names, signals, strict=False)
    }


def run_case(
    name: str, kind: str, seed: int, weights: Path, root: Path, quick: bool = False
) -> dict:
    """Fit and predict in this process.

    Args:
        name: The task's name.
        kind: One of ``POSTERIORS``.
        seed: Seed of data and network.
        weights: The network's weights.
        root: Folder of torchvision's datasets.
        quick: Whether to take few examples.

    Returns:
        Seconds, peak memory and scores, or the error.
    """
    warnings.simplefilter("ignore")
    task = made(name, seed, root, quick)
    task.network.load_state_dict(torch.load(weights))
    task.network.eval()
    if kind == PEER:
        return {"error": refusal(task)}
    reset_peak()
    before, start = peak_megabytes(), time.process_time()
    predict = predictor(kind, task)
    fit_seconds, start = time.process_time() - start, time.process_time()
    found = predictions(predict, task)
    seconds, peak = time.process_time() - start, peak_megabytes()
    return {
        "fit_seconds": fit_seconds,
        "seconds": seconds,
        "before_mb": before,
        "peak_mb": peak,
        "scores": scores(found, task.test[1].flatten()),
    }


def train_case(
    name: str, seed: int, weights: Path, root: Path, quick: bool = False
) -> dict:
    """Train a network in this process.

    Args:
        name: The task's name.
        seed: Seed of data and network.
        weights: Where to write the weights.
        root: Folder of torchvision's datasets.
        quick: Whether to take few steps.

    Returns:
        The seconds that it took.
    """
    task = made(name, seed, root, quick)
    start = time.process_time()
    train(task, 2 if quick else STEPS)
    torch.save(task.network.state_dict(), weights)
    return {"seconds": time.process_time() - start}


def table(rows: list[dict]) -> str:
    """Format the cases, with means and standard deviations over the seeds."""
    lines = [
        "| task | posterior | fit s | predict s | peak MB | accuracy % | NLL | ECE "
        "| mistakes by confidence | by total | by epistemic |",
        "|---" * 11 + "|",
    ]
    for (task, kind), own in groupby(rows, lambda row: (row["task"], row["posterior"])):
        runs = [row["result"] for row in own]
        case = f"| {task} | {kind} "
        if "error" in runs[0]:
            lines.append(f"{case}| refused: {runs[0]['error']} |" + " |" * 8)
            continue
        costs = [
            f"{np.mean([run[key] for run in runs]):.{digits}f}"
            for key, digits in (("fit_seconds", 1), ("seconds", 1), ("peak_mb", 0))
        ]
        cells = [
            _cell([run["scores"].get(key) for run in runs], factor, digits)
            for key, factor, digits in (
                ("accuracy", 100, 1),
                ("nll", 1, 3),
                ("ece", 1, 3),
                ("by_confidence", 1, 3),
                ("by_total", 1, 3),
                ("by_epistemic", 1, 3),
            )
        ]
        lines.append(f"{case}| {' | '.join(costs + cells)} |")
    return "\n".join(lines)


def _cell(values: list[float | None], factor: float, digits: int) -> str:
    if None in values:
        return ""
    return mean_and_std(factor * np.array(values, float), digits)


def main() -> None:
    """Run all cases, each in its own process, and write their results."""
    parser = study_parser(__doc__, STUDY)
    parser.set_defaults(seeds=3)
    parser.add_argument("--case", nargs=4, help=argparse.SUPPRESS)
    settings = parse(parser)
    if settings.case:
        name, kind, seed, weights = settings.case
        own = int(seed), Path(weights), settings.data_root
        is_training = kind == "train"
        run = train_case(name, *own) if is_training else run_case(name, kind, *own)
        print(json.dumps(run))
        return
    progress, rows = Progress(settings, STUDY), []
    with TemporaryDirectory() as folder:
        for name in TASKS:
            for seed in range(settings.seeds):
                rows += _cases(progress, settings, name, seed, folder)
    rows.sort(key=lambda row: _order(row["task"], row["posterior"]))
    given = {
        "fit": FIT,
        "held out": HELD_OUT,
        "steps": STEPS,
        "fisher_rank": RANK,
        "seeds": settings.seeds,
    }
    write_report(settings.out, STUDY, given, rows, table(rows))
    progress.clear()


def _order(task: str, kind: str) -> tuple[int, int]:
    return list(TASKS).index(task), POSTERIORS.index(kind)


def _cases(
    progress: Progress, settings: argparse.Namespace, task: str, seed: int, folder: str
) -> list[dict]:
    """Run all posteriors of a trained network."""
    weights = str(Path(folder) / f"{task}-{seed}.pt")

    def run(kind: str) -> dict:
        if settings.quick:
            own = seed, Path(weights), settings.data_root, True
            is_training = kind == "train"
            return train_case(task, *own) if is_training else run_case(task, kind, *own)
        options = ["--data-root", str(settings.data_root)]
        options += ["--case", task, kind, str(seed), weights]
        result = in_own_process(__file__, options, 60 * MINUTES)
        print(task, seed, kind, result, flush=True)
        return result

    rows = []
    for kind in QUICK if settings.quick else POSTERIORS:
        key = f"{task}/{seed}/{kind}"

        def measure(kind: str = kind) -> dict:
            if not Path(weights).exists():
                run("train")
            return run(kind)

        result = progress.run(key, measure)
        rows.append({"task": task, "posterior": kind, "seed": seed, "result": result})
    return rows


if __name__ == "__main__":
    main()
