"""Cost of a debiased fit and of its predictions, against laplace-torch on equal points.

All fits see the same points; a debiased fit splits them into directions and magnitudes.
Times are taken in turn in one process, and compared pair by pair.

    python benchmarks/fit_cost.py --out DIR
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from laplace.curvature import AsdlGGN
from laplace.curvature.curvlinops import CurvlinopsGGN
from shared.command_line import add_out
from shared.networks import conv_net_for_timing
from shared.reports import write_report
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import Laplace

STUDY = Path(__file__).stem
BACKENDS = {"CurvlinopsGGN": CurvlinopsGGN, "AsdlGGN": AsdlGGN}


def seconds(function: Callable[[], object]) -> float:
    """Measure the wall time of a call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def ratios(
    candidates: dict[str, Callable[[], object]], reference: str, repeats: int
) -> dict[str, dict[str, float]]:
    """Run the candidates in turn and compare each with the reference of its round.

    Args:
        candidates: What to time, by name.
        reference: The name to compare with.
        repeats: Number of rounds, after one that does not count.

    Returns:
        For each name the median seconds, and median, minimum and maximum of the ratio.
    """
    rounds = [
        {name: seconds(function) for name, function in candidates.items()}
        for _ in range(repeats + 1)
    ][1:]
    result = {}
    for name in candidates:
        own = [times[name] / times[reference] for times in rounds]
        result[name] = {
            "seconds": statistics.median(times[name] for times in rounds),
            "ratio": statistics.median(own),
            "ratio_min": min(own),
            "ratio_max": max(own),
        }
    return result


def measure(points: int, images: int, repeats: int) -> dict:
    """Measure fits on a number of points, and predictions on a number of images."""
    torch.manual_seed(0)
    model = conv_net_for_timing()
    X, y = torch.randn(points, 1, 28, 28), torch.randint(10, (points,))
    loader = DataLoader(TensorDataset(X, y), batch_size=128)

    def laplace(structure: str, **kwargs):
        return Laplace(model, "classification", "all", structure, **kwargs)

    results = {"parameters": sum(p.numel() for p in model.parameters())}
    for name, backend in BACKENDS.items():
        approximations = {
            "KronLaplace": laplace("kron", backend=backend),
            "debiased kfac": laplace("kron_debiased", backend=backend),
        }
        if backend is CurvlinopsGGN:
            approximations["debiased ggn"] = laplace("kron_debiased", magnitudes="ggn")
        results[f"fit, {name}"] = ratios(
            {k: lambda la=la: la.fit(loader) for k, la in approximations.items()},
            "KronLaplace",
            repeats,
        )
        if backend is CurvlinopsGGN:
            results[f"predict {images} images"] = ratios(
                {k: lambda la=la: la(X[:images]) for k, la in approximations.items()},
                "KronLaplace",
                repeats,
            )
    return results


def table(results: dict) -> str:
    """Format the results as a Markdown table."""
    lines = [
        "| what | approximation | seconds | ratio to KronLaplace (min to max) |",
        "|---|---|---|---|",
    ]
    for what, rows in results.items():
        if not isinstance(rows, dict):
            continue
        for name, row in rows.items():
            lines.append(
                f"| {what} | {name} | {row['seconds']:.2f} | {row['ratio']:.2f} "
                f"({row['ratio_min']:.2f} to {row['ratio_max']:.2f}) |"
            )
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark and write its results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=512)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    add_out(parser, STUDY)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")

    results = measure(arguments.points, arguments.images, arguments.repeats)
    settings = {k: v for k, v in vars(arguments).items() if k != "out"}
    write_report(arguments.out, STUDY, settings, results, table(results))


if __name__ == "__main__":
    main()
