"""What the terminal and Markdown reports share: blocks, labels, numbers that do not round across a border."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeguard.matrix.outcome import Counts
from mergeguard.reports import view
from robustness_tests.meta import outcome_builders as build


def test_reports_load_no_torch() -> None:
    modules = "results_json, summary, terminal, markdown, junit"
    code = f"import sys; from mergeguard.reports import {modules}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("rate", "shown"),
    [(0, ".00"), (1, "1.0"), (0.875, ".88"), (0.5, ".50"), (0.999, ".99"), (0.001, ".01"), (math.nan, "nan")],
)
def test_a_rate_is_shown_in_three_characters_and_only_the_ends_as_the_ends(rate: float, shown: str) -> None:
    assert view.format_rate(rate) == shown


@pytest.mark.parametrize(
    ("fraction", "shown"),
    [(0.7, ".70"), (0.57, ".57"), (0, ".00"), (1, "1.0"), (1.26, "1.2"), (-0.305, "-.31"), (math.inf, "nan")],
)
def test_a_fraction_is_shown_in_two_digits(fraction: float, shown: str) -> None:
    assert view.format_fraction(fraction) == shown


@build.QUICK
@given(st.floats(0, 1) | st.sampled_from([0.499, 0.4999999, 0.5, 0.29, 0.58]))
def test_a_fraction_below_a_half_is_never_shown_as_a_half(fraction: float) -> None:
    assert (float(view.format_fraction(fraction)) >= 0.5) == (fraction >= 0.5 - 1e-9)


@pytest.mark.parametrize(
    ("score", "shown"),
    [
        (84.2, "84"),
        (25.3, "25"),
        (3.3, "3.3"),
        (0.4, ".4"),
        (-0.04, ".0"),
        (-0.42, "-.4"),
        (-12.3, "-12"),
        (1e6, "1e6"),
    ],
)
def test_a_score_is_shown_in_about_three_characters(score: float, shown: str) -> None:
    assert view.format_score(score) == shown


def test_counts_and_scores_of_controls_are_told_apart() -> None:
    assert view.format_counts(Counts(hits=1, trials=48)) == "1/48"
    assert view.format_counts(Counts(score=0.4)) == "score .4"


@build.QUICK
@given(st.text())
def test_cleaned_text_is_one_printable_line(text: str) -> None:
    assert view.clean(text).isprintable()


def test_cleaning_shows_what_cannot_be_seen_and_keeps_the_rest() -> None:
    assert (
        view.clean("dare_ties(density=0.4)\n né\x1b[31m\u202e\ud800")
        == r"dare_ties(density=0.4) né\x1b[31m\u202e\ud800"
    )


def test_a_merger_is_called_by_its_name_where_that_is_unambiguous() -> None:
    specs = [
        "linear",
        "ties(density=0.4,normalize=true)",
        "ties(density=0.4,normalize=false)",
        "dare_ties(density=0.4)",
    ]
    labels = view.merger_labels([build.outcome(merger=spec) for spec in specs])
    assert list(labels.values()) == ["linear", "ties(normalize=true)", "ties(normalize=false)", "dare_ties"]


def test_specs_that_mean_the_same_keep_their_written_forms() -> None:
    specs = ["ties(density=0.4)", "ties(density=0.4,normalize=true)"]
    full = {"density": 0.4, "normalize": True}
    labels = view.merger_labels([build.outcome(merger=spec, merger_parameters=full) for spec in specs])
    assert list(labels.values()) == specs


@build.QUICK
@given(st.lists(build.outcomes(), max_size=5))
def test_labels_of_different_mergers_differ(outcomes: list) -> None:  # type: ignore[type-arg] # of any outcomes
    labels = view.merger_labels(outcomes)
    assert len(set(labels.values())) == len({outcome.merger_spec for outcome in outcomes})


def test_variants_and_seeds_have_blocks_of_their_own() -> None:
    one = build.outcome()
    results = build.results([one, replace(one, variant="bits=5"), replace(one, seed=1), replace(one, coefficient=None)])
    titles = [block.title for block in view.blocks(results)]
    assert titles == [f"{name} (seed {seed})" for name, seed in
                      (("instructional_fingerprint", 0), ("instructional_fingerprint(bits=5)", 0),
                       ("instructional_fingerprint", 1))]  # fmt: skip
    assert view.blocks(results)[0].coefficients == (0.5, None)
    assert [block.title for block in view.blocks(build.results([one]))] == ["instructional_fingerprint"]


def test_what_protections_share_of_the_matched_control_is_shown_once() -> None:
    cells = [build.outcome(name, coefficient=c) for name in ("a", "b") for c in (0.3, 0.5)]
    kept = view.kept_skills(cells)
    assert [(line.skill, line.group) for line in kept] == [("refusal", ""), ("arithmetic", "")]
    assert kept[0].fractions == {0.3: 0.7, 0.5: 0.7}
    assert kept[0].thefts == {0.3, 0.5}


def test_protections_whose_matched_controls_differ_have_rows_of_their_own() -> None:
    cells = [build.outcome("a"), build.outcome("b"), build.outcome("c", skills_kept={"refusal": 0.1}, theft=False)]
    kept = view.kept_skills(cells)
    assert [(line.skill, line.group) for line in kept] == [
        ("refusal", "a, b"),
        ("arithmetic", "a, b"),
        ("refusal", "c"),
    ]
    assert kept[2].thefts == frozenset()


def test_a_description_says_everything_that_was_measured() -> None:
    text = view.describe(build.outcome(hits=6, note="edge", conditional_on="one trigger", interval=(0.35, 0.97)))
    for part in ("VSR 6/8 (0.35 to 0.97)", "p 1e-09 (level 2e-05)", "decoys 1/40", "base 0/48", "matched control 1/48",
                 "conditional on one trigger", "edge"):  # fmt: skip
        assert part in text
    assert view.describe(build.outcome(score=84.2)).startswith("score 84.2, p 1e-09")


def test_the_environment_is_flattened_to_pairs() -> None:
    pairs = dict(
        view.environment_lines(build.results(environment={"packages": {"torch": "2.13.0"}, "gpus": ["a", "b"]}))
    )
    assert pairs["world name"] == "tiny"
    assert pairs["world digests base"] == "sha256:0011"
    assert pairs["packages torch"] == "2.13.0"
    assert pairs["gpus"] == "a, b"
