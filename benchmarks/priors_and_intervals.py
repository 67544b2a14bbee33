"""Do conformal sets and intervals cover what they say, and which prior fits?

Four small questions. Conformal sets of calibrated networks, on five random splits of
images: how often do they hold the class? Intervals of a regression (diabetes, eight
splits), with the prior precision tuned alone and with the noise. The prior of
normalizations' scales and shifts, of mean zero or centred at the trained values. And a
grid search over prior precisions in one pass, beside one pass for each and
laplace-torch's ``kron``.

    python benchmarks/priors_and_intervals.py --data-root DATA

An interrupted study resumes where it stopped.
"""

from __future__ import annotations

import argparse
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from laplace import Laplace
from scipy.stats import sem
from shared.command_line import parse, study_parser
from shared.data import scale_of, validation_data
from shared.problems import Problem
from shared.reports import Progress, write_report
from shared.training import trained
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.nn.functional import mse_loss, nll_loss
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import KronDebiasedLaplace
from laplace_debiased.comparison.data import raw_images

STUDY = Path(__file__).stem
BUDGET, BATCH_SIZE = 128, 125
COVERAGE, WIDTH = 0.9, 1.96
CONFORMAL = [("fashion-mnist", "MLP"), ("mnist", "MLP")]
NUM_CALIBRATION, NUM_THRESHOLD = 1000, 4000
NORMALIZED = ("ResNet", "WideResNet", "ViT-Little", "ResNet-18")
NUM_SPLITS, NUM_TRAIN, TRAINING_STEPS = 8, 300, 100
# laplace-torch takes more than a second for each image and grid
NUM_GRID_IMAGES = 50
GRID = {"log_prior_prec_min": -1.0, "log_prior_prec_max": 4.0, "grid_size": 21}
GGN = ("ResNet", "WideResNet", "ResNet-18")


def test_images(dataset: str, root: Path, count: int) -> tuple[Tensor, Tensor]:
    """Load the first test images, as networks take them."""
    mean, std = scale_of(dataset, root)
    X, y = raw_images(dataset, root, train=False)
    return (X[:count] - mean) / std, y[:count]


def fitted(problem: Problem, magnitudes: str = "kfac") -> KronDebiasedLaplace:
    """Fit a posterior with the marginal likelihood's prior precision."""
    la = KronDebiasedLaplace(
        problem.model, "classification", budget=BUDGET, magnitudes=magnitudes
    )
    la.fit(problem.loader())
    la.optimize_prior_precision()
    return la


def loader(X: Tensor, y: Tensor) -> DataLoader:
    """Return batches of points."""
    return DataLoader(TensorDataset(X, y), BATCH_SIZE)


def conformal_coverage(
    dataset: str, name: str, settings: argparse.Namespace, split: int
) -> dict[str, float]:
    """Measure coverage and size of conformal sets on one split of validation images."""
    root = settings.data_root
    problem = Problem.load(name, dataset, root, settings.quick)
    if dataset == "fashion-mnist":  # which has five networks
        problem.model = trained(name, dataset, root, split)
    la = fitted(problem)
    X, y = validation_data(dataset, root)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(split))
    first, second = order[:NUM_CALIBRATION], order[NUM_CALIBRATION:]
    second = second[:NUM_THRESHOLD]
    la.calibrate(loader(X[first], y[first]))
    sets = la.conformal_sets(loader(X[second], y[second]), COVERAGE)
    inputs, labels = test_images(dataset, root, settings.images)
    held = torch.cat([sets(part) for part in inputs.split(BATCH_SIZE)])
    covered = held.gather(1, labels[:, None]).double().mean().item()
    return {"coverage": covered, "size": held.sum(1).double().mean().item()}


def diabetes(split: int) -> tuple[nn.Module, DataLoader, tuple[Tensor, Tensor]]:
    """Train a network on a split of the data, standardized, and return its test set."""
    data = load_diabetes(return_X_y=True)
    X, y = (torch.tensor(own, dtype=torch.float64) for own in data)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(split))
    train, test = order[:NUM_TRAIN], order[NUM_TRAIN:]
    X = (X - X[train].mean(0)) / X[train].std(0)
    y = ((y - y[train].mean()) / y[train].std())[:, None]
    torch.manual_seed(split)
    model = nn.Sequential(nn.Linear(X.shape[1], 50), nn.Tanh(), nn.Linear(50, 1))
    model.double()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2, weight_decay=1e-2)
    for _ in range(TRAINING_STEPS):
        optimizer.zero_grad()
        mse_loss(model(X[train]), y[train]).backward()
        optimizer.step()
    points = TensorDataset(X[train], y[train])
    return model.eval(), DataLoader(points, 50), (X[test], y[test])


def interval_coverage(split: int) -> dict[str, dict[str, float]]:
    """Measure how often 95 % intervals of a regression hold the target."""
    model, train, (X, y) = diabetes(split)
    result = {}
    for label, options in (
        ("prior alone, noise 1", {}),
        ("prior and noise", {"tune_sigma_noise": True}),
    ):
        la = KronDebiasedLaplace(model, "regression", budget=BUDGET, seed=split)
        la.fit(train)
        la.optimize_prior_precision(**options)
        found = la.uncertainty(X)
        std = found.total.sqrt()
        held = ((y - found.mean).abs() <= WIDTH * std).double().mean()
        density = torch.distributions.Normal(found.mean, std).log_prob(y)
        result[label] = {
            "coverage": held.item(),
            "nll": -density.mean().item(),
            "noise": float(la.sigma_noise),
        }
    return result


def of_priors(name: str, settings: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Compare priors of normalizations: marginal likelihood, its choice, and NLL."""
    problem = Problem.load(name, "fashion-mnist", settings.data_root, settings.quick)
    la = fitted(problem, "ggn" if name in GGN else "kfac")
    X, y = problem.inputs[: settings.few], problem.labels[: settings.few]
    result = {}
    for label in ("centred", "mean zero"):
        if label == "mean zero":
            la.prior_mean = torch.zeros_like(la.mean)
            la.optimize_prior_precision()
        p = torch.cat([la(part) for part in X.split(BATCH_SIZE)])
        result[label] = {
            "evidence": la.log_marginal_likelihood().item(),
            "prior_precision": la.prior_precision.item(),
            "nll": nll_loss(p.log(), y).item(),
        }
    return result


def of_grids(settings: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Time grid searches, and tell what they choose."""
    root, count = settings.data_root, 2 if settings.quick else NUM_GRID_IMAGES
    problem = Problem.load("MLP", "fashion-mnist", root, settings.quick)
    X, y = (own[:count] for own in validation_data("fashion-mnist", root))
    validation = DataLoader(TensorDataset(X, y), 50)
    points = DataLoader(TensorDataset(*problem.train[:5000]), 250)
    result = {}

    def timed(label: str, search: partial[float]) -> None:
        start = time.process_time()
        choice = search()
        seconds = time.process_time() - start
        result[label] = {"choice": choice, "seconds": seconds}

    la = KronDebiasedLaplace(problem.model, "classification", budget=BUDGET)
    la.fit(points)
    kron = Laplace(problem.model, "classification", "all", "kron")
    kron.fit(points)
    la(X[:50])
    timed("ours, one pass", partial(searched, la, validation))
    timed("ours, a pass for each", partial(searched_by_passes, la, X, y))
    timed("laplace-torch, kron", partial(searched, kron, validation))
    timed("calibrate", partial(calibrated, la, validation))
    return result


def searched(la: Any, validation: DataLoader) -> float:
    """Search a grid by laplace-torch's interface."""
    la.optimize_prior_precision(method="gridsearch", val_loader=validation, **GRID)
    return la.prior_precision.item()


def searched_by_passes(la: KronDebiasedLaplace, X: Tensor, y: Tensor) -> float:
    """Search the same grid, each prior precision by its own predictions."""
    ends = GRID["log_prior_prec_min"], GRID["log_prior_prec_max"]
    grid = torch.logspace(*ends, int(GRID["grid_size"]))
    losses = []
    for own in grid:
        la.prior_precision = own
        p = torch.cat([la(part) for part in X.split(50)])
        losses.append(nll_loss(p.log(), y).item())
    return grid[int(np.argmin(losses))].item()


def calibrated(la: KronDebiasedLaplace, validation: DataLoader) -> float:
    """Calibrate, and return the marginal likelihood's prior precision."""
    la.calibrate(validation)
    return la.prior_precision.item()


def _mean(values: list[float], digits: int = 3) -> str:
    error = f" ± {sem(values):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{error}"


def table(results: dict[str, Any]) -> str:
    """Format coverages: means ± standard errors over splits, and the splits' range."""
    lines = [
        "| what | wanted | covered | of single splits | size or noise |",
        "|---|---|---|---|---|",
    ]
    for label, runs in results["conformal"].items():
        lines.append(_coverage_row(f"sets, {label}", COVERAGE, runs, "size"))
    regression = results["diabetes"]
    for label in regression[0]:
        runs = [own[label] for own in regression]
        lines.append(_coverage_row(f"diabetes, {label}", 0.95, runs, "noise"))
    return "\n".join(lines)


def _coverage_row(
    label: str, wanted: float, runs: list[dict[str, float]], other: str
) -> str:
    covered = [own["coverage"] for own in runs]
    spread = f"{min(covered):.3f} to {max(covered):.3f}"
    size = _mean([own[other] for own in runs], 2)
    return f"| {label} | {wanted} | {_mean(covered)} | {spread} | {size} |"


def prior_table(results: dict[str, Any]) -> str:
    """Format what the priors of normalizations give."""
    lines = [
        "| network | prior of normalizations | log marginal likelihood "
        "| prior precision | NLL |",
        "|---" * 5 + "|",
    ]
    for name, rows in results["normalizations"].items():
        for label, own in rows.items():
            cells = [name, label, f"{own['evidence']:.0f}"]
            cells += [f"{own['prior_precision']:.2f}", f"{own['nll']:.4f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def grid_table(results: dict[str, Any]) -> str:
    """Format times and choices of grid searches."""
    lines = ["| search | prior precision | processor time s |", "|---|---|---|"]
    for label, own in results["grids"].items():
        lines.append(f"| {label} | {own['choice']:.2f} | {own['seconds']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Run the study, and write tables and numbers."""
    parser = study_parser(__doc__, STUDY)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--few", type=int, default=300, help="images of large networks")
    parser.add_argument("--networks", nargs="+", default=NORMALIZED)
    settings = parse(parser)
    if settings.quick:
        settings.images, settings.few, settings.networks = 100, 50, NORMALIZED[:1]
    warnings.simplefilter("ignore")
    progress = Progress(settings, STUDY)
    splits = range(1 if settings.quick else NUM_SPLITS)
    results = {
        "conformal": {
            f"{dataset}, {name}": [
                progress.run(
                    f"conformal {dataset} {split}",
                    partial(conformal_coverage, dataset, name, settings, split),
                )
                for split in range(settings.seeds)
            ]
            for dataset, name in CONFORMAL[: 1 if settings.quick else None]
        },
        "diabetes": [
            progress.run(f"diabetes {k}", partial(interval_coverage, k)) for k in splits
        ],
        "grids": progress.run("grids", partial(of_grids, settings)),
        "normalizations": {
            name: progress.run(f"prior {name}", partial(of_priors, name, settings))
            for name in settings.networks
        },
    }
    recorded = {"budget": BUDGET, "images": settings.images, "few": settings.few}
    write_report(settings.out, STUDY, recorded, results, table(results))
    for name, own in (("priors", prior_table), ("grids", grid_table)):
        (settings.out / f"{STUDY}_{name}.md").write_text(own(results) + "\n")
    progress.clear()


if __name__ == "__main__":
    main()
