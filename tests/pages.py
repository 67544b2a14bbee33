"""Run the Python snippets of pages.

    python -m tests.pages docs/start.md ...

writes what they print into the ``text`` blocks below them, figures that they save
beside the page, and snippets with a title into the file of that name.
"""

import contextlib
import io
import math
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

SNIPPET = re.compile(
    r'^```python(?: title="(?P<title>.*?)")?\n(?P<code>.*?)^```\n'
    r"(?:\n```text\n(?P<output>.*?)^```\n)?",
    re.DOTALL | re.MULTILINE,
)
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


class Ran(NamedTuple):
    """What the snippets of a page define, printed, and saved as figures."""

    namespace: dict
    outputs: list[str]
    figures: dict[str, bytes]


def snippets(page):
    return list(SNIPPET.finditer(page.read_text()))


def run(page):
    """Run a page's snippets in order, as one program in the present folder."""
    namespace, outputs = {"__name__": "__page__"}, []
    for snippet in snippets(page):
        above = "\n" * snippet.string.count("\n", 0, snippet.start("code"))
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            # errors tell their line in the page
            exec(compile(above + snippet["code"], str(page), "exec"), namespace)
        outputs.append(printed.getvalue())
    figures = {path.name: path.read_bytes() for path in Path().glob("*.png")}
    return Ran(namespace, outputs, figures)


def says_the_same(shown, printed):
    """Whether texts are equal, but for the last digits of numbers."""
    words = [NUMBER.sub("#", text).split() for text in (shown, printed)]
    numbers = [list(map(float, NUMBER.findall(text))) for text in (shown, printed)]
    return words[0] == words[1] and all(
        math.isclose(*pair, rel_tol=0.25, abs_tol=0.05)
        for pair in zip(*numbers, strict=True)
    )


def with_output(snippet, output):
    """Return a snippet's text with what it prints, if the page shows that."""
    if snippet["output"] is None:
        return snippet[0]
    first, last = (place - snippet.start() for place in snippet.span("output"))
    return f"{snippet[0][:first]}{output.rstrip()}\n{snippet[0][last:]}"


def write(page):
    """Run a page in an empty folder, and write what it gives."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        ran = run(page)
    outputs, text = iter(ran.outputs), page.read_text()
    page.write_text(SNIPPET.sub(lambda own: with_output(own, next(outputs)), text))
    for snippet in snippets(page):
        if snippet["title"]:
            (page.parent / snippet["title"]).write_text(snippet["code"])
    for name, figure in ran.figures.items():
        if f"({name})" in text:
            (page.parent / name).write_bytes(figure)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for path in [Path(name).resolve() for name in sys.argv[1:]]:
        torch.manual_seed(0)
        write(path)
