"""Variances of many outputs by samples in forward mode, beside backward passes.

Two questions. What do predictions of all weights of a ResNet-50 cost, with 1,000
classes and 8 images of 224 x 224? Its weights and inputs are random, since time and
memory depend on shapes alone; the price of a backward pass for each class is
extrapolated from that of a few classes. And how good are the likelihoods? A trained
network with 100 classes (pairs of MNIST's digits) predicts test images by samples, with
several seeds, and by exact variances, at the prior precision that the marginal
likelihood chooses, and at wider posteriors.

    python benchmarks/predictions_by_samples.py --data-root DATA
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
from shared.data import PAIRS, problem_data
from shared.internals import nll, variances_of_first_outputs
from shared.processes import in_own_process, peak_megabytes, reset_peak
from shared.reports import write_report
from shared.tables import mean_and_std
from shared.training import trained
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchvision.models import resnet18, resnet50

from laplace_debiased import KronDebiasedLaplace

STUDY = Path(__file__).stem
SAMPLES = (16, 32, 64, 128, 256)
WIDER = (1, 10)
FIT, IMAGES, CLASSES, FEW = 8, 8, 1000, (1, 2)
BUDGET, RANK, TEST = 128, 10, 500
THREADS, MINUTES = 2, 40


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


def costs(quick: bool) -> dict[str, Any]:
    """Measure predictions of a ResNet in this process.

    Args:
        quick: Whether to take a small one.

    Returns:
        Costs of fit and prediction, and of exact variances of few classes.
    """
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    model = resnet18(num_classes=300) if quick else resnet50(num_classes=CLASSES)
    size = 32 if quick else 224
    X, y = torch.randn(FIT + IMAGES, 3, size, size), torch.randint(300, (FIT,))
    la = KronDebiasedLaplace(
        model.eval(), "classification", estimator="two_batch", fisher_rank=1
    )
    loader = DataLoader(TensorDataset(X[:FIT], y), FIT)
    found = {"fit": timed(lambda: la.fit(loader))}
    # the scale of the precision is that of the prior
    la.prior_precision = 1e4
    # the posterior alone, without what fits leave behind
    found["prediction"] = timed(lambda: la(X[FIT:]))
    for count in FEW:
        exact = timed(
            lambda count=count: variances_of_first_outputs(la, X[FIT:], count)
        )
        found[f"exact variances of {count}"] = exact
    return found


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
    data = problem_data(PAIRS, settings.data_root)
    model = trained("pair-classifier", PAIRS, settings.data_root)
    samples = list(SAMPLES[:1] if settings.quick else SAMPLES)
    points = Subset(data.train, range(500 if settings.quick else len(data.train)))
    la = KronDebiasedLaplace(
        model,
        "classification",
        budget=16 if settings.quick else BUDGET,
        fisher_rank=RANK,
    )
    la.fit(DataLoader(points, 64))
    la.optimize_prior_precision()
    chosen, rows = la.prior_precision.item(), []
    count = 20 if settings.quick else TEST
    X, y = data.test_inputs[:count], data.test_labels[:count]
    for factor in WIDER:
        la.prior_precision = chosen / factor
        rows.append(differences(la, X, y, settings.seeds, samples))
        print(table_of_differences(rows[-1:]), flush=True)
    options = ["--costs", *["--quick"] * settings.quick]
    results = {"costs": in_own_process(__file__, options, 60 * MINUTES), "nll": rows}
    given = {"seeds": settings.seeds, "samples": samples, "test": count}
    write_report(settings.out, STUDY, given, results, table(results))


if __name__ == "__main__":
    main()
