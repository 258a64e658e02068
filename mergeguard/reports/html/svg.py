"""Matplotlib's SVG made fit for a page: colours from the page's variables, text as text, no style of its own.

Matplotlib writes colours into `style` attributes, which a strict content security policy refuses and which a dark page
cannot change, and gives every figure the same ids. Here styles become presentation attributes, the colours of `ROLES`
become variables of the page's style sheet, and ids get a prefix.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

if TYPE_CHECKING:
    from collections.abc import Iterator

SKILL_COLOURS = 4
"""Skills that have a colour of their own; further ones use the same colours again, with other dashes."""
_NAMES = ("ink", "muted", "rule", "paper", "line", "survived", "overclaims", "lost", "undecidable")
_SKILLS = tuple(f"skill-{i}" for i in range(SKILL_COLOURS))
ROLES = {name: f"#0100{i:02x}" for i, name in enumerate((*_NAMES, *_SKILLS))}
"""What a colour is for, by the name of the page's variable, and the stand-in that is drawn with."""

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_HREF = f"{{{_XLINK}}}href"
_VARIABLES = {stand_in: f"var(--{name})" for name, stand_in in ROLES.items()}
_SIZE = re.compile(r"(?:^|\s)(?P<size>[\d.]+px)\b")
_NUMBER = re.compile(r"-?\d+\.\d{3,}")


def for_page(source: str, *, prefix: str, label: str) -> str:
    """The `<svg>` element alone, an image called `label`, its ids beginning with `prefix`.

    Raises:
        ValueError: a colour is none of `ROLES`, so that it would stay as it is in dark mode.
    """
    root = ET.fromstring(source)  # noqa: S314 - matplotlib wrote it, in this process
    used = {match for element in root.iter() for match in _references(element)}
    for element in root.iter():
        for child in [child for child in element if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style")]:
            element.remove(child)
        if (own := element.get("id")) is not None:
            if own in used:
                element.set("id", f"{prefix}{own}")
            else:
                del element.attrib["id"]
        if _HREF in element.attrib:
            element.set("href", f"#{prefix}{element.attrib.pop(_HREF).removeprefix('#')}")
        if (clip := element.get("clip-path")) is not None:
            element.set("clip-path", clip.replace("url(#", f"url(#{prefix}"))
        for name, value in _presentation(element.attrib.pop("style", "")):
            element.set(name, value)
        for name in ("fill", "stroke"):
            if name in element.attrib:
                element.set(name, _variable(element.attrib[name]))
        for name in ("d", "transform", "x", "y"):
            if name in element.attrib:
                element.set(name, _NUMBER.sub(lambda match: f"{float(match[0]):.2f}", element.attrib[name]))
        element.tail = None
        if element.text is not None and not element.text.strip():
            element.text = None
        element.tag = element.tag.removeprefix(f"{{{_SVG}}}")
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib.update({"role": "img", "aria-label": label})
    return ET.tostring(root, encoding="unicode")


def _references(element: ET.Element) -> Iterator[str]:
    """Ids that the element refers to."""
    if _HREF in element.attrib:
        yield element.attrib[_HREF].removeprefix("#")
    if (clip := element.get("clip-path")) is not None:
        yield clip.removeprefix("url(#").removesuffix(")")


def _presentation(style: str) -> Iterator[tuple[str, str]]:
    """The declarations of a `style` as attributes that SVG has; of a font the size alone, the page gives the rest."""
    for declaration in filter(None, (part.strip() for part in style.split(";"))):
        name, _, value = (part.strip() for part in declaration.partition(":"))
        if name == "font":
            size = _SIZE.search(value)
            assert size is not None, value
            yield "font-size", size["size"]
        elif name == "font-family":
            continue
        elif name != "opacity" or value != "1":
            yield name, value


def _variable(colour: str) -> str:
    if colour == "none":
        return colour
    if colour not in _VARIABLES:
        raise ValueError(f"the plot has the colour {colour}, which is none of {', '.join(ROLES)}")
    return _VARIABLES[colour]
