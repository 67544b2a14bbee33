"""How well posteriors predict clean, corrupted and foreign images, as a user fits them.

The prior precision is chosen by the marginal likelihood or by validation images; test
images are the network's own, those of another dataset, and corrupted ones in five
severities.

    python benchmarks/quality_under_shift.py --data-root DATA

``--problems fashion-mnist/MLP`` restricts it to one network. An interrupted study
resumes where it stopped.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
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
from shared.data import FOREIGN, foreign_images, scale_of, validation_data
from shared.figures import draw_band, legend_below, written_figure
from shared.fits import FEW_POINTS, fit_few_points, full_data_posterior
from shared.predictions import chosen_prior, glm_probabilities
from shared.problems import Problem
from shared.reports import Progress, write_report
from shared.tables import mean_and_std
from torch import Tensor
from torch.nn.functional import nll_loss
from torchvision.transforms.v2 import functional as transforms

from laplace_debiased import KronDebiasedLaplace
from laplace_debiased.comparison.data import raw_images
from laplace_debiased.comparison.experiment import MAP
from laplace_debiased.comparison.metrics import (
    misclassification_auroc,
    ood_auroc,
    score,
)
from laplace_debiased.comparison.posteriors import FULL_DATA

STUDY = Path(__file__).stem
BUDGET = 128
NUM_IMAGES = 500
SEVERITIES = (1, 2, 3, 4, 5)
GRID = [10 ** (third / 3) for third in range(-6, 13)]
# of images from 0 to 1, in the five severities
CORRUPTIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "noise": lambda X, k: transforms.gaussian_noise(X, sigma=0.04 * k),
    "blur": lambda X, k: transforms.gaussian_blur(X, [7, 7], [0.3 * k]),
    "contrast": lambda X, k: transforms.adjust_contrast(X, 1 - 0.15 * k),
    "rotation": lambda X, k: transforms.rotate(X, 6.0 * k),
}
COLUMNS = {
    "prior": ("prior precision", 1, 1),
    "nll": ("NLL", 1, 3),
    "ece": ("ECE", 1, 3),
    "brier": ("Brier", 1, 3),
    "accuracy": ("accuracy %", 100, 1),
    "misclassification": ("AUROC of errors", 1, 3),
    "ood": ("AUROC of other images", 1, 3),
}


@dataclass(frozen=True)
class TestImages:
    """What is predicted.

    Args:
        own: Test images.
        labels: Their classes.
        other: Images of another dataset.
        corrupted: Corrupted test images, by corruption and severity.
    """

    own: Tensor
    labels: Tensor
    other: Tensor
    corrupted: dict[tuple[str, int], Tensor]

    @classmethod
    def load(cls, dataset: str, data_root: Path, count: int) -> TestImages:
        """Load and corrupt images, and scale them as the training images are."""
        mean, std = scale_of(dataset, data_root)
        X, y = (part[:count] for part in raw_images(dataset, data_root, train=False))
        torch.manual_seed(0)  # of the noise
        corrupted = {
            (name, severity): (corrupt(X, severity).clamp(0, 1) - mean) / std
            for name, corrupt in CORRUPTIONS.items()
            for severity in SEVERITIES
        }
        other = foreign_images(dataset, data_root, count)
        return cls((X - mean) / std, y, other, corrupted)


def by_validation(
    las: Sequence[KronDebiasedLaplace], problem: Problem, X: Tensor, y: Tensor
) -> list[float]:
    """Choose the prior precisions with the lowest NLL of validation images."""
    posteriors = [(la.H, GRID) for la in las]
    chosen = []
    for predictions in glm_probabilities(posteriors, problem.model, X):
        losses = [nll_loss(p.log(), y).item() for p in predictions]
        chosen.append(GRID[int(np.argmin(losses))])
    return chosen


def evaluate(
    predict: Callable[[Tensor], list[Tensor]], images: TestImages
) -> list[dict[str, Any]]:
    """Score predictions; one result for each posterior and prior precision."""
    results = []
    pairs = zip(predict(images.own), predict(images.other), strict=True)
    for own, other in pairs:
        results.append(
            asdict(score(own, images.labels))
            | {
                "misclassification": misclassification_auroc(own, images.labels),
                "ood": ood_auroc(own, other),
                "shift": {},
            }
        )
    for (name, severity), X in images.corrupted.items():
        for result, p in zip(results, predict(X), strict=True):
            scores = asdict(score(p, images.labels))
            result["shift"][f"{name} {severity}"] = scores
    return results


def run_network(
    dataset: str, name: str, settings: argparse.Namespace, progress: Progress
) -> dict[str, Any]:
    """Run all estimators on all seeds."""
    problem = Problem.load(name, dataset, settings.data_root, settings.quick)
    images = TestImages.load(dataset, settings.data_root, settings.images)
    validation = [
        part[: settings.images] for part in validation_data(dataset, settings.data_root)
    ]

    @torch.no_grad()
    def without_posterior() -> list[dict]:
        return evaluate(lambda X: [problem.model(X).softmax(-1)], images)

    def measure(
        build: Callable[[int], KronDebiasedLaplace], seeds: int
    ) -> list[list[dict]]:
        las = [build(seed) for seed in range(seeds)]
        validated = by_validation(las, problem, *validation)
        priors = [[chosen_prior(la), p] for la, p in zip(las, validated, strict=True)]
        posteriors = [(la.H, pair) for la, pair in zip(las, priors, strict=True)]

        def predict(X: Tensor) -> list[Tensor]:
            predictions = glm_probabilities(posteriors, problem.model, X)
            return list(chain(*predictions))

        results = iter(evaluate(predict, images))
        return [[next(results) | {"prior": p} for p in pair] for pair in priors]

    builders: dict[str, Callable[[int], KronDebiasedLaplace]] = {
        FULL_DATA: lambda _: full_data_posterior(problem, keep=not settings.quick),
        **{k: partial(fit_few_points, k, problem, BUDGET) for k in FEW_POINTS},
    }
    rows = {MAP: [progress.run(f"{problem}, {MAP}", without_posterior)]}
    for label, build in builders.items():
        seeds = 1 if label == FULL_DATA else settings.seeds
        rows[label] = progress.run(
            f"{problem}, {label}", partial(measure, build, seeds)
        )
        print(f"{problem}, {label}", flush=True)
    return rows


def table(datasets: dict[str, Any]) -> str:
    """Format the scores as a Markdown table: means ± standard deviations."""
    titles = [title for title, *_ in COLUMNS.values()]
    severities = [f"NLL, severity {k}" for k in SEVERITIES]
    lines = [
        "| dataset | network | estimator | prior by "
        f"| {' | '.join(titles + severities)} |",
        "|---" * (4 + len(titles) + len(severities)) + "|",
    ]
    cases = [
        (f"{dataset} | {network} | {label}", label, seeds)
        for dataset, networks in datasets.items()
        for network, rows in networks.items()
        for label, seeds in rows.items()
    ]
    for case, label, seeds in cases:
        methods = ["-"] if label == MAP else ["marginal likelihood", "validation"]
        for index, method in enumerate(methods):
            cells = " | ".join(_cells([run[index] for run in seeds]))
            lines.append(f"| {case} | {method} | {cells} |")
    return "\n".join(lines)


def _cells(runs: list[dict[str, Any]]) -> list[str]:
    cells = []
    for key, (_, factor, digits) in COLUMNS.items():
        if key not in runs[0]:
            cells.append("-")
            continue
        column = factor * np.array([run[key] for run in runs])
        cells.append(mean_and_std(column, digits))
    return cells + [mean_and_std(shifted(runs, "nll", k), 3) for k in SEVERITIES]


def shifted(runs: list[dict[str, Any]], metric: str, severity: int) -> np.ndarray:
    """Average a metric over the corruptions of a severity: ``[seeds]``."""
    return np.array(
        [
            np.mean(
                [run["shift"][f"{name} {severity}"][metric] for name in CORRUPTIONS]
            )
            for run in runs
        ]
    )


def write_figure(path: Path, datasets: dict[str, Any]) -> None:
    """Draw NLL and ECE against the severity, with the marginal likelihood's prior."""
    cases = [
        (f"{dataset}, {network}", rows)
        for dataset, networks in datasets.items()
        for network, rows in networks.items()
    ]
    with written_figure(path, len(cases), 2) as figure:
        panels = figure.subplots(
            2, len(cases), sharex=True, sharey="row", squeeze=False
        )
        for column, (title, rows) in zip(panels.T, cases, strict=True):
            for axis, metric in zip(column, ("nll", "ece"), strict=True):
                for label, seeds in rows.items():
                    _draw(axis, label, [run[0] for run in seeds], metric)
            column[0].set_title(title)
            column[1].set_xlabel("severity")
        panels[0, 0].set_ylabel("test NLL")
        panels[1, 0].set_ylabel("ECE")
        legend_below(figure, panels[0, 0], 6)


def _draw(axis: Axes, label: str, runs: list[dict[str, Any]], metric: str) -> None:
    own = np.array([run[metric] for run in runs])
    curve = [own, *(shifted(runs, metric, k) for k in SEVERITIES)]
    draw_band(axis, [0, *SEVERITIES], np.transpose(curve), label)


def main() -> None:
    """Run the study, and write table, numbers and figure."""
    parser = study_parser(__doc__, STUDY)
    add_problems(parser, [*NETWORKS, "mnist/MLP"])
    parser.add_argument("--images", type=int, default=NUM_IMAGES)
    settings = parse(parser)
    if settings.quick:
        settings.images = 50
    warnings.simplefilter("ignore")
    progress = Progress(settings, STUDY)
    results = run_problems(settings, partial(run_network, progress=progress))
    recorded = {
        "other_dataset": {
            dataset: FOREIGN[dataset] for dataset, _ in settings.problems
        },
        "seeds": settings.seeds,
        "budget": BUDGET,
        "images": settings.images,
    }
    write_report(settings.out, STUDY, recorded, results, table(results))
    write_figure(settings.out / f"{STUDY}.png", results)
    progress.clear()


if __name__ == "__main__":
    main()
