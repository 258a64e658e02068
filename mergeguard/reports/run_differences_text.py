"""What changed between two runs, in words: lines for a terminal, and Markdown fit for a comment on a pull request."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeguard.matrix.outcome import format_coefficient
from mergeguard.reports.markdown import MARKS, Section, assemble, escape, table, table_section
from mergeguard.reports.view import clean, format_counts, format_score

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from mergeguard.matrix.outcome import Outcome
    from mergeguard.reports.run_differences import CellChange, GateChange, Lost, RunComparison

_CELL_COLUMNS = ("cell", "old", "new", "p", "corrected", "beyond chance")


def to_lines(comparison: RunComparison) -> Iterator[str]:
    """For a terminal: the headline, what was lost, every change, then how to read it."""
    yield headline(comparison)
    yield counts_line(comparison)
    yield from _runs(comparison)
    measured, unmeasured = _lost(comparison)
    for lost, cell in measured:
        yield f"survivor lost: {_named(comparison, lost.outcome)}: {lost.reason}; {_change(cell)}"
    yield from (f"survivors no longer measured: {row}: {places}" for row, places in _rows(comparison, unmeasured))
    for outcome in comparison.gained:
        yield f"survivor gained: {_named(comparison, outcome)}"
    for cell in _others(comparison):
        yield f"changed: {_named(comparison, cell.new)}: {_change(cell)}"
    for title, outcomes in (("gone", comparison.gone), ("new", comparison.added)):
        yield from (f"{title}: {row}: {places}" for row, places in _rows(comparison, outcomes))
    for gate in comparison.gates:
        yield f"{'gate worse' if gate.worse else 'gate'}: {gate.name}: {gate.old or '-'} -> {gate.new or '-'}"
    yield from (f"differs: {line}" for line in comparison.differences)
    yield ""
    yield explanation(comparison)


def to_markdown(comparison: RunComparison) -> str:
    """GitHub's Markdown of at most `markdown.LIMIT` characters, the headline and the losses first."""
    return assemble(_sections(comparison), "mergeguard compare --json")


def headline(comparison: RunComparison) -> str:
    if comparison.holds:
        return "no survivor lost"
    return f"{len(comparison.lost)} survivor{'' if len(comparison.lost) == 1 else 's'} lost"


def counts_line(comparison: RunComparison) -> str:
    """Cells changed, of how many, and how many of them by more than chance explains."""
    changed, clear = len(comparison.changed), len(comparison.beyond_chance)
    parts = [
        f"world {comparison.world}: {changed} of {len(comparison.cells)} common cells changed",
        f"{clear} of them by more than chance explains",
        f"{len(comparison.gone)} cells gone, {len(comparison.added)} new",
    ]
    if comparison.gained:
        parts.append(f"survivors gained: {len(comparison.gained)}")
    if worse := sum(gate.worse for gate in comparison.gates):
        parts.append(f"gates worse: {worse}")
    return "; ".join(parts)


def explanation(comparison: RunComparison) -> str:
    """How the p-values were made and what they do not say."""
    shared = dict.fromkeys(cell.new.conditional_on for cell in comparison.cells if cell.new.conditional_on)
    test = (
        "p: two-sided Fisher exact tests of the hits and of the unseen keys that answer, the smaller p doubled, as if "
        "each run had drawn its own keys."
    )
    parts = [
        test,
        f"Corrected: Holm's over the {comparison.tested} cells with hits; beyond chance: at most {comparison.level:g}.",
        "With one seed both runs have the same keys: a change then has a cause, even if other keys could look like it.",
    ]
    if comparison.undecidable:
        parts.append(f"In {comparison.undecidable} cells no hits could have reached that: too few trials.")
    if shared:
        parts.append(f"Conditional on {', '.join(shared)}, which trials share.")
    return clean(" ".join(parts))


def _sections(comparison: RunComparison) -> Iterator[Section]:
    mark = "✅" if comparison.holds else "❌"
    opening = [f"## {mark} mergeguard compare: {headline(comparison)}", "", f"**{escape(counts_line(comparison))}.**"]
    opening += ["", *(f"- {escape(line)}" for line in _runs(comparison)), ""]
    yield Section("the headline", tuple(opening), ())
    measured, unmeasured = _lost(comparison)
    if measured:
        lost_rows = ((*_names(comparison, lost), *_numbers(cell)) for lost, cell in measured)
        yield _open_table("survivors lost", ("survivor lost", "why", *_CELL_COLUMNS[1:]), lost_rows)
    if unmeasured:
        yield _open_table("survivors no longer measured", ("survivors no longer measured", "coefficients"),
                          _escaped_rows(comparison, unmeasured))  # fmt: skip
    clear = [cell for cell in _others(comparison) if cell.beyond_chance]
    if clear:
        yield _open_table("changed beyond chance", _CELL_COLUMNS, (_cell_row(comparison, cell) for cell in clear))
    worse = [gate for gate in comparison.gates if gate.worse]
    if worse:
        yield _open_table("gates worse", ("gate worse", "old", "new"), map(_gate_row, worse))
    rest = [cell for cell in _others(comparison) if not cell.beyond_chance]
    if rest:
        about = f"{len(rest)} cells, by no more than chance explains or untested"
        yield table_section("Other changes", about, _CELL_COLUMNS, (_cell_row(comparison, cell) for cell in rest))
    if comparison.gained:
        rows = [
            (escape(_named(comparison, outcome)), _shown(outcome, _measured(outcome))) for outcome in comparison.gained
        ]
        yield table_section("Survivors gained", str(len(rows)), ("cell", "new"), rows)
    for title, outcomes in (("Cells gone", comparison.gone), ("New cells", comparison.added)):
        if outcomes:
            yield table_section(title, str(len(outcomes)), ("row", "coefficients"), _escaped_rows(comparison, outcomes))
    gates = [gate for gate in comparison.gates if not gate.worse]
    if gates:
        yield table_section("Gates that measured something else", "", ("gate", "old", "new"), map(_gate_row, gates))
    if comparison.differences:
        about = f"{len(comparison.differences)} lines, old / new"
        lines = [(escape(line),) for line in comparison.differences]
        yield table_section("What else differs", about, ("what",), lines)
    yield Section("how to read it", (escape(explanation(comparison)),), ())


def _open_table(name: str, header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Section:
    first, rule, *body = table(header, rows)
    return Section(name, (first, rule), tuple(body), ("",))


def _runs(comparison: RunComparison) -> Iterator[str]:
    """Each run in a line, and a warning where their keys are not the same."""
    for name, said, problems in zip(("old", "new"), comparison.sentences, comparison.problems, strict=True):
        gate = f"gate does not hold, problems: {len(problems)}" if problems else "gate holds"
        yield f"{name}: {said}; {gate}"
    if comparison.seeds[0] != comparison.seeds[1]:
        one, other = (", ".join(map(str, seeds)) for seeds in comparison.seeds)
        yield f"seeds differ ({one} / {other}): cells of different seeds have other keys and another training"


def _lost(comparison: RunComparison) -> tuple[list[tuple[Lost, CellChange]], list[Outcome]]:
    """Survivors lost that the new run measured, and those that it did not."""
    cells = {id(cell.old): cell for cell in comparison.cells}
    measured = [(lost, cells[id(lost.outcome)]) for lost in comparison.lost if id(lost.outcome) in cells]
    return measured, [lost.outcome for lost in comparison.lost if id(lost.outcome) not in cells]


def _others(comparison: RunComparison) -> list[CellChange]:
    """Cells that changed and are no survivors lost."""
    lost = {id(lost.outcome) for lost in comparison.lost}
    return [cell for cell in comparison.changed if id(cell.old) not in lost]


def _names(comparison: RunComparison, lost: Lost) -> tuple[str, str]:
    return escape(_named(comparison, lost.outcome)), escape(lost.reason)


def _cell_row(comparison: RunComparison, cell: CellChange) -> tuple[str, ...]:
    return escape(_named(comparison, cell.new)), *_numbers(cell)


def _numbers(cell: CellChange) -> tuple[str, ...]:
    return *(_shown(outcome, _detail(cell, outcome)) for outcome in (cell.old, cell.new)), *_tested(cell)


def _gate_row(gate: GateChange) -> tuple[str, str, str]:
    return escape(gate.name), escape(gate.old or "-"), escape(gate.new or "-")


def _tested(cell: CellChange) -> tuple[str, str, str]:
    if cell.p_value is None or cell.corrected is None:
        return "-", "-", "no test of scores"
    said = "yes" if cell.beyond_chance else "no" if cell.decidable else "cannot tell"
    return f"{cell.p_value:.2g}", f"{cell.corrected:.2g}", f"{said} ({cell.of})" if cell.beyond_chance else said


def _change(cell: CellChange) -> str:
    p_value, corrected, said = _tested(cell)
    test = f"p {p_value}, corrected {corrected}, beyond chance: {said}" if cell.p_value is not None else said
    return f"{_in_words(cell, cell.old)} -> {_in_words(cell, cell.new)} ({test})"


def _detail(cell: CellChange, outcome: Outcome) -> str:
    """What was measured on one side; unseen keys and controls where the sides differ in them."""
    parts = [_measured(outcome)]
    if (cell.old.decoy_hits, cell.old.decoy_trials) != (cell.new.decoy_hits, cell.new.decoy_trials):
        parts.append("no unseen keys" if outcome.decoy_trials is None
                     else f"unseen {outcome.decoy_hits}/{outcome.decoy_trials}")  # fmt: skip
    parts += [
        f"{name} {format_counts(counts)}"
        for name, counts in outcome.controls.items()
        if cell.old.controls.get(name) != cell.new.controls.get(name)
    ]
    return ", ".join(parts)


def _shown(outcome: Outcome, detail: str) -> str:
    """A cell as the matrix shows it: the mark of the verdict, in parentheses if it is no theft."""
    text = f"{MARKS[outcome.verdict]} {escape(detail)}"
    return text if outcome.theft else f"({text})"


def _in_words(cell: CellChange, outcome: Outcome) -> str:
    return f"{outcome.verdict} {_detail(cell, outcome)}" + ("" if outcome.theft else ", no theft")


def _measured(outcome: Outcome) -> str:
    if outcome.trials is not None:
        return f"{outcome.hits}/{outcome.trials}"
    return "?" if outcome.score is None else f"score {format_score(outcome.score)}"


def _named(comparison: RunComparison, outcome: Outcome) -> str:
    """The cell's id, with its seed where a run has several."""
    several = max(map(len, comparison.seeds)) > 1
    return f"{outcome.id} (seed {outcome.seed})" if several else outcome.id


def _rows(comparison: RunComparison, outcomes: Iterable[Outcome]) -> list[tuple[str, str]]:
    """Cells by protection and merger, their coefficients in one text."""
    several = max(map(len, comparison.seeds)) > 1
    found: dict[str, list[str]] = {}
    for outcome in outcomes:
        row = f"{outcome.protection_spec}-{outcome.merger_spec}" + (f" (seed {outcome.seed})" if several else "")
        found.setdefault(row, []).append(format_coefficient(outcome.coefficient))
    return [(row, ", ".join(places)) for row, places in found.items()]


def _escaped_rows(comparison: RunComparison, outcomes: Iterable[Outcome]) -> list[tuple[str, str]]:
    return [(escape(row), escape(places)) for row, places in _rows(comparison, outcomes)]
