"""What a fit gains by several processes, and what it takes of large networks.

Each process has one thread. Points and decompositions are timed apart, from when all
processes begin until the last one is done: wall time, which other work on the machine
disturbs, and processor time of the busiest process, which it does not. The cost of
large networks follows from the shapes of their layers.

    python benchmarks/scaling_over_processes.py --out DIR
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from shared.command_line import add_out
from shared.internals import peak_of_fit, stages_of_fits
from shared.networks import all_convolutional, mlp
from shared.reports import write_report
from torch import distributed, multiprocessing, nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import Laplace

STUDY = Path(__file__).stem
COUNTS = (1, 2)
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "MLP": lambda: mlp(4 * (512,)),
    "convolutions": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)), all_convolutional(width=32)
    ),
}
GIB = 2**30
POOL = 8  # points for each of the budget, the default with `fisher_rank`


def measure_stages(network: str, points: int) -> dict[str, list[float]]:
    """Fit once, and time passes and decompositions.

    Args:
        network: Name of the network.
        points: The budget, drawn from as many points as the default pool has.

    Returns:
        Wall time and processor time of each kind of stage, in seconds.
    """
    torch.manual_seed(0)
    model = NETWORKS[network]()
    X, y = torch.randn(32 * points, 784), torch.randint(10, (32 * points,))
    loader = DataLoader(TensorDataset(X, y), batch_size=64)
    la = Laplace(model, "classification", "all", "kron_debiased", budget=points)
    with stages_of_fits(_clocks) as spent:
        la.fit(loader)
    return spent


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _process(rank: int, size: int, folder: str, points: int, repeats: int) -> None:
    """Time fits in one of the processes."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=size
    )
    for network in NETWORKS:
        measure_stages(network, 16)  # does not count
        found = [measure_stages(network, points) for _ in range(repeats)]
        torch.save(found, f"{folder}/{network}-{rank}.pt")


def measure(size: int, points: int, repeats: int) -> dict[str, dict[str, list]]:
    """Time fits by several processes.

    Args:
        size: Number of processes.
        points: The budget.
        repeats: Number of fits of each network.

    Returns:
        For each network and kind of stage, the shortest wall time, and the smallest
        processor time of the busiest process.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = (size, folder, points, repeats)
        multiprocessing.spawn(_process, arguments, nprocs=size)
        results = {}
        for network in NETWORKS:
            ranks = [
                torch.load(f"{folder}/{network}-{rank}.pt") for rank in range(size)
            ]
            results[network] = {
                kind: [
                    min(
                        max(fits[fit][kind][clock] for fits in ranks)
                        for fit in range(repeats)
                    )
                    for clock in (0, 1)
                ]
                for kind in ranks[0][0]
            }
    return results


def table(results: dict) -> str:
    """Format times and gains as a Markdown table."""
    lines = [
        "| network | stage | one process s | two s | gain | processor time of the "
        "busiest: one s | two s | gain |",
        "|---|---|---|---|---|---|---|---|",
    ]
    one, two = (results[str(count)] for count in COUNTS)
    for network, stages in one.items():
        for kind, alone in stages.items():
            both = two[network][kind]
            cells = [
                f"{a:.2f} | {b:.2f} | {a / b:.2f}"
                for a, b in zip(alone, both, strict=True)
            ]
            lines.append(f"| {network} | {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Network:
    """What the cost of a fit depends on.

    Args:
        parameters: Number of parameters of the whole network.
        shapes: Output and input features of its layers that are fitted.
        positions: Number of positions of an example, such as tokens, at full size.
        columns: Number of backward passes for a point.
        forward: Operations of a forward pass for an example; None for twice the
            parameters at each position.
    """

    parameters: float
    shapes: list[tuple[int, int]]
    positions: int
    columns: int
    forward: float | None = None

    @property
    def operations(self) -> float:
        """Operations of a forward pass for an example."""
        return self.forward or 2 * self.parameters * self.positions


def _resnet50() -> list[tuple[int, int]]:
    shapes, width_in = [(64, 147)], 64
    for width, depth in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(depth):
            if block == 0:
                shapes.append((4 * width, width_in))
            shapes += [(width, width_in), (width, 9 * width), (4 * width, width)]
            width_in = 4 * width
    return [*shapes, (1000, 2048)]


def _decoder(lora: int = 0) -> list[tuple[int, int]]:
    width, inner = 4096, 11008
    if lora:  # of queries and values
        return 64 * [(lora, width), (width, lora)]
    block = 4 * [(width, width)] + 2 * [(inner, width)] + [(width, inner)]
    return 32 * block


LARGE = {
    "ResNet-50": Network(25.6e6, _resnet50(), 1, 11, 8.2e9),
    "ViT-L/16": Network(
        304e6,
        24 * [(3072, 1024), (1024, 1024), (4096, 1024), (1024, 4096)] + [(1000, 1024)],
        197,
        11,
    ),
    "7B decoder, LoRA of rank 16": Network(6.7e9, _decoder(16), 512, 11),
    "7B decoder, all linear layers": Network(6.7e9, _decoder(), 512, 11),
}


def exchanged(
    shapes: list[tuple[int, int]], budget: int, pool: int, folds: int, itemsize: int = 4
) -> dict[str, int]:
    """Count the bytes of what processes exchange in a fit with ``kfac`` magnitudes.

    Args:
        shapes: Output and input features of the layers.
        budget: Number of points with backward passes.
        pool: Number of points that they are drawn from.
        folds: Number of folds of cross-fit.
        itemsize: Bytes of a parameter's entry.

    Returns:
        Bytes of sums, in double precision, that each process has of its points; of
        eigenvectors and eigenvalues; of what is known of each point of all processes,
        which are a number for each layer and factor, losses, traces and classes.
    """
    layers = len(shapes)
    outer, inner = (sum(own[k] ** 2 for own in shapes) for k in (0, 1))
    # eigenvalues, too; those of inputs are decomposed once
    of_outer, of_inner = (sum(own[k] ** 2 + own[k] for own in shapes) for k in (0, 1))
    per_point = 2 * itemsize + 8
    return {
        "sums": 8 * folds * (outer + inner + layers),
        "eigenvectors": itemsize * ((folds + 1) * of_outer + of_inner),
        "points": pool * (per_point + 2 * itemsize * layers)
        + budget * (per_point + itemsize * layers),
    }


def cost(network: Network, size: int, budget: int = 4096, folds: int = 2) -> dict:
    """Tell what a fit takes of each process.

    Args:
        network: The network.
        size: Number of processes.
        budget: Number of points with backward passes, of ``POOL`` times as many.
        folds: Number of folds of cross-fit.

    Returns:
        Operations of passes and decompositions, bytes received and held.
    """
    # forward passes of pool and budget; a backward pass is two forward passes
    pool = POOL * budget
    passes = (pool + budget * (1 + 2 * network.columns)) * network.operations
    cubes = [d_in**3 for _, d_in in network.shapes]
    cubes += (folds + 1) * [d_out**3 for d_out, _ in network.shapes]
    sent = exchanged(network.shapes, budget, pool, folds)
    others = (size - 1) / size
    # an all-reduce in a ring passes each part on twice
    received = others * (2 * sent["sums"] + sent["eigenvectors"] + sent["points"])
    held = peak_of_fit(network.shapes, folds, size > 1)
    return {
        "passes": passes / size,
        "decompositions": 9 * max(sum(cubes) / size, max(cubes)),
        "sent": received,
        "held": 4 * network.parameters + held,
    }


def cost_table(results: dict) -> str:
    """Format the costs as a Markdown table."""
    lines = [
        "| network | processes | passes, PFLOP each | decompositions, PFLOP each | "
        "received, GiB each | held, GiB each |",
        "|---|---|---|---|---|---|",
    ]
    for name, rows in results.items():
        for size, own in rows.items():
            lines.append(
                f"| {name} | {size} | {own['passes'] / 1e15:.3g} | "
                f"{own['decompositions'] / 1e15:.2g} | {own['sent'] / GIB:.3g} | "
                f"{own['held'] / GIB:.3g} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark and write its results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    add_out(parser, STUDY)
    arguments = parser.parse_args()
    results = {
        str(size): measure(size, arguments.points, arguments.repeats) for size in COUNTS
    }
    costs = {
        name: {str(size): cost(network, size) for size in (1, 8, 64)}
        for name, network in LARGE.items()
    }
    settings = {k: v for k, v in vars(arguments).items() if k != "out"}
    settings["load"] = os.getloadavg()
    report = results | {"costs": costs}
    write_report(arguments.out, STUDY, settings, report, table(results))
    (arguments.out / "costs.md").write_text(cost_table(costs) + "\n")


if __name__ == "__main__":
    main()
