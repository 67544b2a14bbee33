"""How do posteriors of few points compare with published Laplace approximations?

The protocol of *Variational Linearized Laplace Approximation for Bayesian Deep
Learning* (arXiv 2302.12565): an MLP of 784-200-200-10 units, 10,000 test images, 10,000
foreign ones, and rotated ones. Networks are trained anew, two minutes each, and kept
beside the checkpoints.

    python benchmarks/published_results.py --data-root DATA

An interrupted study resumes where it stopped.
"""

from __future__ import annotations

import argparse
import time
import warnings
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from laplace import Laplace
from scipy.stats import sem
from shared.command_line import parse, study_parser
from shared.figures import legend_below, written_figure
from shared.internals import entropy
from shared.predictions import scaled_temperature
from shared.published import (
    PUBLISHED,
    ProtocolData,
    protocol_data,
    protocol_network,
)
from shared.reports import Progress, write_report
from torch import Tensor, nn
from torch.nn.functional import nll_loss
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms.v2 import functional as transforms

from laplace_debiased import EigenbasisMatrix, KronDebiasedLaplace
from laplace_debiased.comparison.metrics import auroc, score

STUDY = Path(__file__).stem
DATASETS = ("fashion-mnist", "mnist")
BUDGET, BATCH_SIZE, NUM_SAMPLES = 128, 500, 2048
ANGLES = range(10, 181, 10)
MAP, SCALED, KRON = "MAP", "temperature scaling", "laplace-torch, kron"
DEFAULT, CALIBRATED = "default", "default, calibrated"
DASHED = (SCALED, KRON)  # they lie on others
COLUMNS = {
    "nll": ("NLL", 4),
    "nll_mc": ("NLL, MC", 4),
    "accuracy": ("accuracy", 4),
    "ece": ("ECE", 4),
    "brier": ("Brier", 4),
    "ood": ("OOD-AUC", 4),
    "ood_mc": ("OOD-AUC, MC", 4),
    "information": ("OOD-AUC, mutual information", 4),
    "rotated 30": ("NLL at 30°", 3),
    "seconds": ("fit and tuning s", 1),
}
PUBLISHED_COLUMNS = [name for name in COLUMNS if name != "information"]


def rotated(data: ProtocolData, count: int, angle: int) -> Tensor:
    """Rotate the first test images."""
    images = data.test[0][:count].unflatten(1, (1, 28, 28))
    return transforms.rotate(images, float(angle)).flatten(1)


def of_network(
    model: nn.Module, temperature: float, data: ProtocolData, count: int
) -> dict[str, float]:
    """Score the network's own outputs."""
    p, foreign = (
        (model(X) / temperature).softmax(-1) for X in (data.test[0], data.foreign)
    )
    ood = auroc(entropy(p), entropy(foreign))
    result = asdict(score(p, data.test[1]))
    result |= {"nll_mc": result["nll"], "ood": ood, "ood_mc": ood}
    for angle in ANGLES:
        turned = (model(rotated(data, count, angle)) / temperature).softmax(-1)
        result |= _turned(angle, turned, data.test[1][:count])
    return result


def _turned(angle: int, p: Tensor, y: Tensor) -> dict[str, float]:
    scores = score(p, y)
    return {f"rotated {angle}": scores.nll, f"rotated {angle} ECE": scores.ece}


def of_posterior(
    la: KronDebiasedLaplace, data: ProtocolData, count: int
) -> dict[str, float]:
    """Score a posterior's predictions: probit, samples, and mutual information."""
    X, y = data.test
    p, information = predicted(la, X)
    q, foreign_information = predicted(la, data.foreign)
    p_mc, q_mc = sampled(la, X), sampled(la, data.foreign)
    result = asdict(score(p, y)) | {
        "nll_mc": nll_loss(p_mc.clamp(min=1e-300).log(), y).item(),
        "ood": auroc(entropy(p), entropy(q)),
        "ood_mc": auroc(entropy(p_mc), entropy(q_mc)),
        "information": auroc(information, foreign_information),
    }
    for angle in ANGLES:
        turned, _ = predicted(la, rotated(data, count, angle))
        result |= _turned(angle, turned, y[:count])
    return result


def predicted(la: KronDebiasedLaplace, X: Tensor) -> tuple[Tensor, Tensor]:
    """Return probabilities, and the mutual information of class and parameters."""
    parts = [la.uncertainty(part) for part in X.split(BATCH_SIZE)]
    return (
        torch.cat([part.probabilities for part in parts]),
        torch.cat([part.epistemic for part in parts]),
    )


def sampled(la: KronDebiasedLaplace, X: Tensor) -> Tensor:
    """Return the mean probabilities of samples of the outputs."""
    generator = torch.Generator().manual_seed(0)
    options = {"link_approx": "mc", "n_samples": NUM_SAMPLES, "generator": generator}
    return torch.cat([la(part, **options) for part in X.split(BATCH_SIZE)])


def fitted_kron(
    model: nn.Module, loader: DataLoader
) -> tuple[EigenbasisMatrix, float, float]:
    """Fit laplace-torch's K-FAC to all data.

    Returns:
        Its curvature, the prior precision of its marginal likelihood, and the seconds.
    """
    start = time.process_time()
    kron = Laplace(model, "classification", "all", "kron")
    kron.fit(loader)
    kron.optimize_prior_precision()
    seconds = time.process_time() - start
    curvature = EigenbasisMatrix(kron.H.eigenvectors, kron.H.eigenvalues)
    return curvature, kron.prior_precision.item(), seconds


def run_seed(
    dataset: str, settings: argparse.Namespace, seed: int
) -> dict[str, dict[str, float]]:
    """Score all methods on one network."""
    data = protocol_data(dataset, settings.data_root)
    steps = {"steps": 200} if settings.quick else {}
    model = protocol_network(dataset, data.train, seed, **steps)
    if settings.quick:
        data = ProtocolData(
            *((X[:300], y[:300]) for X, y in data[:3]), data.foreign[:300]
        )
    count = settings.images
    train = DataLoader(TensorDataset(*data.train), BATCH_SIZE)
    start = time.process_time()
    la = KronDebiasedLaplace(model, "classification", budget=BUDGET, seed=seed)
    la.fit(train)
    la.optimize_prior_precision()
    fit_seconds = time.process_time() - start
    curvature, prior_precision, kron_seconds = fitted_kron(model, train)
    X, y = data.validation
    with torch.no_grad():
        outputs = model(X)
        temperature = scaled_temperature(outputs, y)
        rows = {
            MAP: of_network(model, 1.0, data, count) | {"seconds": 0.0},
            SCALED: of_network(model, temperature, data, count),
            DEFAULT: of_posterior(la, data, count) | {"seconds": fit_seconds},
        }
        start = time.process_time()
        chosen = la.calibrate(DataLoader(TensorDataset(X, y), BATCH_SIZE))
        seconds = fit_seconds + time.process_time() - start
        rows[CALIBRATED] = of_posterior(la, data, count) | {
            "seconds": seconds,
            "temperature": chosen.temperature,
            "scale": chosen.scale,
        }
        la.H, la.prior_precision = curvature, prior_precision
        rows[KRON] = of_posterior(la, data, count) | {"seconds": kron_seconds}
    return rows


def run_dataset(
    dataset: str, settings: argparse.Namespace, progress: Progress
) -> list[dict[str, dict[str, float]]]:
    """Run all seeds."""
    seeds = []
    for seed in range(settings.seeds):
        run = partial(run_seed, dataset, settings, seed)
        seeds.append(progress.run(f"{dataset} {seed}", run))
        print(dataset, seed, seeds[-1][CALIBRATED], flush=True)
    return seeds


def table(results: dict[str, Any]) -> str:
    """Format ours as means ± standard errors, and the published means."""
    titles = [title for title, _ in COLUMNS.values()]
    lines = [
        f"| dataset | method | {' | '.join(titles)} |",
        "|---" * (2 + len(titles)) + "|",
    ]
    for dataset, seeds in results.items():
        for label in seeds[0]:
            cells = " | ".join(_cells([seed[label] for seed in seeds]))
            lines.append(f"| {dataset} | {label} | {cells} |")
        for label, values in PUBLISHED[dataset].items():
            known = dict(zip(PUBLISHED_COLUMNS, values, strict=True))
            cells = " | ".join(_cells([known]))
            lines.append(f"| {dataset} | *published:* {label} | {cells} |")
    return "\n".join(lines)


def _cells(runs: list[dict[str, float]]) -> list[str]:
    cells = []
    for key, (_, digits) in COLUMNS.items():
        values = [run[key] for run in runs if key in run]
        if not values:
            cells.append("-")
            continue
        error = f" ± {sem(values):.{digits}f}" if len(values) > 1 else ""
        cells.append(f"{np.mean(values):.{digits}f}{error}")
    return cells


def write_figure(path: Path, results: dict[str, Any]) -> None:
    """Draw NLL and ECE against the angle of rotation."""
    with written_figure(path, 2 * len(results)) as figure:
        panels = figure.subplots(1, 2 * len(results), squeeze=False)[0]
        for k, (dataset, seeds) in enumerate(results.items()):
            for label in seeds[0]:
                for axis, suffix in zip(panels[2 * k :], ("", " ECE"), strict=False):
                    keys = [f"rotated {angle}{suffix}" for angle in ANGLES]
                    curves = [[seed[label][key] for key in keys] for seed in seeds]
                    style = "--" if label in DASHED else "-"
                    axis.plot(ANGLES, np.mean(curves, 0), style, label=label)
            for axis, ylabel in zip(panels[2 * k :], ("NLL", "ECE"), strict=False):
                axis.set(title=dataset, xlabel="rotated by (°)", ylabel=ylabel)
        legend_below(figure, panels[0], 5)


def main() -> None:
    """Run the study, and write table, numbers and figure."""
    parser = study_parser(__doc__, STUDY)
    parser.add_argument("--images", type=int, default=1000, help="rotated images")
    settings = parse(parser)
    if settings.quick:
        settings.images = 50
    warnings.simplefilter("ignore")
    progress = Progress(settings, STUDY)
    datasets = DATASETS[:1] if settings.quick else DATASETS
    results = {name: run_dataset(name, settings, progress) for name in datasets}
    recorded = {"seeds": settings.seeds, "budget": BUDGET, "images": settings.images}
    write_report(settings.out, STUDY, recorded, results, table(results))
    write_figure(settings.out / f"{STUDY}.png", results)
    progress.clear()


if __name__ == "__main__":
    main()
