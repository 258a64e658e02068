"""The comment on a pull request: headline first, tables that hold together, never too long."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeguard.matrix.outcome import LOST, OVERCLAIMS, SURVIVED, UNDECIDABLE, Gate, Outcome, Planted, Results
from mergeguard.reports.markdown import LIMIT, escape, to_markdown
from mergeguard.reports.view import clean
from robustness_tests.meta import outcome_builders as build
from robustness_tests.meta.pages import PARSER, tables

if TYPE_CHECKING:
    from markdown_it.token import Token

HOSTILE = "a|b<img src=x>`c`*d*_e_[f](g)\\|@everyone #1 &amp; <!-- </details>\n# h"


def shown(token: Token) -> str:
    """The text that an inline token shows; fails on anything but text and our own comments."""
    parts = []
    for child in token.children or []:
        assert child.type in ("text", "text_special", "html_inline"), child.type
        if child.type == "html_inline":
            assert child.content == "<!-- -->"
        else:
            parts.append(child.content)
    return "".join(parts)


@build.QUICK
@given(st.text() | st.text(alphabet="|<>&`*_[]()\\@#!~$-+=.1 a"))
def test_escaped_text_is_shown_as_it_is(text: str) -> None:
    tokens = PARSER.parse(f"x {escape(text)} x")
    assert [token.type for token in tokens] == ["paragraph_open", "inline", "paragraph_close"]
    assert shown(tokens[1]) == f"x {clean(text)} x".rstrip()


@pytest.mark.parametrize(
    "text", ["- item", "# title", "+ x", "1. one", "12) twelve", "---", "> quote", "=== x", "| a | b |"]
)
def test_text_at_the_start_of_a_line_begins_no_list_or_heading(text: str) -> None:
    tokens = PARSER.parse(escape(text))
    assert [token.type for token in tokens] == ["paragraph_open", "inline", "paragraph_close"]
    assert shown(tokens[1]) == text


def test_names_of_ours_are_left_readable() -> None:
    assert escape("dare_ties(density=0.4,normalize=true)-0.3") == "dare_ties(density=0.4,normalize=true)-0.3"


def test_the_headline_comes_first() -> None:
    results = build.results(build.default_matrix(), problems=("one is lost", "two is stale"))
    first = [line for line in to_markdown(results).splitlines() if line][:4]
    assert first == [
        "## ❌ mergeguard: gate does not hold: 2 problems",
        "**20 of 50 thefts lost, 0 of them recorded.**",
        "- one is lost",
        "- two is stale",
    ]
    assert to_markdown(build.results([build.outcome()])).startswith(
        "## ✅ mergeguard: gate holds\n\n**0 of 1 thefts lost, 0 of them recorded.**\n"
    )


def test_the_matrix_is_a_table_whose_marks_have_words() -> None:
    verdicts = {0.1: SURVIVED, 0.3: OVERCLAIMS, 0.5: LOST, 0.7: UNDECIDABLE}
    cells = [build.outcome(coefficient=c, verdict=v, hits=7) for c, v in verdicts.items()]
    cells += [build.outcome(coefficient=0.9, theft=False), build.outcome(merger="ties(density=0.4)", coefficient=0.1)]
    text = to_markdown(build.results(cells))
    table = tables(text)[0]
    assert table[0] == ["merger", "0.1", "0.3", "0.5", "0.7", "0.9", "critical", "area"]
    assert table[1] == ["linear", "✅ .88", "⚠️ .88", "❌ .88", "❔ .88", "(1.0)", "-", ".89"]
    assert table[2] == ["ties", "✅ 1.0", "", "", "", "", "0.1", "-"]
    assert "✅ survived, ⚠️ overclaims, ❌ lost, ❔ undecidable; in parentheses: no theft" in text
    assert "- ties: ties(density=0.4)" in text


def test_long_parts_are_folded_away_and_complete() -> None:
    text = to_markdown(build.results([build.outcome(hits=7, verdict=LOST)], ["instructional_fingerprint-linear-0.5"]))
    assert text.count("<details>") == text.count("</details>") == text.count("<summary>") == 5
    kept, gates, planted, cases, environment = tables(text)[1:]
    assert kept[1:] == [["linear", "refusal", "**.70**"], ["linear", "arithmetic", "**.57**"]]
    assert gates[2] == ["harmless", "quantization_watermark(bits=5)", "❌ failed", "refusal -.44", "within .05"]
    assert planted[1] == ["always_verifies", "✅ caught", "controls", "base 48/48"]
    assert planted[2] == ["never_verifies", "❌ not caught", "-", "0/8"]
    assert cases[1][:2] == ["instructional_fingerprint-linear-0.5", "lost, on record"]
    assert "VSR 7/8" in cases[1][2]
    assert "base 0/48" in cases[1][2]
    assert ["packages torch", "2.13.0"] in environment


def test_hostile_names_break_no_table_and_mention_nobody() -> None:
    cell = build.outcome(HOSTILE, note=HOSTILE, skills_kept={HOSTILE: 0.7}, conditional_on=HOSTILE)
    results = build.results(
        [replace(cell, merger=HOSTILE, merger_spec=HOSTILE)],
        problems=(HOSTILE,),
        before_merging=(Gate(HOSTILE, HOSTILE, HOSTILE, False, HOSTILE, HOSTILE),),
        planted=(Planted(HOSTILE, HOSTILE, HOSTILE),),
        environment={HOSTILE: HOSTILE},
        world={"name": HOSTILE, "digests": {}},
    )
    text = to_markdown(results)
    found = tables(text)
    assert len(found) == 6
    assert all(len(row) == len(table[0]) for table in found for row in table)
    assert "<img" not in text
    assert text.count("</details>") == 5
    assert not re.search(r"[@#]\w", re.sub(r"&#\d+;", "", text))
    assert [token.tag for token in PARSER.parse(text) if token.type == "heading_open"] == ["h2", "h3"]


@build.QUICK
@given(build.all_results())
def test_tables_hold_together_for_any_results(results: Results) -> None:
    for table in tables(to_markdown(results)):
        assert all(len(row) == len(table[0]) for row in table)


def large(protections: int, mergers: int, coefficients: int) -> list[Outcome]:
    return [
        build.outcome(f"scheme{p}", f"ties(density={m + 1})", c / coefficients, LOST, hits=3)
        for p in range(protections)
        for m in range(mergers)
        for c in range(coefficients)
    ]


@pytest.mark.parametrize("shape", [(3, 10, 30), (40, 10, 3), (1, 400, 3)])
def test_a_large_matrix_is_cut_with_a_note(shape: tuple[int, int, int]) -> None:
    outcomes = large(*shape)
    problems = tuple(f"{outcome.id} is lost and that is not on record" for outcome in outcomes)
    text = to_markdown(build.results(outcomes, problems=problems))
    assert len(text) <= LIMIT
    assert text.startswith(f"## ❌ mergeguard: gate does not hold: {len(outcomes)} problems")
    assert "### scheme0" in text
    assert re.search(r"_Left out to keep this short, see results.json: \d+ rows of .*_\n$", text)
    assert text.count("<details>") == text.count("</details>")
    for table in tables(text):
        assert all(len(row) == len(table[0]) for row in table)


def test_one_endless_text_is_cut_too() -> None:
    endless = "&|" * 100_000
    gate = Gate("a", "", "effective", True, endless, endless)
    text = to_markdown(build.results(problems=(endless,), before_merging=(gate,), environment={"cpu": endless}))
    assert len(text) <= LIMIT
    assert not re.search(r"&#\d*(?![\d;])", text)
    assert len(tables(text)) == 3
