"""What curvatures along many directions cost, beside curvlinops' products.

Each case runs in a process of its own, whose peak memory the operating system counts.

    python benchmarks/directional_curvature_cost.py
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from curvlinops import GGNLinearOperator
from shared.command_line import add_out
from shared.networks import conv_net_for_timing
from shared.processes import peak_megabytes
from shared.reports import write_report
from torch import Tensor, nn

from laplace_debiased import directional_derivatives

STUDY = Path(__file__).stem
NUM_POINTS, NUM_DIRECTIONS = 512, 100
PEER, BLOCKS = "curvlinops, GGN products", "curvlinops, products of ten at once"


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


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "convolutions": conv_net_for_timing,
    "linear layers": million_parameters,
}


def by_products(
    at_once: int, model: nn.Module, data: list, directions: Tensor
) -> Tensor:
    """Multiply the GGN by some directions after the others."""
    operator = GGNLinearOperator(
        model,
        nn.CrossEntropyLoss(),
        list(model.parameters()),
        data,
        check_deterministic=False,
    )
    parts = directions.split(at_once, 1)
    return torch.cat([(part * (operator @ part)).sum(0) for part in parts])


def by_ours(mode: str, model: nn.Module, data: list, directions: Tensor) -> Tensor:
    """Measure all directions at once."""
    params = list(model.parameters())
    return directional_derivatives(
        model, nn.CrossEntropyLoss(), params, data, directions, mode=mode
    ).curvature


AT_ONCE = {PEER: 1, BLOCKS: 10}
METHODS = (PEER, BLOCKS, "forward", "reverse", "auto")


def measure(network: str, method: str) -> dict:
    """Time one case in this process.

    Args:
        network: Name in ``NETWORKS``.
        method: Name in ``METHODS``.

    Returns:
        Number of parameters, seconds, peak memory before and after in megabytes, and
        the curvatures.
    """
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model = NETWORKS[network]().eval()
    num_params = sum(param.numel() for param in model.parameters())
    data = [(torch.randn(NUM_POINTS, 1, 28, 28), torch.randint(10, (NUM_POINTS,)))]
    directions = torch.randn(num_params, NUM_DIRECTIONS)
    before = peak_megabytes()
    start = time.perf_counter()
    if method in AT_ONCE:
        curvatures = by_products(AT_ONCE[method], model, data, directions)
    else:
        curvatures = by_ours(method, model, data, directions)
    return {
        "network": network,
        "method": method,
        "parameters": num_params,
        "seconds": time.perf_counter() - start,
        "before_mb": before,
        "peak_mb": peak_megabytes(),
        "curvatures": curvatures.tolist(),
    }


def apart(network: str, method: str) -> dict:
    """Run a case in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as executor:
        return executor.submit(measure, network, method).result()


def compared(rows: list[dict]) -> list[dict]:
    """Compare with the peer at its best, and curvatures with those one by one."""
    expected = torch.tensor(rows[0]["curvatures"])
    best = min(row["seconds"] for row in rows if row["method"] in AT_ONCE)
    return [
        {k: v for k, v in row.items() if k != "curvatures"}
        | {
            "ratio": best / row["seconds"],
            "difference": (torch.tensor(row["curvatures"]) / expected - 1)
            .abs()
            .max()
            .item(),
        }
        for row in rows
    ]


def table(rows: list[dict]) -> str:
    """Format the rows as a Markdown table."""
    lines = [
        "| network | parameters | curvatures by | seconds | times faster "
        "| peak memory (GB) | largest relative difference |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['network']} | {row['parameters']:,} | {row['method']} "
        f"| {row['seconds']:.1f} | {row['ratio']:.1f} "
        f"| {row['peak_mb'] / 1024:.1f} | {row['difference']:.0e} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, and write table and numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_out(parser, STUDY)
    arguments = parser.parse_args()
    rows = [
        row
        for network in NETWORKS
        for row in compared([apart(network, method) for method in METHODS])
    ]
    settings = {"points": NUM_POINTS, "directions": NUM_DIRECTIONS}
    write_report(arguments.out, STUDY, settings, rows, table(rows))


if __name__ == "__main__":
    main()
