"""`mergeguard compare --worlds`: how well one world predicts another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergeguard.errors import ParameterError

if TYPE_CHECKING:
    from collections.abc import Callable

    from mergeguard.matrix.outcome import Results
    from mergeguard.reports.world_agreement import Comparison


def compare(
    predicting: Annotated[Path, typer.Argument(help="results.json of the world that predicts, e.g. the tiny one.")],
    predicted: Annotated[Path, typer.Argument(help="results.json of the world that is predicted, e.g. a real one.")],
    worlds: Annotated[bool, typer.Option("--worlds", help="Compare two worlds, cell by cell.")] = False,
    tuned_on: Annotated[
        str | None,
        typer.Option(help="Mergers that the predicting world was tuned on, e.g. linear,ties; others are held out."),
    ] = None,
    second_seed: Annotated[
        list[Path] | None,
        typer.Option(help="results.json of either world with another seed; may be given for each of the two."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
) -> None:
    """Say how well one world predicts another: exit code 1 if what was held out misses a target, 2 on a wrong input."""
    if not worlds:
        raise ParameterError("expected --worlds, e.g. mergeguard compare --worlds tiny.json real.json")
    from mergeguard.reports.agreement_text import to_lines
    from mergeguard.reports.results_json import read_results

    comparison = compare_files(read_results, predicting, predicted, tuned_on, second_seed or [])
    typer.echo(
        json.dumps(comparison.to_json(), indent=2, allow_nan=False) if as_json else "\n".join(to_lines(comparison))
    )
    raise typer.Exit(0 if comparison.met else 1)


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
