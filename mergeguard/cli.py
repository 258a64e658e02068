"""The command line: a thin door. Every error of an input is one line on stderr and exit code 2."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, cast

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mergeguard import __version__
from mergeguard.commands.claim import claim
from mergeguard.commands.compare import compare
from mergeguard.commands.embed import embed
from mergeguard.commands.gate import gate
from mergeguard.commands.progress import progress as _progress
from mergeguard.commands.report import report
from mergeguard.commands.skills import skills
from mergeguard.commands.verify import verify
from mergeguard.commands.world_plan import plan
from mergeguard.errors import MergeguardError, ParameterError, UnknownNameError

if TYPE_CHECKING:
    from mergeguard.matrix.outcome import Results

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
world_app = typer.Typer(no_args_is_help=True, help="Build or check a world of models.")
app.add_typer(world_app, name="world")
app.command()(compare)
app.command()(gate)
app.command()(report)
app.command()(skills)
app.command()(claim)
app.command()(embed)
app.command()(verify)
world_app.command()(plan)
KINDS = ("protections", "mergers", "worlds", "skills")
INTERNAL_ERROR = 70
"""Exit code of a bug of ours, as in sysexits.h."""
RECORDED_SEEDS = 3
"""Seeds that a recorded loss is taken from: a cell that is lost in some of them only is on the edge."""
# Typer exports one of its usage errors, and not the class that all of them share.
_UsageError = cast("type[typer.BadParameter]", typer.BadParameter.__mro__[1])

_errors = Console(stderr=True)
_leave: Callable[[int | None], NoReturn] = sys.exit


@app.callback(invoke_without_command=True)
def top(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Can I still prove that a language model is mine after someone merged it into theirs?"""
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def run(
    protection: Annotated[
        list[str] | None, typer.Option(help="A protection, e.g. quantization_watermark(bits=4); repeatable.")
    ] = None,
    merger: Annotated[list[str] | None, typer.Option(help="A merger, e.g. ties(density=0.2); repeatable.")] = None,
    coefficients: Annotated[
        str | None, typer.Option(help="Weights of the protected model, e.g. 0.1,0.5; default 0.1 to 0.9.")
    ] = None,
    axes: Annotated[
        str | None, typer.Option(help="Vary parameters of the mergers that have a density: normalize,density.")
    ] = None,
    world: Annotated[str, typer.Option(help="The world of models: a name, or a file such as my-trio.toml.")] = "tiny",
    seed: Annotated[int, typer.Option(help="Seed of keys, training and random masks.", min=0)] = 0,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Jobs at a time; default: as many as the world's threads fit the cores (one per core for tiny), or "
            "one per GPU. Never changes a result.",
            min=1,
        ),
    ] = None,
    executor: Annotated[
        str, typer.Option(help="Where jobs run: processes, or ray (the cluster at RAY_ADDRESS, else this machine).")
    ] = "processes",
    output: Annotated[Path, typer.Option(help="Folder of the reports.")] = Path("mergeguard-results"),
    record_losses: Annotated[
        Path | None,
        typer.Option(
            help="Write the losses of this seed and the next two to a file of recorded losses.", dir_okay=False
        ),
    ] = None,
) -> None:
    """Run the survival matrix: exit code 0 if the gate holds, 1 if it does not, 2 if an input is wrong."""
    from mergeguard.matrix.cases import expand, parse_coefficients, with_axes
    from mergeguard.matrix.executors import EXECUTORS
    from mergeguard.mergers.registry import DEFAULT_COEFFICIENTS, DEFAULT_MERGERS
    from mergeguard.protections.registry import DEFAULT_PROTECTIONS, make_protection
    from mergeguard.reports.bundle import prepare_folder, write_reports
    from mergeguard.reports.terminal import print_matrix
    from mergeguard.worlds.registry import find_world

    world = find_world(world)
    if executor not in EXECUTORS:
        raise UnknownNameError("executor", executor, EXECUTORS)
    schemes = [make_protection(name).spec for name in protection or DEFAULT_PROTECTIONS]
    attacks = merger or DEFAULT_MERGERS
    cases = expand(
        schemes,
        attacks if axes is None else with_axes(attacks, axes),
        DEFAULT_COEFFICIENTS if coefficients is None else parse_coefficients(coefficients),
        world=world,
        seed=seed,
    )
    full = not (protection or merger or coefficients or axes)
    prepare_folder(output)
    if record_losses is not None:
        prepare_folder(record_losses.parent)

    from mergeguard.matrix.recorded import read_records, recorded_file, write_records
    from mergeguard.matrix.runner import run as run_cases

    records = read_records(recorded_file(world))
    with _progress() as step:
        results = run_cases(cases, records=records, full=full, workers=workers, executor=executor, on_progress=step)
    print_matrix(results, Console())
    write_reports(results, output)
    typer.echo(f"reports: {output}")
    if record_losses is not None:
        runs = [results.outcomes]
        for other in range(seed + 1, seed + RECORDED_SEEDS):
            with _progress() as step:
                reseeded = [replace(case, seed=other) for case in cases]
                runs.append(run_cases(reseeded, workers=workers, executor=executor, on_progress=step).outcomes)
        written = write_records(record_losses, runs, records, full=full)
        typer.echo(f"recorded {len(written)} losses in {record_losses}; review their reasons before you commit it")
    raise typer.Exit(_exit_code(results))


@app.command()
def merge(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe, in mergekit's YAML.")] = None,
    out: Annotated[Path | None, typer.Argument(help="The folder to write; it must not exist.")] = None,
    check: Annotated[
        Path | None, typer.Option(help="Merge nothing; verify this merged model's files against its manifest.")
    ] = None,
    coefficients: Annotated[
        str | None,
        typer.Option(
            help="Merge once for each weight of the recipe's first model, of which the others share the rest, into "
            "OUT/0.1 and so on; the inputs are read once."
        ),
    ] = None,
    vocabulary: Annotated[
        str, typer.Option(help="Where embedding rows differ: refuse, base, truncate or largest.")
    ] = "refuse",
    seed: Annotated[int, typer.Option(help="Seed of random masks.", min=0)] = 0,
    threads: Annotated[
        int | None, typer.Option(help="Threads that merge; default: one per core. Never changes a byte.", min=1)
    ] = None,
    device: Annotated[str, typer.Option(help="Where the arithmetic runs: cpu, cuda, cuda:1, ...")] = "cpu",
    shard_size: Annotated[str, typer.Option(help="The largest file to write, e.g. 5GB or 200MB.")] = "5GB",
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read pickle checkpoints too.")] = False,
    allow_duplicate_keys: Annotated[
        bool, typer.Option("--allow-duplicate-keys", help="Let the last of several equal keys in the recipe count.")
    ] = False,
    allow_unrelated: Annotated[
        bool,
        typer.Option("--allow-unrelated", help="Merge models of different architectures, or unrelated to the base."),
    ] = False,
) -> None:
    """Merge checkpoints by a recipe, or check a merged one: exit code 1 if its files are not as they were written."""
    if check is not None:
        if recipe is not None:
            raise ParameterError("--check takes one folder and no recipe")
        raise typer.Exit(_check_merged(check))
    if recipe is None or out is None:
        raise ParameterError("expected RECIPE and OUT, e.g. mergeguard merge ties.yml merged; or --check FOLDER")
    from mergeguard.matrix.cases import parse_coefficients
    from mergeguard.mergers.merge import Options, merge_checkpoints, parse_size

    options = Options(
        seed=seed,
        threads=threads,
        device=device,
        coefficients=() if coefficients is None else parse_coefficients(coefficients),
        vocabulary=vocabulary,
        allow_pickle=allow_pickle,
        allow_duplicate_keys=allow_duplicate_keys,
        allow_unrelated=allow_unrelated,
        max_shard_bytes=parse_size(shard_size),
    )
    with _progress() as step:
        merged = merge_checkpoints(recipe, out, options, on_progress=step)
    for warning in merged.warnings:
        _errors.print(f"warning: {warning}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    global _leave  # noqa: PLW0603 - how this process ends is the process's
    _leave = _leave_at_once
    written = f"{merged.tensors} tensors, {merged.bytes_written / 1e9:.2f} GB"
    for folder in merged.folders:
        typer.echo(f"merged: {folder}")
    typer.echo(f"{written} in {merged.seconds:.1f} s")


def _check_merged(folder: Path) -> int:
    from mergeguard.checkpoints.manifest import check_manifest

    problems = check_manifest(folder)
    for problem in problems:
        typer.echo(problem)
    typer.echo(f"{folder}: {len(problems)} problems" if problems else f"{folder}: every file is as it was written")
    return 1 if problems else 0


@app.command("list")
def list_names(
    kind: Annotated[str, typer.Argument(help="protections, mergers, worlds or skills")],
) -> None:
    """List what is registered, with its parameters."""
    if kind not in KINDS:
        raise UnknownNameError("kind", kind, KINDS)
    table = Table("name", "parameters", "about", box=None)
    for row in _rows(kind):
        table.add_row(*map(Text, row))  # as texts: a string's "[text]" would be taken for a style
    Console().print(table)


@world_app.command()
def build(
    name: Annotated[str, typer.Argument(help="The world to build: tiny or smollm2.")],
    output: Annotated[
        Path | None, typer.Option(help="A folder that does not exist yet; default: tiny-world or smollm2-world.")
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="smollm2: train every weight instead of adapters; wants a GPU.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="smollm2: cpu, cuda, ...; default: a GPU if there is one.")] = None,
) -> None:
    """Train a world from its seed. A killed build of smollm2 goes on where it stopped."""
    out = output or Path(f"{name}-world")
    with _progress() as step:
        if name == "tiny":
            from mergeguard.worlds.tiny.build import build as build_tiny

            manifest = build_tiny(out, on_progress=step)
        elif name == "smollm2":
            from mergeguard.worlds.smollm2.build import FULL, Recipe
            from mergeguard.worlds.smollm2.build import build as build_smollm2

            manifest = build_smollm2(out, FULL if full else Recipe(), step, device)
        else:
            raise UnknownNameError("world that can be built", name, ("tiny", "smollm2"))
    for part, digest in manifest["digests"].items():
        typer.echo(f"{digest}  {part}")


@world_app.command()
def check(
    name: Annotated[str, typer.Argument(help="The world to check, or its file.")],
    folder: Annotated[Path | None, typer.Option(help="A folder that `world build` wrote.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Print every requirement of a world with its measured value: exit code 1 if one fails."""
    from mergeguard.matrix.requirements import check_world
    from mergeguard.worlds.registry import load_world

    with _progress() as step:
        requirements = check_world(load_world(name, folder), seed=seed, on_progress=step)
    table = Table(box=None)
    for header in ("", "requirement", "measured", "required"):
        table.add_column(header, overflow="fold")
    for item in requirements:
        cells = ("passed" if item.passed else "FAILED", item.name, item.measured, item.required)
        table.add_row(*map(Text, cells))
    Console().print(table)
    failed = sum(not item.passed for item in requirements)
    typer.echo(f"{len(requirements)} requirements, {failed} failed")
    raise typer.Exit(1 if failed else 0)


def main() -> None:
    """Entry point of the `mergeguard` command."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        code = app(standalone_mode=False)
        _leave(code)
    except MergeguardError as error:
        message = str(error)
    except _UsageError as error:
        message = error.format_message()  # empty if a command was missing and the help is printed
    except BrokenPipeError:  # nobody reads any more; what was to be written is written
        os._exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception:  # noqa: BLE001 - a bug of ours must not look like a gate that does not hold
        _errors.print_exception()
        sys.exit(INTERNAL_ERROR)
    if message.strip():
        line = f"error: {' '.join(message.splitlines())}"
        _errors.print(line, style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(2)


def _leave_at_once(code: int | None) -> NoReturn:
    """End without tearing down torch, which takes as long as merging a small model."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def _exit_code(results: Results) -> int:
    return 0 if results.holds else 1


def _rows(kind: str) -> Iterator[tuple[str, str, str]]:
    from mergeguard.mergers.registry import MERGERS
    from mergeguard.protections.registry import PROTECTIONS
    from mergeguard.specs import format_value
    from mergeguard.worlds.registry import WORLDS
    from mergeguard.worlds.skills.registry import SKILLS, options_of

    if kind == "mergers":
        for name in MERGERS:
            method = MERGERS.get(name)
            yield name, _written(method.defaults, format_value), f"{method.summary} ({method.citation})"
    elif kind == "protections":
        for name in PROTECTIONS:
            scheme = PROTECTIONS.get(name)
            about = f"{_first_line(scheme)} [{scheme.access.value}]".lstrip()
            yield name, _written(dict(scheme.defaults), format_value), about
    elif kind == "skills":
        for name in SKILLS:
            yield name, ", ".join(options_of(name)), _first_line(SKILLS.get(name))
    else:
        for name in WORLDS:
            yield name, "", _first_line(WORLDS.get(name))
        yield "FILE.toml", "", "A world of your own models; fixtures/worlds/ has two to begin with."


def _first_line(item: object) -> str:
    return (item.__doc__ or "").strip().partition("\n")[0]


def _written(parameters: dict[str, bool | int | float | str], show: Callable[..., str]) -> str:
    return ", ".join(f"{name}={show(value)}" for name, value in parameters.items())


if __name__ == "__main__":
    main()
