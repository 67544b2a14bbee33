"""Check that each link and each image of the built site leads somewhere in it.

    python docs/site/check_links.py site

mkdocs checks those in Markdown; this also sees what themes, reference and hooks wrote.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """Links and anchors of a page.

    Args:
        path: Its HTML file.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.links: list[str] = []
        self.anchors = {""}
        self.feed(path.read_text())

    def handle_starttag(self, _tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what a tag links to, and how it can be linked to."""
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values.get("id", ""), values.get("name", "")}
        self.links += [values[name] for name in ("href", "src") if name in values]


def broken(site: Path) -> list[str]:
    """Return the links of a site that lead nowhere, as ``page -> link``.

    Args:
        site: The folder of the site.

    Raises:
        ValueError: If it has no pages.
    """
    pages = {path: Page(path) for path in site.resolve().rglob("*.html")}
    if not pages:
        raise ValueError(f"There are no pages in {site}.")
    return [
        f"{path.relative_to(site.resolve())} -> {link}"
        for path, page in pages.items()
        for link in page.links
        if not _leads_somewhere(path, link, pages)
    ]


def _leads_somewhere(path: Path, link: str, pages: dict[Path, Page]) -> bool:
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:  # of another site
        return True
    target = path
    if path.name == "404.html":  # it stands for pages of any depth
        return True
    if parts.path:
        target = (path.parent / unquote(parts.path)).resolve()
    if target in pages:
        return unquote(parts.fragment) in pages[target].anchors
    return target.is_file()


if __name__ == "__main__":
    found = broken(Path(sys.argv[1]))
    print("\n".join(found) or "All links of the site lead somewhere.")
    sys.exit(bool(found))
