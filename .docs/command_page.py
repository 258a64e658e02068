"""The page on the command line: what typer knows of each command, as its own documentation tool writes it."""

from __future__ import annotations

import typer
from typer.cli import get_docs_for_click
from typer.main import get_command

from mergeguard.cli import app


def command_page() -> str:
    """Every command with its arguments and options, in Markdown."""
    command = get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="mergeguard")
    return text.replace("# `mergeguard`", "# Command line", 1)
