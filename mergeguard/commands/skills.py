"""`mergeguard skills`: what a model can do, by the skills that worlds measure and by lm-evaluation-harness."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mergeguard.errors import ParameterError
from mergeguard.verification.loading import DTYPES, check_dtype

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mergeguard.reading import Probe, Sampling


def skills(
    model: Annotated[str, typer.Argument(help="A folder with weights and a tokenizer, or a hub id.")],
    skill: Annotated[
        list[str] | None,
        typer.Option(help="A skill, e.g. gsm8k(limit=20) or gsm8k(template=alpaca,chat_template=none); repeatable."),
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(help="FILE with the data of the one skill, or SKILL=FILE; default: the public data set."),
    ] = None,
    lm_eval: Annotated[list[str] | None, typer.Option(help="A task of lm-evaluation-harness; repeatable.")] = None,
    limit: Annotated[int | None, typer.Option(help="Items a harness task; default: all.", min=1)] = None,
    temperature: Annotated[float | None, typer.Option(help="Draw answers; default: greedy answers.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest tokens; default: from all.")] = None,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that together reach this.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the draws.", min=0)] = 0,
    device: Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help=f"Of the model: {', '.join(DTYPES)}.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Measure a model's skills, each rate with its 95 % interval."""
    from mergeguard.checkpoints.resolve import resolve_path
    from mergeguard.verification.loading import load_model, load_tokenizer
    from mergeguard.worlds.skills.registry import skill_probes

    if not skill and not lm_eval:
        raise ParameterError("expected --skill or --lm-eval, e.g. mergeguard skills MODEL --skill strongreject")
    check_dtype(dtype)
    options = _options(skill or [], source or [])
    sampling = _sampling(temperature, top_k, top_p, seed)
    folder = resolve_path(model)
    # Whatever is wrong with a skill shows before large weights are loaded.
    tokenizer = load_tokenizer(folder)
    probes = {name: skill_probes(name, tokenizer, **given) for name, given in options.items()}
    loaded = load_model(folder, dtype, device)
    found = {
        "model": model,
        "skills": [_measure(loaded, tokenizer, name, asked, sampling) for name, asked in probes.items()],
        "lm_eval": _harness(loaded, tokenizer, lm_eval, limit) if lm_eval else [],
    }
    if as_json:
        typer.echo(json.dumps(found, indent=2, allow_nan=False))
    else:
        _print(found)


def _options(names: list[str], sources: list[str]) -> dict[str, dict[str, Any]]:
    """What each skill's loader gets, by the skill's name."""
    from mergeguard.specs import parse_spec

    specs = [parse_spec(name) for name in names]
    options: dict[str, dict[str, Any]] = {spec.name: dict(spec.parameters) for spec in specs}
    if len(options) < len(specs):
        raise ParameterError("the same --skill is given twice; ask for each once")
    for text in sources:
        name, equals, file = text.partition("=")
        if not equals or name not in options:
            if len(options) != 1:
                raise ParameterError(f"--source {text!r} does not say whose it is; expected SKILL=FILE, of a --skill")
            name, file = next(iter(options)), text
        if "source" in options[name]:
            raise ParameterError(f"the skill {name!r} has two sources; give one")
        options[name]["source"] = file
    return options


def _sampling(temperature: float | None, top_k: int | None, top_p: float, seed: int) -> Sampling | None:
    from mergeguard.reading import Sampling

    if temperature is None:
        if top_k is not None or top_p != 1.0 or seed:
            raise ParameterError("--top-k, --top-p and --seed are about drawn answers; add --temperature")
        return None
    return Sampling(temperature, top_k, top_p, seed)


def _measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    probes: Sequence[Probe],
    sampling: Sampling | None,
) -> dict[str, Any]:
    from mergeguard.verification.answers import answer_probes
    from mergeguard.verification.statistics import clopper_pearson

    answers = answer_probes(model, tokenizer, probes, sampling)
    hits, trials = sum(answer.matched for answer in answers), len(answers)
    interval = clopper_pearson(hits, trials)
    return {"name": name, "hits": hits, "trials": trials, "rate": hits / trials, "interval": list(interval)}


def _harness(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: list[str], limit: int | None
) -> list[dict[str, Any]]:
    from mergeguard.verification.lm_eval import harness_scores

    return [{"task": task, **score._asdict()} for task, score in harness_scores(model, tokenizer, tasks, limit).items()]


def _print(found: dict[str, Any]) -> None:
    console = Console()
    if found["skills"]:
        table = Table("skill", "rate", "95 % interval", "of", box=None)
        for item in found["skills"]:
            low, high = item["interval"]
            table.add_row(
                Text(item["name"]),
                f"{item['rate']:.3f}",
                f"{low:.3f} to {high:.3f}",
                f"{item['hits']}/{item['trials']}",
            )
        console.print(table)
    if found["lm_eval"]:
        table = Table("task", "metric", "value", "standard error", box=None)
        for item in found["lm_eval"]:
            error = "" if item["stderr"] is None else f"{item['stderr']:.4f}"
            table.add_row(Text(item["task"]), Text(item["metric"]), f"{item['value']:.4f}", error)
        console.print(table)
