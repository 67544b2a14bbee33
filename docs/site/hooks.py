"""What the site's build adds to mkdocs.

The site's tree is the repository's: pages of docs/ and those outside of it keep their
paths, so that a link works on the code host and in the site. Studies are listed as
their overview lists them. Formulas become MathML, which browsers show without scripts.
"""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
# pages, figures, and what pages link to
OUTSIDE = (
    "*.md",
    "LICENSE",
    "CITATION.cff",
    "benchmarks/README.md",
    "benchmarks/results/*/README.md",
    "benchmarks/results/*/*.png",
    "benchmarks/*.py",
    "benchmarks/shared/*.py",
    "laplace_debiased/*/*.py",
)
_STUDY = re.compile(r"\[([^]]+)\]\((results/[^/]+/README\.md)\)")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)


def on_config(config: MkDocsConfig) -> None:
    """List the studies in the order of the benchmarks' page."""
    overview = "benchmarks/README.md"
    studies = _STUDY.findall((ROOT / overview).read_text())
    pages = [{title: f"benchmarks/{path}"} for title, path in studies]
    for entry in config.nav or []:
        if overview in entry.values():
            entry["Benchmarks"] = [overview, *pages]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Give each file the path that it has in the repository."""
    own = [file for file in files if file.src_dir == config.docs_dir]
    paths = [
        *(Path(config.docs_dir) / file.src_uri for file in own),
        *(path for pattern in OUTSIDE for path in sorted(ROOT.glob(pattern))),
    ]
    of_theme = [file for file in files if file not in own]
    return Files([*of_theme, *(_file(path, config) for path in paths)])


def on_page_content(html: str, **_: Any) -> str:
    """Set a page's formulas, and keep numbers with their errors in a line."""
    return _FORMULA.sub(_mathml, html).replace(
        " ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}"
    )


def _file(path: Path, config: MkDocsConfig) -> File:
    name = path.relative_to(ROOT).as_posix()
    return File.generated(config, name, abs_src_path=str(path))


def _mathml(match: re.Match[str]) -> str:
    display = "block" if match[1] == "div" else "inline"
    formula = convert(unescape(match[2]), display=display)
    # a transpose sign is no operator, which browsers would stretch
    return formula.replace("<mo>&#x022A4;</mo>", "<mi>&#x022A4;</mi>")
