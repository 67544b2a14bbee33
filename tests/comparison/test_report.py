import json

import pytest

from laplace_debiased.comparison.experiment import ESTIMATORS, MAP, PRIOR_PRECISIONS
from laplace_debiased.comparison.posteriors import FULL_DATA
from laplace_debiased.comparison.report import reliabilities, table, write_numbers
from tests.comparison.runs import LABELS, NLLS, runs


def cells(text):
    """The table as ``{row: {column: cell}}``."""
    header, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
    )
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def test_table_has_means_and_standard_errors():
    rows = cells(table(runs(2)))
    assert list(rows) == list(ESTIMATORS)
    assert rows[FULL_DATA]["NLL"] == "0.400 ± 0.100"
    assert rows["single batch"]["NLL"] == "0.550 ± 0.150"
    assert rows["single batch"]["AUROC"] == "0.900 ± 0.000"
    assert rows["single batch"]["accuracy %"] == "66.7 ± 0.0"


def test_difference_to_full_data_is_paired_by_seed():
    rows = cells(table(runs(2)))
    # 0.1 and 0.2: their standard error is not that of unpaired values
    assert rows["single batch"]["NLL - full"] == "+0.150 ± 0.050"
    assert rows[MAP]["NLL - full"] == "-0.200 ± 0.100"


def test_table_leaves_out_what_does_not_exist():
    rows = cells(table(runs(2)))
    assert rows[FULL_DATA]["NLL - full"] == "-"
    assert rows[MAP]["prior precision"] == rows[MAP]["median fit s"] == "-"
    assert rows[MAP]["points"] == "0"
    assert rows["single batch"]["points"] == "40"


def test_single_seed_has_no_standard_error():
    assert "±" not in table(runs(1))


def test_table_lines_are_aligned():
    assert len({len(line) for line in table(runs(2)).splitlines()}) == 1


def test_reliability_joins_seeds():
    assert reliabilities(runs(2), LABELS) == reliabilities(runs(1), LABELS)


def test_numbers_are_written(tmp_path):
    path = tmp_path / "numbers.json"
    write_numbers(path, runs(2), LABELS, {"dataset": "digits"})
    numbers = json.loads(path.read_text())
    assert numbers["dataset"] == "digits"
    assert numbers["prior_precisions"] == list(PRIOR_PRECISIONS)
    run = numbers["runs"][len(ESTIMATORS) + 3]
    assert run["scores"]["nll"] == NLLS["single batch"][1]
    assert len(run["curve"]) == len(PRIOR_PRECISIONS)
    assert numbers["reliability"][MAP]["accuracy"] == pytest.approx([0, 1, 1])
    assert "probabilities" not in numbers["runs"][0]
