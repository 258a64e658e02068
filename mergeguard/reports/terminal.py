"""The matrix in a terminal, or as plain lines: marks tell verdicts apart without colour, ASCII ones where need be."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.cells import cell_len, chop_cells
from rich.text import Text

from mergeguard.matrix.outcome import LOST, OVERCLAIMS, SURVIVED, UNDECIDABLE, Outcome, Results, format_coefficient
from mergeguard.reports import view
from mergeguard.reports.summary import sentence, summary_of, verdict_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console

_STYLES = {SURVIVED: "green", OVERCLAIMS: "bold yellow", LOST: "bold red", UNDECIDABLE: "bold magenta"}
_CORNER = "alpha"
_LEAST_LABEL = 12


@dataclass(frozen=True)
class Glyphs:
    """One character for each word; all differ, as colour alone must not carry a meaning."""

    marks: dict[str, str]
    theft: str
    passed: str
    failed: str
    missing: str


UNICODE = Glyphs({SURVIVED: "✓", OVERCLAIMS: "!", LOST: "✗", UNDECIDABLE: "?"}, "•", "✓", "✗", "·")
ASCII = Glyphs({SURVIVED: "+", OVERCLAIMS: "!", LOST: "x", UNDECIDABLE: "?"}, "*", "+", "x", "-")


@dataclass(frozen=True)
class _Grid:
    """Rows of cells below headers, each row with a full and a short label.

    Short labels wrap where even they are too wide, and columns that do not fit the width are continued below.
    """

    headers: Sequence[str]
    rows: list[tuple[str, str, list[Text]]] = field(default_factory=list)

    def fits(self, width: int) -> bool:
        """Whether the full labels and all columns fit side by side."""
        return max(cell_len(full) for full, _, _ in self.rows) + sum(self._widths()) <= width

    def lines(self, width: int, *, full: bool) -> Iterator[Text]:
        widths = self._widths()
        labels = [row[0] if full else row[1] for row in self.rows]
        room = max(width - sum(widths), min(_LEAST_LABEL, width // 3))
        label_width = min(room, max(cell_len(label) for label in (*labels, _CORNER)))
        for first, last in _chunks(widths, width - label_width):
            yield self._line(_CORNER, [Text(h) for h in self.headers], widths, label_width, first, last, "bold")
            for label, (_, _, cells) in zip(labels, self.rows, strict=True):
                *above, final = _wrap_label(label, label_width)
                yield from (Text(line) for line in above)
                yield self._line(final, cells, widths, label_width, first, last)

    def _widths(self) -> list[int]:
        columns = zip(*(cells for _, _, cells in self.rows), strict=True)
        return [
            1 + max(cell_len(header), *(cell.cell_len for cell in column))
            for header, column in zip(self.headers, columns, strict=True)
        ]

    @staticmethod
    def _line(
        label: str, cells: Sequence[Text], widths: list[int], label_width: int, first: int, last: int, style: str = ""
    ) -> Text:
        line = Text(label + " " * (label_width - cell_len(label)), style)
        for cell, width in zip(cells[first:last], widths[first:last], strict=True):
            line.append(" " * (width - cell.cell_len)).append_text(cell)
        line.rstrip()
        return line


def print_matrix(results: Results, console: Console) -> None:
    """Print the whole report to a Rich console: at its width, in colour and in Unicode where it has them."""
    plain = console.legacy_windows or not console.encoding.lower().startswith("utf")
    for line in _render(results, console.width, ASCII if plain else UNICODE):
        if plain:  # names may hold characters that this encoding lacks
            line.plain = line.plain.encode("ascii", "backslashreplace").decode("ascii")
        console.print(line, soft_wrap=True, highlight=False)


def matrix_lines(results: Results, *, width: int = 80, ascii_only: bool = False) -> list[str]:
    """The same report as plain text, without colours or markup."""
    return [line.plain for line in _render(results, width, ASCII if ascii_only else UNICODE)]


def _render(results: Results, width: int, glyphs: Glyphs) -> Iterator[Text]:
    width = max(width, 20)
    world = view.clean(str(results.world.get("name", "unknown")))
    head = f"mergeguard: {len(results.outcomes)} cases on world {world}, {results.seconds:.0f} s"
    yield from _prose(head, width, "bold")
    if results.outcomes:
        yield from _measured(results, width, glyphs)
    yield from _gates(results, width, glyphs)
    yield from _planted(results, width, glyphs)
    yield Text()
    yield from _prose(sentence(summary_of(results)), width)
    yield from _prose(verdict_line(results), width, "bold green" if results.holds else "bold red")
    for problem in results.problems:
        yield from _prose(f"  {glyphs.failed} {view.clean(problem)}", width, "red", hang=4)


def _measured(results: Results, width: int, glyphs: Glyphs) -> Iterator[Text]:
    """The matrix, its legend and what the merges keep."""
    shorts = view.merger_labels(results.outcomes)
    labels = {spec: (view.clean(spec), short) for spec, short in shorts.items()}
    matrix = [(block, _matrix_grid(block, labels, glyphs)) for block in view.blocks(results)]
    kept = _kept_grid(results, labels, glyphs)
    full = all(grid.fits(width) for grid in (*(grid for _, grid in matrix), kept) if grid.rows)
    for block, grid in matrix:
        yield Text()
        yield from _prose(block.title, width, "bold cyan")
        yield from _prose(f"  {block.about}", width, "dim", hang=2)
        yield from grid.lines(width, full=full)
    yield Text()
    yield from _legend({} if full else labels, width, glyphs)
    if kept.rows:
        yield Text()
        yield Text("what the merge keeps", "bold cyan")
        about = f"of each skill, by the matched control; {glyphs.theft} theft: at least .50 of each"
        yield from _prose(f"  {about}", width, "dim", hang=2)
        yield from kept.lines(width, full=full)


def _matrix_grid(block: view.Block, labels: dict[str, tuple[str, str]], glyphs: Glyphs) -> _Grid:
    grid = _Grid([*map(format_coefficient, block.coefficients), "crit", "area"])
    for row in block.rows:
        cells = [_cell(row.outcomes.get(coefficient), glyphs) for coefficient in block.coefficients]
        tail = (view.format_critical(row.summary.critical_coefficient), view.format_area(row.summary.area))
        grid.rows.append((*labels[row.merger_spec], [*cells, *map(Text, tail)]))
    return grid


def _cell(outcome: Outcome | None, glyphs: Glyphs) -> Text:
    if outcome is None:
        return Text(glyphs.missing, "dim")
    if not outcome.theft:
        return Text(f"({view.number(outcome)})", "dim")
    return Text(f"{view.number(outcome)} {glyphs.marks[outcome.verdict]}", _STYLES[outcome.verdict])


def _legend(labels: dict[str, tuple[str, str]], width: int, glyphs: Glyphs) -> Iterator[Text]:
    words = ", ".join(f"{glyphs.marks[verdict]} {verdict}" for verdict in _STYLES)
    lines = [
        f"{words}, (in parentheses) no theft",
        "crit: smallest theft from which all larger ones survive; area: under VSR",
        *(f"{short} = {full}" for full, short in labels.values() if full != short),
    ]
    for line in lines:
        yield from _prose(line, width, "dim", hang=2)


def _kept_grid(results: Results, labels: dict[str, tuple[str, str]], glyphs: Glyphs) -> _Grid:
    coefficients = view.sorted_coefficients(results.outcomes)
    grid = _Grid(list(map(format_coefficient, coefficients)))
    for line in view.kept_skills(results.outcomes):
        full, short = (f"{name} {view.clean(line.skill)}" for name in labels[line.merger_spec])
        if line.group:
            full, short = f"{full} [{line.group}]", f"{short} [{line.group}]"
        grid.rows.append((full, short, [_fraction(line, c, glyphs) for c in coefficients]))
    return grid


def _fraction(line: view.Kept, coefficient: float | None, glyphs: Glyphs) -> Text:
    if coefficient not in line.fractions:
        return Text(glyphs.missing, "dim")
    text = view.format_fraction(line.fractions[coefficient])
    return Text(f"{text} {glyphs.theft}") if coefficient in line.thefts else Text(f"{text}  ", "dim")


def _gates(results: Results, width: int, glyphs: Glyphs) -> Iterator[Text]:
    if not results.before_merging:
        return
    yield Text()
    yield Text("before merging", "bold cyan")
    for gate in results.before_merging:
        name = f"{gate.protection}({gate.variant})" if gate.variant else gate.protection
        mark, said, style = (glyphs.passed, "passed", "green") if gate.passed else (glyphs.failed, "failed", "bold red")
        text = f"  {mark} {gate.gate} {said}: {name}: {gate.measured} (required: {gate.required})"
        yield from _prose(text, width, style, hang=4)


def _planted(results: Results, width: int, glyphs: Glyphs) -> Iterator[Text]:
    if not results.planted:
        return
    yield Text()
    yield Text("planted controls", "bold cyan")
    for planted in results.planted:
        mark, style = (glyphs.passed, "green") if planted.caught else (glyphs.failed, "bold red")
        said = f"caught by {planted.caught_by}" if planted.caught else "NOT CAUGHT"
        measured = f" ({planted.measured})" if planted.measured else ""
        yield from _prose(f"  {mark} {planted.name}: {said}{measured}", width, style, hang=4)


def _prose(text: str, width: int, style: str = "", hang: int = 0) -> Iterator[Text]:
    """`text` wrapped at spaces, its further lines indented by `hang`; ids are cut only where longer than a line."""
    line = text[: len(text) - len(text.lstrip())]
    gap = ""
    for word in view.clean(text).split(" "):
        for part in chop_cells(word, width - hang):
            if line.strip() and cell_len(line + gap + part) > width:
                yield Text(line, style)
                line, gap = " " * hang, ""
            line += gap + part
            gap = ""
        gap = " "
    yield Text(line, style)


def _chunks(widths: list[int], room: int) -> Iterator[tuple[int, int]]:
    """Ranges of columns that fit `room`, at least one column each."""
    first, used = 0, 0
    for i, width in enumerate(widths):
        if i > first and used + width > room:
            yield first, i
            first, used = i, 0
        used += width
    yield first, len(widths)


def _wrap_label(label: str, width: int) -> list[str]:
    """`label` in lines of at most `width` cells, broken after one of `( , = _ space` where it can be."""
    words = re.findall(r"[^(,=_ ]*[(,=_ ]|[^(,=_ ]+", label)
    lines, line = [], ""
    for piece in (part for word in words for part in chop_cells(word, max(2, width - 2))):
        if line and cell_len(line + piece.rstrip()) > width:
            lines.append(line.rstrip())
            line = "  "
        line += piece
    return [*lines, line]
