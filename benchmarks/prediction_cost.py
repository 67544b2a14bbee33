"""Time and peak memory of GLM predictions, against laplace-torch's Jacobians.

Each case runs in a process of its own, whose peak memory Linux counts. The memory of
laplace-torch's Jacobians grows with the square of the images that are predicted at
once, so that it is measured at several numbers, and ours is compared to the fastest.

    python benchmarks/prediction_cost.py
"""

from __future__ import annotations

import argparse
import json
import re
import time
import warnings
from pathlib import Path

import torch
from shared.command_line import add_out
from shared.networks import conv_net_for_timing
from shared.processes import in_own_process, peak_megabytes, reset_peak
from shared.reports import write_report
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import Laplace

STUDY = Path(__file__).stem
STRUCTURES = {"KronLaplace": "kron", "debiased": "kron_debiased"}
# network, posterior, images, and how many of them at once
CASES = [
    ("conv net", "KronLaplace", 32, 32),
    ("conv net", "KronLaplace", 32, 16),
    ("conv net", "KronLaplace", 32, 8),
    ("conv net", "KronLaplace", 32, 4),
    ("conv net", "KronLaplace", 32, 2),
    ("conv net", "KronLaplace", 32, 1),
    ("conv net", "debiased", 32, 32),
    ("conv net", "debiased", 128, 128),
    ("conv net", "debiased", 1000, 1000),
    ("last layer", "KronLaplace", 64, 64),
    ("last layer", "debiased", 64, 64),
]
CLASSES, FEATURES = 1000, 2048
_FIT_POINTS = 64
MINUTES = 10


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
        model, X = conv_net_for_timing(), torch.randn(1000, 1, 28, 28)
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


def run_case(
    network: str, structure: str, images: int, at_once: int, repeats: int
) -> dict:
    """Predict in this process, with the covariance of all outputs.

    Args:
        network: See :func:`fitted`.
        structure: Name in ``STRUCTURES``.
        images: Number of images.
        at_once: Number of images in a prediction.
        repeats: Number of times; the fastest counts.

    Returns:
        Seconds, memory before and peak memory, or the error.
    """
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    la, X = fitted(network, STRUCTURES[structure])
    reset_peak()
    before, seconds = peak_megabytes(), []
    for _ in range(repeats):
        start = time.perf_counter()
        try:
            for part in X[:images].split(at_once):
                # laplace-torch's, which both posteriors have
                la._glm_predictive_distribution(part)
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
    """Format the cases as a Markdown table; ratios are to the fastest peer."""
    lines = [
        "| network | posterior | images | at once | seconds | times faster "
        "| memory above the model's (MB) |",
        "|---" * 7 + "|",
    ]
    for row in rows:
        case = " | ".join(
            str(row[key]) for key in ("network", "posterior", "images", "at_once")
        )
        if "seconds" not in row:
            lines.append(f"| {case} | fails | | {row['error']} |")
            continue
        peers = [other["seconds"] for other in rows if _is_peer(other, row)]
        ratio = f"{min(peers) / row['seconds']:.1f}" if peers else ""
        memory = row["peak_mb"] - row["before_mb"]
        lines.append(f"| {case} | {row['seconds']:.2f} | {ratio} | {memory:.0f} |")
    return "\n".join(lines)


def _is_peer(other: dict, row: dict) -> bool:
    """Whether another row is laplace-torch's prediction of the same images."""
    same = all(other[key] == row[key] for key in ("network", "images"))
    return same and other["posterior"] == "KronLaplace" and "seconds" in other


def main() -> None:
    """Run all cases, each in its own process, and write their results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--case", type=int, help="run one case in this process")
    add_out(parser, STUDY)
    arguments = parser.parse_args()
    if arguments.case is not None:
        print(json.dumps(run_case(*CASES[arguments.case], arguments.repeats)))
        return

    rows = []
    for index, case in enumerate(CASES):
        options = ["--case", str(index), "--repeats", str(arguments.repeats)]
        result = in_own_process(__file__, options, 60 * MINUTES)
        names = ("network", "posterior", "images", "at_once")
        rows.append(dict(zip(names, case, strict=True)) | result)
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    settings = {"repeats": arguments.repeats}
    write_report(arguments.out, STUDY, settings, rows, table(rows))


if __name__ == "__main__":
    main()
