"""The page of a run: complete, escaped, closed to the network, and drawn from the numbers that it shows."""

from __future__ import annotations

import base64
import hashlib
import logging
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import pytest
from hypothesis import given, settings

from mergeguard.errors import MergeguardError
from mergeguard.matrix.cases import expand, parse_coefficients
from mergeguard.matrix.outcome import LOST, OVERCLAIMS, SURVIVED, UNDECIDABLE, Counts, Gate, Outcome, Planted, Results
from mergeguard.reports import view
from mergeguard.reports.html import cells, svg, to_html
from mergeguard.reports.results_json import read_results
from robustness_tests.meta import outcome_builders as build
from robustness_tests.meta.html_reading import Element, read_html

PUBLISHED = Path(__file__).parents[2] / "fixtures" / "results"
HOSTILE = "a|b<img src=x onerror=alert(1)>`c`$x_1$</script><script>alert(2)</script>{{7*7}}&amp;\n'\"\u202e"


@pytest.fixture(scope="module")
def tiny() -> Results:
    return read_results(PUBLISHED / "tiny.json")


@pytest.fixture(scope="module")
def page(tiny: Results) -> Element:
    return read_html(to_html(tiny))


def test_it_is_a_whole_document_with_a_language_and_a_title(page: Element, tiny: Results) -> None:
    assert page.one("html").attributes["lang"] == "en"
    assert page.one("meta").attributes == {"charset": "utf-8"}
    assert page.one("title").text == "mergeguard: gate holds (world tiny · seed 0 · 90 cells · mergeguard 0.1.0)"
    assert [heading.tag for heading in page.all() if re.fullmatch("h[1-6]", heading.tag)][:3] == ["h1", "h2", "h2"]
    assert len(to_html(tiny)) < 500_000


def test_nothing_in_it_reaches_out(page: Element) -> None:
    ids = {element.attributes["id"] for element in page.all() if "id" in element.attributes}
    links = [element.attributes["href"] for element in page.all() if "href" in element.attributes]
    assert len(links) > 100
    assert [link for link in links if link != "data:," and link.removeprefix("#") not in ids] == []
    assert not any("src" in element.attributes for element in page.all())
    clips = [element.attributes["clip-path"] for element in page.all() if "clip-path" in element.attributes]
    assert clips
    assert [clip for clip in clips if clip.removeprefix("url(#").removesuffix(")") not in ids] == []


def test_the_policy_admits_its_own_style_and_script_and_nothing_else(page: Element) -> None:
    def digest(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    [style], [script] = page.all("style"), page.all("script")
    [policy] = [meta for meta in page.all("meta") if meta.attributes.get("http-equiv") == "Content-Security-Policy"]
    assert dict(part.split(maxsplit=1) for part in policy.attributes["content"].split("; ")) == {
        "default-src": "'none'",
        "style-src": digest(style.raw),
        "script-src": digest(script.raw),
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert not [name for part in page.all() for name in part.attributes if name.startswith("on") or name == "style"]


@settings(build.QUICK, max_examples=8)
@given(build.all_results())
def test_any_results_make_a_page_that_holds_together(results: Results) -> None:
    page = read_html(to_html(results))
    assert len(list(page.all("details", "cell"))) == len({(o.id, o.world, o.seed) for o in results.outcomes})
    assert len(list(page.all("script"))) == 1
    text = page.one("main").text
    for shown in (*results.problems, *(gate.measured for gate in results.before_merging)):
        assert view.clean(shown) in text


def test_hostile_texts_are_shown_as_they_are_and_add_no_tag() -> None:
    def results(text: str) -> Results:
        cell = build.outcome(text, note=text, conditional_on=text, skills_kept={text: 0.7}, skills={text: 0.6})
        cell = replace(
            cell, merger=text, merger_spec=text, world=text, details={text: 1.0}, controls={text: Counts(1, 2)}
        )
        return build.results(
            [cell],
            problems=(text,),
            before_merging=(Gate(text, text, text, False, text, text),),
            planted=(Planted(text, text, text),),
            environment={text: text},
            world={"name": text, "digests": {}},
        )

    def shape(page: Element) -> list[str]:
        return [element.tag for element in page.all() if element.tag != "wbr"]

    hostile, plain = read_html(to_html(results(HOSTILE))), read_html(to_html(results("tame")))
    assert shape(hostile) == shape(plain)
    shown, expected = view.clean(HOSTILE), plain.one("main").text.count("tame")
    commands = [shlex.split(code.raw) for code in hostile.all("pre")]
    assert [words.count(shown) for words in commands] == [3, 3]
    assert hostile.one("main").text.count(shown) + 6 == expected
    labels = [part.attributes["aria-label"] for part in hostile.all("svg")]
    assert labels == [f"{view.clean(HOSTILE)} under {view.clean(HOSTILE)}, over alpha: 1.0 at 0.5 (survived)"]


def test_the_matrix_is_a_table_with_words_for_its_marks() -> None:
    verdicts = {0.1: SURVIVED, 0.3: OVERCLAIMS, 0.5: LOST, 0.7: UNDECIDABLE}
    outcomes = [build.outcome(coefficient=c, verdict=v, hits=7) for c, v in verdicts.items()]
    outcomes += [
        build.outcome(coefficient=0.9, theft=False),
        build.outcome(merger="ties(density=0.4)", coefficient=0.1),
    ]
    page = read_html(to_html(build.results(outcomes, ["instructional_fingerprint-linear-0.5"])))
    table = page.one("table", "heat")
    read = ["✓.88 survived", "△.88 overclaims", "✗.88 lost, on record", "?.88 undecidable", "(1.0) no theft"]
    assert table.rows() == [
        ["merge method", "α 0.1", "α 0.3", "α 0.5", "α 0.7", "α 0.9", "critical", "area"],
        ["linear", *read, "none", ".89"],
        ["ties", "✓1.0 survived", *["not measured"] * 4, "0.1", "–"],
    ]
    assert [cell.text for cell in table.all("td", "unexpected")] == ["△.88 overclaims", "?.88 undecidable"]
    assert {header.attributes["scope"] for header in table.all("th")} == {"col", "row"}
    assert table.one("caption").text == "VSR and verdict of instructional_fingerprint by merge method and α"
    assert [row.attributes["data-merger"] for row in table.all("tr") if row.attributes] == ["0", "1"]


def test_every_cell_leads_to_its_numbers_and_the_command_that_measures_it_again(page: Element, tiny: Results) -> None:
    numbers = {part.attributes["id"]: part for part in page.all("div", "numbers")}
    links = [
        link.attributes["href"].removeprefix("#") for table in page.all("table", "heat") for link in table.all("a")
    ]
    assert links == list(numbers)
    assert len(links) == len(tiny.outcomes)
    assert "cell-instructional_fingerprint-ties-density-0.4-normalize-true-0.3" in numbers
    for outcome, anchor in zip(tiny.outcomes, links, strict=True):
        words = shlex.split(numbers[anchor].one("pre").raw)
        assert words[:2] == ["mergeguard", "run"]
        given = dict(zip(words[2::2], words[3::2], strict=True))
        alphas = parse_coefficients(given["--coefficients"])
        [case] = expand(
            [given["--protection"]], [given["--merger"]], alphas, world=given["--world"], seed=int(given["--seed"])
        )
        assert (case.id, case.world, case.seed) == (outcome.id, outcome.world, outcome.seed)
        shown = numbers[anchor].text
        assert f"VSR {outcome.hits}/{outcome.trials} = {view.number(outcome)}" in shown
        assert f"p {outcome.p_value:.2g} (level 2e-05)" in shown
        assert f"matched_control {view.format_counts(outcome.controls['matched_control'])}" in shown


def test_the_command_of_everything_covers_every_cell(page: Element, tiny: Results) -> None:
    command = page.one("pre").raw
    words = shlex.split(command)
    given = list(zip(words[2::2], words[3::2], strict=True))
    found = expand(
        [value for name, value in given if name == "--protection"],
        [value for name, value in given if name == "--merger"],
        parse_coefficients(dict(given)["--coefficients"]),
    )
    assert {case.id for case in found} == {outcome.id for outcome in tiny.outcomes}


def test_cells_of_several_seeds_and_worlds_are_kept_apart() -> None:
    outcomes = [build.outcome(seed=seed, world=world) for world in ("tiny", "smollm2") for seed in (0, 1)]
    page = read_html(to_html(build.results(outcomes)))
    assert len(list(page.all("table", "heat"))) == 4
    assert len({part.attributes["id"] for part in page.all("div", "numbers")}) == 4
    commands = [code.raw for part in page.all("div", "numbers") for code in part.all("pre")]
    assert [shlex.split(command)[-3::2] for command in commands] == [
        ["tiny", "0"], ["tiny", "1"], ["smollm2", "0"], ["smollm2", "1"]
    ]  # fmt: skip


def test_different_cells_never_share_an_anchor() -> None:
    alike = [build.outcome(name) for name in ("a(b=1)", "a-b-1", "a(b=1)", "a(b=2)")]
    ends = ["1-linear-0.5", "1-linear-0.5-2", "1-linear-0.5-3", "2-linear-0.5"]
    assert cells.anchors(alike) == [f"cell-a-b-{end}" for end in ends]


def test_the_overview_says_why_there_is_no_critical_coefficient() -> None:
    outcomes = [
        build.outcome(merger="linear"),
        build.outcome(merger="karcher", verdict=LOST, hits=0),
        build.outcome(merger="nearswap", theft=False),
        build.outcome(merger="iso_c", coefficient=None),
        build.outcome("gaussian_probe", "linear", score=84),
    ]
    rows = read_html(to_html(build.results(outcomes))).one("table", "overview").rows()
    assert rows == [
        ["merge method", "instructional_fingerprint", "gaussian_probe"],
        ["linear", "0.5", "0.5"],
        ["karcher", "none", "–"],
        ["nearswap", "no theft", "–"],
        ["iso_c", "n/a", "–"],
        ["thefts lost, all methods", "1 of 3", "0 of 1"],
        ["worst theft, all methods", ".00", "84"],
        ["mean area, all methods", "–", "–"],
    ]


def test_controls_show_the_worst_reading_of_a_row_and_where_it_was() -> None:
    controls = [{"base": Counts(0, 48), "donor": Counts(hits, 48)} for hits in (1, 5, 2)]
    outcomes = [
        build.outcome(coefficient=c, controls=found, decoy_hits=3)
        for c, found in zip((0.1, 0.2, 0.3), controls, strict=True)
    ]
    page = read_html(to_html(build.results(outcomes)))
    [table] = [table for table in page.all("table") if "Worst reading" in table.one("caption").text]
    assert table.rows() == [
        ["merge method", "base", "donor", "decoys, merged model"],
        ["linear", "0/48", "5/48 at 0.2", "3/40"],
    ]


def test_skills_gates_planted_mistakes_problems_and_environment_are_there() -> None:
    text = read_html(to_html(build.results([build.outcome()], problems=("one is lost",)))).one("body").text
    for shown in (
        "✗ Gate does not hold: 1 problem",
        "Why the gate does not hold one is lost",
        "linear refusal .70 theft linear arithmetic .57 theft",
        "quantization_watermark(bits=5) harmless ✗ failed refusal -.44 within .05",
        "never_verifies ✗ not caught – 0/8",
        "packages torch 2.13.0",
        "time 12 s",
    ):
        assert shown in text


@pytest.mark.parametrize(
    ("results", "curves"),
    [
        (build.results(), 0),
        (build.nan_everywhere(), 0),
        (build.results([build.outcome(merger="iso_c", coefficient=None)]), 0),
        (build.results([build.outcome()]), 1),
        (build.results([build.outcome("gaussian_probe", coefficient=c, score=-c) for c in (0.0, 1.0)]), 1),
        (build.results(build.default_matrix()), 10),
    ],
    ids=["no cell", "not a number", "no coefficient", "one cell", "scores below zero", "two schemes"],
)
def test_there_is_a_curve_for_every_row_that_has_one(results: Results, curves: int) -> None:
    page = read_html(to_html(results))
    assert len(list(page.all("svg"))) == curves
    assert len(list(page.all("details", "cell"))) == len(results.outcomes)


def drawn(*outcomes: Outcome) -> Element:
    """The picture of one row."""
    return read_html(to_html(build.results(outcomes))).one("svg")


def strokes(picture: Element, colour: str, **attributes: str) -> list[list[tuple[float, float]]]:
    """The points of every line of a colour."""
    return [
        [(float(x), float(y)) for x, y in re.findall(r"[ML] (-?[\d.]+) (-?[\d.]+)", path.attributes["d"])]
        for path in picture.all("path")
        if path.attributes.get("stroke") == f"var(--{colour})"
        and all(path.attributes.get(name.replace("_", "-")) == value for name, value in attributes.items())
    ]


def markers(picture: Element, colour: str) -> list[tuple[float, float]]:
    """Where the marks filled with a colour are."""
    return [
        (float(mark.attributes["x"]), float(mark.attributes["y"]))
        for mark in picture.all("use")
        if mark.attributes.get("fill") == f"var(--{colour})"
    ]


def test_the_curve_runs_through_the_rates_and_its_whiskers_are_the_intervals() -> None:
    cells_ = [
        build.outcome(coefficient=0.2, hits=0, interval=(0.0, 0.5), verdict=LOST),
        build.outcome(coefficient=0.4, hits=4, interval=(0.25, 0.75)),
        build.outcome(coefficient=0.6, hits=8, interval=(0.5, 1.0), theft=False),
    ]
    picture = drawn(*cells_)
    [[(_, bottom)], [(_, top)]] = [[point] for point in (markers(picture, "lost")[0], markers(picture, "paper")[0])]
    rate = [(bottom - y) / (bottom - top) for _, y in (*markers(picture, "survived"),)]
    assert rate == pytest.approx([0.5], abs=0.01)
    whiskers = [line for line in strokes(picture, "line") if len(line) == 2]
    assert [[(bottom - y) / (bottom - top) for _, y in line] for line in whiskers] == [
        pytest.approx(cell.interval, abs=0.01) for cell in cells_
    ]
    [curve] = [line for line in strokes(picture, "line") if len(line) == 3]
    assert curve == [*markers(picture, "lost"), *markers(picture, "survived"), *markers(picture, "paper")]


def test_the_skills_are_drawn_under_the_evidence_and_the_critical_coefficient_across_both() -> None:
    row = [
        build.outcome(coefficient=c, verdict=v, skills_kept={"refusal": c, "arithmetic": 1 - c})
        for c, v in ((0.3, LOST), (0.5, SURVIVED), (0.7, SURVIVED))
    ]
    picture = drawn(*row)
    [rising], [falling] = (strokes(picture, name, fill="none") for name in ("skill-0", "skill-1"))
    assert rising[0][1] > rising[2][1]
    assert [y for _, y in rising] == pytest.approx([y for _, y in reversed(falling)], abs=0.02)
    assert min(y for _, y in rising) > max(y for _, y in markers(picture, "survived"))
    across = {x for line in strokes(picture, "survived", **{"stroke-dasharray": "2.4,1.6"}) for x, _ in line}
    assert across == {rising[1][0]}


def test_pictures_have_text_and_only_the_colours_of_the_page(page: Element) -> None:
    sheet = page.one("style").raw
    for picture in page.all("svg"):
        texts = [text.text for text in picture.all("text")]
        assert texts[-1:] == ["kept"]
        assert "VSR" in texts
        assert "α, the weight of the protected model" in texts
    colours = {part.attributes[name] for part in page.all() for name in ("fill", "stroke") if name in part.attributes}
    variables = {colour.removeprefix("var(").removesuffix(")") for colour in colours - {"none"}}
    assert variables >= {"--line", "--survived", "--lost", "--skill-0", "--skill-1"}
    assert [name for name in variables if f"{name}: #" not in sheet] == []


def test_a_colour_that_dark_mode_could_not_change_is_refused() -> None:
    source = '<svg xmlns="http://www.w3.org/2000/svg"><path style="fill: {}; stroke: none"/></svg>'
    assert svg.for_page(source.format(svg.ROLES["lost"]), prefix="", label="") == (
        '<svg role="img" aria-label=""><path fill="var(--lost)" stroke="none" /></svg>'
    )
    with pytest.raises(ValueError, match="the plot has the colour #1f77b4"):
        svg.for_page(source.format("#1f77b4"), prefix="", label="")


@pytest.mark.parametrize(
    ("outcome", "strength"),
    [
        (build.outcome(hits=8), 4),
        (build.outcome(hits=4), 2),
        (build.outcome(hits=0, theft=False), 0),
        (build.outcome(verdict=LOST, hits=0), 4),
        (build.outcome(verdict=LOST, hits=8), 0),
        (build.outcome(score=42), 2),
        (build.outcome(score=-3), 0),
        (build.outcome(rate=float("nan")), 0),
    ],
)
def test_the_shade_of_a_cell_follows_what_it_shows(outcome: Outcome, strength: int) -> None:
    cell = cells.make_cell(outcome, anchor="a", scheme=0, merger=0, merger_label="", largest_score=84)
    assert cell.strength == strength


def test_the_users_own_settings_of_matplotlib_are_left_alone_and_left_out(tiny: Results) -> None:
    small = replace(tiny, outcomes=tiny.outcomes[:3], summary=())
    expected = to_html(small)
    with mpl.rc_context({"svg.fonttype": "path", "axes.grid": True, "lines.color": "pink", "font.size": 30}):
        before = dict(mpl.rcParams)
        assert to_html(small) == expected
        assert dict(mpl.rcParams) == before
    assert logging.getLogger("matplotlib").level == logging.NOTSET


def test_a_machine_without_a_cache_gets_the_same_page_and_no_warning(tiny: Results, tmp_path: Path) -> None:
    """In a new process: nothing is loaded before it is needed, nothing is printed, nothing is left."""
    program = (
        "import logging, sys; logging.basicConfig(); from mergeguard.reports import bundle, results_json; "
        "assert not {'matplotlib', 'jinja2', 'torch'} & set(sys.modules), 'loaded too early'; "
        f"print(bundle.to_html(results_json.read_results({str(PUBLISHED / 'tiny.json')!r})), end='')"
    )
    nowhere = dict.fromkeys(("HOME", "MPLCONFIGDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"), str(tmp_path / "file" / "x"))
    (tmp_path / "file").touch()
    (tmp_path / "scratch").mkdir()
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env={**os.environ, **nowhere, "TMPDIR": str(tmp_path / "scratch")},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout == to_html(tiny)
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_matplotlib_that_does_not_load_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MergeguardError, match=r"^report\.html needs matplotlib, which does not load: "):
        to_html(build.results([build.outcome()]))
