"""`mergeguard embed`: fresh secret evidence in a model that is about to be published."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mergeguard.errors import GateFailed, MergeguardError, SchemeError

_errors = Console(stderr=True)


def embed(
    scheme: Annotated[str, typer.Argument(help="A protection, e.g. instructional_fingerprint(variant=dialogue).")],
    model: Annotated[str, typer.Argument(help="Your model: a folder, or a hub id like org/name@revision.")],
    out: Annotated[Path, typer.Argument(help="The folder to write, which you may publish; it must not exist.")],
    evidence: Annotated[
        Path, typer.Option(help="The file to write, which you keep secret; it must not exist.", dir_okay=False)
    ],
    world: Annotated[
        str | None,
        typer.Option(help="Whose training budget and texts: a name or a file. Default: what was measured on SmolLM2."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps instead of the budget's.", min=1)] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Instead of the budget's.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Instead of the budget's.", min=1)] = None,
    base: Annotated[
        str | None, typer.Option(help="What your model was fine-tuned from, for schemes that read against it.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of what is written: float32, bfloat16 or float16; default: your model's.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where it trains: cpu, cuda, cuda:1, ...")] = "cpu",
    seed: Annotated[
        int | None, typer.Option(help="For tests: keys drawn from a seed are no secret.", min=0, hidden=True)
    ] = None,
) -> None:
    """Embed secret evidence in a model: exit code 1, and nothing written, if it cannot be verified afterwards."""
    from mergeguard.ownership.embedding import Schedule
    from mergeguard.ownership.embedding import embed as embed_evidence

    schedule = Schedule(world, steps, learning_rate, batch_size)
    try:
        done = embed_evidence(
            scheme, model, out, evidence, schedule=schedule, base=base, dtype=dtype, device=device, seed=seed
        )
    except SchemeError as error:
        raise MergeguardError(str(error)) from error
    except GateFailed as error:
        _errors.print(f"failed: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    typer.echo(f"model: {done.out}, {done.changed} of {done.tensors} tensors changed")
    typer.echo(f"evidence: {done.evidence}; keep it secret, and a copy elsewhere")
    typer.echo(done.check.statement)
    typer.echo(f"next, before you publish the model: mergeguard claim {done.evidence}")
