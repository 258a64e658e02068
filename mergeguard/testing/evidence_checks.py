"""Checks of the evidence: it goes through files and processes unchanged, and what is wrong with it is loud."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mergeguard.checkpoints.files import PRIVATE, read_tensors, write_tensors
from mergeguard.errors import MergeguardError
from mergeguard.protections.contract import Evidence
from mergeguard.testing.context import same_reading, show, without

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mergeguard.matrix.outcome import Gate
    from mergeguard.testing.context import Context

UNKNOWN = "no_such_parameter"


def check_evidence_round_trips(context: Context) -> Gate:
    """Evidence that went through JSON and safetensors reads as before, here and in another process."""
    required = "all that read needs is in the evidence, as plain data and tensors, and nothing in the instance"
    evidence, own = context.embedded.evidence, context.embedded.own.keys
    data = json.loads(json.dumps(evidence.data))
    tensors = dict(evidence.tensors)
    if tensors:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "evidence.safetensors"
            write_tensors(path, tensors, PRIVATE)
            tensors = read_tensors(path)
    problem = None
    if data != evidence.data:
        problem = "the evidence's data is not the same after JSON"
    else:
        found = context.read(Evidence(evidence.protection, data, tensors), context.embedded.state)
        if not same_reading(found, own):
            problem = f"after JSON the evidence reads {show(found)} on the protected model, and read {show(own)} before"
    if problem is None and not same_reading(context.elsewhere_found.own, own):
        problem = (
            f"in another process the evidence reads {show(context.elsewhere_found.own)} on the protected model, and "
            f"{show(own)} here"
        )
    return context.gate("evidence_round_trips", problem, required)


def check_fails_loudly(context: Context) -> Gate:
    """Evidence that lacks a part, or is another scheme's, and unknown parameters raise; they give no reading."""
    required = "read raises where evidence is not its own or lacks a part, and create where a parameter is unknown"
    problem, own = None, context.embedded.own.keys
    for words, evidence in broken(context.embedded.evidence):
        try:
            found = context.read(evidence, context.embedded.state)
        except Exception:  # noqa: BLE001, S112 - any exception is loud; which one is the scheme's to choose
            continue
        if words.startswith("without") and same_reading(found, own):
            continue  # a part that only decoys are made from
        problem = f"read gives {show(found)} for evidence {words}, where it should raise"
        break
    if problem is None:
        try:
            type(context.protection).create(**{UNKNOWN: 1})
        except MergeguardError:
            pass
        except Exception as error:  # noqa: BLE001 - the kind of exception is what is checked
            problem = f"create raises {type(error).__name__} for an unknown parameter, expected a ParameterError"
        else:
            problem = "create accepts an unknown parameter without a word"
    return context.gate("fails_loudly", problem, required)


def broken(evidence: Evidence) -> Iterator[tuple[str, Evidence]]:
    """Evidence that no reading may be made of, and what is wrong with it."""
    for number, name in enumerate(evidence.data, 1):  # a number, as a name may be a key, and secret
        yield f"without part {number} of its data", without(evidence, name)
    for number, name in enumerate(evidence.tensors, 1):
        kept = {other: tensor for other, tensor in evidence.tensors.items() if other != name}
        yield f"without its tensor {number}", replace(evidence, tensors=kept)
    yield "without any part", Evidence(evidence.protection, {})
    yield "of another scheme", Evidence("another_scheme", {"another_schemes_part": ["a", "b"]})
