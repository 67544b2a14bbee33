"""Variances of many outputs by samples in forward mode, beside backward passes.

Two questions. What do predictions of all weights of a ResNet-50 cost, with 1,000
classes and 8 images of 224 x 224? Weights, inputs and posterior are random, since time
and memory depend on shapes alone; the price of a backward pass for each class is
extrapolated from those of one and two. And how good are the likelihoods? A small
convolutional network is trained to tell 100 random images under noise. Its posterior
predicts test images by samples, with several seeds, and by exact variances, at the
prior precision that the marginal likelihood chooses, and at a tenth of it.

    python benchmarks/predictions_by_samples.py
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shared.command_line import parse, study_parser
from shared.internals import (
    nll,
    sampled_variances,
    variances_of_first_outputs,
)
from shared.processes import in_own_process, peak_megabytes, reset_peak
from shared.reports import write_report
from shared.tables import mean_and_std
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet50, shufflenet_v2_x0_5

from laplace_debiased import EigenbasisMatrix, KronDebiasedLaplace

STUDY = Path(__file__).stem
SAMPLES, DEFAULT = (16, 32, 64, 128, 256), 64
WIDER = (1, 10)
IMAGES, CLASSES, FEW = 8, 1000, (1, 2)
BUDGET, RANK, EPOCHS = 64, 10, 12
PATTERNS, SIZE, NOISE, TRAIN, TEST = 100, 8, 1.3, 3000, 1000
THREADS, MINUTES = 2, 60


def timed(measured: Callable[[], Any]) -> dict[str, float]:
    """Measure a call.

    Args:
        measured: The call.

    Returns:
        Its seconds, those of the processor, and its peak memory.
    """
    reset_peak()
    start, own = time.perf_counter(), time.process_time()
    measured()
    return {
        "seconds": time.perf_counter() - start,
        "processor_seconds": time.process_time() - own,
        "peak_mb": peak_megabytes(),
    }


def random_posterior(model: nn.Module) -> EigenbasisMatrix:
    """Make a posterior precision of a network's parameters, with random eigenbases."""
    vectors, values = [], []
    for param in model.parameters():
        sizes = param.flatten(1).shape if param.ndim > 1 else param.shape
        normal = [torch.randn(size, size) for size in sizes]
        # columns lie one after the other, as those of eigenvectors do
        vectors.append([torch.linalg.qr(own)[0].T.contiguous().T for own in normal])
        values.append([1e4 * torch.rand(*sizes)])
    return EigenbasisMatrix(vectors, values) + torch.tensor(100.0)


def costs(quick: bool) -> dict[str, Any]:
    """Measure predictions of a ResNet in this process.

    Args:
        quick: Whether to take a small one.

    Returns:
        Costs of a prediction, and of exact variances of few classes.
    """
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    model = (shufflenet_v2_x0_5 if quick else resnet50)(num_classes=CLASSES).eval()
    posterior, size = random_posterior(model), 32 if quick else 224
    X, count = torch.randn(IMAGES, 3, size, size), 2 if quick else DEFAULT
    given = model, posterior, X
    found = {f"{count} samples": timed(lambda: sampled_variances(*given, count))}
    for few in FEW:
        measured = timed(lambda few=few: variances_of_first_outputs(*given, few))
        found[f"exact variances of {few}"] = measured
    return found


def noisy_patterns(patterns: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Draw images of random patterns under noise, and their classes."""
    y = torch.randint(len(patterns), (count,))
    X = patterns[y]
    return X + NOISE * torch.randn_like(X), y


def trained_network(X: Tensor, y: Tensor, epochs: int) -> nn.Module:
    """Train a convolutional network.

    Args:
        X: Images.
        y: Their classes.
        epochs: Number of passes over them.

    Returns:
        The network.
    """
    network = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * SIZE**2, 64),
        nn.ReLU(),
        nn.Linear(64, PATTERNS),
    )
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(X)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(X[rows]), y[rows]).backward()
            optimizer.step()
    return network.eval()


def differences(
    la: KronDebiasedLaplace, X: Tensor, y: Tensor, seeds: int, samples: list[int]
) -> dict[str, Any]:
    """Compare predictions by samples with exact ones.

    Args:
        la: The posterior.
        X: Test images.
        y: Their classes.
        seeds: Number of seeds.
        samples: Numbers of samples.

    Returns:
        The exact NLL, and by number of samples and seed its relative difference, and
        the relative error of the variances.
    """
    settings, la.forward_samples = la.settings, None
    start = time.process_time()
    exact = la.uncertainty(X)
    result = {
        "prior_precision": la.prior_precision.item(),
        "nll": nll(exact.probabilities, y),
        "nll_of_network": nll(exact.mean.softmax(1), y),
        "seconds": time.process_time() - start,
    }
    for count in samples:
        la.forward_samples, runs = count, []
        for seed in range(seeds):
            la.settings = replace(settings, seed=seed)
            start = time.process_time()
            found = la.uncertainty(X)
            seconds = time.process_time() - start
            errors = found.functional_variance / exact.functional_variance - 1
            own = {
                "nll": nll(found.probabilities, y) / result["nll"] - 1,
                "variance": errors.square().mean().sqrt().item(),
                "seconds": seconds,
            }
            runs.append(own)
        result[str(count)] = runs
    la.settings = settings
    return result


def table_of_costs(found: dict[str, dict]) -> str:
    """Format the costs as a Markdown table."""
    lines = ["| stage | seconds | processor s | peak GB |", "|---" * 4 + "|"]
    for stage, own in found.items():
        lines.append(
            f"| {stage} | {own['seconds']:.0f} | {own['processor_seconds']:.0f} "
            f"| {own['peak_mb'] / 1024:.1f} |"
        )
    few, more = (found[f"exact variances of {count}"] for count in FEW)
    slope = (more["processor_seconds"] - few["processor_seconds"]) / (FEW[1] - FEW[0])
    total = few["processor_seconds"] + slope * (CLASSES - FEW[0])
    lines.append(f"| exact variances of {CLASSES:,}, extrapolated | | {total:,.0f} | |")
    return "\n".join(lines)


def table_of_differences(rows: list[dict]) -> str:
    """Format the differences as a Markdown table."""
    lines = [
        "| prior precision | NLL of the network | exact NLL | samples "
        "| difference of the NLL % | largest % | error of a variance % |",
        "|---" * 7 + "|",
    ]
    for row in rows:
        for count in (key for key in row if key.isdigit()):
            nlls = 100 * np.array([run["nll"] for run in row[count]])
            errors = 100 * np.array([run["variance"] for run in row[count]])
            lines.append(
                f"| {row['prior_precision']:.3g} | {row['nll_of_network']:.4f} "
                f"| {row['nll']:.4f} | {count} | {mean_and_std(nlls, 2)} "
                f"| {np.abs(nlls).max():.2f} | {mean_and_std(errors, 1)} |"
            )
    return "\n".join(lines)


def table(results: dict[str, Any]) -> str:
    """Format both parts as Markdown tables."""
    parts = table_of_costs(results["costs"]), table_of_differences(results["nll"])
    return "\n\n".join(parts)


def main() -> None:
    """Measure costs and likelihoods, and write their tables."""
    parser = study_parser(__doc__, STUDY)
    parser.add_argument("--costs", action="store_true", help=argparse.SUPPRESS)
    settings = parse(parser)
    warnings.simplefilter("ignore")
    if settings.costs:
        print(json.dumps(costs(settings.quick)))
        return
    torch.manual_seed(0)
    patterns = torch.randn(PATTERNS, 1, SIZE, SIZE)
    sizes = (TRAIN // 10, TEST // 20) if settings.quick else (TRAIN, TEST)
    train, test = (noisy_patterns(patterns, count) for count in sizes)
    model = trained_network(*train, 1 if settings.quick else EPOCHS)
    samples = list(SAMPLES[:1] if settings.quick else SAMPLES)
    la = KronDebiasedLaplace(model, "classification", budget=BUDGET, fisher_rank=RANK)
    la.fit(DataLoader(TensorDataset(*train), 64))
    la.optimize_prior_precision()
    chosen, rows = la.prior_precision.item(), []
    for factor in WIDER:
        la.prior_precision = chosen / factor
        rows.append(differences(la, *test, settings.seeds, samples))
    options = ["--costs", *["--quick"] * settings.quick]
    results = {"costs": in_own_process(__file__, options, 60 * MINUTES), "nll": rows}
    given = {"seeds": settings.seeds, "samples": samples, "threads": THREADS}
    write_report(settings.out, STUDY, given, results, table(results))


if __name__ == "__main__":
    main()
