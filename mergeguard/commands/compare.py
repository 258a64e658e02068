"""`mergeguard compare`: what changed between two runs of a world; with --worlds, how well one predicts another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergeguard.errors import ParameterError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from mergeguard.matrix.outcome import Results
    from mergeguard.reports.world_agreement import Comparison


def compare(
    old: Annotated[Path, typer.Argument(help="results.json of the run before; with --worlds, of the world to trust.")],
    new: Annotated[Path, typer.Argument(help="results.json of the run after; with --worlds, of the world predicted.")],
    worlds: Annotated[
        bool, typer.Option("--worlds", help="Compare two worlds, cell by cell, instead of two runs of one.")
    ] = False,
    markdown: Annotated[
        Path | None, typer.Option(help="Also write Markdown for a comment on a pull request.", dir_okay=False)
    ] = None,
    level: Annotated[
        float | None,
        typer.Option(
            help="How often equal runs may be called changed, over all cells together; default 0.05.",
            show_default=False,
        ),
    ] = None,
    tuned_on: Annotated[
        str | None,
        typer.Option(
            help="With --worlds: mergers that the predicting world was tuned on, e.g. linear,ties; others are held out."
        ),
    ] = None,
    second_seed: Annotated[
        list[Path] | None,
        typer.Option(help="With --worlds: results.json of either world with another seed; once for each of the two."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
) -> None:
    """Say what changed from OLD to NEW: exit code 1 if a survivor was lost, 2 on a wrong input.

    A survivor is a theft that the evidence survived; it is lost too if nobody measured it, or if it is no theft any
    more. With --worlds, the exit code is 1 if what was held out misses a target.
    """
    from mergeguard.reports.results_json import read_results

    if worlds:
        if markdown is not None or level is not None:
            raise ParameterError("--markdown and --level are of two runs of one world; expected them without --worlds")
        from mergeguard.reports.agreement_text import to_lines

        agreement = compare_files(read_results, old, new, tuned_on, second_seed or [])
        _print(agreement.to_json(), to_lines(agreement), as_json)
        raise typer.Exit(0 if agreement.met else 1)
    if tuned_on is not None or second_seed:
        raise ParameterError("--tuned-on and --second-seed say how to compare two worlds; expected --worlds with them")
    from mergeguard.reports import run_differences, run_differences_text
    from mergeguard.reports.writing import write_text

    comparison = run_differences.compare_runs(
        read_results(old), read_results(new), level=run_differences.LEVEL if level is None else level
    )
    if markdown is not None:
        write_text(markdown, run_differences_text.to_markdown(comparison))
    _print(comparison.to_json(), run_differences_text.to_lines(comparison), as_json)
    raise typer.Exit(0 if comparison.holds else 1)


def compare_files(
    read: Callable[[Path], Results],
    predicting: Path,
    predicted: Path,
    tuned_on: str | None,
    second_seeds: list[Path],
) -> Comparison:
    """`compare_worlds` on files, read by `read`.

    Raises:
        CheckpointError: a file cannot be read or is no results.json of this version.
        ParameterError, UnknownNameError: they cannot be compared, or `tuned_on` is no list of mergers in them.
    """
    from mergeguard.reports.world_agreement import compare_worlds

    names = [] if tuned_on is None else [name.strip() for name in tuned_on.split(",")]
    return compare_worlds(
        read(predicting),
        read(predicted),
        tuned_on=list(dict.fromkeys(names)),
        second_seeds=[read(path) for path in second_seeds],
    )


def _print(document: dict[str, object], lines: Iterable[str], as_json: bool) -> None:
    typer.echo(json.dumps(document, indent=2, allow_nan=False) if as_json else "\n".join(lines))
