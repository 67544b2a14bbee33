"""Which pool, floor and number of folds are best for the default estimator.

On validation images, which no other study is scored by.

    python benchmarks/pool_floor_and_folds.py --networks MLP --data-root DATA

An interrupted study resumes where it stopped.
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from shared.closeness import (
    CROSS_FIT,
    CURVATURE,
    DATASET,
    Row,
    load_problem,
    ours,
    parse_rows,
    rows_parser,
    run_study,
    table,
    with_magnitudes,
)
from shared.data import validation_data
from shared.fits import Result, fit, timed_factors, with_curvature
from shared.internals import Factors, average_repeated_splits, factored_curvature
from shared.problems import Problem

__all__ = ["table"]

STUDY = Path(__file__).stem
FIRST_SEED = 0
BEST = CROSS_FIT | CURVATURE


def repeated_splits(problem: Problem, factors: Factors, **options: Any) -> Result:
    """Average magnitudes over all splits of eight folds in two halves (NERCOME)."""
    la, _ = fit(problem, **BEST, num_folds=8, **options)
    average_repeated_splits(la)
    return Result.of(problem, la)


ROWS: dict[str, Row] = {
    "kfac: default (pool of 4096, floor 0.1, 2 folds)": partial(ours, **BEST),
    **{
        f"kfac: pool of {size}": partial(ours, **BEST, pool_size=size)
        for size in (512, 1024, 2048, 8192)
    },
    **{
        f"kfac: floor {floor:g}": partial(ours, **BEST, sampling_floor=floor)
        for floor in (0.01, 0.03, 0.3)
    },
    **{
        f"kfac: {folds} folds": partial(ours, **BEST, num_folds=folds)
        for folds in (4, 8)
    },
    "kfac: 8 folds, repeated splits": repeated_splits,
}


def on_validation_images(name: str, settings: argparse.Namespace) -> Problem:
    """Load a network, and validation images in place of test images."""
    problem = load_problem(name, settings)
    count = len(problem.inputs)
    X, y = validation_data(DATASET, settings.data_root)
    return replace(problem, inputs=X[:count], labels=y[:count])


def full_data_on_them(
    problem: Problem, settings: argparse.Namespace
) -> tuple[dict[str, Result], Factors]:
    """Return the full-data reference on these images, and K-FAC's factors."""
    factors, _ = timed_factors(problem, keep=not settings.quick)
    la = with_curvature(problem, factored_curvature(factors))
    return {"kfac": Result.of(problem, la)}, factors


def main() -> None:
    """Run all rows on all networks, and write table and numbers."""
    settings = parse_rows(rows_parser(__doc__, STUDY))
    warnings.simplefilter("ignore")
    rows = with_magnitudes(ROWS, settings.magnitudes)
    run_study(
        STUDY, rows, settings, on_validation_images, full_data_on_them, FIRST_SEED
    )


if __name__ == "__main__":
    main()
