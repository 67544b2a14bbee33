import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def test_snippets_run_in_order():
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(snippets) >= 3
    namespace = {}
    exec(snippets[0], namespace)
    for snippet in snippets[1:]:
        exec(snippet, namespace)
    assert namespace["probabilities"].shape == (5, 3)


READMES = [README, README.parent / "benchmarks" / "README.md"]
RESULTS = README.parent / "benchmarks" / "results"


@pytest.mark.parametrize("readme", READMES, ids=["project", "benchmarks"])
def test_tables_are_the_committed_results(readme):
    tables = re.findall(
        r"<!-- table: (\S+) -->\n(.*?)<!-- end -->", readme.read_text(), re.DOTALL
    )
    assert len(tables) >= 3
    for name, table in tables:
        assert table == (RESULTS / f"{name}.md").read_text(), name


def test_every_result_is_shown():
    text = "".join(readme.read_text() for readme in READMES)
    assert all(path.stem in text for path in RESULTS.glob("*.md"))


@pytest.mark.parametrize("readme", READMES, ids=["project", "benchmarks"])
def test_figures_exist(readme):
    figures = re.findall(r"!\[.*?\]\((.*?)\)", readme.read_text())
    assert figures
    assert all((readme.parent / figure).is_file() for figure in figures)


def test_commands_are_the_ones_that_ci_runs():
    ci = (README.parent / ".ci" / "run").read_text()
    assert "README.md" in ci
    assert 'pip install ".[test]" && python -m pytest' in README.read_text()
    assert 'pip install ".[benchmarks]" && python -m laplace_debiased' in (
        README.read_text()
    )
