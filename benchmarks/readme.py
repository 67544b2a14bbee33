"""Put the committed results' tables into the READMEs.

    python benchmarks/readme.py

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``, and is that of
``benchmarks/results/NAME.md``.
"""

from __future__ import annotations

import re
from pathlib import Path

BENCHMARKS = Path(__file__).parent
READMES = (BENCHMARKS.parent / "README.md", BENCHMARKS / "README.md")
_TABLE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """Return a README's text with the present tables."""

    def table(match: re.Match) -> str:
        start, name, end = match.groups()
        content = (BENCHMARKS / "results" / f"{name}.md").read_text()
        return f"{start}{content}{end}"

    return _TABLE.sub(table, text)


if __name__ == "__main__":
    for path in READMES:
        path.write_text(filled(path.read_text()))
