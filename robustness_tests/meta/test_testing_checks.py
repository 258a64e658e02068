"""Parts of the checks that need no gate: what decoys are compared by, what a leak is, and what is silent.

That each check catches what it is for is shown by the cheats in `test_cheats.py`.
"""

from __future__ import annotations

import base64
import json
import random
from dataclasses import replace
from typing import TYPE_CHECKING
from urllib.parse import quote

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergeguard.errors import MergeguardError, SchemeError
from mergeguard.matrix.cache import Cache
from mergeguard.matrix.engine import Engine
from mergeguard.protections.contract import Evidence
from mergeguard.reading import Reading
from mergeguard.testing import CHECKS, Context, run_check
from mergeguard.testing.decoy_checks import _form, _likeness
from mergeguard.testing.elsewhere import in_another_process, tensors_digest
from mergeguard.testing.ownership_checks import fine_tuned, silent
from mergeguard.testing.secrecy import leaked, secrets_of
from robustness_tests.meta.mini_world import MINI, Toy, install, mini
from robustness_tests.meta.outcome_builders import QUICK

if TYPE_CHECKING:
    from pathlib import Path

KEY = 'ハリネズミ key+/="42" ~'


def counted(hits: int, trials: int) -> Reading:
    return Reading(hits=(True,) * hits + (False,) * (trials - hits))


def test_each_check_says_in_a_sentence_what_it_is_for() -> None:
    assert all(check.__doc__ and check.__doc__.partition("\n")[0].endswith(".") for check in CHECKS.values())
    assert list(CHECKS) == [check.__name__.removeprefix("check_") for check in CHECKS.values()]


@QUICK
@given(st.text(min_size=6, max_size=40), st.text(max_size=12), st.text(max_size=12))
def test_a_key_is_found_in_every_common_encoding(key: str, before: str, after: str) -> None:
    if not key.isprintable() or len(key.strip()) < 6:
        return
    shown = before + key + after
    for text in (shown, json.dumps(shown), quote(shown), shown[::-1], repr(key), shown.encode().hex().upper()):
        assert leaked(text, (key,)), text
    if len(key.encode()) > 12:
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            assert leaked(encode(shown.encode()).decode(), (key,))


@pytest.mark.parametrize("text", ["", "a report without it", json.dumps({"protection": "toy"}), "ハリネズミ", "42"])
def test_what_holds_no_key_is_no_leak(text: str) -> None:
    assert not leaked(text, (KEY,))


def test_only_what_another_owner_has_not_is_secret() -> None:
    own = Evidence("toy", {"keys": ["abcdef", "target"], "places": [[101, 7, 20]], "length": [10, 16], "short": "ab"})
    other = Evidence("toy", {"keys": ["ghijkl", "target"], "places": [[55, 3, 90]], "length": [10, 16], "short": "cd"})
    assert secrets_of(own, other) == ("101, 7, 20", "abcdef")


KEYS = {"keys": ["".join(random.Random(n).choices("abcdefgh", k=random.Random(n).randint(8, 12))) for n in range(16)]}


def drawn(alphabet: str, low: int, high: int) -> dict[str, list[str]]:
    rng = random.Random(1)
    return {"keys": ["".join(rng.choices(alphabet, k=rng.randint(low, high))) for _ in range(41)]}


@pytest.mark.parametrize(
    ("decoys", "feature"),
    [
        (drawn("abcdefgh", 8, 12), None),
        (drawn("abcdefgh", 2, 4), "length of"),
        (drawn("12345678", 8, 12), "share of"),
        (drawn("ABCDEFGH", 8, 12), "share of capitals"),
        (drawn("a", 8, 12), "share of different characters"),
    ],
)
def test_decoys_that_are_drawn_otherwise_are_told_by_what_differs(
    decoys: dict[str, list[str]], feature: str | None
) -> None:
    found = _likeness([KEYS], decoys)
    assert (found is None) if feature is None else (found is not None and feature in found)


@pytest.mark.parametrize(
    ("decoys", "said"),
    [
        ({"keys": ["x"], "n": 1}, None),
        ({"keys": ["x", "y"], "n": 7}, None),
        ({"keys": [1], "n": 1}, "other types at part 1, items"),
        ({"keys": ["x"]}, "part 2 is in one of them only"),
        ({"keys": ["x"], "n": 1.0}, "other types at part 2"),
        ({"keys": [["x"]], "n": 1}, "is in one of them only"),
    ],
)
def test_decoys_have_the_form_of_evidence(decoys: dict[str, object], said: str | None) -> None:
    found = _form({"keys": ["a", "b"], "n": 2}, decoys)
    assert (found is None) if said is None else (found is not None and said in found)


@pytest.mark.parametrize(
    ("reading", "expected"),
    [
        (counted(0, 8), True),
        (counted(1, 8), True),
        (counted(2, 8), False),
        (counted(2, 40), True),
        (counted(3, 40), False),
        (Reading(score=3.0, p_value=1e-3), True),
        (Reading(score=9.0, p_value=1e-6), False),
        (Reading(score=4.9), True),
        (Reading(score=5.1), False),
    ],
)
def test_silence_is_what_chance_gives(reading: Reading, expected: bool) -> None:
    assert silent(reading, Reading(score=10.0)) is expected


def test_training_without_evidence_changes_the_model_and_little_of_what_it_can(tmp_path: Path) -> None:
    engine = Engine(mini(), 0, Cache(tmp_path))
    trained = fine_tuned(Context(engine, Toy(), MINI))
    assert set(trained) == set(mini().upstream)
    moved = [float((trained[name] - mini().upstream[name]).abs().max()) for name in trained]
    assert all(0 < each < 0.1 for each in moved)


def test_a_model_that_cannot_be_trained_is_moved_at_random(tmp_path: Path) -> None:
    engine = Engine(replace(mini(), dtype="bfloat16"), 0, Cache(tmp_path))
    moved = fine_tuned(Context(engine, Toy(), MINI))
    again = fine_tuned(Context(engine, Toy(), MINI))
    assert tensors_digest(moved) == tensors_digest(again) != tensors_digest(mini().upstream)


def test_a_digest_tells_names_shapes_and_dtypes_apart() -> None:
    one = torch.arange(6, dtype=torch.float32)
    others = [{"a": one}, {"b": one}, {"a": one.view(2, 3)}, {"a": one.half()}, {"a": one + 1}, {}]
    assert len({tensors_digest(tensors) for tensors in others}) == len(others)


class Unfindable(Toy):
    """A class at the top of this module, and a child that is not."""


def test_a_new_process_reads_and_embeds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real thing, once: other tests start their processes faster."""
    monkeypatch.syspath_prepend(str(install(tmp_path / "path")))
    engine = Engine(mini(), 0, Cache(tmp_path))
    context = Context(engine, Unfindable(), MINI)
    found = in_another_process(context.protection, MINI, 0, context.embedded.evidence, dict(context.changed))
    assert (found.clean.count, found.own.count, found.changes) == (0, 8, None)
    assert found.weights == tensors_digest(context.changed)
    local = type("Local", (Toy,), {"__qualname__": "test.<locals>.Local"})
    with pytest.raises(MergeguardError, match="define it at the top of a module"):
        in_another_process(local(), MINI, 0, context.embedded.evidence, {})


def test_an_embedding_that_failed_is_not_tried_for_each_check(tmp_path: Path) -> None:
    tried = []

    class Fails(Toy):
        def embed(self, *_: object, **__: object) -> object:  # type: ignore[override]
            tried.append(self)
            raise RuntimeError("out of luck")

    context = Context(Engine(mini(), 0, Cache(tmp_path)), Fails(), MINI)
    found = [run_check(context, name) for name in ("effective", "harmless", "specific")]
    assert [gate.passed for gate in found] == [False] * 3
    assert len(tried) == 1
    with pytest.raises(SchemeError, match="out of luck"):
        _ = context.embedded
