"""The options that studies share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from laplace_debiased.comparison.environment import default_data_root

RESULTS = Path(__file__).parents[1] / "results"
NETWORKS = (
    "fashion-mnist/MLP",
    "fashion-mnist/all-convolutional",
    "fashion-mnist/ResNet",
)


def add_out(parser: argparse.ArgumentParser, study: str) -> None:
    """Add the option of the folder that results are written to.

    Args:
        parser: The parser.
        study: The study's name, that of its folder of results.
    """
    parser.add_argument("--out", type=Path, default=RESULTS / study)


def study_parser(description: str, study: str) -> argparse.ArgumentParser:
    """Return a parser of the options that all studies of trained networks have.

    Args:
        description: The study's docstring, whose first line is shown.
        study: The study's name.

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
    add_out(parser, study)
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
        f"in shared/training.py; default: {' '.join(problems)}",
    )


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line; a quick run has one seed and keeps its results apart."""
    settings = parser.parse_args()
    if settings.quick:
        settings.seeds = 1
        if hasattr(settings, "problems"):
            settings.problems = [("fashion-mnist", "MLP")]
        if settings.out.parent == RESULTS:
            settings.out = RESULTS / "quick" / settings.out.name
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
