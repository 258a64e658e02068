"""All reports of a run in one folder: `results.json`, `report.md`, `junit.xml` and `report.html`."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from mergeguard.errors import CheckpointError
from mergeguard.reports.html import to_html
from mergeguard.reports.junit import to_junit
from mergeguard.reports.markdown import to_markdown
from mergeguard.reports.results_json import write_results
from mergeguard.reports.summary import summary_of
from mergeguard.reports.writing import write_text

if TYPE_CHECKING:
    from pathlib import Path

    from mergeguard.matrix.outcome import Results


def prepare_folder(folder: Path) -> None:
    """Make the folder, so that a run of minutes does not end at a path that cannot be written.

    Raises:
        CheckpointError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot write the output folder {folder}: {error.strerror or error}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise CheckpointError(f"cannot write the output folder {folder}: permission denied; choose another")


def write_reports(results: Results, folder: Path) -> None:
    """Write every report, each whole or not at all.

    Raises:
        CheckpointError: the folder cannot be written or is full.
    """
    complete = replace(results, summary=summary_of(results))
    write_results(complete, folder / "results.json")
    write_text(folder / "report.md", to_markdown(complete))
    write_text(folder / "junit.xml", to_junit(complete))
    write_text(folder / "report.html", to_html(complete))
