import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [
    README,
    ROOT / "benchmarks" / "README.md",
    *sorted(ROOT.glob("benchmarks/results/*/README.md")),
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/*.md")),
]


def shown_tables(page):
    return re.findall(
        r"<!-- table: (\S+) -->\n(.*?)<!-- end -->", page.read_text(), re.DOTALL
    )


def after_snippets(page):
    """What the snippets of a page define, run in order."""
    namespace = {}
    for snippet in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(snippet, namespace)
    return namespace


def test_snippets_run_in_order():
    assert after_snippets(README)["probabilities"].shape == (5, 3)


def test_snippets_of_the_knobs_run_in_order():
    found = after_snippets(ROOT / "docs" / "knobs.md")
    assert found["worst"] < 0.2
    low, high = found["interval"]
    assert (low < high).all()
    assert found["of_tokens"].shape == (2, 5, 3)


SCALE = ROOT / "docs" / "scale.md"


def test_snippets_of_scale_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = after_snippets(SCALE)
    assert found["probabilities"].shape == (5, 2)
    assert found["merged"].n_data == 400
    assert list((tmp_path / "fit-of-tuesday").iterdir())


def test_the_script_of_scale_runs_under_torchrun(tmp_path):
    snippet = re.search(r"```python\n(# script.py.*?)```", SCALE.read_text(), re.DOTALL)
    script = tmp_path / "script.py"
    script.write_text(snippet[1])
    options = ("--standalone", "--nproc-per-node=2")
    launched = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "torch.distributed.run",
            *options,
            script,
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    namespace = {}
    with contextlib.redirect_stdout(io.StringIO()) as alone:
        exec(snippet[1], namespace)
    first, second = map(float, re.findall(r"-\d+\.\d{6}", launched.stdout))
    assert first == second
    assert first == pytest.approx(float(alone.getvalue()), rel=1e-5)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_tables_are_the_committed_results(page):
    for path, table in shown_tables(page):
        assert table == (page.parent / f"{path}.md").read_text(), path


def test_every_result_is_shown():
    shown = {
        (page.parent / f"{path}.md").resolve()
        for page in PAGES
        for path, _ in shown_tables(page)
    }
    results = {
        path
        for path in (ROOT / "benchmarks" / "results").glob("*/*.md")
        if path.name != "README.md"
    }
    assert {path.resolve() for path in results} == shown


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_figures_lead_somewhere(page):
    targets = re.findall(r"\]\((.*?)\)", page.read_text())
    for target in targets:
        if "://" not in target:
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_readme_is_short_and_has_a_figure_and_a_table():
    text = README.read_text()
    assert len(text.splitlines()) <= 150
    assert len(re.findall(r"!\[.*?\]\(.*?\)", text)) == len(shown_tables(README)) == 1


def test_commands_are_the_ones_that_ci_runs():
    ci = (ROOT / ".ci" / "run").read_text()
    assert "README.md" in ci
    lines = README.read_text().splitlines()
    assert 'pip install ".[test]" && python -m pytest' in lines
    assert 'pip install ".[benchmarks]" && python -m laplace_debiased' in lines
