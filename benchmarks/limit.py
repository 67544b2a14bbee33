"""How far fits and predictions are from the price of their passes.

The limit of a fit is the forward passes over its pool, and one forward pass over its
budget with a backward pass for each class but one, as many as the curvature has
columns; that of predictions is one forward pass with a backward pass for each class.
Limits and times are measured in turns, in one run, on one thread, as processor time;
the fastest of the repeats counts. Where passes take little, a fit is compared to them
and one eigendecomposition of each factor, too.

    python benchmarks/limit.py --data-root DATA
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from statistics import mean, stdev

import torch
from shared.closeness import DATASET, MAGNITUDES
from shared.command_line import parse, study_parser
from shared.fits import fit
from shared.internals import POOL_FACTOR, pool_positions
from shared.passes import OF_FIT, backward, fastest, forward
from shared.predictions import nlls
from shared.problems import Problem
from shared.reports import write_report
from torch import Tensor

from laplace_debiased import EigenbasisMatrix

STUDY = Path(__file__).stem
NETWORKS = ("MLP", "all-convolutional", "ResNet", "ViT-Little")
ABLATED = ("all-convolutional", "ResNet")
IMAGES, PRIORS = (128, 1), (1.0, 10.0, 100.0)


def measure(name: str, settings: argparse.Namespace) -> dict:
    """Time fits and predictions of a network, and their limits.

    Args:
        name: The network.
        settings: The command line.

    Returns:
        Seconds.
    """
    problem = Problem.load(name, DATASET, settings.data_root, settings.quick)
    images, budget = problem.train.tensors[0], settings.budget

    def passes() -> None:
        forward(problem, images[: POOL_FACTOR * budget])
        backward(problem, images[:budget], OF_FIT)

    fits = {
        magnitudes: lambda m=magnitudes: fit(problem, budget=budget, magnitudes=m)
        for magnitudes in MAGNITUDES
    }
    la, _ = fit(problem, budget=budget)
    matrices = decomposed(la.H)

    def decompositions() -> None:
        for matrix in matrices:
            torch.linalg.eigh(matrix)

    fits["decompositions"] = decompositions
    result: dict = {"fit": fastest(settings.repeats, limit=passes, **fits)}
    for count in IMAGES:
        some = problem.inputs[:count]
        result[f"predict {count}"] = fastest(
            settings.repeats * (10 if count == 1 else 2),
            limit=lambda some=some: backward(problem, some),
            ours=lambda some=some: la(some),
        )
    if name in ABLATED:
        result["ablation"] = ablation(problem, settings)
    return result


def decomposed(curvature: EigenbasisMatrix) -> list[Tensor]:
    """Return symmetric matrices of the sizes of all factors, one for each."""
    bases = {
        id(own): own
        for vectors in curvature.eigenvectors
        for own in vectors
        if own.ndim
    }
    squares = [own for own in bases.values() if own.ndim == 2]
    return [own * torch.logspace(0, -6, len(own)) @ own.T for own in squares]


def ablation(problem: Problem, settings: argparse.Namespace) -> dict[str, list[float]]:
    """Compare input covariances of few positions with those of all.

    Args:
        problem: Network and data.
        settings: The command line.

    Returns:
        Excess of the test NLL over that with all positions, in percent, of each seed,
        by the prior precision.
    """
    excess: dict[str, list[float]] = {f"{prior:g}": [] for prior in PRIORS}
    for seed in range(settings.seeds):
        few, _ = fit(problem, budget=settings.budget, seed=seed)
        with pool_positions(None):
            whole, _ = fit(problem, budget=settings.budget, seed=seed)
        pairs = zip(*nlls(problem, [few.H, whole.H], PRIORS), strict=True)
        for values, (own, other) in zip(excess.values(), pairs, strict=True):
            values.append(100 * (own / other - 1))
    return excess


def table(results: dict) -> str:
    """Format times, their limits and the ablation as Markdown tables."""
    lines = [
        "| network | fit: limit, s | `kfac`, s | ratio | `ggn`, s | ratio "
        "| one `eigh` each, s | `kfac` over both "
        "| 128 images: limit, ms | ours, ms | ratio | 1 image: limit, ms | ours, ms "
        "| ratio |",
        "|---" * 14 + "|",
    ]
    for name, result in results.items():
        own = result["fit"]
        cells = [f"{own['limit']:.2f}"]
        cells += [f"{own[m]:.2f} | {own[m] / own['limit']:.1f}" for m in MAGNITUDES]
        both = own["limit"] + own["decompositions"]
        cells.append(f"{own['decompositions']:.2f} | {own['kfac'] / both:.1f}")
        for count in IMAGES:
            limit, ours = (1e3 * s for s in result[f"predict {count}"].values())
            cells.append(f"{limit:.1f} | {ours:.1f} | {ours / limit:.1f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    priors = " | ".join(f"prior precision {prior:g}, %" for prior in PRIORS)
    lines += ["", f"| few positions against all | {priors} |", "|---" * 4 + "|"]
    for name, result in results.items():
        if "ablation" in result:
            own = [spread(values) for values in result["ablation"].values()]
            lines.append(f"| {name} | {' | '.join(own)} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Format mean and standard deviation over seeds."""
    deviation = stdev(values) if len(values) > 1 else 0.0
    return f"{mean(values):+.2f} ± {deviation:.2f}"


def main() -> None:
    """Measure all networks, and write table and numbers."""
    parser = study_parser(__doc__, STUDY)
    parser.add_argument("--budget", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--networks", nargs="*", default=NETWORKS, help="also: ResNet-18"
    )
    settings = parse(parser)
    if settings.quick:
        settings.networks, settings.repeats = ["MLP"], 1
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results = {name: measure(name, settings) for name in settings.networks}
    recorded = {
        "dataset": DATASET,
        "budget": settings.budget,
        "seeds": settings.seeds,
        "repeats": settings.repeats,
    }
    write_report(settings.out, STUDY, recorded, results, table(results))


if __name__ == "__main__":
    main()
