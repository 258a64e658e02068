"""`mergeguard report`: a page with a leaderboard from results files, one as HTML, or the recorded losses in them."""

from __future__ import annotations

import shlex
from functools import cache
from pathlib import Path
from typing import Annotated

import typer

from mergeguard.commands.compare import compare_files
from mergeguard.errors import ParameterError


def report(
    results: Annotated[list[Path], typer.Argument(help="Files as `mergeguard run` wrote them (results.json).")],
    output: Annotated[
        Path | None, typer.Option(help="The Markdown page to write; by default it is printed.", dir_okay=False)
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(help="Write one results file as a page of HTML; without --output no other.", dir_okay=False),
    ] = None,
    agreement: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            help="Two of the files: how well the first one's world predicts the second's.", metavar="TINY REAL"
        ),
    ] = None,
    tuned_on: Annotated[str | None, typer.Option(help="As in `mergeguard compare`; with --agreement.")] = None,
    second_seed: Annotated[
        list[Path] | None, typer.Option(help="As in `mergeguard compare`; with --agreement.")
    ] = None,
    record_losses: Annotated[
        Path | None,
        typer.Option(help="Make no page; write the losses of these results to a file of records.", dir_okay=False),
    ] = None,
) -> None:
    """Make one Markdown page from results files: a leaderboard of schemes, then every file in full.

    --html makes a page of HTML from one file instead, --record-losses a file of recorded losses.
    """
    from mergeguard.reports.bundle import prepare_folder
    from mergeguard.reports.losses import record_losses as record
    from mergeguard.reports.results_json import read_results
    from mergeguard.reports.results_page import results_page
    from mergeguard.reports.writing import write_text

    read = cache(read_results)  # the files of an agreement are among the others
    if agreement is None and (tuned_on or second_seed):
        raise ParameterError(
            "--tuned-on and --second-seed say how to compare two worlds; expected --agreement TINY REAL"
        )
    if record_losses is not None:
        if agreement or output or html:
            raise ParameterError("--record-losses makes no page; expected no --output, --html or --agreement with it")
        prepare_folder(record_losses.parent)
        written = record(record_losses, [read(path) for path in results])
        typer.echo(f"recorded {len(written)} losses in {record_losses}; review their reasons before you commit it")
        return
    if html is not None and len(results) > 1:
        raise ParameterError(f"--html makes a page of one results file, and there are {len(results)}; name one")
    names = [path.name for path in results]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ParameterError(
            f"two of the files are called {twice}; the page links to them by name, expected distinct ones"
        )
    if html is not None:
        from mergeguard.reports.html import to_html

        write_text(html, to_html(read(results[0])))
        typer.echo(f"report: {html}")
        if output is None:
            return
    comparison = compare_files(read, *agreement, tuned_on, second_seed or []) if agreement else None
    command = _command(results, output, agreement, tuned_on, second_seed or [])
    page = results_page({path.name: read(path) for path in results}, command, comparison)
    if output is not None:
        write_text(output, page)
        typer.echo(f"report: {output}")
    else:
        typer.echo(page, nl=False)


def _command(
    results: list[Path],
    output: Path | None,
    agreement: tuple[Path, Path] | None,
    tuned_on: str | None,
    second_seed: list[Path],
) -> str:
    """The command that makes the page, as if run in the folder of the files."""
    words = ["mergeguard", "report", *(path.name for path in results)]
    if agreement is not None:
        words += ["--agreement", *(path.name for path in agreement)]
    if tuned_on is not None:
        words += ["--tuned-on", tuned_on]
    for path in second_seed:
        words += ["--second-seed", path.name]
    return shlex.join([*words, "--output", output.name if output else "README.md"])
