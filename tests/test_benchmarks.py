"""The benchmarks' own parts; what they measure is in their results."""

import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from laplace_debiased.comparison.environment import default_data_root

FOLDER = Path(__file__).parents[1] / "benchmarks"
MODULES = sorted(path.stem for path in FOLDER.glob("*.py"))


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)


def test_all_benchmarks_can_be_imported():
    program = f"import {', '.join(MODULES)}"
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=FOLDER,
        env={"PYTHONPATH": str(FOLDER.parent)},
        check=True,
    )


def test_an_interrupted_study_resumes_where_it_stopped(benchmarks, tmp_path):
    from common import Progress

    path = tmp_path / "new" / "study.json"
    calls = []

    def measure():
        calls.append(1)
        return {"value": len(calls)}

    for _ in range(2):
        assert Progress(path).run("first", measure) == {"value": 1}
    assert Progress(path).run("second", measure) == {"value": 2}
    Progress(path).clear()
    assert not path.exists()


QUICK = [
    ("sampling_quality", "estimators"),
    ("sampling_quality", "settings"),
    ("sampling_quality", "fractions"),
    ("sampling_quality", "fractions", "--magnitudes", "ggn", "--shares", "0.3", "auto"),
    ("bias", "directions"),
    ("bias", "dependence"),
    ("newton_step",),
    ("optimization",),
    ("many_classes",),
    ("calibration",),
    ("pipeline",),
    ("full_data_cost",),
]


@pytest.mark.skipif(
    not (default_data_root() / "FashionMNIST").is_dir(),
    reason="FashionMNIST is not in the folder that LAPLACE_DEBIASED_DATA names",
)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("command", QUICK, ids=" ".join)
def test_studies_run_in_a_quick_mode(benchmarks, monkeypatch, tmp_path, command):
    study, *arguments = command
    monkeypatch.setattr(
        sys, "argv", [study, *arguments, "--quick", "--out", str(tmp_path)]
    )
    import_module(study).main()
    written = {path.suffix for path in tmp_path.iterdir()}
    assert {".json", ".md"} <= written <= {".json", ".md", ".png"}
    assert not list(tmp_path.glob("*.partial.json"))


def test_a_study_is_restricted_to_some_rows(benchmarks):
    from argparse import Namespace

    from sampling_quality import STUDIES, chosen_rows

    def labels(study, magnitudes, shares):
        chosen = Namespace(study=study, magnitudes=magnitudes, shares=shares)
        return list(chosen_rows(chosen))

    assert labels("fractions", ["ggn"], ["0.3", "auto"]) == ["ggn: 0.3", "ggn: auto"]
    assert len(STUDIES["fractions"]) == 20
    of_kfac = labels("estimators", ["kfac"], ["0.3"])
    assert of_kfac == [k for k in STUDIES["estimators"] if k.startswith("kfac")]


def test_tables_are_put_between_their_marks(benchmarks, tmp_path, monkeypatch):
    import readme

    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "cost.md").write_text("| a |\n")
    monkeypatch.setattr(readme, "BENCHMARKS", tmp_path)
    text = "before\n<!-- table: cost -->\nold\n<!-- end -->\nafter\n"
    expected = "before\n<!-- table: cost -->\n| a |\n<!-- end -->\nafter\n"
    assert readme.filled(text) == readme.filled(expected) == expected


def test_results_say_which_commit_gave_them():
    for path in (FOLDER / "results").glob("*.json"):
        commit = json.loads(path.read_text())["environment"]["commit"]
        assert re.fullmatch("[0-9a-f]{7,}", commit), path.name  # and not dirty


@pytest.mark.parametrize("path", sorted(FOLDER.glob("checkpoints/*/*.json")), ids=str)
def test_checkpoints_are_those_of_the_recipes(benchmarks, path):
    from networks import PAIR_RECIPES, RECIPES, trained
    from safetensors.torch import load_file

    name, seed = path.stem.rsplit("-", 1)
    recipe = (RECIPES | PAIR_RECIPES)[name]
    record = json.loads(path.read_text())
    assert record["epochs"] == recipe.epochs == len(record["training_loss"])
    assert record["test_accuracy"] > 0.85
    model = trained(name, path.parent.name, Path("unused"), int(seed))
    assert sum(p.numel() for p in model.parameters()) == record["parameters"]
    assert not model.training
    stored = load_file(path.with_suffix(".safetensors"))
    assert stored.keys() == model.state_dict().keys()


def test_data_of_many_classes(benchmarks, monkeypatch):
    import networks
    import torch
    from torch.utils.data import TensorDataset

    X, y = torch.rand(12, 1, 4, 4), torch.arange(12) % 10
    fake = networks.Data(TensorDataset(X, y), X[:5], y[:5])
    monkeypatch.setattr(networks, "load", lambda *_: fake)
    data = networks.problem_data(networks.PAIRS, Path("unused"))
    images, labels = data.train.tensors
    assert images.shape == (networks.NUM_TRAIN, 1, 4, 8)
    assert labels.max() < 100
    left = (X == images[0, :, :, :4]).flatten(1).all(1).nonzero()[0]
    assert labels[0] // 10 == y[left]
