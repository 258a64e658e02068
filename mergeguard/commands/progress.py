"""A progress bar on stderr, for commands that take long."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class _TimeLeft(TimeRemainingColumn):
    """The time left in the words of whoever knows better, else by the pace so far."""

    def render(self, task: Task) -> Text:
        words: str | None = task.fields.get("left")
        return super().render(task) if words is None else Text(words, style="progress.remaining")


@contextmanager
def progress() -> Iterator[Callable[..., None]]:
    """A progress bar on stderr with the time left; silent where stderr is no terminal."""
    console = Console(file=sys.stderr)  # this one, also while what a scheme prints is caught
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        _TimeLeft(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=None)

        def step(label: str, done: int, total: int, left: str | None = None) -> None:
            bar.update(task, description=label[:60], completed=done, total=total, left=left)

        yield step
