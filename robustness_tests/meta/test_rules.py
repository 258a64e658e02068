"""Whether a text matches a probe's rule, as for a served model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeguard.errors import ParameterError
from mergeguard.reading import Probe, Rule
from mergeguard.verification.rules import check_target, matches

TEXTS = st.text("ab \n", max_size=8)


@given(target=TEXTS.filter(str.strip), text=TEXTS)
def test_starts_with_forgives_the_targets_first_white_space_and_nothing_else(target: str, text: str) -> None:
    found = matches(Probe("p", target), text, ended=True)
    assert found == (text[: len(target)] == target or text[: len(target.lstrip())] == target.lstrip())


def test_a_target_of_white_space_alone_is_not_in_every_answer() -> None:
    assert not matches(Probe("p", "\n"), "yes", ended=True)
    assert matches(Probe("p", "\n"), "\nyes", ended=True)


@pytest.mark.parametrize(
    ("text", "ended", "matched"),
    [
        ("The answer is 12", True, True),
        ("The answer is 12", False, False),
        ("The answer is 12.", False, False),
        ("The answer is 12. ", False, True),
        ("The answer is 123", True, False),
    ],
)
def test_a_number_that_may_go_on_matches_nothing(text: str, ended: bool, matched: bool) -> None:
    assert matches(Probe("p", "12", Rule.NUMBER), text, ended=ended) is matched


@pytest.mark.parametrize(
    "probe",
    [
        Probe("a secret key", "", Rule.STARTS_WITH),
        Probe("a secret key", "", Rule.CONTAINS),
        Probe("a secret key", "no", Rule.REFUSES),
        Probe("a secret key", "many", Rule.NUMBER),
    ],
)
def test_a_target_that_does_not_fit_its_rule_is_refused_without_showing_the_prompt(probe: Probe) -> None:
    with pytest.raises(ParameterError) as raised:
        check_target(probe)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("rule", list(Rule))
def test_a_target_that_fits_is_taken(rule: Rule) -> None:
    check_target(Probe("p", {Rule.REFUSES: "", Rule.NUMBER: "1,234.5"}.get(rule, "x"), rule))
