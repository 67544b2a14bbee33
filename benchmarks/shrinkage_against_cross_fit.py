"""Does nonlinear shrinkage of the same points' eigenvalues do what cross-fit does?

Analytical nonlinear shrinkage (Ledoit and Wolf, 2020) corrects the eigenvalues of a
sample covariance without other points. Each Kronecker factor of all points is shrunken,
with its points as the sample size, or all of its rows: each position is one, and with
gradients each class. Points are drawn uniformly, or as by default: by their curvature,
with the input covariances of a pool.

    python benchmarks/shrinkage_against_cross_fit.py --data-root DATA

An interrupted study resumes where it stopped.
"""

from __future__ import annotations

import argparse
import warnings
from functools import partial
from pathlib import Path
from typing import Any

from shared.closeness import (
    CROSS_FIT,
    CURVATURE,
    TWO_BATCH,
    UNIFORM,
    Row,
    ours,
    parse_rows,
    rows_parser,
    run_study,
    table,
)
from shared.fits import Result, fit, with_curvature
from shared.internals import (
    POOL_FACTOR,
    Factors,
    factored_curvature,
    full_data_factors,
    shrink_magnitudes,
    undo_debiasing,
)
from shared.problems import Problem
from shared.shrinkage import shrunken

__all__ = ["table"]

STUDY = Path(__file__).stem
NETWORKS = ("MLP", "all-convolutional")
FOLDS = (2, 4, 8)


def same_points(problem: Problem, factors: Factors, **options: Any) -> Result:
    """Let all points give directions and magnitudes."""
    la, _ = fit(problem, **CROSS_FIT, **options)
    undo_debiasing(la)
    return Result.of(problem, la)


def shrinkage(
    problem: Problem,
    factors: Factors,
    positions: bool,
    keep_trace: bool = False,
    **options: Any,
) -> Result:
    """Let all points give directions, and magnitudes by shrinkage."""
    la, _ = fit(problem, **CROSS_FIT, **options)
    num_points, num_pool = options["budget"], None
    if options["sampling"] == "curvature":
        num_pool = min(POOL_FACTOR * num_points, len(problem.train))
    shrink_magnitudes(la, shrunken, num_points, num_pool, positions, keep_trace)
    return Result.of(problem, la)


def rows_of(draw: str, **options: Any) -> dict[str, Row]:
    """Return the rows with points that are drawn in the same way."""
    rows: dict[str, Row] = {
        "single batch": same_points,
        "two batches": partial(ours, **TWO_BATCH),
        **{
            f"cross-fit, {folds} folds": partial(ours, **CROSS_FIT, num_folds=folds)
            for folds in FOLDS
        },
        "shrinkage by points": partial(shrinkage, positions=False),
        "shrinkage by rows": partial(shrinkage, positions=True),
        "shrinkage by points, same trace": partial(
            shrinkage, positions=False, keep_trace=True
        ),
    }
    return {
        f"kfac: {draw}, {name}": partial(row, **options) for name, row in rows.items()
    }


BY_CURVATURE = rows_of("curvature", **CURVATURE)
ROWS = rows_of("uniform", **UNIFORM) | BY_CURVATURE


def kfac_of_all_data(
    problem: Problem, settings: argparse.Namespace
) -> tuple[dict[str, Result], Factors]:
    """Return the full-data reference, and its factors."""
    factors = full_data_factors(problem.model, problem.loader())
    la = with_curvature(problem, factored_curvature(factors))
    return {"kfac": Result.of(problem, la)}, factors


def main() -> None:
    """Run all rows on all networks, and write table and numbers."""
    parser = rows_parser(__doc__, STUDY)
    parser.set_defaults(seeds=5)
    settings = parse_rows(parser)
    settings.networks = [name for name in settings.networks if name in NETWORKS]
    warnings.simplefilter("ignore")
    rows = BY_CURVATURE if settings.quick else ROWS
    run_study(STUDY, rows, settings, full=kfac_of_all_data)


if __name__ == "__main__":
    main()
