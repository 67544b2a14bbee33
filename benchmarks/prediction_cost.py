"""Time and peak memory of GLM predictions, against laplace-torch's Jacobians.

Each case runs in a process of its own, whose peak memory the operating system counts.

    python benchmarks/prediction_cost.py --out benchmarks/results
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
from common import RESULTS, conv_net, peak_megabytes, write_report
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import Laplace

STRUCTURES = {"KronLaplace": "kron", "debiased": "kron_debiased"}
CASES = [
    ("conv net", "KronLaplace", 32),
    ("conv net", "debiased", 32),
    ("conv net", "debiased", 128),
    ("conv net", "debiased", 1000),
    ("last layer", "KronLaplace", 64),
    ("last layer", "debiased", 64),
]
CLASSES, FEATURES = 1000, 2048
_FIT_POINTS = 64


def fitted(network: str, structure: str) -> tuple[object, torch.Tensor]:
    """Fit a posterior, and draw images to predict.

    Args:
        network: ``"conv net"`` (all weights, 10 classes) or ``"last layer"`` (1,000
            classes, 2,048 features).
        structure: The Hessian structure.

    Returns:
        The posterior and 1,000 inputs.
    """
    if network == "conv net":
        model, X = conv_net(), torch.randn(1000, 1, 28, 28)
        y, subset, options = torch.randint(10, (1000,)), "all", {}
    else:
        model = nn.Sequential(nn.Flatten(), nn.Identity(), nn.Linear(FEATURES, CLASSES))
        X = torch.randn(1000, FEATURES)
        y, subset = torch.randint(CLASSES, (1000,)), "last_layer"
        # the exact Fisher would cost 1,000 backward passes
        options = {"backend_kwargs": {"stochastic": True}}
    la = Laplace(model, "classification", subset, structure, **options)
    train = TensorDataset(X[:_FIT_POINTS], y[:_FIT_POINTS])
    la.fit(DataLoader(train, _FIT_POINTS))
    return la, X


def run_case(network: str, structure: str, images: int, repeats: int) -> dict:
    """Predict in this process, with the covariance of all outputs.

    Args:
        network: See :func:`fitted`.
        structure: Name in ``STRUCTURES``.
        images: Number of images in one prediction.
        repeats: Number of predictions; the fastest counts.

    Returns:
        Seconds, peak memory before and after, or the error.
    """
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    la, X = fitted(network, STRUCTURES[structure])
    before, seconds = peak_megabytes(), []
    for _ in range(repeats):
        start = time.perf_counter()
        try:
            la._glm_predictive_distribution(X[:images])
        except (RuntimeError, MemoryError) as error:
            return {"error": _reason(error)}
        seconds.append(time.perf_counter() - start)
    return {"seconds": min(seconds), "before_mb": before, "peak_mb": peak_megabytes()}


def _reason(error: Exception) -> str:
    """Shorten what the allocator says."""
    wanted = re.search(r"allocate (\d+) bytes", str(error))
    if wanted is None:
        return str(error).splitlines()[0]
    return f"needs {int(wanted[1]) / 1e6:.0f}"


def table(rows: list[dict]) -> str:
    """Format the cases as a Markdown table; ratios are to the same images' peer."""
    lines = [
        "| network | posterior | images | seconds | times faster | peak memory (MB) "
        "| times less |",
        "|---" * 7 + "|",
    ]
    for row in rows:
        name = f"| {row['network']} | {row['posterior']} | {row['images']} "
        if "seconds" not in row:
            lines.append(f"{name}| fails | | {row['error']} | |")
            continue
        peer = next((r for r in rows if _is_peer(r, row)), None)
        ratios = ["", ""]
        if peer is not None:
            ratios = [f"{peer[key] / row[key]:.1f}" for key in ("seconds", "peak_mb")]
        lines.append(
            f"{name}| {row['seconds']:.2f} | {ratios[0]} | {row['peak_mb']:.0f} "
            f"| {ratios[1]} |"
        )
    return "\n".join(lines)


def _is_peer(other: dict, row: dict) -> bool:
    """Whether another row is laplace-torch's of the same prediction."""
    same = all(other[key] == row[key] for key in ("network", "images"))
    return same and other["posterior"] == "KronLaplace" and "seconds" in other


def main() -> None:
    """Run all cases, each in its own process, and write their results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--case", type=int, help="run one case in this process")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.case is not None:
        print(json.dumps(run_case(*CASES[arguments.case], arguments.repeats)))
        return

    rows = []
    for index, (network, posterior, images) in enumerate(CASES):
        command = [sys.executable, "-W", "ignore", __file__, "--case", str(index)]
        command += ["--repeats", str(arguments.repeats)]
        output = subprocess.run(command, capture_output=True, text=True)
        lines = output.stdout.strip().splitlines()
        result = (
            json.loads(lines[-1])
            if output.returncode == 0
            else {"error": f"the process ended with code {output.returncode}"}
        )
        case = {"network": network, "posterior": posterior, "images": images}
        rows.append(case | result)
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    settings = {"repeats": arguments.repeats}
    write_report(arguments.out, "prediction_cost", settings, rows, table(rows))


if __name__ == "__main__":
    main()
