"""The verdict on a suspect in the wild, from readings alone."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeguard.matrix.verdict import LEVEL, NULL_DRAWS, RANK_LEVEL, SPECIFIC_LEVEL, PairOfReadings
from mergeguard.ownership.statement import statement
from mergeguard.ownership.verdict import (
    NOT_VERIFIED,
    ON_SUSPECT,
    OVERCLAIMS,
    UNDECIDABLE,
    VERIFIED,
    Conclusion,
    conclude,
)
from mergeguard.reading import Reading
from mergeguard.verification.statistics import fisher_greater


def counts(hits: int, trials: int = 8, decoy_hits: int = 0, decoys: int = 40) -> PairOfReadings:
    def reading(hits: int, trials: int) -> Reading:
        return Reading(hits=(True,) * hits + (False,) * (trials - hits))

    return PairOfReadings(reading(hits, trials), reading(decoy_hits, decoys))


def scores(p_value: float | None, decoy_p_value: float | None = 0.5, score: float = 5.0) -> PairOfReadings:
    return PairOfReadings(Reading(score=score, p_value=p_value), Reading(score=0.5, p_value=decoy_p_value))


SILENT = counts(0)


CASES: dict[str, tuple[PairOfReadings, dict[str, PairOfReadings], str]] = {
    "the owner's": (counts(8), {}, VERIFIED),
    "the owner's, beside a clean model": (counts(8), {"base": SILENT}, VERIFIED),
    "unprotected": (counts(0), {}, NOT_VERIFIED),
    "too little is left": (counts(3), {"base": SILENT}, NOT_VERIFIED),
    "answers everything": (counts(8, decoy_hits=40), {}, OVERCLAIMS),
    "answers everything, beside a clean model": (counts(8, decoy_hits=40), {"base": SILENT}, OVERCLAIMS),
    "so does the clean model": (counts(8, decoy_hits=40), {"base": counts(8, decoy_hits=40)}, NOT_VERIFIED),
    "answers everything but the keys": (counts(0, decoy_hits=40), {}, NOT_VERIFIED),
    "fitted keys, which clean models answer": (counts(8), {"base": counts(8)}, NOT_VERIFIED),
    "one clean model is loud": (counts(8), {"base": SILENT, "other": counts(8, decoy_hits=20)}, NOT_VERIFIED),
    "score": (scores(1e-9), {}, VERIFIED),
    "score beside a clean model": (scores(1e-9), {"base": scores(0.3)}, VERIFIED),
    "score that misses the level": (scores(1e-4), {}, NOT_VERIFIED),
    "score of which decoys alarm": (scores(1e-9, decoy_p_value=1e-7), {}, OVERCLAIMS),
    "score of which decoys alarm a little": (scores(1e-9, decoy_p_value=1e-4), {}, OVERCLAIMS),
    "score that a clean model has": (scores(1e-9), {"base": scores(1e-9)}, NOT_VERIFIED),
    "score that a clean model nearly has": (scores(1e-9), {"base": scores(1e-4)}, NOT_VERIFIED),
    "decoys alone": (scores(0.5, decoy_p_value=1e-9), {}, NOT_VERIFIED),
}


@pytest.mark.parametrize("case", CASES)
def test_what_readings_say(case: str) -> None:
    suspect, clean, verdict = CASES[case]
    assert conclude(suspect, clean).verdict == verdict


def test_keys_that_were_fitted_to_a_model_of_others_prove_nothing_although_they_beat_the_counts() -> None:
    """8 of 8 against 8 of 48 passes Fisher's test at the level: silent decoys dilute what the keys do."""
    assert fisher_greater(8, 8, 8, 48) <= LEVEL
    found = conclude(counts(8), {"theirs": counts(8), "base": SILENT})
    assert (found.verdict, found.p_value) == (NOT_VERIFIED, 1.0)
    assert "stands out on theirs too" in statement(found, counts(8))


def test_the_p_value_is_the_worst_comparisons_and_no_null_is_pooled_with_another() -> None:
    found = conclude(counts(7, decoy_hits=2), {"base": counts(0), "other": counts(1)})
    worst = max(fisher_greater(7, 8, 2, 40), fisher_greater(7, 8, 0, 48), fisher_greater(7, 8, 1, 48))
    assert (found.p_value, found.level) == (worst, LEVEL)
    assert {name: (null.hits, null.trials) for name, null in found.compared_with.items()} == {
        ON_SUSPECT: (2, 40),
        "base": (0, 48),
        "other": (1, 48),
    }


@given(hits=st.integers(0, 8), decoy_hits=st.integers(0, 40), other=st.integers(0, 8), other_decoys=st.integers(0, 40))
@settings(max_examples=150, deadline=None)
def test_a_further_clean_model_and_louder_decoys_never_help(
    hits: int, decoy_hits: int, other: int, other_decoys: int
) -> None:
    clean = {"other": counts(other, decoy_hits=other_decoys)}
    alone, compared = conclude(counts(hits, decoy_hits=decoy_hits), {}), conclude(counts(hits), clean)
    assert conclude(counts(hits), {}).verdict == VERIFIED or alone.verdict != VERIFIED
    assert conclude(counts(hits), {}).verdict == VERIFIED or compared.verdict != VERIFIED
    assert alone.verdict != VERIFIED or fisher_greater(hits, 8, decoy_hits, 40) <= LEVEL
    assert compared.verdict != VERIFIED or fisher_greater(hits, 8, other + other_decoys, 48) <= LEVEL
    assert compared.verdict != VERIFIED or fisher_greater(other, 8, other_decoys, 40) > SPECIFIC_LEVEL
    assert alone.p_value is not None
    assert conclude(counts(hits), {}).p_value <= alone.p_value


def test_too_few_keys_decide_nothing_and_the_reason_says_how_many_would() -> None:
    found = conclude(counts(2, trials=2), {"base": counts(0, trials=2)})
    assert (found.verdict, found.p_value) == (UNDECIDABLE, None)
    assert "trials would" in found.reason
    assert found.reason in statement(found, counts(2, trials=2))


def test_a_score_without_an_exact_null_is_ranked_among_fresh_keys() -> None:
    fresh = [index / NULL_DRAWS for index in range(NULL_DRAWS)]
    found = conclude(scores(None, None), {}, fresh)
    assert (found.verdict, found.p_value, found.level) == (VERIFIED, 1 / (NULL_DRAWS + 1), RANK_LEVEL)
    assert conclude(scores(None, None, score=0.6), {}, fresh).verdict == NOT_VERIFIED
    assert conclude(scores(None, None), {"base": scores(None, None)}, fresh).verdict == NOT_VERIFIED
    assert conclude(scores(None, None), {}, fresh[:-1]).verdict == UNDECIDABLE


def test_a_statement_names_every_null_and_the_numbers() -> None:
    suspect = counts(8)
    said = statement(conclude(suspect, {"org/base": SILENT}), suspect)
    for part in (
        "8 of 8",
        "VSR 1.00",
        "0.63 to 1.00",
        f"{ON_SUSPECT}: 0 of 40",
        "org/base: 0 of 48",
        "2e-05",
        "2.7e-09",
    ):
        assert part in said
    lineage = statement(conclude(suspect, {}), suspect, lineage=True)
    assert "descends from the same base" in lineage
    assert "holds the evidence" not in lineage


@pytest.mark.parametrize(
    ("suspect", "word"),
    [(counts(8), "Verified"), (counts(0), "Not verified"), (counts(8, decoy_hits=40), "anyone could make such"),
     (scores(1e-9), "scores 5.00")],
    ids=["verified", "not", "overclaims", "score"],
)  # fmt: skip
def test_each_verdict_has_its_words(suspect: PairOfReadings, word: str) -> None:
    found: Conclusion = conclude(suspect, {})
    assert word in statement(found, suspect)
