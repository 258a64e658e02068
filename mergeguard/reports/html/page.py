"""What the page shows, worked out of results: plain data, so that the template only lays it out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergeguard import __version__
from mergeguard.matrix.outcome import Counts, Gate, Planted, format_coefficient
from mergeguard.reports import view
from mergeguard.reports.html import curves
from mergeguard.reports.html.cells import Cell, anchors, height, make_cell, rerun_all
from mergeguard.reports.summary import sentence, summary_of, verdict_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mergeguard.matrix.outcome import Outcome, Results


@dataclass(frozen=True)
class Row:
    """A row of the heat map: `cells` by column, None where nothing was measured; `curve` is an `<svg>` or None."""

    merger: int
    label: str
    spec: str
    cells: tuple[Cell | None, ...]
    critical: str
    area: str
    curve: str | None
    controls: tuple[str, ...]


@dataclass(frozen=True)
class Block:
    """A protection's part of the page, and its line of the overview."""

    scheme: int
    title: str
    about: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    control_names: tuple[str, ...]
    lost: str
    worst: str
    area: str
    scores: bool


@dataclass(frozen=True)
class Kept:
    """A row of the skills that merges keep: by column a fraction and whether the cell is a theft, or None."""

    merger: int
    label: str
    skill: str
    cells: tuple[tuple[str, bool] | None, ...]


@dataclass(frozen=True)
class Page:
    """All that `report.html.j2` lays out. Texts are plain: the template escapes them."""

    version: str
    holds: bool
    headline: str
    sentence: str
    about: str
    problems: tuple[str, ...]
    schemes: tuple[str, ...]
    mergers: tuple[tuple[str, str], ...]
    skills: tuple[str, ...]
    blocks: tuple[Block, ...]
    columns: tuple[str, ...]
    kept: tuple[Kept, ...]
    gates: tuple[Gate, ...]
    planted: tuple[Planted, ...]
    environment: tuple[tuple[str, str], ...]
    command: str

    @property
    def cells(self) -> int:
        """How many cells there are."""
        return sum(cell is not None for block in self.blocks for row in block.rows for cell in row.cells)

    @property
    def several(self) -> bool:
        """Whether there is anything to choose from."""
        return len(self.schemes) > 1 or len(self.mergers) > 1


def make_page(results: Results) -> Page:
    """Everything on the page; draws the curves, which is what takes time."""
    outcomes = results.outcomes
    labels = view.merger_labels(outcomes)
    schemes = list(dict.fromkeys(outcome.protection_spec for outcome in outcomes))
    skills = tuple(dict.fromkeys(skill for outcome in outcomes for skill in outcome.skills_kept))
    named = {id(outcome): anchor for outcome, anchor in zip(outcomes, anchors(outcomes), strict=True)}
    columns = view.sorted_coefficients(outcomes)
    with curves.drawing():
        blocks = tuple(_block(i, block, schemes, labels, skills, named) for i, block in enumerate(view.blocks(results)))
    return Page(
        version=__version__,
        holds=results.holds,
        headline=verdict_line(results),
        sentence=sentence(summary_of(results)),
        about=_about(results),
        problems=tuple(map(view.clean, results.problems)),
        schemes=tuple(map(view.clean, schemes)),
        mergers=tuple((label, view.clean(spec)) for spec, label in labels.items()),
        skills=tuple(map(view.clean, skills)),
        blocks=blocks,
        columns=tuple(map(format_coefficient, columns)),
        kept=tuple(_kept(results, labels, columns)),
        gates=tuple(map(_clean_gate, results.before_merging)),
        planted=tuple(
            Planted(view.clean(item.name), item.caught_by and view.clean(item.caught_by), view.clean(item.measured))
            for item in results.planted
        ),
        environment=(*view.environment_lines(results), ("time", f"{results.seconds:.0f} s")),
        command=rerun_all(outcomes) if outcomes else "",
    )


def _block(
    index: int,
    block: view.Block,
    schemes: Sequence[str],
    labels: Mapping[str, str],
    skills: Sequence[str],
    named: Mapping[int, str],
) -> Block:
    outcomes = [outcome for row in block.rows for outcome in row.outcomes.values()]
    scheme = schemes.index(outcomes[0].protection_spec)
    places = {spec: place for place, spec in enumerate(labels)}
    controls = tuple(dict.fromkeys(name for outcome in outcomes for name in outcome.controls))
    finite = [outcome.score for outcome in outcomes if outcome.score is not None and math.isfinite(outcome.score)]
    largest = max(finite, default=0.0)
    rows = []
    for j, row in enumerate(block.rows):
        label, spec = labels[row.merger_spec], view.clean(row.merger_spec)
        cells = {
            coefficient: make_cell(
                outcome,
                anchor=named[id(outcome)],
                scheme=scheme,
                merger=places[row.merger_spec],
                merger_label=label,
                largest_score=largest,
            )
            for coefficient, outcome in row.outcomes.items()
        }
        said = f"{block.title} under {spec}, over alpha: {curves.summary(row.outcomes)}"
        critical = row.summary.critical_coefficient
        curve = curves.draw(row.outcomes, critical, skills, prefix=f"c{index}-{j}-", label=said)
        rows.append(
            Row(
                merger=places[row.merger_spec],
                label=label,
                spec=spec,
                cells=tuple(cells.get(coefficient) for coefficient in block.coefficients),
                critical=_critical(row),
                area="–" if row.summary.area is None else view.format_area(row.summary.area),
                curve=curve,
                controls=(*(_worst(_of_control(row, name)) for name in controls), _worst(_of_decoys(row))),
            )
        )
    thefts = [outcome for outcome in outcomes if outcome.theft]
    areas = [row.summary.area for row in block.rows if row.summary.area is not None]
    return Block(
        scheme=scheme,
        title=block.title,
        about=block.about,
        columns=tuple(map(format_coefficient, block.coefficients)),
        rows=tuple(rows),
        control_names=tuple(map(view.clean, controls)),
        lost=f"{sum(not outcome.survived for outcome in thefts)} of {len(thefts)}",
        worst=view.number(min(thefts, key=_evidence)) if thefts else "–",
        area=view.format_area(sum(areas) / len(areas)) if areas else "–",
        scores=all(outcome.rate is None for outcome in outcomes),
    )


def _about(results: Results) -> str:
    worlds = dict.fromkeys((str(results.world.get("name", "unknown")), *(o.world for o in results.outcomes)))
    seeds = dict.fromkeys(str(outcome.seed) for outcome in results.outcomes)
    parts = [
        f"world{'s' * (len(worlds) > 1)} {', '.join(worlds)}",
        *([f"seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}"] if seeds else []),
        f"{len(results.outcomes)} cell{'s' * (len(results.outcomes) != 1)}",
        f"mergeguard {results.environment.get('mergeguard', __version__)}",
    ]
    return view.clean(" · ".join(parts))


def _critical(row: view.Row) -> str:
    """The critical coefficient, or why there is none."""
    if row.summary.critical_coefficient is not None:
        return view.format_critical(row.summary.critical_coefficient)
    if not row.summary.thefts:
        return view.NO_THEFT
    return "n/a" if set(row.outcomes) == {None} else "none"


def _evidence(outcome: Outcome) -> float:
    """What a cell shows of the evidence, for finding the least; unreadable is least of all."""
    shown = outcome.score if outcome.rate is None else outcome.rate
    return -math.inf if shown is None or math.isnan(shown) else shown


def _of_control(row: view.Row, name: str) -> Iterator[tuple[float | None, Counts]]:
    return ((alpha, outcome.controls[name]) for alpha, outcome in row.outcomes.items() if name in outcome.controls)


def _of_decoys(row: view.Row) -> Iterator[tuple[float | None, Counts]]:
    for alpha, outcome in row.outcomes.items():
        if outcome.decoy_trials is not None:
            yield alpha, Counts(hits=outcome.decoy_hits, trials=outcome.decoy_trials)


def _worst(found: Iterator[tuple[float | None, Counts]]) -> str:
    """The reading nearest to a survival; where it is not the same at every coefficient, with the first such one."""
    readings = list(found)
    if not readings:
        return "–"
    alpha, worst = max(readings, key=lambda item: height(item[1]))
    text = view.format_counts(worst)
    if len({view.format_counts(counts) for _, counts in readings}) == 1 or alpha is None:
        return text
    return f"{text} at {format_coefficient(alpha)}"


def _kept(results: Results, labels: Mapping[str, str], columns: Sequence[float | None]) -> Iterator[Kept]:
    places = {spec: place for place, spec in enumerate(labels)}
    for line in view.kept_skills(results.outcomes):
        group = f" ({line.group})" if line.group else ""
        cells = tuple(
            (view.format_fraction(line.fractions[column]), column in line.thefts) if column in line.fractions else None
            for column in columns
        )
        merger = line.merger_spec
        yield Kept(places[merger], f"{labels[merger]}{group}", view.clean(line.skill), cells)


def _clean_gate(gate: Gate) -> Gate:
    variant = f"({gate.variant})" if gate.variant else ""
    name = view.clean(f"{gate.protection}{variant}")
    return Gate(name, "", view.clean(gate.gate), gate.passed, view.clean(gate.measured), view.clean(gate.required))
