"""Reads a page of HTML strictly, for tests of what it says: tags must nest, ids must be unique."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

VOID = frozenset({"meta", "link", "input", "wbr", "br", "img"})

PARTS = frozenset({"td", "th", "dt", "dd", "li", "caption", "div"})


@dataclass
class Element:
    """A tag with its attributes and what is in it."""

    tag: str
    attributes: dict[str, str]
    children: list[Element | str] = field(default_factory=list)

    def all(self, tag: str | None = None, kind: str | None = None) -> Iterator[Element]:
        """Elements inside of this one, in order, of a tag and a class if they are given."""
        for child in self.children:
            if isinstance(child, Element):
                if tag in (None, child.tag) and kind in (None, *child.kinds):
                    yield child
                yield from child.all(tag, kind)

    def one(self, tag: str | None = None, kind: str | None = None) -> Element:
        """The first of them."""
        return next(self.all(tag, kind))

    @property
    def kinds(self) -> list[str]:
        return self.attributes.get("class", "").split()

    @property
    def text(self) -> str:
        """All text inside, runs of space as one, with one between the parts of a table or a list."""
        return " ".join(self._spaced().split())

    def _spaced(self) -> str:
        inside = "".join(child if isinstance(child, str) else child._spaced() for child in self.children)
        return f" {inside} " if self.tag in PARTS else inside

    @property
    def raw(self) -> str:
        return "".join(child if isinstance(child, str) else child.raw for child in self.children)

    def rows(self) -> list[list[str]]:
        """The texts of a table's rows, its head included."""
        return [[cell.text for cell in row.all() if cell.tag in ("th", "td")] for row in self.all("tr")]


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"<{tag}> has an attribute twice"
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        opened = self.open.pop()
        assert opened.tag == tag, f"<{opened.tag}> ends as </{tag}>"

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")


def read_html(text: str) -> Element:
    """The document, its tags nested and its ids unique, else an AssertionError."""
    reader = _Reader()
    reader.feed(text)
    reader.close()
    assert [element.tag for element in reader.open] == [""], "a tag is not closed"
    ids = [element.attributes["id"] for element in reader.root.all() if "id" in element.attributes]
    assert len(ids) == len(set(ids)), "an id occurs twice"
    return reader.root
