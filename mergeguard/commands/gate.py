"""`mergeguard gate`: one scheme through every check and every cell, and a page that says whether it holds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mergeguard.commands.progress import progress


def gate(
    scheme: Annotated[
        str, typer.Argument(help="MODULE:CLASS or a registered NAME, each with (parameters) or without.")
    ],
    world: Annotated[str, typer.Option(help="The world of models: a name, or a file such as my-trio.toml.")] = "tiny",
    seed: Annotated[int, typer.Option(help="Seed of keys, training and random masks.", min=0)] = 0,
    merger: Annotated[
        list[str] | None, typer.Option(help="A merger, e.g. ties(density=0.2); repeatable. Default: five.")
    ] = None,
    coefficients: Annotated[
        str | None, typer.Option(help="Weights of the protected model, e.g. 0.1,0.5; default 0.1 to 0.9.")
    ] = None,
    axes: Annotated[
        str | None, typer.Option(help="Vary parameters of the mergers that have a density: normalize,density.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Jobs at a time; default: what fits the cores. Never changes a result.", min=1)
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of the reports.")] = Path("mergeguard-results"),
    recorded: Annotated[
        Path | None, typer.Option(help="Known losses, a file as --record-losses writes it.", dir_okay=False)
    ] = None,
    record_losses: Annotated[
        Path | None,
        typer.Option(help="Write the losses of this seed and the next two to a file for --recorded.", dir_okay=False),
    ] = None,
    seconds_per_call: Annotated[
        float | None, typer.Option(help="The most that a call of the scheme may take; longer is an error.")
    ] = None,
    margin: Annotated[float | None, typer.Option(help="How far a skill may move by embedding; default 0.05.")] = None,
) -> None:
    """Gate a protection: exit code 0 if it passes, 1 if it does not, 2 if it or an option cannot be used."""
    from rich.console import Console

    from mergeguard.reports.bundle import prepare_folder, write_reports
    from mergeguard.reports.terminal import print_matrix
    from mergeguard.testing.gate import record_losses as record
    from mergeguard.testing.gate import run_gate
    from mergeguard.testing.plan import Options, moved, plan
    from mergeguard.testing.scheme import find_scheme

    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does, so that a scheme in this folder is found; workers inherit it
    written = Options(world=world, seed=seed, recorded=recorded, seconds_per_call=seconds_per_call, margin=margin)
    options, narrowed = moved(
        written,
        world=None,
        seed=None,
        mergers=merger,
        coefficients=None if coefficients is None else [coefficients],
        axes=axes,
    )
    what = plan(find_scheme(scheme), options, narrowed=narrowed)
    prepare_folder(output)
    if record_losses is not None:
        prepare_folder(record_losses.parent)
    with progress() as step:
        report = run_gate(what, workers=workers, on_progress=step)
    print_matrix(report.results, Console())
    write_reports(report.results, output)
    typer.echo(f"\n{report}\n\nreports: {output}")
    if record_losses is not None:
        with progress() as step:
            count = record(what, report, record_losses, workers=workers, on_progress=step)
        typer.echo(f"recorded {count} losses in {record_losses}; review their reasons before you commit it")
    raise typer.Exit(0 if report.passed else 1)
