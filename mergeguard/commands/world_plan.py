"""`mergeguard world plan`: what memory a world's stages take, and whether this machine has it."""

from __future__ import annotations

from typing import Annotated

import typer

from mergeguard.errors import ParameterError


def plan(
    name: Annotated[str, typer.Argument(help="A world, or the file of one.")],
    length: Annotated[
        int | None, typer.Option(help="Tokens of a training row; default: the world's longest text.", min=1)
    ] = None,
    free: Annotated[float | None, typer.Option(help="GB to fit into; default: what is free here.", min=0)] = None,
) -> None:
    """Print the memory that each stage of a world takes: exit code 1 if one does not fit."""
    from mergeguard.worlds.memory import check_fits, free_bytes, plans_of
    from mergeguard.worlds.registry import load_world

    world = load_world(name)
    room = free_bytes(world.device) if free is None else round(free * 1e9)
    problems = []
    for stage in plans_of(world, length):
        typer.echo(stage.describe())
        try:
            check_fits(stage, room)
        except ParameterError as error:
            problems.append(str(error))
    typer.echo(f"{room / 1e9:.2f} GB free on {world.device}" if free is None else f"{room / 1e9:.2f} GB given")
    for problem in problems:
        typer.echo(f"does not fit: {problem}")
    raise typer.Exit(1 if problems else 0)
