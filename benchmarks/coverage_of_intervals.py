"""How often intervals for the curvature's scale hold that of all data.

A small network is trained on simulated inputs of Gaussian or lognormal scale. Each row
counts, over draws of the points, how often the 95 % interval of a layer's trace holds
the trace of all data.

    python benchmarks/coverage_of_intervals.py
"""

from __future__ import annotations

import argparse
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import torch
from shared.command_line import add_out, parse
from shared.reports import write_report
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from laplace_debiased import KronDebiasedLaplace
from laplace_debiased.comparison.training import Recipe, train

STUDY = Path(__file__).stem
NUM_DATA, NUM_INPUTS, NUM_CLASSES = 20_000, 12, 4
SCALES = {"Gaussian": 0.0, "lognormal 0.5": 0.5, "lognormal 1": 1.0}
CHOICES = list(
    product(("kfac", "ggn"), ("uniform", "curvature"), ("two_batch", "cross_fit"))
)


def simulated(spread: float) -> TensorDataset:
    """Draw inputs, whose lengths have a logarithm of some spread, and noisy classes."""
    generator = Generator().manual_seed(1)
    X = torch.randn(NUM_DATA, NUM_INPUTS, generator=generator)
    X *= (spread * torch.randn(NUM_DATA, 1, generator=generator)).exp()
    noise = 0.5 * torch.randn(NUM_DATA, NUM_CLASSES, generator=generator)
    return TensorDataset(X, (X[:, :NUM_CLASSES].sin() + noise).argmax(1))


def network() -> nn.Module:
    """Build a network of three layers."""
    return nn.Sequential(
        nn.Linear(NUM_INPUTS, 24),
        nn.Tanh(),
        nn.Linear(24, 16),
        nn.ReLU(),
        nn.Linear(16, NUM_CLASSES),
    )


def fitted(
    model: nn.Module, loader: DataLoader, choice: tuple[str, str, str], **options: Any
) -> KronDebiasedLaplace:
    """Fit a posterior."""
    magnitudes, sampling, estimator = choice
    la = KronDebiasedLaplace(
        model,
        "classification",
        magnitudes=magnitudes,
        sampling=sampling,
        estimator=estimator,
        **options,
    )
    la.fit(loader)
    return la


def traces(la: KronDebiasedLaplace) -> Tensor:
    """Centres of the intervals ``[layers]``."""
    ends = torch.tensor(list(la.curvature_intervals().values()), dtype=torch.float64)
    return ends.prod(1).sqrt()


def run(
    spread: float, num_draws: int, budget: int, progress: tqdm
) -> dict[str, dict[str, list[float]]]:
    """Count how often intervals hold the truth, for all choices of a fit."""
    data = simulated(spread)
    loader = DataLoader(data, batch_size=2000)
    model = train(Recipe(network, 10, 1e-2, batch_size=256), data, seed=0).model
    results = {}
    for choice in CHOICES:
        truth = traces(fitted(model, loader, (*choice[:2], "cross_fit")))
        holds, ratios = [], []
        for seed in range(num_draws):
            la = fitted(model, loader, choice, budget=budget, seed=seed)
            ends = torch.tensor(list(la.curvature_intervals().values()))
            holds.append((ends[:, 0] <= truth) & (truth <= ends[:, 1]))
            ratios.append(traces(la) / truth)
            progress.update()
        results[", ".join(choice)] = {
            "coverage": torch.stack(holds).double().mean(0).tolist(),
            "spread": torch.stack(ratios).std(0).tolist(),
        }
    return results


def table(results: dict[str, dict[str, dict[str, list[float]]]]) -> str:
    """Lay out the smallest and the largest coverage of the layers, in percent."""
    lines = [
        f"| magnitudes, draw, estimator | {' | '.join(results)} |",
        "|---|" + "---|" * len(results),
    ]
    for row in next(iter(results.values())):
        cells = [
            f"{100 * min(own[row]['coverage']):.0f} to "
            f"{100 * max(own[row]['coverage']):.0f}"
            for own in results.values()
        ]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run all scales of the inputs, and write table and numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--budget", type=int, default=128)
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    add_out(parser, STUDY)
    settings = parse(parser)
    if settings.quick:
        settings.draws = 2
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tqdm(total=len(SCALES) * len(CHOICES) * settings.draws) as progress:
        results = {
            name: run(spread, settings.draws, settings.budget, progress)
            for name, spread in SCALES.items()
        }
    recorded = {"draws": settings.draws, "budget": settings.budget}
    write_report(settings.out, STUDY, recorded, results, table(results))


if __name__ == "__main__":
    main()
