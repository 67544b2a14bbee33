"""Time and peak memory of each stage on full-size networks, on random images.

The cost depends on shapes alone, so neither weights nor images are trained or real.
Each case runs in a process of its own; peak memory is that of the process so far.

    python benchmarks/network_cost.py --out benchmarks/results
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from common import RESULTS, write_report
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18, resnet50, vit_b_16

from laplace_debiased import Laplace


@dataclass(frozen=True)
class Case:
    """A network, what is fitted, and how much is predicted.

    Args:
        network: Name in ``NETWORKS``.
        subset: ``"all"`` or ``"last_layer"``.
        size: Height and width of an image.
        classes: Number of classes.
        budget: Number of points that the posterior is fitted to.
        batch_size: Number of points in a batch.
        predicted: Number of images in one prediction.
        magnitudes: The magnitudes.
        estimator: The estimator: with large layers, the time is that of their
            eigendecompositions, of which ``"cross_fit"`` takes three.
    """

    network: str
    subset: str
    size: int
    classes: int
    budget: int
    batch_size: int
    predicted: int
    magnitudes: str = "kfac"
    estimator: str = "two_batch"


def cifar_resnet18(num_classes: int) -> nn.Module:
    """Build ResNet-18 with the first layers that are usual for 32×32 images."""
    model = resnet18(num_classes=num_classes)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


NETWORKS = {
    "ResNet-18": cifar_resnet18,
    "ResNet-50": resnet50,
    "ViT-B/16": vit_b_16,
}
CASES = [
    Case("ResNet-18", "all", 32, 10, 256, 32, 64),
    Case("ResNet-18", "all", 32, 10, 256, 32, 64, estimator="cross_fit"),
    Case("ResNet-18", "all", 32, 10, 256, 32, 64, "ggn"),
    Case("ResNet-50", "last_layer", 224, 1000, 32, 16, 8),
    Case("ResNet-50", "all", 224, 10, 32, 4, 4),
    Case("ViT-B/16", "last_layer", 224, 1000, 32, 16, 8),
    Case("ViT-B/16", "all", 224, 10, 32, 4, 4),
]


def run_case(case: Case) -> dict:
    """Run all stages in this process.

    Args:
        case: What to run.

    Returns:
        Number of fitted parameters, and for each stage its seconds and the peak memory
        so far in megabytes.
    """
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model = NETWORKS[case.network](num_classes=case.classes)
    X = torch.randn(case.budget, 3, case.size, case.size)
    y = torch.randint(case.classes, (case.budget,))
    train = DataLoader(TensorDataset(X, y), case.batch_size)
    la = Laplace(
        model,
        "classification",
        case.subset,
        "kron_debiased",
        magnitudes=case.magnitudes,
        estimator=case.estimator,
        budget=case.budget,
    )
    images = torch.randn(case.predicted, 3, case.size, case.size)
    stages: dict[str, Callable] = {
        "network alone": lambda: model.eval()(images),
        "fit": lambda: la.fit(train),
        "tune the prior": lambda: la.optimize_prior_precision(),
        "predict": lambda: la(images),
    }
    result: dict = {"stages": {}}
    for name, stage in stages.items():
        start = time.perf_counter()
        with torch.set_grad_enabled(name != "network alone"):
            stage()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        seconds = time.perf_counter() - start
        result["stages"][name] = {"seconds": seconds, "peak_mb": peak}
    return result | {"n_params": la.n_params}


def table(rows: list[dict]) -> str:
    """Format the cases as a Markdown table."""
    lines = [
        "| network | fitted | parameters | magnitudes | estimator | points | fit s "
        "| fit GB | prior s | images | predict s | predict GB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = f"{row['network']}, {row['size']}², {row['classes']} classes"
        if "error" in row:
            lines.append(f"| {name} | {row['subset']} | {row['error']} ||||||||||")
            continue
        fit, tune, predict = (
            row["stages"][stage] for stage in ("fit", "tune the prior", "predict")
        )
        lines.append(
            f"| {name} | {row['subset'].replace('_', ' ')} "
            f"| {row['n_params'] / 1e6:.1f}M | {row['magnitudes']} "
            f"| {row['estimator'].replace('_', '-')} | {row['budget']} "
            f"| {fit['seconds']:.1f} | {fit['peak_mb'] / 1024:.1f} "
            f"| {tune['seconds']:.1f} | {row['predicted']} "
            f"| {predict['seconds']:.1f} | {predict['peak_mb'] / 1024:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run all cases, each in its own process, and write their results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", type=int, help="run one case in this process")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.case is not None:
        print(json.dumps(run_case(CASES[arguments.case])))
        return

    rows = []
    for index, case in enumerate(CASES):
        command = [sys.executable, "-W", "ignore", __file__, "--case", str(index)]
        output = subprocess.run(command, capture_output=True, text=True)
        result = (
            json.loads(output.stdout.strip().splitlines()[-1])
            if output.returncode == 0
            else {"error": f"the process ended with code {output.returncode}"}
        )
        rows.append(asdict(case) | result)
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    write_report(arguments.out, "network_cost", {}, rows, table(rows))


if __name__ == "__main__":
    main()
