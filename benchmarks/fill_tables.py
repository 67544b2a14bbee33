"""Put the committed results' tables into the pages that show them.

    python benchmarks/fill_tables.py

A table stands between ``<!-- table: PATH -->`` and ``<!-- end -->``, and is that of the
file ``PATH.md`` beside the page.
"""

from __future__ import annotations

import re
from pathlib import Path

BENCHMARKS = Path(__file__).parent
PAGES = (
    BENCHMARKS.parent / "README.md",
    BENCHMARKS / "README.md",
    *sorted(BENCHMARKS.glob("results/*/README.md")),
    *sorted(BENCHMARKS.parent.glob("docs/*.md")),
)
_TABLE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(page: Path) -> str:
    """Return a page's text with the present tables."""

    def table(match: re.Match) -> str:
        start, path, end = match.groups()
        content = (page.parent / f"{path}.md").read_text()
        return f"{start}{content}{end}"

    return _TABLE.sub(table, page.read_text())


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page))
