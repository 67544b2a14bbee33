"""The benchmarks' own parts; what they measure is in their results."""

import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from laplace_debiased.comparison.environment import default_data_root
from laplace_debiased.comparison.experiment import Run
from laplace_debiased.comparison.metrics import Scores
from laplace_debiased.comparison.report import table as main_table

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
    from argparse import Namespace

    from common import Progress

    settings = Namespace(out=tmp_path / "new", data_root="here", budget=8)
    calls = []

    def measure():
        calls.append(1)
        return {"value": len(calls)}

    for _ in range(2):
        assert Progress(settings, "study").run("first", measure) == {"value": 1}
    settings.data_root = "elsewhere"
    assert Progress(settings, "study").run("second", measure) == {"value": 2}
    settings.budget = 16
    with pytest.raises(SystemExit, match=r"'budget': 8.*'budget': 16"):
        Progress(settings, "study")
    settings.budget = 8
    Progress(settings, "study").clear()
    assert not list(settings.out.iterdir())


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
    ("peers",),
    ("scale",),
    ("full_data_cost",),
    ("network_cost",),
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


def test_networks_are_named_with_their_dataset(benchmarks, capsys):
    from common import add_problems, run_problems, study_parser

    parser = study_parser("A study.")
    add_problems(parser, ["mnist/MLP"])
    assert parser.parse_args([]).problems == [("mnist", "MLP")]
    settings = parser.parse_args(["--problems", "a/b", "c/d", "a/e"])
    results = run_problems(settings, lambda dataset, network, _: dataset + network)
    assert results == {"a": {"b": "ab", "e": "ae"}, "c": {"d": "cd"}}
    with pytest.raises(SystemExit):
        parser.parse_args(["--problems", "MLP"])
    assert "expected DATASET/NETWORK" in capsys.readouterr().err


def test_sampled_predictives_take_every_second_prior(benchmarks):
    from calibration import table

    def runs(*nll):
        return [{"nll": list(nll), "ece": [0.5 * value for value in nll]}]

    rows = {"glm": {"full data": runs(3.0, 2.0, 1.0)}, "nn": {"full data": runs(4, 5)}}
    lines = table({"mnist": {"MLP": rows}}, [1.0, 3.0, 10.0]).splitlines()
    assert lines[2:] == [
        "| mnist | MLP | glm | all | full data | 3.000 | 1.000 | 0.500 | 1.000 |",
        "| mnist | MLP | nn | all | full data | 4.000 | 5.000 | 2.500 | 4.000 |",
    ]


def runs_with_excess(*values):
    return [{"own": [1 + value] * 2, "others": [1.0, 1.0]} for value in values]


def test_trend_of_the_bias_uses_all_seeds(benchmarks):
    from bias import dependence_table, trend

    power = {str(v): runs_with_excess(*[0.1 * v**0.5] * 3) for v in (0, 1, 4, 9)}
    assert trend(power) == pytest.approx((0.5, 0), abs=1e-12)
    # means of 0.1 and 0.2: one of the seeds has no excess
    noisy = {"1": runs_with_excess(-0.1, 0.3), "2": runs_with_excess(0.1, 0.3)}
    slope, error = trend(noisy)
    assert slope == pytest.approx(1)
    assert error != error  # without the second seed there is no excess
    lines = dependence_table({"width": {**noisy, "4": runs_with_excess(-0.2, 0.1)}})
    assert lines.endswith("| width | 4 | 0.95 ± 0.21 | none: no excess at 4 |")


def test_error_of_the_trend_is_the_jackknife_over_seeds(benchmarks):
    import numpy as np
    from bias import trend

    excess = {"1": (0.1, 0.2, 0.3), "2": (0.5, 0.3, 0.4)}
    _, error = trend({v: runs_with_excess(*e) for v, e in excess.items()})
    slopes = []
    for k in range(3):
        first, second = (np.mean(np.delete(e, k)) for e in excess.values())
        slopes.append(np.log2(second / first))
    expected = np.sqrt(2 / 3 * np.sum(np.subtract(slopes, np.mean(slopes)) ** 2))
    assert error == pytest.approx(expected)


def test_optimizers_are_tuned_by_as_many_trials_and_edges_are_told(benchmarks):
    from optimization import METHODS

    for method in METHODS.values():
        assert len({tuple(settings.items()) for settings in method.settings}) == 20
    cg = METHODS["CG, debiased"]
    inside = {"damping": 1.0, "lr": 1.0, "adapt_damping": True}
    assert cg.at_edge(inside) == []
    assert cg.at_edge(inside | {"damping": 10.0}) == ["damping"]


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


# the functions that make tables, where they are not a study's only one
TABLES = {
    "sampling_estimators": "sampling_quality.table",
    "sampling_estimators_short": "sampling_quality.short_table",
    "sampling_fractions": "sampling_quality.table",
    "sampling_settings": "sampling_quality.table",
    "bias_directions": "bias.directions_table",
    "bias_dependence": "bias.dependence_table",
}
OPTIONS_OF_TABLES = {"calibration": ["priors"], "many_classes": ["exact_seconds"]}


def test_the_table_of_networks_is_made_of_their_records(benchmarks):
    import networks

    assert (FOLDER / "results" / "networks.md").read_text() == networks.table() + "\n"


@pytest.mark.parametrize(
    "path",
    sorted(set(FOLDER.glob("results/*.md")) - {FOLDER / "results" / "networks.md"}),
    ids=lambda path: path.stem,
)
def test_tables_are_made_of_the_numbers(benchmarks, path):
    name = path.stem
    numbers = path.with_name(f"{name.removesuffix('_short')}.json")
    report = json.loads(numbers.read_text())
    if "runs" in report:
        runs = [
            Run(**run | {"scores": Scores(**run["scores"]), "probabilities": None})
            for run in report["runs"]
        ]
        assert path.read_text() == main_table(runs) + "\n"
        return
    module, _, function = TABLES.get(name, f"{name}.table").partition(".")
    options = {
        option: report["settings"][option] for option in OPTIONS_OF_TABLES.get(name, ())
    }
    table = getattr(import_module(module), function)
    assert path.read_text() == table(report["results"], **options) + "\n"


@pytest.mark.parametrize(
    "path", sorted(FOLDER.glob("checkpoints/*/*.json")), ids=lambda path: path.stem
)
def test_checkpoints_are_those_of_the_recipes(benchmarks, path):
    from networks import recipe_for, trained
    from safetensors.torch import load_file

    name, seed = path.stem.rsplit("-", 1)
    recipe = recipe_for(name, path.parent.name)
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
    assert images.shape == (networks.NUM_PAIRS, 1, 4, 8)
    assert labels.max() < 100
    left = (X == images[0, :, :, :4]).flatten(1).all(1).nonzero()[0]
    assert labels[0] // 10 == y[left]


@pytest.mark.parametrize("dataset", ["fashion-mnist", "cifar100"])
def test_networks_fit_their_images(benchmarks, dataset):
    import torch
    from networks import IMAGES, full_size_recipes, recipes

    from laplace_debiased.rows.selection import select

    images = IMAGES[dataset]
    channels, size, classes = images
    for recipe in (recipes(images) | full_size_recipes(images)).values():
        with torch.device("meta"):
            model = recipe.build().eval()
            output = model(torch.empty(2, channels, size, size))
        assert output.shape == (2, classes)
        assert not select(model, list(model.parameters()))[1]


def test_full_size_networks_are_the_known_ones(benchmarks):
    from networks import IMAGES, full_size_recipes

    sizes = {
        name: sum(p.numel() for p in recipe.build().parameters())
        for name, recipe in full_size_recipes(IMAGES["cifar10"]).items()
    }
    # of the papers: about 1.4M, 11.2M and 8.9M
    assert sizes["ALL-CNN-C-96"] == 1_369_738
    assert sizes["ResNet-18-64"] == 11_173_962
    assert sizes["WideResNet-40-4"] == 8_949_210


def test_splits_are_those_of_the_paper(benchmarks, monkeypatch):
    import networks
    import torch
    from torch.utils.data import TensorDataset

    def load(dataset, root, num_test=1000):
        y = torch.arange(50_000)
        X = y[:, None].float()
        return networks.Data(TensorDataset(X, y), X[:num_test], y[:num_test])

    monkeypatch.setattr(networks, "load", load)
    root = Path("unused")
    train, inputs, _ = networks.problem_data("cifar10", root)
    validation, _ = networks.validation_data("cifar10", root)
    assert (len(train), len(validation), len(inputs)) == (40_000, 10_000, 10_000)
    assert not set(train.tensors[1].tolist()) & set(validation[:, 0].tolist())


@pytest.mark.filterwarnings("ignore")
def test_temperature_scaling_finds_the_temperature(benchmarks):
    from types import SimpleNamespace

    import torch
    from peers import Case, temperature_scaling

    torch.manual_seed(0)
    logits = 2 * torch.randn(2000, 4)
    y = logits.softmax(1).multinomial(1)[:, 0]
    overconfident = SimpleNamespace(model=lambda X: 3 * X)
    predict, _ = temperature_scaling(Case(overconfident, (logits, y), [], 0))
    assert torch.allclose(predict(logits).float(), logits.softmax(1), atol=0.03)
