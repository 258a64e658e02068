"""`mergeguard claim`: commit to evidence beforehand, and have a third party say when."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

QUERY_EXAMPLE = "curl -H 'Content-Type: application/timestamp-query' --data-binary @{request} URL > reply.tsr"


def claim(
    evidence: Annotated[Path, typer.Argument(help="The evidence file that `mergeguard embed` wrote.")],
    output: Annotated[Path, typer.Option(help="The claim, which is public; a name that ends in .json.")] = Path(
        "claim.json"
    ),
    statement: Annotated[
        str | None, typer.Option(help="Public text in it, e.g. who you are and which model you protected.")
    ] = None,
    time_stamp: Annotated[
        Path | None, typer.Option(help="A time-stamping authority's reply to the request, to be added.")
    ] = None,
    tsa: Annotated[str | None, typer.Option(help="URL of a time-stamping authority that is asked now.")] = None,
    tsa_roots: Annotated[
        Path | None, typer.Option(help="PEM file of root certificates; the stamp's signature is checked with it.")
    ] = None,
) -> None:
    """Write a salted digest of the evidence, to be published or time-stamped before a suspect appears."""
    from mergeguard.ownership.claims import make_claim

    written = make_claim(evidence, output, statement=statement, reply=time_stamp, tsa=tsa, roots=tsa_roots)
    typer.echo(f"claim: {written.claim} (public)")
    if written.stamp is None:
        typer.echo(f"request for a time stamp: {written.request}")
        typer.echo(f"send it, e.g. {QUERY_EXAMPLE.format(request=written.request)}")
        typer.echo(f"and add the reply: mergeguard claim {evidence} --output {output} --time-stamp reply.tsr")
        return
    who = written.stamp.authority or f"{written.stamp.problem}; add --tsa-roots"
    typer.echo(f"time stamp: {written.reply}, {written.stamp.time} ({who})")
