"""How few validation images may calibration have, and what does it cost elsewhere?

One posterior of 128 points for each network. It is calibrated by all disjoint draws of
50, 200 and 1,000 validation images; test NLLs are compared with those of the network
alone. What calibration may give up on clean images (``tolerance``) is weighed against
corrupted and rotated ones. The rule was chosen with ALL-CNN-C, WideResNet, ResNet-18
and the second MLP, by other posteriors and other images than these.

    python benchmarks/calibration_by_few_images.py --data-root DATA

An interrupted study resumes where it stopped.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import torch
from calibrated_predictions import GGN, PROBLEMS
from quality_under_shift import CORRUPTIONS
from scipy.stats import sem
from shared.command_line import add_problems, parse, run_problems, study_parser
from shared.data import FOREIGN, scale_of, validation_data
from shared.internals import entropy
from shared.moments import (
    MAP_OUTPUTS,
    UNCALIBRATED,
    Moments,
    calibrated,
    moments,
    scaled,
)
from shared.problems import Problem
from shared.reports import Progress, write_report
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms.v2 import functional as transforms

from laplace_debiased import Calibration, KronDebiasedLaplace
from laplace_debiased.comparison.data import raw_images
from laplace_debiased.comparison.metrics import auroc

STUDY = Path(__file__).stem
BUDGET, SEED = 128, 7
COUNTS = (50, 200, 1000)
NUM_VALIDATION, NUM_TIMED = 2000, 250
# images before these were used while the rule was written
FIRST_VALIDATION, FIRST_TEST = 1000, 1000
PAIR = ("clean", "foreign")
ANGLES, SEVERITY = range(30, 181, 30), 3
TOLERANCES = {
    "calibrated": 2e-3,  # that of `la.calibrate`
    "tolerance .01": 1e-2,
    "all of the variance": inf,
}


def test_images(
    dataset: str, root: Path, count: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Load clean, corrupted, rotated and foreign images, and classes of the first."""
    mean, std = scale_of(dataset, root)
    X, y = raw_images(dataset, root, train=False)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    chosen = order[FIRST_TEST : FIRST_TEST + count]
    few = chosen[: count // 20]
    foreign, _ = raw_images(FOREIGN[dataset], root, train=False)
    torch.manual_seed(0)  # of the noise
    images = {
        "clean": X[chosen],
        "corrupted": torch.cat(
            [f(X[few], SEVERITY).clamp(0, 1) for f in CORRUPTIONS.values()]
        ),
        "rotated": torch.cat([transforms.rotate(X[few], float(a)) for a in ANGLES]),
        "foreign": foreign[FIRST_TEST : FIRST_TEST + count // 2],
    }
    labels = {
        "clean": y[chosen],
        "corrupted": y[few].repeat(len(CORRUPTIONS)),
        "rotated": y[few].repeat(len(ANGLES)),
    }
    return {k: (own - mean) / std for k, own in images.items()}, labels


def by_draws(
    choose: Callable[[Moments, Tensor], Calibration],
    validation: tuple[Moments, Tensor],
    test: tuple[Moments, Tensor],
    count: int,
) -> list[float]:
    """Compute test NLLs with each disjoint draw of validation images."""
    known, y = validation
    result = []
    for first in range(0, len(y) - count + 1, count):
        rows = slice(first, first + count)
        chosen = choose(known[rows], y[rows])
        result.append(test[0].nll(chosen, test[1]))
    return result


def seconds_over_predictions(la: KronDebiasedLaplace, X: Tensor, y: Tensor) -> float:
    """Time a calibration in predictions of its images, in processor time."""
    loader = DataLoader(TensorDataset(X, y), NUM_TIMED)
    la(X[:50])  # the first one also sets up
    start = time.process_time()
    for inputs, _ in loader:
        la(inputs)
    predict = time.process_time() - start
    start = time.process_time()
    la.calibrate(loader)
    return (time.process_time() - start) / predict


@torch.no_grad()
def run_network(
    dataset: str, name: str, settings: argparse.Namespace
) -> dict[str, Any]:
    """Fit, calibrate by each draw, and score."""
    root = settings.data_root
    problem = Problem.load(name, dataset, root, settings.quick)
    magnitudes = "ggn" if name in GGN else "kfac"
    la = KronDebiasedLaplace(
        problem.model,
        "classification",
        budget=BUDGET,
        magnitudes=magnitudes,
        seed=SEED,
    )
    with torch.enable_grad():
        la.fit(problem.loader())
    la.optimize_prior_precision()
    X, y = (
        part[FIRST_VALIDATION : FIRST_VALIDATION + settings.validation]
        for part in validation_data(dataset, root)
    )
    known = moments(la, X)
    images, labels = test_images(dataset, root, settings.images)
    found = {k: moments(la, own) for k, own in images.items()}
    test = found["clean"], labels["clean"]
    result: dict[str, Any] = {"MAP": test[0].nll(MAP_OUTPUTS, test[1])}
    for label, choose in (("scaled", scaled), ("calibrated", calibrated)):
        result[label] = {
            count: by_draws(choose, (known, y), test, count)
            for count in COUNTS
            if count <= len(y)
        }
    first = known[:1000], y[:1000]
    choices = {"MAP": MAP_OUTPUTS, "temperature scaling": scaled(*first)}
    choices |= {k: calibrated(*first, tolerance=t) for k, t in TOLERANCES.items()}
    choices["default, not calibrated"] = UNCALIBRATED
    result["ends"] = {
        label: {k: found[k].nll(choice, own) for k, own in labels.items()}
        for label, choice in choices.items()
    }
    result["temperature"] = choices["calibrated"].temperature
    result["scale"] = choices["calibrated"].scale
    chosen = choices["calibrated"]
    result["foreign"] = {
        "MAP": auroc(*(certain_entropy(found[k]) for k in PAIR)),
        "information": auroc(*(found[k].information(chosen) for k in PAIR)),
    }
    result["rotated by variance"] = auroc(
        *(found[k].variance.mean(1) for k in ("clean", "rotated"))
    )
    result["cost"] = seconds_over_predictions(la, X[:NUM_TIMED], y[:NUM_TIMED])
    return result


def certain_entropy(outputs: Moments) -> Tensor:
    """Compute the entropy of the network's own probabilities."""
    return entropy(outputs.mean.softmax(1))


def _difference(values: list[float], base: float) -> str:
    gaps = np.array(values) - base
    error = f" ± {sem(gaps):.4f}" if len(gaps) > 1 else ""
    return f"{gaps.mean():+.4f}{error} ({gaps.max():+.4f})"


def _by_network(results: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{dataset}, {name}", result)
        for dataset, networks in results.items()
        for name, result in networks.items()
    ]


def table(results: dict[str, Any]) -> str:
    """Format test NLLs minus MAP's: mean ± standard error and worst of the draws."""
    counts = [str(count) for count in COUNTS]
    titles = ["network", "MAP's NLL"]
    titles += [f"calibrated by {count}" for count in counts]
    titles += [f"temperature scaling by {count}" for count in counts]
    titles += ["AUROC of other images, MAP", "mutual information", "cost"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for label, result in _by_network(results):
        base = result["MAP"]
        cells = [label, f"{base:.4f}"]
        for method in ("calibrated", "scaled"):
            draws = {str(k): own for k, own in result[method].items()}
            cells += [
                _difference(draws[k], base) if k in draws else "-" for k in counts
            ]
        foreign = result["foreign"]
        cells += [f"{foreign[k]:.3f}" for k in ("MAP", "information")]
        cells.append(f"{result['cost']:.2f} ×")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def both_ends(results: dict[str, Any]) -> str:
    """Format NLLs of clean, corrupted and rotated images."""
    lines = [
        "| network | method | clean | corrupted | rotated "
        "| AUROC of rotated, variance |",
        "|---" * 6 + "|",
    ]
    for label, result in _by_network(results):
        told = f"{result['rotated by variance']:.3f}"
        for method, own in result["ends"].items():
            cells = (
                f"{own['clean']:.4f} | {own['corrupted']:.3f} | {own['rotated']:.3f}"
            )
            lines.append(f"| {label} | {method} | {cells} | {told} |")
    return "\n".join(lines)


def main() -> None:
    """Run the study, and write tables and numbers."""
    parser = study_parser(__doc__, STUDY)
    add_problems(parser, PROBLEMS)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--validation", type=int, default=NUM_VALIDATION)
    settings = parse(parser)
    if settings.quick:
        settings.images, settings.validation = 100, 200
    warnings.simplefilter("ignore")
    progress = Progress(settings, STUDY)

    def run(dataset: str, name: str, settings: argparse.Namespace) -> Any:
        return progress.run(
            f"{dataset}/{name}", partial(run_network, dataset, name, settings)
        )

    results = run_problems(settings, run)
    recorded = {
        "budget": BUDGET,
        "images": settings.images,
        "validation": settings.validation,
    }
    write_report(settings.out, STUDY, recorded, results, table(results))
    (settings.out / f"{STUDY}_ends.md").write_text(both_ends(results) + "\n")
    progress.clear()


if __name__ == "__main__":
    main()
