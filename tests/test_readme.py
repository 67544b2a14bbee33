import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def test_snippets_run_in_order():
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(snippets) >= 3
    namespace = {}
    preamble = (
        "direction_loader = DataLoader(TensorDataset(X, y), 64)\n"
        "other_loader = DataLoader(TensorDataset(X.clone(), y.clone()), 64)\n"
        "more_data = other_loader\n"
    )
    exec(snippets[0] + preamble, namespace)
    for snippet in snippets[1:]:
        exec(snippet, namespace)
    assert namespace["probabilities"].shape == (5, 3)


RESULTS = README.parent / "benchmarks" / "results"


@pytest.mark.parametrize(
    "name", ["digits", "fashion-mnist", "fit_cost", "prediction_cost"]
)
def test_tables_are_the_committed_results(name):
    assert (RESULTS / f"{name}.md").read_text() in README.read_text()


def test_figures_exist():
    figures = re.findall(r"!\[.*?\]\((.*?)\)", README.read_text())
    assert figures
    assert all((README.parent / figure).is_file() for figure in figures)


def test_commands_are_the_ones_that_ci_runs():
    ci = (README.parent / ".ci" / "run").read_text()
    assert "README.md" in ci
    assert 'pip install ".[test]" && python -m pytest' in README.read_text()
    assert 'pip install ".[benchmarks]" && python -m laplace_debiased' in (
        README.read_text()
    )
