"""The matrix in a terminal: every meaning has a mark without colour, and everything fits the width."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from mergeguard.matrix.outcome import LOST, OVERCLAIMS, SURVIVED, UNDECIDABLE, Gate, Outcome, Results
from mergeguard.reports.terminal import ASCII, UNICODE, Glyphs, matrix_lines, print_matrix
from robustness_tests.meta import outcome_builders as build

FULL = build.results(build.default_matrix(), ["instructional_fingerprint-linear-0.3"], problems=("one is lost",))


def printed(results: Results, width: int, encoding: str = "utf-8", **options: object) -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, errors="strict", write_through=True)
    print_matrix(results, Console(file=file, width=width, **options))  # type: ignore[arg-type] # options of Console
    return raw.getvalue().decode(encoding)


def row_of(lines: list[str], label: str) -> list[str]:
    """The cells of the first row with this label: numbers with their marks."""
    line = next(line for line in lines if line.startswith(f"{label} "))
    cells: list[str] = []
    for part in line.removeprefix(label).split():
        if (
            part in (*UNICODE.marks.values(), *ASCII.marks.values(), UNICODE.theft)
            and cells
            and part != UNICODE.missing
        ):
            cells[-1] += part
        else:
            cells.append(part)
    return cells


def five_cells() -> Results:
    verdicts = (SURVIVED, OVERCLAIMS, LOST, UNDECIDABLE, SURVIVED)
    hits = (8, 7, 0, 4, 8)
    cells = [
        build.outcome(coefficient=c, verdict=verdict, hits=h, theft=c < 0.9)
        for c, verdict, h in zip((0.1, 0.3, 0.5, 0.7, 0.9), verdicts, hits, strict=True)
    ]
    return build.results([*cells, build.outcome(merger="task_arithmetic(lambda=1.4)", coefficient=0.3)])


@pytest.mark.parametrize("glyphs", [UNICODE, ASCII], ids=["unicode", "ascii"])
def test_every_mark_differs_from_every_other(glyphs: Glyphs) -> None:
    marks = [*glyphs.marks.values(), glyphs.theft, glyphs.missing]
    assert len(set(marks)) == len(marks)
    assert glyphs.passed != glyphs.failed
    assert all(cell_len(mark) == 1 for mark in marks)


def test_cells_tell_the_verdicts_and_no_theft_apart_without_colour() -> None:
    lines = matrix_lines(five_cells())
    assert row_of(lines, "linear") == ["1.0✓", ".88!", ".00✗", ".50?", "(1.0)", "-", ".59"]
    assert row_of(lines, "task_arithmetic(lambda=1.4)") == ["·", "1.0✓", "·", "·", "·", "0.3", "-"]
    assert row_of(matrix_lines(five_cells(), ascii_only=True), "linear")[:5] == [
        "1.0+",
        ".88!",
        ".00x",
        ".50?",
        "(1.0)",
    ]
    legend = next(line for line in lines if "overclaims" in line)
    assert legend == "✓ survived, ! overclaims, ✗ lost, ? undecidable, (in parentheses) no theft"


def test_scores_are_shown_in_place_of_rates() -> None:
    scores = {0.1: 3.3, 0.5: 25.2, 1.0: 84.4}
    lines = matrix_lines(
        build.results([build.outcome("gaussian_probe", coefficient=c, score=z) for c, z in scores.items()])
    )
    assert row_of(lines, "linear")[:3] == ["3.3✓", "25✓", "84✓"]
    assert any("the score" in line for line in lines)


def test_what_the_merge_keeps_is_shown_per_merger_and_skill_with_thefts_marked() -> None:
    cells = [
        build.outcome(coefficient=c, skills_kept={"refusal": c, "arithmetic": 1 - c}, theft=theft)
        for c, theft in ((0.3, False), (0.5, True), (0.7, False))
    ]
    lines = matrix_lines(build.results(cells))
    below = lines[lines.index("what the merge keeps") :]
    assert row_of(below, "linear refusal") == [".30", ".50•", ".70"]
    assert row_of(below, "linear arithmetic") == [".70", ".50•", ".30"]


def test_gates_and_planted_controls_are_shown_with_what_was_measured() -> None:
    text = "\n".join(matrix_lines(build.results(), width=120))
    assert "✓ effective passed: instructional_fingerprint: 8/8 (required: survives alpha 1)" in text
    assert "✗ harmless failed: quantization_watermark(bits=5): refusal -.44" in text
    assert "✓ always_verifies: caught by controls (base 48/48)" in text
    assert "✗ never_verifies: NOT CAUGHT (0/8)" in text


def test_the_end_says_how_many_are_lost_and_whether_the_gate_holds() -> None:
    assert matrix_lines(FULL)[-3:] == [
        "20 of 50 thefts lost, 1 of them recorded", "gate does not hold: 1 problem", "  ✗ one is lost",
    ]  # fmt: skip
    assert matrix_lines(build.results([build.outcome()]))[-2:] == [
        "0 of 1 thefts lost, 0 of them recorded", "gate holds",
    ]  # fmt: skip


@pytest.mark.parametrize("width", [80, 120])
def test_nine_coefficients_fit_with_every_row_on_one_line(width: int) -> None:
    lines = printed(FULL, width).splitlines()
    assert max(map(cell_len, lines)) <= width
    header = next(line for line in lines if line.startswith("alpha"))
    assert header.split() == ["alpha", *(f"{c:g}" for c in build.NINE), "crit", "area"]
    label = "dare_ties" if width == 80 else "dare_ties(density=0.4,normalize=true)"
    assert row_of(lines, label) == [
        "(.12)",
        "(.25)",
        ".38✗",
        ".50✗",
        ".62✓",
        ".75✓",
        ".88✓",
        "(1.0)",
        "(1.0)",
        "0.5",
        ".62",
    ]
    assert ("dare_ties = dare_ties(density=0.4,normalize=true)" in lines) == (width == 80)


def test_columns_line_up() -> None:
    lines = matrix_lines(FULL)
    start = lines.index("instructional_fingerprint") + 2
    assert len({len(line) for line in lines[start : start + 6]}) == 1


@build.QUICK
@given(st.lists(build.outcomes(), max_size=6), st.integers(20, 130))
def test_no_line_is_wider_than_the_terminal_and_no_cell_is_lost(outcomes: list[Outcome], width: int) -> None:
    lines = matrix_lines(build.results(outcomes), width=width)
    assert all(cell_len(line) <= width for line in lines)
    assert all(line.isprintable() for line in lines)
    headers = [column for line in lines if line.startswith("alpha ") for column in line.split()[1:]]
    for outcome in outcomes:
        assert ("none" if outcome.coefficient is None else f"{outcome.coefficient:g}") in headers


def test_a_narrow_terminal_continues_the_columns_below() -> None:
    lines = matrix_lines(FULL, width=50)
    headers = [line.split()[1:] for line in lines if line.startswith("alpha")]
    assert headers[0] + headers[1] == [*(f"{c:g}" for c in build.NINE), "crit", "area"]


def test_long_names_that_share_a_prefix_stay_distinguishable_in_a_narrow_terminal() -> None:
    specs = [f"extraordinarily_long_method(density=0.4,normalize={word})" for word in ("true", "false")]
    cells = [build.outcome(merger=spec, coefficient=c) for spec in specs for c in build.NINE]
    lines = matrix_lines(build.results(cells))
    assert all(cell_len(line) <= 80 for line in lines)
    text = " ".join(line.strip() for line in lines)
    for word in ("true", "false"):
        full = f"extraordinarily_long_method(density=0.4,normalize={word})"
        assert f"extraordinarily_long_method(normalize={word}) = {full}" in text
    rows = [line.split()[0] for line in lines if "✓" in line and "survived" not in line]
    assert rows[:2] == ["true)", "false)"]  # the end of the label, on the line of the cells


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_an_encoding_without_the_marks_gets_ascii_ones(encoding: str) -> None:
    cells = [build.outcome("schéma", "linear", 0.5, LOST, hits=0)]
    text = printed(build.results(cells, problems=("schéma ✗ lost",)), 80, encoding)
    assert text.isascii()
    assert ".00 x" in text
    assert r"sch\xe9ma" in text


def test_a_legacy_windows_console_gets_ascii_marks() -> None:
    file = io.StringIO()
    print_matrix(five_cells(), Console(file=file, width=80, legacy_windows=True))
    assert ".00 x" in file.getvalue()
    assert "✗" not in file.getvalue()


def test_colour_comes_only_with_a_terminal_and_never_replaces_a_mark() -> None:
    plain = printed(five_cells(), 80)
    coloured = printed(five_cells(), 80, force_terminal=True, color_system="standard", no_color=False, _environ={})
    assert "\x1b[" not in plain
    assert "\x1b[1;31m.00 ✗" in coloured
    assert "\x1b[2m(1.0)" in coloured


def test_names_are_neither_markup_nor_escape_codes() -> None:
    cells = [build.outcome("[red]a[/red]\x1b[31m")]
    gate = Gate("[bold]x", "", "effective", True, ":smile:\x1b[0m", "[/]")
    text = printed(build.results(cells, before_merging=(gate,)), 80)
    assert r"[red]a[/red]\x1b[31m" in text
    assert r"[bold]x: :smile:\x1b[0m (required: [/])" in text
    assert "\x1b" not in text


def test_plain_lines_are_what_is_printed() -> None:
    assert printed(FULL, 80).splitlines() == matrix_lines(FULL)


def test_empty_results_have_a_report_too() -> None:
    lines = matrix_lines(build.results(before_merging=(), planted=()))
    assert lines == [
        "mergeguard: 0 cases on world tiny, 12 s",
        "",
        "0 of 0 thefts lost, 0 of them recorded",
        "gate holds",
    ]
