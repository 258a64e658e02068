"""A Sphinx extension: links for the names that signatures and docstrings write.

Annotations name types as their module imports them, some only for type checkers, so that Sphinx cannot know which
`Job` of ours is meant: this reads it off the module's imports. Names of other projects get no link, as the site is
built without a network. A name of ours that exists nowhere is an error of the build, as every broken reference is.
"""

from __future__ import annotations

import ast
import builtins
import functools
import importlib.util
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.roles import XRefRole
from sphinx.transforms.post_transforms import SphinxPostTransform

if TYPE_CHECKING:
    from collections.abc import Mapping

    from docutils.nodes import Element
    from sphinx.application import Sphinx
    from sphinx.domains.python import ObjectEntry
    from sphinx.environment import BuildEnvironment

OURS = "mergeguard"
SOFT = "mergeguard_soft"
"""Marks a reference that may lead nowhere."""
INSIDE = ("attribute", "method", "property")
"""What is named within a class."""


class KnownName(XRefRole):
    """A word between single backticks: code, and a link where an object has that name. It need not be a name."""

    def __init__(self) -> None:
        super().__init__(innernodeclass=nodes.literal)

    def process_link(
        self, env: BuildEnvironment, refnode: Element, has_explicit_title: bool, title: str, target: str
    ) -> tuple[str, str]:
        refnode["refdomain"], refnode["reftype"], refnode[SOFT] = "py", "obj", True
        refnode["py:module"] = env.ref_context.get("py:module")
        refnode["py:class"] = env.ref_context.get("py:class")
        return title, target.removesuffix("()")


class FullNames(SphinxPostTransform):
    """Before references are resolved: each name as a dotted one, where that is one of ours that is documented."""

    default_priority = 5

    def run(self, **_: Any) -> None:
        objects = self.env.domains.python_domain.objects
        for node in self.document.findall(pending_xref):
            if node.get("refdomain") == "py":
                full = next((name for name in candidates(node) if name in objects), None)
                if full is None and node.get(SOFT):
                    full = only_one(objects, node["reftarget"])
                if full is not None:
                    node["reftarget"], node["refspecific"] = full, False


def candidates(node: pending_xref) -> list[str]:
    """The dotted names that a reference may mean, the most likely one first."""
    module, target = node.get("py:module") or OURS, node["reftarget"]
    dotted = full_name(module, target)
    inside = [f"{module}.{node['py:class']}.{target}"] if node.get("py:class") else []
    return [*inside, f"{module}.{target}", dotted, definition(dotted)]


def only_one(objects: Mapping[str, ObjectEntry], target: str) -> str | None:
    """The only class, function or constant of ours that is called `target`, if that is no everyday word."""
    if target == target.lower() and "_" not in target:
        return None
    found = [name for name, entry in objects.items() if name.endswith(f".{target}") and entry.objtype not in INSIDE]
    return found[0] if len(found) == 1 else None


@functools.cache
def imported_names(module: str) -> dict[str, str]:
    """The dotted names that `module` imports anywhere in its file, by the names it gives them."""
    found: dict[str, str] = {}
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.asname or alias.name: alias.name for alias in node.names}
    return found


@functools.cache
def defined_names(module: str) -> set[str]:
    """The names that `module` assigns or makes classes of anywhere in its file, some only for type checkers."""
    found = list(ast.walk(_tree(module)))
    assigned = {node.id for node in found if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return assigned | {node.name for node in found if isinstance(node, ast.ClassDef)}


def _tree(module: str) -> ast.Module:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return ast.Module([], [])
    return ast.parse(Path(spec.origin).read_text(encoding="utf-8"))


@functools.cache
def written_names() -> frozenset[str]:
    """Every name that a module of ours imports or defines: what an inherited signature writes is another module's."""
    modules = [name for name in sys.modules if name.partition(".")[0] == OURS]
    return frozenset().union(*(defined_names(name) | set(imported_names(name)) for name in modules))


def full_name(module: str, target: str) -> str:
    """`target` as `module` writes it, as a dotted name from its package down."""
    first, _, rest = target.partition(".")
    start = imported_names(module).get(first, first)
    return f"{start}.{rest}" if rest else start


def definition(dotted: str) -> str:
    """Where an object that is re-exported under `dotted` is defined: `mergeguard.mergers.Merger` is of `.contract`."""
    module, _, name = dotted.rpartition(".")
    found = getattr(sys.modules.get(module), name, None) if module.startswith(OURS) else None
    home = getattr(found, "__module__", None)
    return f"{home}.{getattr(found, '__qualname__', name)}" if isinstance(home, str) else dotted


def resolve(_app: Sphinx, _env: BuildEnvironment, node: pending_xref, content: Element) -> Element | None:
    """The bare text of a name that has no page here; None if it is no name at all."""
    if node.get("refdomain") != "py":
        return None
    if node.get(SOFT):
        return content
    target = node["reftarget"]
    others = [name for name in candidates(node) if "." in name and name.split(".")[0] != OURS]
    return content if others or hasattr(builtins, target) or target.rpartition(".")[2] in written_names() else None


_ABSOLUTE = re.compile(r"\|(?=\S)|(?<=\S)\|")
_SEVERAL = re.compile(r"^:ivar [^:]+:")
_UNREADABLE = re.compile(r"=\s?<[^<>]*(<[^<>]*>)?[^<>]*>")
_hidden: dict[int, list[str]] = {}


def hide(_app: Sphinx, what: str, _name: str, _object: object, _options: object, lines: list[str]) -> None:
    """Keep a variable's docstring from napoleon, which would take what precedes a colon in it for a type."""
    if what in ("attribute", "data", "property"):
        _hidden[id(lines)] = lines[:]
        lines[:] = ["."]


def show(_app: Sphinx, _what: str, _name: str, _object: object, _options: object, lines: list[str]) -> None:
    """Put back what `hide` took, let a line be about several attributes, and `|x|` an absolute value."""
    lines[:] = _hidden.pop(id(lines), lines)
    lines[:] = [bars(_SEVERAL.sub(lambda match: match[0].replace(", ", ","), line)) for line in lines]


def bars(line: str) -> str:
    """`line` with the bars of absolute values escaped, outside of code: `|x|` would be a substitution."""
    parts = line.split("`")
    return "`".join(part if index % 2 else _ABSOLUTE.sub(r"\|", part) for index, part in enumerate(parts))


def simplify(
    _app: Sphinx, _what: str, _name: str, _object: object, _options: object, signature: str | None, returns: str | None
) -> tuple[str, str | None] | None:
    """Write `...` for defaults that no parser of Python could read, such as `<factory>`."""
    return None if signature is None else (_UNREADABLE.sub("= ...", signature), returns)


def skip(_app: Sphinx, what: str, _name: str, member: object, _skipped: bool, _options: object) -> bool | None:
    """Leave out what a module imports from other projects."""
    home = getattr(member, "__module__", None)
    return True if what == "module" and callable(member) and str(home).partition(".")[0] != OURS else None


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the role, the resolver, and what is done to docstrings before and after napoleon (at 500)."""
    app.add_role("known", KnownName())
    app.add_post_transform(FullNames)
    app.connect("missing-reference", resolve)
    app.connect("autodoc-process-docstring", hide, priority=400)
    app.connect("autodoc-process-docstring", show, priority=600)
    app.connect("autodoc-process-signature", simplify)
    app.connect("autodoc-skip-member", skip)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
