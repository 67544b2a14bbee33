"""Do calibrated predictions help: on clean, corrupted and foreign images?

Each network is fitted with 128 points and calibrated with 1,000 validation images, five
times with other draws of both (the MLP of FashionMNIST: five networks). Temperature
scaling has the same validation images. How to choose temperature and scale was decided
by other validation and test images, with the networks and draws of seed 0.

    python benchmarks/calibrated_predictions.py --data-root DATA

``--problems fashion-mnist/MLP`` restricts it to one network. An interrupted study
resumes where it stopped.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality_under_shift import CORRUPTIONS, SEVERITIES
from scipy.stats import sem
from shared.command_line import add_problems, parse, run_problems, study_parser
from shared.data import FOREIGN, scale_of, validation_data
from shared.figures import legend_below, written_figure
from shared.internals import entropy
from shared.moments import (
    BATCH_SIZE,
    MAP_OUTPUTS,
    UNCALIBRATED,
    Moments,
    calibrated,
    certain,
    moments,
    scaled,
)
from shared.problems import FIT_BATCH_SIZE, Problem
from shared.reports import Progress, write_report
from shared.training import CHECKPOINTS, trained
from torch import Tensor, nn
from torch.nn.functional import nll_loss
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import Calibration, KronDebiasedLaplace, KronDebiasedLLLaplace
from laplace_debiased.comparison.data import raw_images
from laplace_debiased.comparison.metrics import auroc, misclassification_auroc, score

STUDY = Path(__file__).stem
BUDGET = 128
ENSEMBLE_SIZE = 5
# those before were used while calibration was written
FIRST_IMAGE, NUM_IMAGES = 1000, 1000
FIRST_VALIDATION = 1000
SMALL_SETS = (50, 200)
PROBLEMS = [
    "fashion-mnist/MLP",
    "mnist/MLP",
    "fashion-mnist/all-convolutional",
    "fashion-mnist/ResNet",
    "fashion-mnist/ViT-Little",
    "fashion-mnist/ALL-CNN-C",
    "fashion-mnist/WideResNet",
]
GGN = ("all-convolutional", "ResNet", "ALL-CNN-C", "WideResNet")
MAP, SCALED, ENSEMBLE = "MAP", "temperature scaling", "deep ensemble of 5"
LAST, DEFAULT, CALIBRATED = "last layer", "default", "default, calibrated"
COLUMNS = {
    "accuracy": ("accuracy %", 100, 1),
    "nll": ("NLL", 1, 4),
    "ece": ("ECE", 1, 4),
    "mistakes": ("AUROC of errors", 1, 3),
    "foreign": ("AUROC of other images", 1, 3),
    **{f"severity {k}": (f"NLL, severity {k}", 1, 3) for k in SEVERITIES},
    **{f"{k} points": (f"NLL, {k} validation images", 1, 4) for k in SMALL_SETS},
}


@dataclass(frozen=True)
class Images:
    """What is predicted.

    Args:
        own: Test images, with their classes.
        foreign: Images of another dataset.
        corrupted: Corrupted test images, by severity, of all corruptions.
        shifted_labels: Their classes.
    """

    own: tuple[Tensor, Tensor]
    foreign: Tensor
    corrupted: dict[int, Tensor]
    shifted_labels: Tensor

    @classmethod
    def load(cls, dataset: str, root: Path, count: int, num_corrupted: int) -> Images:
        """Load images that calibration was not written with."""
        mean, std = scale_of(dataset, root)
        X, y = raw_images(dataset, root, train=False)
        # the test images of other studies are a random thousand, in this order
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
        chosen = order[FIRST_IMAGE : FIRST_IMAGE + count]
        others, _ = raw_images(FOREIGN[dataset], root, train=False)
        some = X[chosen[:num_corrupted]]
        torch.manual_seed(0)  # of the noise
        corrupted = {
            k: torch.cat([f(some, k) for f in CORRUPTIONS.values()]).clamp(0, 1)
            for k in SEVERITIES
        }
        return cls(
            ((X[chosen] - mean) / std, y[chosen]),
            (others[FIRST_IMAGE : FIRST_IMAGE + count] - mean) / std,
            {k: (own - mean) / std for k, own in corrupted.items()},
            y[chosen[:num_corrupted]].repeat(len(CORRUPTIONS)),
        )


def scores(
    predict: Callable[[Tensor], Moments],
    calibration: Calibration,
    images: Images,
    shifted: bool = True,
) -> dict[str, float]:
    """Score predictions of all images."""
    X, y = images.own
    own, foreign = predict(X), predict(images.foreign)
    p = own.probabilities(calibration)
    is_map = not own.variance.any()
    uncertain = [
        entropy(part.probabilities(calibration))
        if is_map
        else part.information(calibration)
        for part in (own, foreign)
    ]
    result = _of_probabilities(p, y) | {"foreign": auroc(*uncertain)}
    for k, corrupted in images.corrupted.items() if shifted else ():
        found = predict(corrupted)
        result[f"severity {k}"] = found.nll(calibration, images.shifted_labels)
    return result


def _of_probabilities(p: Tensor, y: Tensor) -> dict[str, float]:
    own = asdict(score(p, y))
    return own | {"mistakes": misclassification_auroc(p, y)}


def small_sets(
    choose: Callable[[Moments, Tensor], Calibration],
    predict: Callable[[Tensor], Moments],
    validation: tuple[Moments, Tensor],
    images: Images,
) -> dict[str, float]:
    """Score choices by few of the validation images: test NLLs."""
    (X, labels), (known, y) = images.own, validation
    own, result = predict(X), {}
    for count in SMALL_SETS:
        chosen = choose(known[:count], y[:count])
        result[f"{count} points"] = own.nll(chosen, labels)
    return result


def ensemble(dataset: str, name: str, root: Path, images: Images) -> dict[str, float]:
    """Score the average of networks that were trained from several initializations."""
    models = [trained(name, dataset, root, seed) for seed in range(ENSEMBLE_SIZE)]

    def predict(X: Tensor) -> tuple[Tensor, Tensor]:
        p = torch.stack([certain(m, X).mean.double().softmax(-1) for m in models])
        return p.mean(0), entropy(p.mean(0)) - entropy(p).mean(0)

    (X, y) = images.own
    p, own = predict(X)
    _, foreign = predict(images.foreign)
    result = _of_probabilities(p, y) | {"foreign": auroc(own, foreign)}
    for k, corrupted in images.corrupted.items():
        p, _ = predict(corrupted)
        result[f"severity {k}"] = nll_loss(p.log(), images.shifted_labels).item()
    return result


@torch.no_grad()
def run_seed(
    dataset: str, name: str, settings: argparse.Namespace, seed: int, images: Images
) -> dict[str, Any]:
    """Fit, calibrate and score with one draw of points and validation images."""
    problem = Problem.load(name, dataset, settings.data_root, settings.quick)
    if len(checkpoints(dataset, name)) >= settings.seeds > 1:
        problem.model = trained(name, dataset, settings.data_root, seed)
    first = FIRST_VALIDATION + seed * settings.images
    X, y = (
        part[first : first + settings.images]
        for part in validation_data(dataset, settings.data_root)
    )
    magnitudes = "ggn" if name in GGN else "kfac"
    la = KronDebiasedLaplace(
        problem.model,
        "classification",
        budget=BUDGET,
        magnitudes=magnitudes,
        seed=seed + 1,
    )
    last = None
    with torch.enable_grad():
        start = time.perf_counter()
        la.fit(problem.loader())
        fit_seconds = time.perf_counter() - start
        if isinstance(list(problem.model.modules())[-1], nn.Linear):
            last = KronDebiasedLLLaplace(problem.model, "classification")
            last.fit(problem.loader())
            last.optimize_prior_precision()
    loader = DataLoader(TensorDataset(X, y), BATCH_SIZE)
    start = time.perf_counter()
    chosen = la.calibrate(loader)
    calibrate_seconds = time.perf_counter() - start
    la._calibration = None
    start = time.perf_counter()
    for part in X.split(BATCH_SIZE):
        la(part)
    predict_seconds = time.perf_counter() - start

    of_map = partial(certain, problem.model)
    predict = cache(partial(moments, la))
    known = predict(X)
    of_validation = of_map(X)
    rows = {
        MAP: scores(of_map, MAP_OUTPUTS, images),
        SCALED: scores(of_map, scaled(of_validation, y), images)
        | small_sets(scaled, of_map, (of_validation, y), images),
        DEFAULT: scores(predict, UNCALIBRATED, images),
        CALIBRATED: scores(predict, chosen, images)
        | small_sets(calibrated, predict, (known, y), images),
    }
    if last is not None:
        rows[LAST] = scores(partial(moments, last), UNCALIBRATED, images)
    return {
        "rows": rows,
        "calibration": asdict(chosen),
        "prior_precision": la.prior_precision.item(),
        "seconds": {
            "fit": fit_seconds,
            "calibrate": calibrate_seconds,
            "predict": predict_seconds,
        },
    }


def checkpoints(dataset: str, name: str) -> list[Path]:
    """Return the trained networks of a kind."""
    paths = [CHECKPOINTS / dataset / f"{name}-{k}.safetensors" for k in range(99)]
    return [path for path in paths if path.exists()]


def run_network(
    dataset: str, name: str, settings: argparse.Namespace, progress: Progress
) -> dict[str, Any]:
    """Run all seeds."""
    images = Images.load(
        dataset, settings.data_root, settings.images, settings.corrupted
    )
    seeds = []
    for seed in range(settings.seeds):
        run = partial(run_seed, dataset, name, settings, seed, images)
        seeds.append(progress.run(f"{dataset}/{name} {seed}", run))
        print(dataset, name, seed, seeds[-1]["seconds"], flush=True)
    result = {"seeds": seeds, "ensemble": None}
    if len(checkpoints(dataset, name)) >= ENSEMBLE_SIZE:
        with torch.no_grad():
            result["ensemble"] = ensemble(dataset, name, settings.data_root, images)
    return result


def rows_of(result: dict[str, Any]) -> dict[str, list[dict[str, float]]]:
    """Return the scores of all seeds, by row of the table."""
    rows = {
        label: [seed["rows"][label] for seed in result["seeds"]]
        for label in result["seeds"][0]["rows"]
    }
    if result["ensemble"]:
        rows[ENSEMBLE] = [result["ensemble"]]
    return rows


def table(results: dict[str, Any]) -> str:
    """Format the scores as a Markdown table: means ± standard errors."""
    titles = [title for title, *_ in COLUMNS.values()]
    lines = [
        f"| network | method | {' | '.join(titles)} |",
        "|---" * (2 + len(titles)) + "|",
    ]
    for dataset, networks in results.items():
        for name, result in networks.items():
            for label, runs in rows_of(result).items():
                cells = " | ".join(_cells(runs))
                lines.append(f"| {dataset}, {name} | {label} | {cells} |")
    return "\n".join(lines)


def _cells(runs: list[dict[str, float]]) -> list[str]:
    cells = []
    for key, (_, factor, digits) in COLUMNS.items():
        if key not in runs[0]:
            cells.append("-")
            continue
        values = factor * np.array([run[key] for run in runs])
        cells.append(_average(values, f".{digits}f"))
    return cells


def _average(values: np.ndarray, form: str) -> str:
    digits = form.lstrip("+")
    error = f" ± {sem(values):{digits}}" if len(values) > 1 else ""
    return f"{values.mean():{form}}{error}"


def differences(results: dict[str, Any]) -> str:
    """Format what was chosen, and scores minus those of temperature scaling."""
    keys = ["nll", "ece", "mistakes", *(f"severity {k}" for k in SEVERITIES)]
    keys += [f"{k} points" for k in SMALL_SETS]
    lines = [
        f"| network | temperature | scale | {' | '.join(COLUMNS[k][0] for k in keys)} "
        "| calibrating by predicting |",
        "|---" * (4 + len(keys)) + "|",
    ]
    for dataset, networks in results.items():
        for name, result in networks.items():
            chosen = [seed["calibration"] for seed in result["seeds"]]
            seconds = [seed["seconds"] for seed in result["seeds"]]
            ratio = np.median([s["calibrate"] / s["predict"] for s in seconds])
            cells = [
                f"{np.mean([own[key] for own in chosen]):.2f}"
                for key in ("temperature", "scale")
            ]
            rows = rows_of(result)
            for key in keys:
                pairs = zip(rows[CALIBRATED], rows[SCALED], strict=True)
                gaps = np.array([own[key] - other[key] for own, other in pairs])
                cells.append(_average(gaps, "+.4f"))
            lines.append(f"| {dataset}, {name} | {' | '.join(cells)} | {ratio:.2f} × |")
    return "\n".join(lines)


def write_figure(path: Path, results: dict[str, Any]) -> None:
    """Draw NLL against severity, and how foreign images are told, for each network.

    NLLs are over that of the network alone.
    """
    cases = [
        (f"{dataset},\n{name}", rows_of(result))
        for dataset, networks in results.items()
        for name, result in networks.items()
    ]
    labels = [MAP, SCALED, DEFAULT, CALIBRATED]
    with written_figure(path, len(cases), 2.4) as figure:
        panels = figure.subplots(2, len(cases), squeeze=False, sharey="row")
        for (upper, lower), (title, rows) in zip(panels.T, cases, strict=True):
            for index, label in enumerate(labels):
                keys = ["nll", *(f"severity {k}" for k in SEVERITIES)]
                own, alone = (
                    np.mean([[run[key] for key in keys] for run in rows[row]], 0)
                    for row in (label, MAP)
                )
                upper.plot([0, *SEVERITIES], own / alone, label=label)
                lower.bar(index, np.mean([run["foreign"] for run in rows[label]]))
            upper.set_title(title, fontsize="small")
            upper.set(xlabel="severity", ylim=(0.4, 2.2))
            lower.set(xticks=[], ylim=(0.5, 1))
        panels[0, 0].set_ylabel("NLL / MAP's")
        panels[1, 0].set_ylabel("AUROC, foreign")
        legend_below(figure, panels[0, 0], 4)


def main() -> None:
    """Run the study, and write tables, numbers and figure."""
    parser = study_parser(__doc__, STUDY)
    add_problems(parser, PROBLEMS)
    parser.add_argument("--images", type=int, default=NUM_IMAGES)
    parser.add_argument("--corrupted", type=int, default=100)
    settings = parse(parser)
    if settings.quick:
        settings.images, settings.corrupted = 100, 10
    warnings.simplefilter("ignore")
    progress = Progress(settings, STUDY)
    results = run_problems(settings, partial(run_network, progress=progress))
    recorded = {
        "seeds": settings.seeds,
        "budget": BUDGET,
        "images": settings.images,
        "corrupted": settings.corrupted,
        "fit_batch_size": FIT_BATCH_SIZE,
    }
    write_report(settings.out, STUDY, recorded, results, table(results))
    own = settings.out / f"{STUDY}_differences.md"
    own.write_text(differences(results) + "\n")
    write_figure(settings.out / f"{STUDY}.png", results)
    progress.clear()


if __name__ == "__main__":
    main()
