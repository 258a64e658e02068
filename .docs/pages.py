"""The site's pages, made from the README and its neighbours, from docstrings, and from what is registered.

Every page is Markdown. Nothing here is prose of its own: what a page says is written beside the code it is about.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import registry_pages
from command_page import command_page

import mergeguard

if TYPE_CHECKING:
    from collections.abc import Iterator

DOCUMENTS = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "fixtures/results/README.md": "results.md",
    "fixtures/thirdparty_scheme/README.md": "example-scheme.md",
}
"""Pages of the checkout, and where each is on the site."""

TUTORIALS = {
    "testing": "Gate a scheme: for researchers",
    "ownership": "Keep and prove ownership: for owners",
    "reports": "Compare protections: for reviewers",
}
CONCEPTS = {
    "worlds": "Worlds and skills",
    "protections": "Protections and evidence",
    "mergers": "Mergers and coefficients",
    "checkpoints": "Checkpoints",
    "verification": "Readings and statistics",
    "matrix": "The matrix and its verdicts",
}
"""Packages whose docstring is a page, by their names in `mergeguard`."""

WITHOUT_PAGE = {"mergeguard.__main__", "mergeguard.cli", "mergeguard.commands"}
"""Of these the page on the command line speaks."""
ABOUT = {"mergeguard", *(f"mergeguard.{name}" for name in (*TUTORIALS, *CONCEPTS))}
_LINK = re.compile(r"\[([^\[\]]+)\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")


def write_pages(root: Path, folder: Path) -> None:
    """Make every page of the checkout at `root` in `folder`, which holds nothing else afterwards."""
    shutil.rmtree(folder, ignore_errors=True)
    pages = dict(_pages(root))
    files = {file for text in pages.values() for file in re.findall(r"\]\(/files/([^)#\s]+)\)", text)}
    for name, text in pages.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    for file in sorted(files):
        path = folder / "files" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / file, path)


def _pages(root: Path) -> Iterator[tuple[str, str]]:
    for source, page in DOCUMENTS.items():
        text = on_site((root / source).read_text(encoding="utf-8"), PurePosixPath(source).parent, root)
        yield page, f"{text}\n{contents()}" if page == "index.md" else text
    for folder, titles in (("tutorials", TUTORIALS), ("concepts", CONCEPTS)):
        for package, title in titles.items():
            yield f"{folder}/{package}.md", docstring_page(title, f"mergeguard.{package}")
    yield "command-line.md", command_page()
    yield from registry_pages.protection_pages(root)
    yield from registry_pages.merger_pages(root)
    yield from api_pages(root / "mergeguard")


def contents() -> str:
    """The site's table of contents, which the first page holds and the side bar shows."""
    parts = {
        "Tutorials": [f"/tutorials/{package}" for package in TUTORIALS],
        "Concepts": [f"/concepts/{package}" for package in CONCEPTS],
        "Schemes and methods": ["/protections/index", "/mergers/index", "/results", "/example-scheme"],
        "Reference": ["/command-line", "/api/index"],
        "Project": ["/contributing", "/changelog"],
    }
    return "".join(contents_list(entries, caption) for caption, entries in parts.items())


def on_site(text: str, folder: PurePosixPath, root: Path) -> str:
    """A page of the checkout with its links to other files turned into links within the site.

    Args:
        text: Markdown.
        folder: the page's folder in the checkout, from which its links start.
        root: the checkout.

    Raises:
        FileNotFoundError: a link leads to nothing.
    """

    def place(match: re.Match[str]) -> str:
        target = os.path.normpath(folder / match[2]).replace(os.sep, "/")
        text, anchor = match[1], match[3] or ""
        if target in DOCUMENTS:
            return f"[{text}](/{DOCUMENTS[target]}{anchor})"
        if (root / target).is_dir():
            inside = DOCUMENTS.get(f"{target}/README.md")
            return f"[{text}](/{inside})" if inside else text
        if not (root / target).is_file():
            raise FileNotFoundError(f"a page in {folder} links to {match[2]}, which the checkout lacks")
        if target.startswith("mergeguard/") and target.endswith(".py"):
            return f"{{py:mod}}`{text} <{module_name(root / target, root / 'mergeguard')}>`"
        return f"[{text}](/files/{target})"

    def prose(part: str) -> str:
        # A heading is repeated in tables of contents, where it cannot hold a link.
        plain = re.sub(r"^#.*$", lambda line: _LINK.sub(r"\1", line[0]), part, flags=re.MULTILINE)
        return _LINK.sub(place, plain)

    parts = re.split(r"(^ *```.*?^ *```$)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if index % 2 else prose(part) for index, part in enumerate(parts))


def docstring_page(title: str, module: str) -> str:
    """A page that is a package's docstring."""
    about = rst(f".. automodule:: {module}", "   :no-members:")
    return f"# {title}\n\n{about}\nIts modules: [{module}](/api/{module.rpartition('.')[2]}.md).\n"


def api_pages(package: Path) -> Iterator[tuple[str, str]]:
    """A page for each package, with all modules directly in it, from the names of the files alone."""
    packages = ["", *sorted(path.parent.name for path in package.glob("*/__init__.py"))]
    packages = [name for name in packages if f"mergeguard.{name}" not in WITHOUT_PAGE]
    for name in packages:
        modules = [
            dotted
            for path in sorted((package / name).glob("*.py" if not name else "**/*.py"))
            if path.stat().st_size and (dotted := module_name(path, package)) not in WITHOUT_PAGE | ABOUT
        ]
        parts = [f"## {module.removeprefix('mergeguard.')}\n\n{rst(f'.. automodule:: {module}')}" for module in modules]
        yield (f"api/{name}.md", package_page(name, parts)) if name else ("api/index.md", front(parts, packages[1:]))


def module_name(path: Path, package: Path) -> str:
    """The dotted name of a file of the package."""
    parts = ("mergeguard", *path.relative_to(package).with_suffix("").parts)
    return ".".join(parts).removesuffix(".__init__")


def front(parts: list[str], packages: list[str]) -> str:
    """The first page of the API: the public names, what all packages share, and the list of packages."""
    names = [f"- {{py:obj}}`mergeguard.{name}`" for name in mergeguard.__all__ if not name.startswith("_")]
    about = rst(".. automodule:: mergeguard", "   :no-members:")
    contents = contents_list([f"/api/{name}" for name in packages], hidden=False)
    return "\n".join(("# Python API", "", about, "Loaded on first use:", "", *names, "", contents, "", *parts))


def package_page(name: str, parts: list[str]) -> str:
    """A package with its modules."""
    folder = next(folder for folder, titles in (("tutorials", TUTORIALS), ("concepts", CONCEPTS)) if name in titles)
    return "\n".join((f"# {name}", "", f"What it is for: [{name}](/{folder}/{name}.md).", "", *parts))


def rst(*lines: str) -> str:
    """A part of a page of Markdown in reStructuredText, which docstrings are written in."""
    return "\n".join(("```{eval-rst}", *lines, "```", ""))


def contents_list(entries: list[str], caption: str = "", *, hidden: bool = True) -> str:
    """A part of the site's table of contents."""
    options = [f":caption: {caption}"] * bool(caption) + [":hidden:"] * hidden
    return "\n".join(("", "```{toctree}", ":maxdepth: 1", *options, "", *entries, "```", ""))
