"""`mergeguard verify`: is a suspect the owner's, as far as its answers or weights show?"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from mergeguard.errors import MergeguardError, ParameterError, SchemeError

if TYPE_CHECKING:
    from mergeguard.ownership.verify import Verification
    from mergeguard.verification.served import ServedModel

_errors = Console(stderr=True)


def verify(
    model: Annotated[
        str | None, typer.Argument(help="The suspect: a folder, or a hub id like org/name@revision.")
    ] = None,
    evidence: Annotated[Path | None, typer.Option(help="The evidence file that `embed` wrote.", dir_okay=False)] = None,
    clean: Annotated[
        list[str] | None, typer.Option(help="A model that is certainly not yours, as a further null; repeatable.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="What your model was fine-tuned from, for schemes that read against it.")
    ] = None,
    upstream: Annotated[
        str | None, typer.Option(help="Your model before the embedding, for schemes that read against it.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="The model whose tokenizer asks, where a suspect has none.")
    ] = None,
    decoys: Annotated[int, typer.Option(help="Unseen keys to try, at least 40.")] = 40,
    claim: Annotated[
        Path | None, typer.Option(help="The claim that was made beforehand; see `mergeguard claim`.", dir_okay=False)
    ] = None,
    tsa_roots: Annotated[
        Path | None, typer.Option(help="PEM file of the roots that a claim's time stamp is trusted by.", dir_okay=False)
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(help="An OpenAI-compatible API that serves the suspect, e.g. http://localhost:8000/v1."),
    ] = None,
    served_model: Annotated[str | None, typer.Option(help="The suspect's name at the endpoint.")] = None,
    api: Annotated[str, typer.Option(help="What of the API is asked: completions or chat.")] = "completions",
    api_key_env: Annotated[
        str | None, typer.Option(help="The environment variable that holds the endpoint's key.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where models are loaded: cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[
        str, typer.Option(help="In which they are: float32 (holds all others exactly), bfloat16, float16 or auto.")
    ] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print the verification as JSON.")] = False,
) -> None:
    """Verify a suspect: exit code 0 if it holds the evidence, 1 if that (or a given claim) is not shown."""
    if evidence is None:
        raise ParameterError("expected --evidence FILE, the file that `mergeguard embed` wrote")
    if (model is None) == (endpoint is None):
        raise ParameterError("expected a suspect: either MODEL, or --endpoint URL with --served-model NAME")
    if endpoint is None and (served_model is not None or api_key_env is not None):
        raise ParameterError("--served-model and --api-key-env are about an endpoint; add --endpoint URL")
    if tsa_roots is not None and claim is None:
        raise ParameterError("--tsa-roots are about a claim's time stamp; add --claim FILE")

    from mergeguard.ownership.evidence_file import exposed, read_document
    from mergeguard.ownership.verify import verify as verify_model
    from mergeguard.verification.loading import check_dtype

    check_dtype(dtype)
    read_document(evidence)
    if exposed(evidence):
        _warn(f"other users of this machine can read {evidence}; chmod 600 it")
    suspect = model if endpoint is None else _served(endpoint, served_model, api, api_key_env)
    assert suspect is not None
    checked = None
    if claim is not None:
        from mergeguard.ownership.claims import check_claim

        checked = check_claim(claim, evidence, roots=tsa_roots)
    try:
        found = verify_model(
            suspect,
            evidence,
            clean=clean or (),
            base=base,
            upstream=upstream,
            tokenizer=tokenizer,
            decoys=decoys,
            claim=checked,
            device=device,
            dtype=dtype,
        )
    except SchemeError as error:
        raise MergeguardError(str(error)) from error
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2, allow_nan=False))
    else:
        _print(found)
    raise typer.Exit(0 if found.verified else 1)


def _served(endpoint: str, name: str | None, api: str, key_variable: str | None) -> ServedModel:
    """The model behind an endpoint. Its key comes from the environment: options end in histories and process lists."""
    from mergeguard.verification.served import ServedModel

    if name is None:
        raise ParameterError("expected --served-model NAME, the suspect's name at the endpoint")
    key = None
    if key_variable is not None:
        key = os.environ.get(key_variable)
        if not key:
            raise ParameterError(f"the environment variable {key_variable} is not set; export the endpoint's key in it")
    return ServedModel(endpoint, name, api=api, api_key=key)  # type: ignore[arg-type]  # it refuses another API itself


def _print(found: Verification) -> None:
    broken = found.committed is not None and not found.committed.holds
    typer.echo(f"{found.verdict}{', but the claim does not hold' if broken else ''}: {found.model}")
    typer.echo(found.statement)
    for note in found.notes:
        typer.echo(f"note: {note}")


def _warn(text: str) -> None:
    _errors.print(f"warning: {text}", style="yellow", markup=False, highlight=False, soft_wrap=True)
