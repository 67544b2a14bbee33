"""How far fits and predictions are from the price of their passes, on any device.

The limits are those of ``limit.py``, but all times are by the clock, once the device is
done. On a GPU, a profile tells the share of that time in which the device is busy, and
the peak of its memory. Trained networks are those of ``limit.py``; that of full size
has random weights, and random images of CIFAR-10's shape, on which times do not depend.

    python benchmarks/device_cost.py --device cuda --data-root DATA
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from shared.closeness import DATASET
from shared.command_line import parse, study_parser
from shared.data import IMAGES
from shared.fits import fit
from shared.internals import POOL_FACTOR
from shared.passes import OF_FIT, backward, fastest, forward
from shared.problems import Problem
from shared.reports import write_report
from shared.training import full_size_recipes
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import TensorDataset

STUDY = Path(__file__).stem
FULL_SIZE = "ResNet-18-64"
NETWORKS = ("MLP", "all-convolutional", "ResNet", "ViT-Little", FULL_SIZE)
NUM_IMAGES = 128
MISSING = "-"


def clock_of(device: torch.device) -> float:
    """Return the time at which a device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def load(name: str, settings: argparse.Namespace) -> Problem:
    """Load a network and its points, or make those of full size, for a device."""
    if name == FULL_SIZE:
        images = IMAGES["cifar10"]
        torch.manual_seed(0)
        model = full_size_recipes(images)[name].build().eval()
        shape = (POOL_FACTOR * settings.budget, images.channels, *2 * [images.size])
        X, y = torch.randn(shape), torch.arange(shape[0]) % images.classes
        problem = Problem(model, TensorDataset(X, y), X[:NUM_IMAGES], y, name, "random")
    else:
        problem = Problem.load(name, DATASET, settings.data_root, settings.quick)
    device = torch.device(settings.device)
    return replace(
        problem,
        model=problem.model.to(device),
        inputs=problem.inputs[:NUM_IMAGES].to(device),
    )


def measure(name: str, settings: argparse.Namespace) -> dict[str, Any]:
    """Time a fit and predictions of a network, and their limits.

    Args:
        name: The network.
        settings: The command line.

    Returns:
        Seconds; on a GPU also what profiles tell.
    """
    problem, device = load(name, settings), torch.device(settings.device)
    images = problem.train.tensors[0][: POOL_FACTOR * settings.budget].to(device)
    clock = partial(clock_of, device)

    def passes() -> None:
        forward(problem, images)
        backward(problem, images[: settings.budget], OF_FIT)

    def ours() -> None:
        fit(problem, budget=settings.budget)

    la, _ = fit(problem, budget=settings.budget)
    stages: dict[str, dict[str, Callable[[], object]]] = {
        "fit": {"limit": passes, "ours": ours},
        "predict": {
            "limit": lambda: backward(problem, problem.inputs),
            "ours": lambda: la(problem.inputs),
        },
    }
    return {
        stage: fastest(settings.repeats, clock, **functions)
        | on_gpu(functions["ours"], device)
        for stage, functions in stages.items()
    }


def on_gpu(function: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Profile a call on a GPU.

    Args:
        function: The function, which has been called before.
        device: The device.

    Returns:
        The share of the time in which kernels or copies run, and the peak of the memory
        in bytes; nothing on another device.
    """
    if device.type != "cuda":
        return {}
    torch.cuda.reset_peak_memory_stats(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        start = clock_of(device)
        function()
        wall = clock_of(device) - start
    busy = 1e-6 * sum(  # one stream: kernels follow each other
        event.self_device_time_total
        for event in profiled.key_averages()
        if event.device_type == DeviceType.CUDA
    )
    return {"busy": busy / wall, "memory": torch.cuda.max_memory_allocated(device)}


def table(results: dict[str, Any]) -> str:
    """Format times, their limits and profiles as a Markdown table."""
    columns = "limit, s | ours, s | ratio | busy, % | memory, MB"
    lines = [
        f"| network | fit: {columns} | {NUM_IMAGES} images: {columns} |",
        "|---" * 11 + "|",
    ]
    for name, result in results.items():
        cells = [cells_of(own) for own in result.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cells_of(own: dict[str, float]) -> str:
    """Format what was measured of fits, or of predictions."""
    limit, ours = own["limit"], own["ours"]
    cells = [f"{limit:.3f}", f"{ours:.3f}", f"{ours / limit:.1f}"]
    cells.append(f"{100 * own['busy']:.0f}" if "busy" in own else MISSING)
    cells.append(f"{own['memory'] / 1e6:.0f}" if "memory" in own else MISSING)
    return " | ".join(cells)


def name_of(device: torch.device) -> str:
    """Return a device's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def main() -> None:
    """Measure all networks, and write table and numbers."""
    parser = study_parser(__doc__, STUDY)
    best = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=best)
    parser.add_argument("--budget", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--networks", nargs="*", choices=NETWORKS, default=NETWORKS)
    settings = parse(parser)
    if settings.quick:
        settings.networks, settings.repeats = ["MLP"], 1
    warnings.simplefilter("ignore")
    results = {name: measure(name, settings) for name in settings.networks}
    recorded = {
        "device": name_of(torch.device(settings.device)),
        "budget": settings.budget,
        "repeats": settings.repeats,
    }
    write_report(settings.out, STUDY, recorded, results, table(results))


if __name__ == "__main__":
    main()
