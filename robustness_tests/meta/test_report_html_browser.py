"""The page in a real browser: Chromium of the system, without a network, and axe for its accessibility."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect, sync_playwright

from mergeguard.matrix.outcome import LOST, OVERCLAIMS, SURVIVED, UNDECIDABLE, Gate
from mergeguard.reports.html import to_html
from mergeguard.reports.results_json import read_results
from robustness_tests.meta import outcome_builders as build

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from playwright.sync_api import Browser, Locator, Page

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
PUBLISHED = Path(__file__).parents[2] / "fixtures" / "results"
WAYS = {
    "light": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 360, "height": 740}, "color_scheme": "dark", "has_touch": True},
}


def find_program() -> str:
    """The system's Chromium; where there is none the test is skipped, and fails in CI."""
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        message = f"no browser: none of {', '.join(PROGRAMS)} is installed (Debian: apt-get install chromium)"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return program


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = find_program()
    expect.set_options(timeout=20_000)  # for a machine that is busy
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program, args=["--no-sandbox"]
        )  # which root must do without
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages on disk: the published matrix, and one with everything that it lacks."""
    cells = [
        build.outcome(coefficient=c, verdict=v, hits=h, note="<script>alert(1)</script>")
        for c, v, h in ((0.1, LOST, 0), (0.3, OVERCLAIMS, 6), (0.5, UNDECIDABLE, 5), (0.7, SURVIVED, 7))
    ]
    cells += [build.outcome("gaussian_probe", c.merger_spec, c.coefficient, score=9.0) for c in cells[:2]]
    cells += [build.outcome(merger="iso_c", coefficient=None, theft=False)]
    gates = (Gate("toy", "", "harmless", False, "refusal .10", "within .05"),)
    made = {
        "tiny": read_results(PUBLISHED / "tiny.json"),
        "mixed": build.results(cells, before_merging=gates, problems=("one is lost & not on record",)),
    }
    folder = tmp_path_factory.mktemp("pages")
    for name, results in made.items():
        (folder / f"{name}.html").write_text(to_html(results), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in made}


class Watched:
    """A page that remembers what went to its console and to the network."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.said: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.said.append(message.text))
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))

    def open(self, path: Path, fragment: str = "") -> Page:
        self.page.goto(f"{path.as_uri()}{fragment}")
        return self.page


@pytest.fixture
def watched(browser: Browser) -> Iterator[Watched]:
    with browser.new_context(**WAYS["light"]) as context:
        yield Watched(context.new_page())


def violations(page: Page) -> list[str]:
    """What axe finds, the best practices included."""
    found = Axe().run(page).response["violations"]
    return [f"{item['id']}: {item['nodes'][0]['html'][:120]}" for item in found]


def choose(page: Page, name: str) -> None:
    page.get_by_role("checkbox", name=name, exact=True).check()


def shown(rows: Locator) -> list[str]:
    """The heads of the rows that can be seen."""
    return [row.locator("th").inner_text() for row in rows.all() if row.is_visible()]


def sheets(page: Page) -> int:
    """Pages of paper that it fills."""
    page.emulate_media(media="print")
    return len(re.findall(rb"/Type\s*/Page\b(?!s)", page.pdf(format="A4")))


@pytest.mark.parametrize("name", ["mixed", pytest.param("tiny", marks=pytest.mark.slow)])
@pytest.mark.parametrize("way", WAYS)
def test_it_renders_in_silence_without_a_network_and_without_a_barrier(
    browser: Browser, pages: dict[str, Path], name: str, way: str
) -> None:
    with browser.new_context(**WAYS[way]) as context:
        watched = Watched(context.new_page())
        page = watched.open(pages[name])
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than its window"
        picture = page.locator("svg").first.bounding_box()
        assert picture is not None
        assert picture["width"] > 250
        assert picture["height"] > 150
        for cell in page.locator("details").all()[:2]:
            cell.locator("summary").click()
        assert violations(page) == []
        assert watched.requests == [pages[name].as_uri()]
        assert watched.said == []


@pytest.mark.parametrize(("ci", "ends"), [("true", pytest.fail), ("", pytest.skip)])
def test_a_machine_without_a_browser_says_so_and_fails_in_ci(
    monkeypatch: pytest.MonkeyPatch, ci: str, ends: Callable[..., object]
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CI", ci)
    with pytest.raises(ends.Exception, match=r"^no browser: none of chromium, "):  # type: ignore[attr-defined]
        find_program()


def test_a_barrier_would_be_found(watched: Watched, pages: dict[str, Path]) -> None:
    page = watched.open(pages["mixed"])
    page.evaluate("document.querySelector('.about').style.color = '#ccc'")
    page.evaluate("document.documentElement.removeAttribute('lang')")
    assert [item.partition(":")[0] for item in violations(page)] == ["color-contrast", "html-has-lang"]


def test_the_policy_stops_a_script_that_got_in_and_a_request(
    watched: Watched, pages: dict[str, Path], tmp_path: Path
) -> None:
    text = pages["mixed"].read_text(encoding="utf-8")
    owned = "document.title = 'owned'"
    planted = f'<script>{owned}</script><img src="http://localhost:9/" onerror="{owned}">'
    (tmp_path / "planted.html").write_text(text.replace("<main>", f"<main>{planted}"), encoding="utf-8")
    page = watched.open(tmp_path / "planted.html")
    assert page.title().startswith("mergeguard: ")
    page.wait_for_load_state("networkidle")
    stopped = [re.search(r"Security Policy directive[^a-z]*([a-z-]+)", line) for line in watched.said]
    assert sorted(found[1] for found in stopped if found) == ["img-src", "script-src", "script-src"], watched.said


def test_filters_leave_the_chosen_schemes_and_merge_methods(watched: Watched, pages: dict[str, Path]) -> None:
    page = watched.open(pages["tiny"])
    status, heat = page.get_by_role("status"), page.locator("table.heat tbody tr")
    everything = shown(heat)
    expect(status).to_have_text("90 of 90 cells shown")
    choose(page, "ties")
    expect(status).to_have_text("18 of 90 cells shown")
    assert shown(heat) == ["ties", "ties"]
    assert page.locator("figcaption:visible").all_inner_texts() == ["ties", "ties"]
    choose(page, "quantization_watermark")
    expect(status).to_have_text("9 of 90 cells shown")
    assert page.locator("h3:visible").all_inner_texts() == ["quantization_watermark"] * 3
    assert page.locator("table.overview thead th:visible").all_inner_texts() == [
        "merge method",
        "quantization_watermark",
    ]
    choose(page, "linear")
    expect(status).to_have_text("18 of 90 cells shown")
    page.get_by_role("button", name="Show all").click()
    expect(status).to_have_text("90 of 90 cells shown")
    assert shown(heat) == everything
    assert watched.said == []


def test_a_cell_leads_to_its_numbers_and_back(watched: Watched, pages: dict[str, Path]) -> None:
    page = watched.open(pages["tiny"])
    numbers = page.locator("[id='cell-instructional_fingerprint-ties-density-0.4-normalize-true-0.2']")
    expect(numbers).to_be_hidden()
    page.locator("table.heat").nth(1).get_by_role("link", name=".50 lost, on record").click()
    expect(numbers).to_be_visible()
    expect(numbers).to_be_focused()
    expect(numbers).to_be_in_viewport()
    expect(numbers).to_contain_text("4/8 = .50, interval 0.16 to 0.84")
    numbers.get_by_role("link", name="Back to the matrix of instructional_fingerprint").click()
    expect(page.get_by_role("heading", name="instructional_fingerprint").first).to_be_in_viewport()


def test_a_link_from_elsewhere_shows_the_numbers_even_if_they_are_filtered_out(
    watched: Watched, pages: dict[str, Path]
) -> None:
    anchor = "cell-quantization_watermark-linear-0.5"
    page = watched.open(pages["tiny"], f"#{anchor}")
    numbers = page.locator(f"[id='{anchor}']")
    expect(numbers).to_be_visible()
    choose(page, "dare_ties")
    expect(numbers).to_be_hidden()
    page.evaluate("location.hash = ''")
    page.evaluate(f"location.hash = '{anchor}'")
    expect(numbers).to_be_visible()
    expect(page.get_by_role("status")).to_have_text("90 of 90 cells shown")


def test_a_command_is_copied(watched: Watched, pages: dict[str, Path]) -> None:
    watched.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = watched.open(pages["tiny"], "#cell-quantization_watermark-ties-density-0.4-normalize-true-0.5")
    page.get_by_role("button", name="Copy the command of ties, α 0.5").first.click()
    expect(page.get_by_role("button", name="Copied the command of ties, α 0.5")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == (
        "mergeguard run --protection quantization_watermark --merger 'ties(density=0.4,normalize=true)' "
        "--coefficients 0.5 --world tiny --seed 0"
    )


def test_without_scripts_everything_can_be_read(browser: Browser, pages: dict[str, Path]) -> None:
    with browser.new_context(java_script_enabled=False) as context:
        page = context.new_page()
        page.goto(pages["mixed"].as_uri())
        expect(page.locator("table.heat").first).to_be_visible()
        expect(page.locator("#filters")).to_be_hidden()
        page.locator("table.heat").first.get_by_role("link", name=".00 lost").click()
        numbers = page.locator("[id='cell-instructional_fingerprint-linear-0.1']")
        expect(numbers).to_be_visible()  # browsers unfold what a link leads to
        expect(numbers.get_by_role("button")).to_have_count(0)


def test_a_screen_reader_hears_what_the_colours_say(watched: Watched, pages: dict[str, Path]) -> None:
    page = watched.open(pages["mixed"])
    table = page.get_by_role("table", name="VSR and verdict of instructional_fingerprint by merge method and α")
    expect(table.get_by_role("columnheader", name="α 0.1", exact=True)).to_have_count(1)
    expect(table.get_by_role("rowheader", name="linear", exact=True)).to_have_count(1)
    for name in (".00 lost", ".75 overclaims", ".62 undecidable", ".88 survived", "(1.0) no theft"):
        expect(table.get_by_role("link", name=name, exact=True)).to_have_count(1)
    picture = page.get_by_role("img", name=re.compile("^instructional_fingerprint under linear, over alpha"))
    assert ".75 at 0.3 (overclaims), .62 at 0.5 (undecidable)" in (picture.get_attribute("aria-label") or "")
    for name in ("Overview: critical coefficients", "Matrix", "Controls", "Environment", "Every cell"):
        expect(page.get_by_role("region", name=name, exact=True)).to_have_count(1)


def test_print_is_light_whole_and_without_buttons(browser: Browser, pages: dict[str, Path]) -> None:
    with browser.new_context(**WAYS["dark"]) as context:
        page = context.new_page()
        page.goto(pages["tiny"].as_uri())
        page.emulate_media(media="print")
        background = "getComputedStyle(document.body).backgroundColor"
        assert page.evaluate(background) == "rgb(255, 255, 255)"
        for part in ("nav", "#filters", "button"):
            expect(page.locator(part).first).to_be_hidden()
        whole = sheets(page)
        page.emulate_media(media="screen")
        assert page.evaluate(background) != "rgb(255, 255, 255)"
        assert page.locator("details[open]").count() == 0, "what was unfolded for print is folded again"
        choose(page, "ties")
        choose(page, "quantization_watermark")
        assert 1 < sheets(page) < 6 < whole
