"""Which share of the points should give directions, if the others give magnitudes.

Two batches that are drawn by curvature, on three networks.

    python benchmarks/share_of_directions.py --magnitudes kfac --data-root DATA

An interrupted study resumes where it stopped.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from shared.closeness import (
    CURVATURE,
    MAGNITUDES,
    TWO_BATCH,
    Row,
    ours,
    parse_rows,
    percent_above,
    rows_parser,
    run_study,
    table,
    with_magnitudes,
    write_figure,
)
from shared.predictions import PRIORS

__all__ = ["table"]

STUDY = Path(__file__).stem
SHARES = tuple(f"{k / 10:g}" for k in range(1, 10))
ROWS: dict[str, Row] = {
    f"{magnitudes}: {share}": partial(
        ours,
        **TWO_BATCH,
        **CURVATURE,
        magnitudes=magnitudes,
        direction_fraction=share if share == "auto" else float(share),
    )
    for magnitudes in MAGNITUDES
    for share in (*SHARES, "auto")
}


def chosen_rows(magnitudes: Sequence[str], shares: Sequence[str]) -> dict[str, Row]:
    """Return the rows with some magnitudes and shares."""
    rows = with_magnitudes(ROWS, magnitudes)
    return {k: row for k, row in rows.items() if k.split(": ")[1] in shares}


def panel_of_shares(axis: Axes, result: dict[str, Any]) -> None:
    """Draw the NLL at some prior precisions against the share of directions."""
    for magnitudes, line in zip(MAGNITUDES, ("-", "--"), strict=True):
        shares = [s for s in SHARES if f"{magnitudes}: {s}" in result["rows"]]
        if not shares:
            continue
        rows = [percent_above(result, f"{magnitudes}: {s}") for s in shares]
        percent = torch.stack(rows)  # [shares, seeds, priors]
        positions = [float(s) for s in shares]
        for prior in (1.0, 10.0, 31.6):
            column = percent[..., PRIORS.index(prior)]
            mean, error = column.mean(1), column.std(1) / column.shape[1] ** 0.5
            axis.plot(positions, mean, line, label=f"{magnitudes}, prior {prior:g}")
            axis.fill_between(positions, mean - error, mean + error, alpha=0.15, lw=0)
    axis.set(xlabel="share of points for directions")


def main() -> None:
    """Run all shares on all networks, and write table, numbers and figure."""
    parser = rows_parser(__doc__, STUDY)
    parser.add_argument(
        "--shares",
        nargs="+",
        choices=(*SHARES, "auto"),
        default=(*SHARES, "auto"),
        help="shares of the points that give directions",
    )
    settings = parse_rows(parser)
    warnings.simplefilter("ignore")
    rows = chosen_rows(settings.magnitudes, settings.shares)
    results = run_study(STUDY, rows, settings)
    write_figure(settings.out / f"{STUDY}.png", results, panel_of_shares)


if __name__ == "__main__":
    main()
