"""The comparison's table and its numbers as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from scipy.stats import sem
from torch import Tensor

from laplace_debiased.comparison.experiment import PRIOR_PRECISIONS, Run
from laplace_debiased.comparison.metrics import reliability
from laplace_debiased.comparison.posteriors import FULL_DATA


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Args:
        value: Its number for a run, given the full-data run of the same seed; None
            where there is none.
        format: How to print it.
        robust: Whether to print the median instead of mean and standard error: a
            machine busy with something else has little effect on median times.
    """

    value: Callable[[Run, Run], float | None]
    format: str
    robust: bool = False


def _excess_nll(run: Run, full: Run) -> float | None:
    return None if run is full else run.scores.nll - full.scores.nll


COLUMNS = {
    "accuracy %": Column(lambda run, _: 100 * run.scores.accuracy, ".1f"),
    "NLL": Column(lambda run, _: run.scores.nll, ".3f"),
    "NLL - full": Column(_excess_nll, "+.3f"),
    "Brier": Column(lambda run, _: run.scores.brier, ".3f"),
    "ECE": Column(lambda run, _: run.scores.ece, ".3f"),
    "AUROC": Column(lambda run, _: run.foreign_auroc, ".3f"),
    "prior precision": Column(lambda run, _: run.prior_precision, ".2f"),
    "median fit s": Column(lambda run, _: run.fit_seconds, ".2f", robust=True),
    "points": Column(lambda run, _: run.num_points, ".0f", robust=True),
}


def group_by_estimator(runs: list[Run]) -> dict[str, list[Run]]:
    """Group runs, keeping their order.

    Args:
        runs: The runs.

    Returns:
        The runs of each estimator.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.estimator, []).append(run)
    return groups


def table(runs: list[Run]) -> str:
    """Print means over seeds with standard errors.

    Args:
        runs: The runs.

    Returns:
        A Markdown table with a row for each estimator.
    """
    full = {run.seed: run for run in runs if run.estimator == FULL_DATA}
    rows = [["", *COLUMNS]]
    for estimator, group in group_by_estimator(runs).items():
        cells = [
            _cell([column.value(run, full[run.seed]) for run in group], column)
            for column in COLUMNS.values()
        ]
        rows.append([estimator, *cells])
    return _markdown(rows)


def _cell(values: list[float | None], column: Column) -> str:
    numbers = [value for value in values if value is not None]
    if len(numbers) < len(values):
        return "-"
    if column.robust:
        return format(median(numbers), column.format)
    average = format(mean(numbers), column.format)
    if len(numbers) == 1:
        return average
    return f"{average} ± {format(sem(numbers), column.format.lstrip('+'))}"


def _markdown(rows: list[list[str]]) -> str:
    """Align rows, the first of which is the header; numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    header, *body = (
        [
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    )
    rule = ["-" * width for width in widths]
    rule[1:] = [dashes[:-1] + ":" for dashes in rule[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *body])


def reliabilities(
    runs: list[Run], labels: Tensor
) -> dict[str, tuple[list[float], list[float]]]:
    """Compute reliability diagrams over the test points of all seeds together.

    Args:
        runs: The runs.
        labels: Test labels ``[points]``.

    Returns:
        Confidence and accuracy of each bin, for each estimator.
    """
    return {
        estimator: reliability(
            torch.cat([run.probabilities for run in group]), labels.repeat(len(group))
        )
        for estimator, group in group_by_estimator(runs).items()
    }


def write_numbers(
    path: Path, runs: list[Run], labels: Tensor, settings: dict[str, Any]
) -> None:
    """Write all numbers behind table and figure as JSON.

    Args:
        path: The file.
        runs: The runs.
        labels: Test labels ``[points]``.
        settings: What was run, as values that JSON knows.
    """
    numbers = {
        **settings,
        "prior_precisions": PRIOR_PRECISIONS,
        "runs": [_without_predictions(run) for run in runs],
        "reliability": {
            estimator: {"confidence": confidence, "accuracy": accuracy}
            for estimator, (confidence, accuracy) in reliabilities(runs, labels).items()
        },
    }
    path.write_text(json.dumps(numbers, indent=2) + "\n")


def _without_predictions(run: Run) -> dict[str, Any]:
    values = asdict(run)
    del values["probabilities"]
    return values
