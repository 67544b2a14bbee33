"""Which budget and pool are best for the time that a fit may take.

Fits of several budgets, each from pools of several sizes, on validation images, and
with other draws than the other studies. As many backward passes are those of all nine
columns of few points, or of two for more points (``fisher_rank=1``). Times are
processor times of a fit.

    python benchmarks/budget_and_pool.py --data-root DATA

An interrupted study resumes where it stopped.
"""

from __future__ import annotations

import time
import warnings
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter
from pool_floor_and_folds import full_data_on_them, on_validation_images
from shared.closeness import (
    DATASET,
    Row,
    parse_rows,
    percent_above,
    rows_parser,
    run_network,
    write_figure,
)
from shared.fits import Result, fit
from shared.internals import Factors
from shared.predictions import PRIORS
from shared.problems import Problem
from shared.reports import Progress, write_report
from shared.tables import deviation

STUDY = Path(__file__).stem
# numbers of points, and of backward passes of each
EXACT, RANKED = 9, 2
BUDGETS = [(64, EXACT), (128, EXACT), (256, EXACT)]
BUDGETS += [(points * EXACT // RANKED, RANKED) for points, _ in BUDGETS]
POOLS = (4096, 8192, 16384)
DRAWS, FIRST_SEED = 8, 200
# where errors are largest
WORST = PRIORS.index(10.0)


def of_size(
    problem: Problem, factors: Factors, size: tuple[int, int, int], seed: int, **_: Any
) -> Result:
    """Fit with a budget, of so many backward passes each, and a pool."""
    points, passes, pool = size
    rank = None if passes == EXACT else passes - 1
    start = time.process_time()
    la, _ = fit(problem, budget=points, fisher_rank=rank, pool_size=pool, seed=seed)
    return Result.of(problem, la, time.process_time() - start)


SIZES = {
    f"kfac: {points} x {passes} of {pool}": (points, passes, pool)
    for points, passes in BUDGETS
    for pool in POOLS
}
ROWS: dict[str, Row] = {
    label: partial(of_size, size=size) for label, size in SIZES.items()
}


def table(networks: dict[str, Any]) -> str:
    """Format errors and times as a Markdown table."""
    priors = " | ".join(f"{prior:g}, %" for prior in PRIORS)
    lines = [
        f"| network | points | passes of each | pool | fit, s | {priors} "
        "| rms at 10, % |",
        "|---" * (len(PRIORS) + 6) + "|",
    ]
    for name, result in networks.items():
        for label in result["rows"]:
            percent = percent_above(result, label)
            cells = [
                f"{mean:+.1f} ± {own:.1f}"
                for mean, own in zip(
                    percent.mean(0), deviation(percent.numpy()), strict=True
                )
            ]
            size = " | ".join(map(str, SIZES[label]))
            lines.append(
                f"| {name} | {size} | {_seconds(result, label):.2f} | "
                f"{' | '.join(cells)} | {_error(result, label):.1f} |"
            )
    return "\n".join(lines)


def _seconds(result: dict, label: str) -> float:
    return median(run["fit_seconds"] for run in result["rows"][label])


def _error(result: dict, label: str) -> float:
    """Root mean square over draws."""
    return percent_above(result, label)[:, WORST].square().mean().sqrt().item()


def panel_of_times(axis: Axes, result: dict) -> None:
    """Draw errors against times, with a curve for each pool."""
    for passes, style in ((EXACT, "o--"), (RANKED, "s-")):
        for number, pool in enumerate(POOLS):
            labels = [k for k in result["rows"] if SIZES[k][1:] == (passes, pool)]
            seconds = [_seconds(result, own) for own in labels]
            errors = [_error(result, own) for own in labels]
            label = f"{passes} passes, pool of {pool}"
            axis.loglog(seconds, errors, style, ms=3, color=f"C{number}", label=label)
    axis.set(xlabel="fit, s")
    for own in (axis.xaxis, axis.yaxis):
        own.set_major_locator(LogLocator(subs=(1, 2, 5)))
        own.set_major_formatter("{x:g}")
        own.set_minor_formatter(NullFormatter())


def main() -> None:
    """Run all sizes on all networks, and write table, numbers and figure."""
    settings = parse_rows(rows_parser(__doc__, STUDY))
    warnings.simplefilter("ignore")
    progress, results = Progress(settings, STUDY), {}
    rows = dict(list(ROWS.items())[:2]) if settings.quick else ROWS
    seeds = range(FIRST_SEED, FIRST_SEED + (settings.seeds or DRAWS))
    for name in settings.networks:
        problem = on_validation_images(name, settings)
        full = full_data_on_them(problem, settings)
        results[name] = run_network(
            problem, rows, full, settings.budget, seeds, progress
        )
    recorded = {"priors": PRIORS, "dataset": DATASET}
    write_report(settings.out, STUDY, recorded, results, table(results))
    ylabel = "root mean square of\nNLL above full data (%)"
    write_figure(settings.out / f"{STUDY}.png", results, panel_of_times, ylabel)
    progress.clear()


if __name__ == "__main__":
    main()
