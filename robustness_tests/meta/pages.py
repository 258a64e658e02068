"""Markdown pages as their readers see them, and those of the checkout, for tests that run what they say."""

from __future__ import annotations

import re
from pathlib import Path

from markdown_it import MarkdownIt

PARSER = MarkdownIt("commonmark").enable("table")
ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def code_blocks(text: str, language: str) -> list[str]:
    """The contents of a page's fenced code blocks in `language`, from top to bottom."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def tables(text: str) -> list[list[list[str]]]:
    """Every table as a Markdown reader sees it: rows of cells' source."""
    found: list[list[list[str]]] = []
    for token in PARSER.parse(text):
        match token.type:
            case "table_open":
                found.append([])
            case "tr_open":
                found[-1].append([])
            case "inline" if found and token.level >= 4:
                found[-1][-1].append(token.content)
    return found
