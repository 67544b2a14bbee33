"""How close posteriors from few backward passes come to the full-data posterior.

Three networks were trained on FashionMNIST. The full-data references are K-FAC and
EKFAC; every other row gets backward passes for ``budget`` points only: each ingredient
alone, and together.

    python benchmarks/few_points_against_full_data.py --data-root DATA

An interrupted study resumes where it stopped.
"""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from shared.closeness import (
    CROSS_FIT,
    CURVATURE,
    GGN,
    MAGNITUDES,
    TWO_BATCH,
    UNIFORM,
    Row,
    absolute_rows,
    ours,
    parse_rows,
    percent_above,
    rows_parser,
    run_study,
    summary,
    table,
    with_magnitudes,
    write_figure,
)
from shared.figures import draw_band
from shared.fits import Result, fit, fit_few_points
from shared.internals import Factors, replace_magnitudes, undo_debiasing
from shared.predictions import PRIORS
from shared.problems import Problem

__all__ = ["table"]

STUDY = Path(__file__).stem
BEST = CROSS_FIT | CURVATURE


def uniform_batch(problem: Problem, factors: Factors, budget: int, seed: int) -> Result:
    """Use a uniform mini-batch for directions and magnitudes."""
    return Result.of(problem, fit_few_points("single batch", problem, budget, seed))


def batch_by_curvature(problem: Problem, factors: Factors, **options: Any) -> Result:
    """Use points drawn by curvature for directions and magnitudes."""
    la, _ = fit(problem, **BEST, **options)
    undo_debiasing(la)
    return Result.of(problem, la)


def few_columns(
    problem: Problem, factors: Factors, budget: int, **options: Any
) -> Result:
    """Let more points have two of the same number of backward passes."""
    exact = problem.model(problem.inputs[:1]).shape[1] - 1
    return ours(
        problem, factors, budget=budget * exact // 2, fisher_rank=1, **BEST, **options
    )


def oracle(problem: Problem, factors: Factors, **options: Any) -> Result:
    """Take directions from a draw, and magnitudes from all data."""
    la, _ = fit(problem, **BEST, **options)
    replace_magnitudes(la, factors)
    return Result.of(problem, la)


# a floor of one makes the draw uniform, but keeps the pool's input covariances
POOL_INPUTS = CURVATURE | {"sampling_floor": 1.0}
ROWS: dict[str, Row] = {
    "kfac: single batch, uniform": uniform_batch,
    "kfac: two batches, uniform": partial(ours, **TWO_BATCH, **UNIFORM),
    "kfac: cross-fit, uniform": partial(ours, **CROSS_FIT, **UNIFORM),
    "kfac: two batches, uniform, inputs of pool": partial(
        ours, **TWO_BATCH, **POOL_INPUTS
    ),
    "kfac: cross-fit, uniform, inputs of pool": partial(
        ours, **CROSS_FIT, **POOL_INPUTS
    ),
    "kfac: single batch, curvature": batch_by_curvature,
    "kfac: two batches, curvature": partial(ours, **TWO_BATCH, **CURVATURE),
    "kfac: cross-fit, curvature": partial(ours, **BEST),
    "kfac: cross-fit, curvature, two columns": few_columns,
    "kfac: oracle": oracle,
    "ggn: two batches, uniform": partial(ours, **TWO_BATCH, **UNIFORM, **GGN),
    "ggn: cross-fit, uniform": partial(ours, **CROSS_FIT, **UNIFORM, **GGN),
    "ggn: two batches, curvature": partial(ours, **TWO_BATCH, **CURVATURE, **GGN),
    "ggn: cross-fit, curvature": partial(ours, **BEST, **GGN),
    "ggn: cross-fit, curvature, two columns": partial(few_columns, **GGN),
}
SUMMARIZED = {
    "kfac: single batch, uniform": "single batch",
    "kfac: two batches, uniform": "two batches (the paper's)",
    "kfac: cross-fit, curvature": "**default**",
    "kfac: cross-fit, curvature, two columns": "**two columns**",
    "kfac: oracle": "oracle",
    "ggn: two batches, uniform": "two batches, `ggn`",
    "ggn: cross-fit, curvature": "**default, `ggn`**",
    "ggn: cross-fit, curvature, two columns": "**two columns, `ggn`**",
}


def short_table(networks: dict[str, Any]) -> str:
    """Format the most important rows of all networks as one table."""
    priors = " | ".join(f"{prior:g}" for prior in PRIORS)
    lines = [
        f"| network | estimator | {priors} | chosen prior |",
        "|---" * (len(PRIORS) + 3) + "|",
    ]
    for name, result in networks.items():
        rows = absolute_rows(result, MAGNITUDES)
        for label, shown in SUMMARIZED.items():
            if label not in result["rows"]:
                continue
            full = Result(**result["references"][label.split(":")[0]])
            runs = [Result(**run) for run in result["rows"][label]]
            rows[shown] = summary(full, runs)
        lines += [
            f"| {name} | {label} | {' | '.join(cells)} |"
            for label, cells in rows.items()
        ]
    return "\n".join(lines)


def panel_of_priors(axis: Axes, result: dict) -> None:
    """Draw the NLL of the most important ``kfac`` rows against the prior precision."""
    for label in SUMMARIZED:
        if not (label.startswith("kfac") and label in result["rows"]):
            continue
        percent = percent_above(result, label)
        draw_band(axis, PRIORS, percent.numpy(), label.removeprefix("kfac: "))
    axis.set(xscale="log", xlabel="prior precision")


def main() -> None:
    """Run all rows on all networks, and write tables, numbers and figure."""
    settings = parse_rows(rows_parser(__doc__, STUDY))
    warnings.simplefilter("ignore")
    results = run_study(STUDY, with_magnitudes(ROWS, settings.magnitudes), settings)
    (settings.out / f"{STUDY}_short.md").write_text(short_table(results) + "\n")
    write_figure(settings.out / f"{STUDY}.png", results, panel_of_priors)


if __name__ == "__main__":
    main()
