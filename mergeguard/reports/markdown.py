"""A report fit for a comment on a pull request: the headline first, the long parts folded away, never too long."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergeguard.matrix.outcome import (
    LOST,
    OVERCLAIMS,
    SURVIVED,
    UNDECIDABLE,
    Gate,
    Outcome,
    Planted,
    Results,
    format_coefficient,
)
from mergeguard.reports import view
from mergeguard.reports.summary import is_recorded, sentence, summary_of, verdict_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

LIMIT = 60_000
"""Characters of a report, at most. GitHub refuses comments of more than 65,536."""

MARKS = {SURVIVED: "✅", OVERCLAIMS: "⚠️", LOST: "❌", UNDECIDABLE: "❔"}
_LONGEST_LINE = 4_000
_NOTE_ROOM = 400
_SPECIAL = re.compile(
    r"^[-+=#](?=[-+=#\s])|^\d(?=\d*[.)]\s)"  # would begin a list, a heading or a line across
    r"|[\\`*\[\]<>&|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])"  # not the underscores inside of names: they mean nothing
    r"|[@#](?=\w)"  # would mention somebody or an issue
)


@dataclass(frozen=True)
class Section:
    """Lines shown together: `opening` and `closing` whole, and as many `rows` as fit the room and the `share`."""

    name: str
    opening: tuple[str, ...]
    rows: tuple[str, ...]
    closing: tuple[str, ...] = ()
    share: int = LIMIT

    def lines(self) -> tuple[str, ...]:
        """All of it."""
        return (*self.opening, *self.rows, *self.closing)


def to_markdown(results: Results) -> str:
    """The report in GitHub's Markdown, of at most `LIMIT` characters; what is left out is named at the end."""
    return assemble(_sections(results), "results.json")


def assemble(sections: Iterable[Section], whole: str) -> str:
    """The sections as far as they fit `LIMIT` characters; what is left out is named at the end, and is in `whole`."""
    written: list[str] = []
    left_out: list[str] = []
    room = LIMIT - _NOTE_ROOM
    for section in sections:
        frame = _length((*section.opening, *section.closing))
        rows = _fitting(section.rows, min(room - frame, section.share))
        if frame > room or (section.rows and not rows):
            left_out.append(section.name)
            continue
        if len(rows) < len(section.rows):
            left_out.append(f"{len(section.rows) - len(rows)} rows of {section.name}")
        room -= frame + _length(rows)
        written += [*section.opening, *rows, *section.closing]
    if left_out:
        written.append(f"_Left out to keep this short, see {whole}: {_few(left_out)}._")
    return "\n".join(written).rstrip() + "\n"


def escape(text: str) -> str:
    """`text` as one line that Markdown and HTML show as it is, also inside a table; nobody is mentioned by it."""
    return _SPECIAL.sub(_escaped, view.clean(text))


def _escaped(match: re.Match[str]) -> str:
    character = match[0]
    # GitHub looks for mentions in the text that an entity stands for, too, but not across a comment.
    return f"{character}<!-- -->" if character in "@#" else f"&#{ord(character)};"


def _sections(results: Results) -> Iterator[Section]:
    yield _headline(results)
    for block in view.blocks(results):
        yield matrix_section(block, labels_of(results))
    if results.outcomes:
        yield _legend(results)
    yield from details(results)


def details(results: Results) -> Iterator[Section]:
    """The long parts, each folded away: skills, gates, planted controls, every measurement, environment."""
    yield from _skills(results, labels_of(results))
    if results.before_merging:
        about = _tally(sum(not gate.passed for gate in results.before_merging), "failed")
        columns = ("gate", "protection", "", "measured", "required")
        yield table_section("Before merging", about, columns, map(_gate, results.before_merging))
    if results.planted:
        about = _tally(sum(not planted.caught for planted in results.planted), "not caught")
        yield table_section(
            "Planted controls", about, ("control", "", "caught by", "measured"), map(_planted, results.planted)
        )
    if results.outcomes:
        about = f"{len(results.outcomes)} cases"
        columns = ("case", "verdict", "measured", "skills kept", "skills of the merged model")
        yield table_section("All measurements", about, columns, map(_case, results.outcomes))
    pairs = [(escape(name), escape(value)) for name, value in view.environment_lines(results)]
    pairs.append(("time", f"{results.seconds:.0f} s"))
    yield table_section("Environment", "", ("", ""), pairs)


def _headline(results: Results) -> Section:
    mark = "✅" if results.holds else "❌"
    opening = (f"## {mark} mergeguard: {verdict_line(results)}", "", f"**{sentence(summary_of(results))}.**", "")
    problems = tuple(f"- {_cut(escape(problem), 1_000)}" for problem in results.problems)
    return Section("the problems", opening, problems, ("",) * bool(problems), share=LIMIT // 4)


def labels_of(results: Results) -> dict[str, str]:
    """The shortest unambiguous label of each merger spec, escaped."""
    return {spec: escape(short) for spec, short in view.merger_labels(results.outcomes).items()}


def matrix_section(
    block: view.Block, labels: Mapping[str, str], number: Callable[[Outcome], str] = view.number
) -> Section:
    """A protection's part of the matrix; `number` writes what a cell measured, after the mark of its verdict."""
    header = ("merger", *map(format_coefficient, block.coefficients), "critical", "area")
    rows = []
    for row in block.rows:
        cells = [_cell(row.outcomes.get(coefficient), number) for coefficient in block.coefficients]
        tail = view.format_critical(row.summary.critical_coefficient), view.format_area(row.summary.area)
        rows.append(_row(labels[row.merger_spec], *cells, *tail))
    title = escape(block.title)
    return Section(title, (f"### {title}", "", escape(block.about), "", *_table_head(header)), tuple(rows), ("",))


def _cell(outcome: Outcome | None, number: Callable[[Outcome], str]) -> str:
    if outcome is None:
        return ""
    if not outcome.theft:
        return f"({number(outcome)})"
    return f"{MARKS[outcome.verdict]} {number(outcome)}"


def _legend(results: Results) -> Section:
    full = [
        f"- {escape(short)}: {escape(spec)}"
        for spec, short in view.merger_labels(results.outcomes).items()
        if short != view.clean(spec)
    ]
    return Section("the merge methods' parameters", (legend(), ""), tuple(full), ("",) * bool(full))


def legend() -> str:
    """What marks, columns and numbers of a matrix mean."""
    marks = ", ".join(f"{mark} {verdict}" for verdict, mark in MARKS.items())
    return (
        f"{marks}; in parentheses: no theft, never counted. Columns are alpha, cells are the VSR (or the score). "
        "Critical: the smallest theft from which every larger one survives. Area: under VSR over alpha."
    )


def _skills(results: Results, labels: Mapping[str, str]) -> Iterator[Section]:
    kept = view.kept_skills(results.outcomes)
    if not kept:
        return
    coefficients = view.sorted_coefficients(results.outcomes)
    rows = []
    for line in kept:
        cells = [
            ("**{}**" if c in line.thefts else "({})").format(view.format_fraction(line.fractions[c]))
            if c in line.fractions
            else ""
            for c in coefficients
        ]
        group = f" ({escape(line.group)})" if line.group else ""
        rows.append((f"{labels[line.merger_spec]}{group}", escape(line.skill), *cells))
    header = ("merger", "skill", *map(format_coefficient, coefficients))
    about = "fractions of each parent's skill, by the matched control; bold: a theft, at least .50 of each"
    yield table_section("What the merge keeps", about, header, rows)


def _gate(gate: Gate) -> tuple[str, ...]:
    name = f"{gate.protection}({gate.variant})" if gate.variant else gate.protection
    mark = "✅ passed" if gate.passed else "❌ failed"
    return escape(gate.gate), escape(name), mark, escape(gate.measured), escape(gate.required)


def _planted(planted: Planted) -> tuple[str, ...]:
    mark = "✅ caught" if planted.caught else "❌ not caught"
    return escape(planted.name), mark, escape(planted.caught_by or "-"), escape(planted.measured)


def _case(outcome: Outcome) -> tuple[str, ...]:
    said = outcome.verdict if outcome.theft else f"{outcome.verdict} ({view.NO_THEFT})"
    if is_recorded(outcome):
        said += ", on record"
    return (
        escape(outcome.id),
        said,
        escape(view.describe(outcome)),
        escape(view.describe_skills(outcome.skills_kept)),
        escape(view.describe_skills(outcome.skills)),
    )


def table_section(name: str, about: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> Section:
    """A table that is folded away; its texts must be escaped."""
    summary = f"<b>{name}</b>" + (f" ({about})" if about else "")
    opening = ("<details>", f"<summary>{summary}</summary>", "", *_table_head(header))
    return Section(name, opening, tuple(_row(*row) for row in rows), ("", "</details>", ""))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """The lines of a table; its texts must be escaped."""
    yield from _table_head(header)
    yield from (_row(*row) for row in rows)


def _table_head(header: Sequence[str]) -> tuple[str, str]:
    return _row(*header), "|" + " --- |" * len(header)


def _row(*cells: str) -> str:
    row = f"| {' | '.join(cells)} |"
    if len(row) <= _LONGEST_LINE:
        return row
    return f"| {' | '.join(_cut(cell, _LONGEST_LINE // len(cells) - 3) for cell in cells)} |"


def _cut(escaped: str, limit: int) -> str:
    """At most `limit` characters, not ending inside of an entity or a comment."""
    if len(escaped) <= limit:
        return escaped
    return re.sub(r"(&[#\w]*|<[!\w -]*)$", "", escaped[: max(0, limit - 4)]) + " ..."


def _length(lines: Iterable[str]) -> int:
    return sum(len(line) + 1 for line in lines)  # with the line end


def _fitting(rows: Sequence[str], room: int) -> tuple[str, ...]:
    """The first rows that fit `room` characters."""
    for count, row in enumerate(rows):
        room -= len(row) + 1
        if room < 0:
            return tuple(rows[:count])
    return tuple(rows)


def _few(names: Sequence[str]) -> str:
    text = ", ".join(_cut(name, 80) for name in names[:3])
    return text if len(names) <= 3 else f"{text} and {len(names) - 3} more parts"


def _tally(bad: int, word: str) -> str:
    return f"{bad} {word}" if bad else f"none {word}"
