"""Time of curvatures along many directions, against curvlinops' GGN products.

The products are those of a network of 240,000 parameters; a network of a million shows
the memory that our curvatures take.

python benchmarks/directional_cost.py
"""

from __future__ import annotations

import argparse
import resource
import time
import warnings
from pathlib import Path

import torch
from common import RESULTS, conv_net, write_report
from curvlinops import GGNLinearOperator
from torch import nn

from laplace_debiased import directional_derivatives

NUM_POINTS, NUM_DIRECTIONS = 512, 100


def million_parameters() -> nn.Module:
    """Build a network of linear layers with a million parameters."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 1024),
        nn.ReLU(),
        nn.Linear(1024, 256),
        nn.ReLU(),
        nn.Linear(256, 10),
    )


def peak_megabytes() -> float:
    """Peak memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(model: nn.Module, num_products: int) -> list[dict]:
    """Time curvatures along the same directions.

    Args:
        model: The network.
        num_products: Number of curvlinops' products to time: their time grows with
            their number.

    Returns:
        Rows of the table.
    """
    torch.manual_seed(0)
    model, loss = model.eval(), nn.CrossEntropyLoss()
    params = list(model.parameters())
    data = [(torch.randn(NUM_POINTS, 1, 28, 28), torch.randint(10, (NUM_POINTS,)))]
    num_params = sum(param.numel() for param in params)
    directions = torch.randn(num_params, NUM_DIRECTIONS)
    operator = GGNLinearOperator(model, loss, params, data, check_deterministic=False)
    some = directions[:, :num_products]
    start = time.perf_counter()
    expected = (some * (operator @ some)).sum(0)
    peer = (time.perf_counter() - start) * NUM_DIRECTIONS / num_products
    case = {"parameters": num_params}
    rows = [case | {"what": "curvlinops, GGN products", "seconds": peer, "ratio": 1.0}]
    for mode in ("forward", "reverse"):
        start = time.perf_counter()
        result = directional_derivatives(
            model, loss, params, data, directions, mode=mode
        )
        seconds = time.perf_counter() - start
        error = (result.curvature[:num_products] / expected - 1).abs().max().item()
        rows.append(
            case
            | {
                "what": f"directional_derivatives, {mode}",
                "seconds": seconds,
                "ratio": peer / seconds,
                "largest_relative_difference": error,
                "peak_mb": peak_megabytes(),
            }
        )
    return rows


def table(rows: list[dict]) -> str:
    """Format the rows as a Markdown table."""
    lines = [
        "| parameters | what | seconds | times faster | peak memory so far (GB) |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        peak = f"{row['peak_mb'] / 1024:.1f}" if "peak_mb" in row else ""
        lines.append(
            f"| {row['parameters']:,} | {row['what']} | {row['seconds']:.1f} "
            f"| {row['ratio']:.1f} | {peak} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, and write table and numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--products", type=int, default=NUM_DIRECTIONS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = [
        row
        for model in (conv_net(), million_parameters())
        for row in measure(model, arguments.products)
    ]
    settings = {"points": NUM_POINTS, "directions": NUM_DIRECTIONS}
    write_report(arguments.out, "directional_cost", settings, rows, table(rows))


if __name__ == "__main__":
    main()
