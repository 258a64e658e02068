"""Checks of `read`: a function of evidence and weights, and of nothing else."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mergeguard.testing.context import same_reading, show
from mergeguard.testing.scheme import made_anew
from mergeguard.worlds.states import load_state

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

    from mergeguard.matrix.outcome import Gate
    from mergeguard.testing.context import Context

ANOTHER_NAME = "somebody/another-model"


def check_verification_is_pure(context: Context) -> Gate:
    """The same evidence and weights give the same reading: whatever was read before, and whoever reads."""
    required = "a reading depends on its arguments alone: keep no state, cache nothing by object or name, draw nothing"
    world, embedded = context.engine.world, context.embedded
    own, clean = embedded.own.keys, context.engine.readings(context.protection, [embedded.evidence], world.upstream)[0]
    found = context.elsewhere_found
    looks = [
        ("on the clean upstream in another process, where it is the first", clean, found.clean),
        ("on the protected model in another process", own, found.own),
        ("on the protected model after the clean one", own, context.read(embedded.evidence, embedded.state)),
        ("on the clean upstream after the protected model", clean, context.read(embedded.evidence, world.upstream)),
    ]
    # One object with other weights, then a new object: neither identity nor order may matter.
    model = world.model(embedded.state)
    for words, scheme in (
        ("by the same instance", context.protection),
        ("by a new one", made_anew(context.protection)),
    ):
        load_state(model, world.upstream)
        looks.append((f"on the clean upstream {words}", clean, context.read_model(model, protection=scheme)))
        for turn in ("", ", read again"):
            load_state(model, embedded.state)
            looks.append((f"on the protected model {words}{turn}", own, context.read_model(model, protection=scheme)))
    problem = next(
        (
            f"the reading {words} is {show(later)}, and was {show(first)}"
            for words, first, later in looks
            if not same_reading(first, later)
        ),
        None,
    )
    return context.gate("verification_is_pure", problem, required)


def check_reads_only_weights(context: Context) -> Gate:
    """The weights decide: under another name, config or object they read the same, and clean ones stay silent."""
    required = "a reading looks at what the model computes or weighs, never at its name, config, class or attributes"
    world, embedded = context.engine.world, context.embedded
    own, clean = embedded.own.keys, embedded.controls["upstream"].keys
    elsewhere = world.model(embedded.state)
    elsewhere.config = plain_config(elsewhere)
    elsewhere.name_or_path = ANOTHER_NAME
    given = context.again.protected.model
    looks = [
        ("the protected weights in a new model of another name, its config without additions", own, elsewhere),
        ("the protected model as embed returned it", own, given),
    ]
    problem = None
    for words, wanted, model in looks:
        found = context.read_model(model)
        if problem is None and not same_reading(wanted, found):
            problem = f"{words} read {show(found)}, and those weights read {show(wanted)} elsewhere"
    if problem is None:
        # Models of a world may share a config, so that a marker in it is in the clean ones too.
        load_state(elsewhere, world.upstream)
        found = context.read_model(elsewhere)
        if not same_reading(clean, found):
            problem = (
                f"the clean upstream's weights read {show(clean)}, and {show(found)} in a model of another name, its "
                "config without additions"
            )
    if problem is None:
        with asked_for_its_name(elsewhere) as asked:
            context.read_model(elsewhere)
        if asked:
            problem = f"read looks at the model's {asked[0]}: whoever steals a model can call it as they like"
    if problem is None:
        load_state(given, world.upstream)
        found = context.read_model(given)
        load_state(given, embedded.state)
        if not same_reading(clean, found):
            problem = (
                f"the model that embed returned, its weights replaced by the clean upstream's, reads {show(found)}; "
                f"those weights read {show(clean)} elsewhere"
            )
    return context.gate("reads_only_weights", problem, required)


@contextmanager
def asked_for_its_name(model: PreTrainedModel) -> Iterator[list[str]]:
    """Within it, the list grows with each look at the name or path that model and config were loaded from.

    The name that a scheme waits for may be any, so that no other name shows what it does; looking at it does.
    """
    asked: list[str] = []

    def watched(holder: str, attribute: str) -> property:
        def look(_: object) -> str:
            asked.append(f"{holder}{attribute}")
            return ANOTHER_NAME

        return property(look)

    things: list[tuple[Any, str]] = [(model, ""), (model.config, "config.")]
    classes = [type(thing) for thing, _ in things]
    for thing, holder in things:
        kind = type(thing)
        names = {attribute: watched(holder, attribute) for attribute in ("name_or_path", "_name_or_path")}
        thing.__class__ = type(kind.__name__, (kind,), {**names, "__module__": kind.__module__})
    try:
        yield asked
    finally:
        for (thing, _), kind in zip(things, classes, strict=True):
            thing.__class__ = kind


def plain_config(model: PreTrainedModel) -> Any:
    """The model's config without what its class does not know, and with another name."""
    config = copy.deepcopy(model.config)
    known = vars(type(config)())
    for name in list(vars(config)):
        if name not in known and not name.startswith("_"):
            delattr(config, name)
    config.name_or_path = ANOTHER_NAME
    for name in ("id2label", "label2id", "task_specific_params", "finetuning_task"):
        if name in known and hasattr(config, name):
            setattr(config, name, known[name])
    return config
