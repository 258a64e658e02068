"""Links of a built site: does every one inside of it lead to a file that is there, and to an anchor in that file?"""

from __future__ import annotations

from html.parser import HTMLParser
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from pathlib import Path

_TARGETS = {"href", "src"}


class _Page(HTMLParser):
    """What a page links to, and what can be linked to in it."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = {"", "top"}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value is not None and (name == "id" or (tag == "a" and name == "name")):
                self.anchors.add(value)
            elif value is not None and name in _TARGETS:
                self.links.append(value)


def broken_links(folder: Path) -> list[str]:
    """Every link from a page in `folder` to a file or an anchor that is not there, or out of the folder; one a line.

    Links to other hosts are not looked at: `build.py --external` does that.

    Raises:
        ValueError: the folder has no page.
    """
    pages = {path.resolve(): _read(path) for path in sorted(folder.rglob("*.html"))}
    if not pages:
        raise ValueError(f"{folder} has no page; expected a built site")
    return [
        f"{path.relative_to(folder.resolve())}: {link}"
        for path, page in pages.items()
        for link in dict.fromkeys(page.links)
        if not _leads_somewhere(link, path, pages, folder.resolve())
    ]


def _read(path: Path) -> _Page:
    page = _Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def _leads_somewhere(link: str, path: Path, pages: dict[Path, _Page], folder: Path) -> bool:
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return parts.scheme != "file"
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if target.is_dir():
        target /= "index.html"
    if not target.is_relative_to(folder) or not target.is_file():
        return False
    return target not in pages or unquote(parts.fragment) in pages[target].anchors
