"""Outcomes and results for tests of reports: plain builders with sensible defaults, and hypothesis strategies."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hypothesis import settings
from hypothesis import strategies as st

from mergeguard.matrix.outcome import LOST, SURVIVED, VERDICTS, Counts, Gate, Outcome, Planted, Results, Summary
from mergeguard.reports.summary import summarise
from mergeguard.specs import Spec, Value, parse_spec

if TYPE_CHECKING:
    from collections.abc import Sequence

QUICK = settings(max_examples=20, deadline=None)
DEFAULT_MERGERS = (
    "linear",
    "task_arithmetic(lambda=1.4)",
    "ties(density=0.4,normalize=true)",
    "dare_linear(density=0.4)",
    "dare_ties(density=0.4,normalize=true)",
)
NINE = tuple(round(i / 10, 1) for i in range(1, 10))


def outcome(
    protection: str = "instructional_fingerprint",
    merger: str = "linear",
    coefficient: float | None = 0.5,
    verdict: str = SURVIVED,
    *,
    hits: int | None = 8,
    trials: int | None = 8,
    score: float | None = None,
    **changes: Any,
) -> Outcome:
    """A theft that survives with 8 of 8 keys, unless told otherwise."""
    spec = parse_spec(merger)
    if score is not None:
        hits = trials = None
    built = Outcome(
        protection=protection,
        variant="",
        merger=spec.name,
        merger_parameters=dict(spec.parameters),
        merger_spec=merger,
        coefficient=coefficient,
        world="tiny",
        seed=0,
        hits=hits,
        trials=trials,
        rate=None if hits is None or trials is None else hits / trials,
        interval=None if score is not None else (0.0, 1.0),
        score=score,
        details={},
        controls={"base": Counts(hits=0, trials=48), "matched control": Counts(hits=1, trials=48)},
        p_value=1e-9,
        level=2e-5,
        decoy_hits=1,
        decoy_trials=40,
        decoy_p_value=1e-7,
        verdict=verdict,
        skills={"refusal": 0.9, "arithmetic": 0.7},
        skills_kept={"refusal": 0.7, "arithmetic": 0.57},
        theft=True,
        access="text",
        claim="ownership",
        conditional_on=None,
        seconds=1.5,
    )
    return replace(built, **changes)


def results(outcomes: Sequence[Outcome] = (), recorded: Sequence[str] = (), **changes: Any) -> Results:
    """Results with the summary of `outcomes`; those whose ids are `recorded` were expected to be lost."""
    marked = tuple(replace(o, expected=LOST) if o.id in recorded else o for o in outcomes)
    built = Results(
        world={"name": "tiny", "digests": {"base": "sha256:0011", "upstream": "sha256:2233"}},
        environment={"python": "3.11.9", "packages": {"torch": "2.13.0"}, "threads": 2},
        outcomes=marked,
        before_merging=(
            Gate("instructional_fingerprint", "", "effective", True, "8/8", "survives alpha 1"),
            Gate("quantization_watermark", "bits=5", "harmless", False, "refusal -.44", "within .05"),
        ),
        planted=(
            Planted("always_verifies", "controls", "base 48/48"),
            Planted("never_verifies", None, "0/8"),
        ),
        summary=summarise(marked, recorded),
        matched_controls={"linear-0.5": {"refusal": 0.7, "arithmetic": 0.6}},
        seconds=12.0,
    )
    return replace(built, **changes)


def default_matrix(protections: Sequence[str] = ("instructional_fingerprint", "gaussian_probe")) -> list[Outcome]:
    """The default mergers at nine coefficients: thefts in the middle, losses at the low end of them."""
    cells = []
    for protection in protections:
        for merger in DEFAULT_MERGERS:
            for coefficient in NINE:
                hits = min(8, int(coefficient * 10))
                cells.append(
                    outcome(
                        protection,
                        merger,
                        coefficient,
                        SURVIVED if hits >= 5 else LOST,
                        hits=hits,
                        score=84 * coefficient if protection == "gaussian_probe" else None,
                        theft=0.3 <= coefficient <= 0.7,
                        skills_kept={"refusal": coefficient, "arithmetic": 1 - coefficient},
                    )
                )
    return cells


names = st.from_regex(r"[a-z][a-z0-9_]{0,12}", fullmatch=True)
texts = st.text(max_size=20)
rates = st.floats(0, 1)
finite = st.floats(-1e6, 1e6)
coefficients = st.one_of(st.none(), st.integers(0, 20).map(lambda i: i / 20))
values: st.SearchStrategy[Value] = st.one_of(st.booleans(), st.integers(-99, 99), finite, names)


@st.composite
def counts(draw: st.DrawFn) -> Counts:
    if draw(st.booleans()):
        return Counts(score=draw(finite), p_value=draw(st.none() | rates))
    trials = draw(st.integers(1, 99))
    return Counts(hits=draw(st.integers(0, trials)), trials=trials)


@st.composite
def outcomes(draw: st.DrawFn) -> Outcome:
    """Any outcome that satisfies the schema, with finite numbers."""
    merger = draw(names)
    parameters = draw(st.dictionaries(names, values, max_size=2))
    counted = draw(st.booleans())
    read = draw(counts().filter(lambda c: (c.trials is not None) == counted))
    decoys = draw(st.none() | counts().filter(lambda c: c.trials is not None))
    low, high = sorted((draw(rates), draw(rates)))
    return Outcome(
        protection=draw(names),
        variant=draw(st.sampled_from(["", "bits=5"])),
        merger=merger,
        merger_parameters=parameters,
        merger_spec=str(Spec.of(merger, parameters)),
        coefficient=draw(coefficients),
        world=draw(names),
        seed=draw(st.integers(0, 2**63)),
        hits=read.hits,
        trials=read.trials,
        rate=read.hits / read.trials if read.hits is not None and read.trials is not None else None,
        interval=(low, high) if counted and draw(st.booleans()) else None,
        score=read.score,
        details=draw(st.dictionaries(texts, finite, max_size=2)),
        controls=draw(st.dictionaries(texts, counts(), max_size=3)),
        p_value=draw(rates),
        level=2e-5,
        decoy_hits=decoys.hits if decoys else None,
        decoy_trials=decoys.trials if decoys else None,
        decoy_p_value=draw(st.none() | rates),
        verdict=draw(st.sampled_from(VERDICTS)),
        skills=draw(st.dictionaries(texts, rates, max_size=2)),
        skills_kept=draw(st.dictionaries(texts, finite, max_size=2)),
        theft=draw(st.booleans()),
        access=draw(st.sampled_from(["text", "logits", "weights", "activations"])),
        claim=draw(st.sampled_from(["ownership", "lineage"])),
        conditional_on=draw(st.none() | texts),
        seconds=draw(st.floats(0, 1e6)),
        expected=draw(st.none() | st.sampled_from(VERDICTS)),
        note=draw(texts),
    )


@st.composite
def all_results(draw: st.DrawFn) -> Results:
    """Any results that satisfy the schema, with finite numbers and hostile texts."""
    cells = tuple(draw(st.lists(outcomes(), max_size=4)))
    gate = st.builds(
        Gate, protection=names, variant=texts, gate=names, passed=st.booleans(), measured=texts, required=texts
    )
    return Results(
        world={"name": draw(names), "digests": draw(st.dictionaries(texts, names, max_size=2))},
        environment=draw(st.dictionaries(texts, st.none() | values | st.lists(texts, max_size=2), max_size=3)),
        outcomes=cells,
        before_merging=tuple(draw(st.lists(gate, max_size=2))),
        planted=tuple(
            draw(st.lists(st.builds(Planted, name=names, caught_by=st.none() | names, measured=texts), max_size=2))
        ),
        summary=summarise(cells, {o.id for o in cells[:2]}),
        problems=tuple(draw(st.lists(st.text(min_size=1, max_size=20), max_size=2))),
        matched_controls=draw(st.dictionaries(texts, st.dictionaries(texts, finite, max_size=2), max_size=2)),
        seconds=draw(st.floats(0, 1e6)),
    )


def matrix_rows(max_size: int = 12) -> st.SearchStrategy[list[Outcome]]:
    """Outcomes of a few protections, variants and mergers, so that rows have several coefficients and seeds."""
    cell = st.builds(
        outcome,
        protection=st.sampled_from(["a", "b"]),
        merger=st.sampled_from(["linear", "ties(density=0.2)", "ties(density=0.4)"]),
        coefficient=coefficients,
        verdict=st.sampled_from(VERDICTS),
        hits=st.integers(0, 8),
        score=st.sampled_from([None, None, None, 3.5]),
        variant=st.sampled_from(["", "bits=5"]),
        theft=st.booleans(),
    )
    return st.lists(cell, max_size=max_size)


def nan_everywhere() -> Results:
    """Results with NaN and infinity wherever a float may honestly be one."""
    cell = outcome(
        rate=math.nan,
        details={"margin": math.inf},
        skills={"refusal": math.nan},
        skills_kept={"refusal": -math.inf, "arithmetic": math.nan},
    )
    return results([cell], environment={"load": math.nan}, matched_controls={"linear-0.5": {"refusal": math.nan}})


def summary_row(thefts: int, lost: int, recorded: int) -> Summary:
    return Summary("a", "", "linear", "linear", None, None, thefts, lost, recorded)
