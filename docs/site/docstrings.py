"""Docstrings as the reference shows them: their roles as Markdown."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, NameResolutionError, Object

_FORMULA = re.compile(r":math:`([^`]+)`")
_NAME = re.compile(r":(?:class|meth|func|attr|mod):`(~?)([^`]+)`")


class Roles(Extension):
    """Turns names into links, and formulas into those of Markdown."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite an object's docstring."""
        if obj.docstring is None:
            return

        def link(match: re.Match[str]) -> str:
            short, name = match.groups()
            shown = name.rpartition(".")[2] if short else name
            return (
                f"<autoref identifier={_path(obj, name)!r} optional>"
                f"<code>{shown}</code></autoref>"
            )

        text = _NAME.sub(link, _FORMULA.sub(_formula, obj.docstring.value))
        # of these sections, griffe knows the plural alone
        text = re.sub(r"^Example:$", "Examples:", text, flags=re.M)
        obj.docstring.value = text.replace("::\n", ":\n")


def _formula(match: re.Match[str]) -> str:
    """Return a formula on one line."""
    return f"${' '.join(match[1].split())}$"


def _path(obj: Object, name: str) -> str:
    """Return the full path of a name that an object's docstring uses."""
    try:
        return obj.resolve(name)
    except NameResolutionError:
        return name
