"""How much faster a fit by a budget is than ``KronLaplace``'s to all data.

Side by side, on the networks of ``few_points_against_full_data.py`` that
``KronLaplace`` does not refuse, with 50,000 training points.

    python benchmarks/fit_time_against_full_data.py --data-root DATA
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from statistics import median

from shared.closeness import DATASET, MAGNITUDES
from shared.command_line import parse, study_parser
from shared.fits import fit, fit_time
from shared.problems import Problem
from shared.reports import write_report

STUDY = Path(__file__).stem
NETWORKS = ("MLP", "all-convolutional")


def measure(name: str, settings: argparse.Namespace) -> dict:
    """Time both fits.

    Args:
        name: The network.
        settings: The command line.

    Returns:
        Seconds of each fit.
    """
    problem = Problem.load(name, DATASET, settings.data_root, settings.quick)
    seconds = fit_time(problem)
    rows = {
        magnitudes: [
            fit(problem, budget=settings.budget, seed=seed, magnitudes=magnitudes)[1]
            for seed in range(settings.seeds)
        ]
        for magnitudes in MAGNITUDES
    }
    return {"full_seconds": seconds, **rows}


def table(results: dict) -> str:
    """Format the times as a Markdown table."""
    lines = [
        "| network | `KronLaplace`, all data, seconds | default, `kfac`, seconds "
        "| times faster | `ggn`, seconds | times faster |",
        "|---" * 6 + "|",
    ]
    for name, result in results.items():
        full = result["full_seconds"]
        cells = [
            f"{median(result[m]):.2f} | {full / median(result[m]):.0f}"
            for m in MAGNITUDES
        ]
        lines.append(f"| {name} | {full:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure all networks, and write table and numbers."""
    parser = study_parser(__doc__, STUDY)
    parser.add_argument("--budget", type=int, default=128)
    parser.add_argument("--networks", nargs="*", default=NETWORKS)
    settings = parse(parser)
    if settings.quick:
        settings.networks = ["MLP"]
    warnings.simplefilter("ignore")
    results = {name: measure(name, settings) for name in settings.networks}
    recorded = {"dataset": DATASET, "budget": settings.budget, "seeds": settings.seeds}
    write_report(settings.out, STUDY, recorded, results, table(results))


if __name__ == "__main__":
    main()
