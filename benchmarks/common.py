"""What the benchmarks share: a network, options, figure style, reports and progress."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
from torch import nn
from tueplots import axes, figsizes, fontsizes

from laplace_debiased.comparison.environment import default_data_root, environment

RESULTS = Path(__file__).parent / "results"
NETWORKS = (
    "fashion-mnist/MLP",
    "fashion-mnist/all-convolutional",
    "fashion-mnist/ResNet",
)
# of the code that runs, even if there are further commits before a study ends
ENVIRONMENT = environment()
# settings that change no result
_PLACES = ("data_root", "out")


def conv_net() -> nn.Module:
    """Build an all-convolutional network with about 240,000 parameters."""

    def block(channels: int, filters: int, stride: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(channels, filters, 3, stride, padding=1), nn.ReLU()]

    return nn.Sequential(
        *block(1, 32),
        *block(32, 32, stride=2),
        *block(32, 64),
        *block(64, 64, stride=2),
        *block(64, 100),
        *block(100, 128),
        nn.Conv2d(128, 10, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def study_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser of the options that all studies of trained networks have.

    Args:
        description: The study's docstring, whose first line is shown.

    Returns:
        The parser.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument(
        "--data-root",
        type=Path,
        default=default_data_root(),
        help="folder of torchvision's datasets",
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a smoke test within a minute; its numbers mean nothing",
    )
    return parser


def problem_name(text: str) -> tuple[str, str]:
    """Split ``dataset/network``."""
    dataset, slash, network = text.partition("/")
    if not slash:
        raise argparse.ArgumentTypeError(
            f"expected DATASET/NETWORK, for example fashion-mnist/MLP, got {text!r}"
        )
    return dataset, network


def add_problems(parser: argparse.ArgumentParser, problems: Sequence[str]) -> None:
    """Add an option of the trained networks that a study is of.

    Args:
        parser: The parser.
        problems: The networks unless others are named.
    """
    parser.add_argument(
        "--problems",
        nargs="+",
        type=problem_name,
        default=[problem_name(text) for text in problems],
        metavar="DATASET/NETWORK",
        help="trained networks: fashion-mnist, mnist, cifar10 or cifar100, and a name "
        f"in networks.py; default: {' '.join(problems)}",
    )


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line; a quick run has one seed and keeps its results apart."""
    settings = parser.parse_args()
    if settings.quick:
        settings.seeds = 1
        if hasattr(settings, "problems"):
            settings.problems = [("fashion-mnist", "MLP")]
        if settings.out == RESULTS:
            settings.out = RESULTS / "quick"
    return settings


def run_problems(
    settings: argparse.Namespace, run: Callable[..., Any]
) -> dict[str, dict[str, Any]]:
    """Run a study on all its networks.

    Args:
        settings: With the option of :func:`add_problems`.
        run: From a dataset, a network and the settings to a result.

    Returns:
        The results, by dataset and network.
    """
    results: dict[str, dict[str, Any]] = {}
    for dataset, network in settings.problems:
        result = run(dataset, network, settings)
        results.setdefault(dataset, {})[network] = result
    return results


def figure_style(ncols: int, height_to_width_ratio: float = 0.9) -> dict[str, Any]:
    """Return matplotlib's settings for a row of panels."""
    return {
        **figsizes.neurips2023(
            ncols=ncols, rel_width=1.4, height_to_width_ratio=height_to_width_ratio
        ),
        **fontsizes.neurips2023(),
        **axes.lines(),
        **axes.grid(),
        "axes.grid": True,
    }


def reset_peak() -> None:
    """Forget this process's peak memory so far (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_megabytes() -> float:
    """Return the peak memory of this process since the last reset (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024


def deviation(values: np.ndarray | Sequence, axis: int = 0) -> np.ndarray:
    """Return the sample standard deviation, zero of a single value."""
    values = np.asarray(values)
    return values.std(axis, ddof=min(1, values.shape[axis] - 1))


def mean_and_std(values: np.ndarray, digits: int) -> str:
    """Format a mean, with the standard deviation if there are several values."""
    mean = f"{values.mean():.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {values.std(ddof=1):.{digits}f}"


def write_report(
    out: Path, name: str, settings: dict[str, Any], results: Any, table: str
) -> None:
    """Write the numbers as JSON and the table as Markdown, and print the table."""
    out.mkdir(parents=True, exist_ok=True)
    report = {"environment": ENVIRONMENT, "settings": settings, "results": results}
    (out / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
    (out / f"{name}.md").write_text(table + "\n")
    print(table)


def in_own_process(
    script: Path | str, arguments: Sequence[str], seconds: float
) -> dict[str, Any]:
    """Run a script that prints a result as JSON in its last line.

    Args:
        script: The script.
        arguments: Its arguments.
        seconds: How long it may take.

    Returns:
        The result, or the last line of what went wrong as ``"error"``.
    """
    command = [sys.executable, "-W", "ignore", str(script), *arguments]
    try:
        output = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return {"error": f"takes more than {seconds / 60:g} minutes"}
    if output.returncode:
        last = [f"ended with code {output.returncode}", *output.stderr.splitlines()][-1]
        return {"error": shorten(last, 100)}
    return json.loads(output.stdout.splitlines()[-1])


class Progress:
    """Results so far, so that an interrupted study resumes where it stopped.

    Args:
        settings: The study's settings.
        name: The study's name.

    Raises:
        SystemExit: If results so far are of other code or settings.
    """

    def __init__(self, settings: argparse.Namespace, name: str):
        self._path = settings.out / f"{name}.partial.json"
        own = {k: v for k, v in vars(settings).items() if k not in _PLACES}
        origin = {"commit": ENVIRONMENT["commit"], "settings": own}
        self._kept = {"origin": json.loads(json.dumps(origin)), "results": {}}
        if not self._path.exists():
            return
        kept = json.loads(self._path.read_text())
        if kept["origin"] != self._kept["origin"]:
            raise SystemExit(
                f"{self._path} has results of {kept['origin']}, this run is "
                f"{self._kept['origin']}: delete it to start anew."
            )
        self._kept = kept

    def run(self, key: str, measure: Callable[[], Any]) -> Any:
        """Return a result; measure and keep it if there is none.

        Args:
            key: Names the result.
            measure: Returns it, as plain values.

        Returns:
            The result.
        """
        results = self._kept["results"]
        if key not in results:
            results[key] = measure()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps(self._kept))
        return results[key]

    def clear(self) -> None:
        """Forget all, once they are reported."""
        self._path.unlink(missing_ok=True)
