import json
import re
import subprocess
import sys

import pytest

from laplace_debiased import __main__ as job
from laplace_debiased.comparison.experiment import ESTIMATORS
from laplace_debiased.comparison.networks import RECIPES


def test_job_compares_estimators_on_digits(tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    job.main(["--seeds", "1", "--budget", "32", "--out", str(out)])

    captured = capsys.readouterr()
    rows = re.findall(r"^\| (\w[\w ,]*?) +\|", captured.out, re.MULTILINE)
    assert rows == list(ESTIMATORS)
    assert "seed 0" in captured.err
    assert "link_approx" not in captured.err

    numbers = json.loads((out / "digits.json").read_text())
    assert (numbers["training_points"], numbers["test_points"]) == (1078, 450)
    assert (numbers["budget"], numbers["seeds"]) == (32, 1)
    assert all(run["scores"]["accuracy"] > 0.95 for run in numbers["runs"])
    assert (out / "digits.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "svhn"], "argument --dataset: invalid choice: 'svhn'"),
        (["--budget", "1"], "argument --budget: must be an integer of at least 8"),
        (["--budget", "many"], "of at least 8, got 'many'"),
        (["--budget", "1079"], "must be at most 1078, the training points of digits"),
        (["--seeds", "0"], "argument --seeds: must be an integer of at least 1"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        job.main([*arguments, "--out", str(tmp_path)])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_folder_that_cannot_be_made_is_refused(tmp_path, capsys):
    occupied = tmp_path / "file"
    occupied.touch()
    with pytest.raises(SystemExit):
        job.main(["--out", str(occupied)])
    assert str(occupied) in capsys.readouterr().err


def test_missing_dataset_is_named(tmp_path, monkeypatch, capsys):
    def fail(dataset, root):
        raise FileNotFoundError(f"{dataset} is not in {root}")

    monkeypatch.setattr("laplace_debiased.comparison.data.load_split", fail)
    monkeypatch.setenv("LAPLACE_DEBIASED_DATA", str(tmp_path / "data"))
    with pytest.raises(SystemExit) as caught:
        job.main(["--dataset", "mnist", "--out", str(tmp_path)])
    assert caught.value.code == 2
    assert f"mnist is not in {tmp_path / 'data'}" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["netcal.metrics", "sklearn.datasets", "tueplots"])
def test_missing_extra_is_named(module, tmp_path, monkeypatch, capsys):
    package = "laplace_debiased.comparison"
    monkeypatch.setattr(package, sys.modules[package])  # the import below replaces it
    for name in list(sys.modules):
        if name.startswith(package):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit) as caught:
        job.main(["--out", str(tmp_path), "--budget", "9999"])
    assert caught.value.code == 1
    message = capsys.readouterr().err
    assert f'{module} is missing: pip install "laplace-debiased[benchmarks]"' in message


def test_help_names_every_dataset(capsys):
    with pytest.raises(SystemExit) as caught:
        job.main(["--help"])
    assert caught.value.code == 0
    help_text = capsys.readouterr().out
    assert all(dataset in help_text for dataset in RECIPES)


def test_library_does_not_load_the_comparison():
    code = (
        "import sys, laplace\n"
        "before = set(sys.modules)\n"  # some of it, with some versions
        "import laplace_debiased\n"
        "loaded = {'laplace_debiased.comparison', 'netcal', 'sklearn', 'tueplots'}\n"
        "loaded &= set(sys.modules) - before\n"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
