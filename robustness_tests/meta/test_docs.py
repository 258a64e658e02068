"""The site: its pages say what is registered and measured, its links lead somewhere, its tutorials run as written."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import mergeguard
from mergeguard.mergers.registry import MERGERS, find_method
from mergeguard.protections.registry import PROTECTIONS
from mergeguard.specs import format_value
from robustness_tests.meta.pages import ROOT, code_blocks
from robustness_tests.meta.time_stamping import make_authority

if TYPE_CHECKING:
    from types import ModuleType

    from mergeguard.registry import Registry

DOCS = ROOT / ".docs"
SITE_TOOLS = ("sphinx", "furo", "myst_parser")
"""What the extra `docs` installs."""
MODULES = ("pages", "registry_pages", "command_page", "links", "references")

SCHEME = """
from mergeguard.protections.gaussian_probe import GaussianProbe


class MyScheme(GaussianProbe):
    name = "my_scheme"
"""
TINY = "### World tiny, seed 0: tiny.json"
EMBEDS = "mergeguard embed "
ON_TINY_MODELS = "mergeguard embed --world tiny "
"""As the owner's tutorial itself says."""
NEEDS_A_SERVER = "--endpoint"  # test_served*.py start one


def ours(registry: Registry[Any]) -> list[str]:
    """The names that are not a third party's."""
    return [name for name in registry if isinstance(registry._targets[name], str)]


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module that makes the pages, as `build.py` imports it, and forgotten afterwards."""
    monkeypatch.syspath_prepend(DOCS)
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("pages")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every page of the site, not yet built."""
    folder = tmp_path_factory.mktemp("pages")
    program = f"import sys; sys.path[:0] = {[str(DOCS), str(ROOT)]}; import pages, pathlib; "
    program += f"pages.write_pages(pathlib.Path({str(ROOT)!r}), pathlib.Path({str(folder)!r}))"
    subprocess.run([sys.executable, "-c", program], check=True)
    return folder


def row_of(page: str, first: str, heading: str) -> list[str]:
    """The cells of the first row of a Markdown table that begins with `first`, below a heading."""
    below = page.partition(f"\n{heading}\n")[2]
    line = next(line for line in below.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def blocks(docstring: str) -> list[tuple[str, str]]:
    """(language, content) of each `code-block` of a docstring, from top to bottom."""
    found = re.findall(r"^\.\. code-block:: (\w+)\n\n((?:(?: {4}.*)?\n)+)", docstring, flags=re.MULTILINE)
    return [(language, re.sub(r"^ {4}", "", text, flags=re.MULTILINE).strip() + "\n") for language, text in found]


def tutorial(package: str) -> list[tuple[str, str]]:
    """The code blocks of a package's docstring."""
    found = blocks(importlib.import_module(f"mergeguard.{package}").__doc__ or "")
    assert found, f"mergeguard.{package} shows no code"
    return found


def test_every_package_has_a_page_that_is_its_docstring(site: ModuleType) -> None:
    packages = {path.parent.name for path in (ROOT / "mergeguard").glob("*/__init__.py")} - {"commands"}
    assert {*site.TUTORIALS, *site.CONCEPTS} == packages
    for name in sorted(packages):
        docstring = importlib.import_module(f"mergeguard.{name}").__doc__ or ""
        assert len(docstring.splitlines()) > 5, f"the docstring of mergeguard.{name} is no page"


def test_every_module_is_in_the_reference(pages: Path, site: ModuleType) -> None:
    reference = "".join(path.read_text(encoding="utf-8") for path in (pages / "api").glob("*.md"))
    shown = set(re.findall(r"^\.\. automodule:: (\S+)$", reference, flags=re.MULTILINE))
    files = [path for path in (ROOT / "mergeguard").rglob("*.py") if path.stat().st_size]
    modules = {site.module_name(path, ROOT / "mergeguard") for path in files}
    commands = {name for name in modules if name.startswith("mergeguard.commands.")}
    assert modules - shown == (site.WITHOUT_PAGE | site.ABOUT | commands) - {"mergeguard"}


@pytest.mark.parametrize("name", ours(PROTECTIONS))
def test_a_protection_has_a_page_with_its_parameters(name: str, pages: Path) -> None:
    page = (pages / "protections" / f"{name}.md").read_text(encoding="utf-8")
    scheme = PROTECTIONS.get(name)
    assert (sys.modules[scheme.__module__].__doc__ or "").strip() in page
    assert f"{{py:class}}`{scheme.__module__}.{scheme.__name__}`" in page
    for parameter, value in scheme.defaults.items():
        assert row_of(page, f"`{parameter}`", "## Parameters")[1] == f"`{format_value(value)}`"
    assert f"mergeguard run --protection {name}" in page or "\n### World tiny, seed 0: " in page


@pytest.mark.parametrize("name", ours(MERGERS))
def test_a_merger_has_a_page_with_source_and_parameters(name: str, pages: Path) -> None:
    page = (pages / "mergers" / f"{name}.md").read_text(encoding="utf-8")
    method = find_method(name)
    [source] = re.findall(r"^Source: (.+?) Code: ", page, flags=re.MULTILINE)
    assert re.sub(r"\[([^]]+)\]\(\S+?\)(?=[.,;)]|$)|<(\S+)>", r"\1\2", source) == f"{method.citation}."
    assert set(re.findall(r"arXiv:([\d.]+\d)", method.citation)) == set(re.findall(r"arxiv.org/abs/([\d.]+\d)", page))
    for parameter in method.parameters:
        row = row_of(page, f"`{parameter.name}`", "## Parameters")
        assert row[1] == f"`{format_value(parameter.default)}`"
        assert all(f"`{choice}`" in row[2] for choice in parameter.choices)
    assert f"mergeguard run --merger {name}" in page or "\n### World tiny, seed 0: " in page


def test_the_measured_rows_are_those_of_the_results_files(pages: Path) -> None:
    results = json.loads((ROOT / "fixtures" / "results" / "tiny.json").read_text(encoding="utf-8"))
    for protection in ("quantization_watermark", "instructional_fingerprint"):
        page = (pages / "protections" / f"{protection}.md").read_text(encoding="utf-8")
        row = row_of(page, "linear", TINY)
        cells = [o for o in results["outcomes"] if (o["protection"], o["merger_spec"]) == (protection, "linear")]
        measured = [float(re.search(r"\d*\.\d+", cell)[0]) for cell in row[1:-2]]  # type: ignore[index]
        assert measured == [pytest.approx(cell["rate"], abs=0.0051) for cell in cells]
        assert [cell.startswith("(") for cell in row[1:-2]] == [not cell["theft"] for cell in cells]
        [summary] = [s for s in results["summary"] if (s["protection"], s["merger_spec"]) == (protection, "linear")]
        assert row[-2] == ("-" if summary["critical_coefficient"] is None else f"{summary['critical_coefficient']:g}")
        merger_page = (pages / "mergers" / "linear.md").read_text(encoding="utf-8")
        assert row == row_of(merger_page.partition(f"\n{TINY}\n")[2], "linear", f"#### {protection}")


def test_links_of_a_page_become_links_of_the_site(site: ModuleType) -> None:
    text = "# See [a](LICENSE)\n[log](CHANGELOG.md#x) [code](mergeguard/specs.py) [out](https://e.org) [here](#there)\n"
    text += "[law](LICENSE) [example](fixtures/thirdparty_scheme)\n```toml\n# [a](b)\n```\n"
    assert site.on_site(text, Path(), ROOT) == (
        "# See a\n[log](/changelog.md#x) {py:mod}`code <mergeguard.specs>` [out](https://e.org) [here](#there)\n"
        "[law](/files/LICENSE) [example](/example-scheme.md)\n```toml\n# [a](b)\n```\n"
    )
    assert site.on_site("[up](../../README.md)", Path("fixtures/results"), ROOT) == "[up](/index.md)"
    with pytest.raises(FileNotFoundError, match=r"gone\.md, which the checkout lacks"):
        site.on_site("[x](gone.md)", Path(), ROOT)


@pytest.fixture
def links(site: ModuleType) -> ModuleType:
    """The checker of built pages."""
    assert site
    return importlib.import_module("links")


@pytest.mark.parametrize(
    "link",
    ["gone.html", "other.html#gone", "#gone", "folder/", "../outside.txt", "style.css.gone", "file:///etc/hosts"],
)
def test_a_broken_link_of_the_site_is_found(link: str, links: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "outside.txt").touch()
    page = tmp_path / "site" / "index.html"
    (page.parent / "folder").mkdir(parents=True)
    page.write_text(f'<a href="other.html">good</a><a href="{link}">bad</a>')
    (page.parent / "other.html").write_text("<p>")
    assert links.broken_links(page.parent) == [f"index.html: {link}"]


def test_good_links_of_the_site_are_left_alone(links: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "index.html").write_text('<h2 id="a b">x</h2><a href="../index.html#top">up</a><a name="n">')
    good = ("deep/", "deep/index.html#a%20b", "deep/index.html#n", "#", "https://example.org/x", "mailto:a@b.org", "")
    (tmp_path / "index.html").write_text("".join(f'<a href="{link}">x</a>' for link in good))
    assert links.broken_links(tmp_path) == []


def test_a_folder_without_pages_is_no_site(links: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no page"):
        links.broken_links(tmp_path)


def test_code_blocks_of_docstrings_are_found() -> None:
    text = "About.\n\n.. code-block:: bash\n\n    one\n\n      two\n\nText.\n\n.. code-block:: python\n\n    three\n"
    assert blocks(text) == [("bash", "one\n\n  two\n"), ("python", "three\n")]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; where Sphinx is missing there is none, which continuous integration does not accept."""
    require_site_tools()
    folder = tmp_path_factory.mktemp("site")
    ran = subprocess.run([sys.executable, DOCS / "build.py", folder], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return folder / "html"


def require_site_tools() -> None:
    missing = [name for name in SITE_TOOLS if importlib.util.find_spec(name) is None]
    if missing and "CI" not in os.environ:
        pytest.skip(f"needs the extra docs: {', '.join(missing)} not installed")
    assert not missing, f"{', '.join(missing)} not installed; install mergeguard[docs]"


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_shows_the_readme_first(built: Path) -> None:
    front = (built / "index.html").read_text(encoding="utf-8")
    assert f"mergeguard {mergeguard.__version__}</title>" in front
    for heading in re.findall(r"^## (.+)$", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE):
        assert f"<h2>{heading}<a" in front, heading
    for page in ("tutorials/testing", "tutorials/ownership", "tutorials/reports", "mergers/ties", "command-line"):
        assert (built / f"{page}.html").is_file()
    assert "Yadav et al. 2023" in (built / "mergers" / "ties.html").read_text(encoding="utf-8")
    reference = (built / "api" / "matrix.html").read_text(encoding="utf-8")
    assert 'href="mergers.html#mergeguard.mergers.contract.Merger"' in reference  # a type that annotations name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{py:class}`mergeguard.specs.Gone`", "reference target not found: mergeguard.specs.Gone"),
        ("[x](#gone)", "gone"),
        ("[x](gone.md)", "gone.md"),
        ("```{eval-rst}\n.. automodule:: mergeguard.gone\n```", "mergeguard.gone"),
        ("```{eval-rst}\n*no end\n```", "Inline emphasis start-string without end-string"),
    ],
)
def test_what_is_wrong_on_a_page_stops_the_build(text: str, said: str, tmp_path: Path) -> None:
    ran = build_page(f"{GOOD_PAGE}{text}", tmp_path)
    assert ran.returncode != 0
    assert said in ran.stderr


@pytest.mark.slow
def test_a_page_without_a_mistake_builds(tmp_path: Path) -> None:
    ran = build_page(GOOD_PAGE, tmp_path)
    assert ran.returncode == 0, ran.stderr


GOOD_PAGE = "# Title\n\n```{eval-rst}\n.. automodule:: mergeguard.specs\n```\n{py:class}`mergeguard.specs.Spec`\n\n"


def build_page(page: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Build a site of one page with the settings of ours."""
    require_site_tools()
    (folder / "pages").mkdir()
    (folder / "pages" / "index.md").write_text(page)
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "-n", "-c", DOCS, folder / "pages", folder / "built"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    """Somebody in an empty folder, with `mergeguard` installed."""
    return Reader(tmp_path)


class Reader:
    """Does what a tutorial says, in one folder, and stops at the first step that fails."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "work"
        self.folder.mkdir()
        command = folder / "bin" / "mergeguard"
        command.parent.mkdir()
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mergeguard "$@"\n')
        command.chmod(0o755)
        places = [str(command.parent), str(Path(sys.executable).parent), os.environ["PATH"]]
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST")},
            "PATH": os.pathsep.join(places),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(self.folder)]),
            "PYTEST_ADDOPTS": "-p mergeguard.pytest_plugin",
        }

    def follow(self, steps: list[tuple[str, str]]) -> list[str]:
        """What each step printed; bash and Python are run, in this order."""
        return [self.run(language, text) for language, text in steps]

    def run(self, language: str, text: str) -> str:
        program = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}[language]
        ran = subprocess.run(
            [*program, text], cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, f"{text}\n{ran.stdout}{ran.stderr}"
        return ran.stdout


@pytest.mark.slow
def test_the_researchers_tutorial_runs(reader: Reader) -> None:
    (language, test), *steps = tutorial("testing")
    assert language == "python"
    (reader.folder / "my_package.py").write_text(SCHEME)
    (reader.folder / "test_my_scheme.py").write_text(test)
    said = "".join(reader.follow(steps))
    assert " passed" in said
    results = json.loads((reader.folder / "reports" / "results.json").read_text(encoding="utf-8"))
    assert [cell["verdict"] for cell in results["outcomes"]] == ["survived"]


@pytest.mark.slow
def test_the_owners_tutorial_runs(reader: Reader) -> None:
    steps, done = tutorial("ownership"), []
    assert [EMBEDS in text for _, text in steps].count(True) == 1
    for language, text in steps:
        if NEEDS_A_SERVER in text:
            continue
        done.append(reader.run(language, text.replace(EMBEDS, ON_TINY_MODELS)))
        if EMBEDS in text:
            shutil.copytree(reader.folder / "my-model-protected", reader.folder / "suspect")
        if "mergeguard claim" in text:  # what the authority sends back, which the tutorial leaves to the reader
            authority = make_authority(reader.folder / "authority")
            (reader.folder / "claim.tsr").write_bytes(authority.reply(reader.folder / "claim.tsq"))
            shutil.copy(authority.roots, reader.folder / "roots.pem")
    assert len(done) == len(steps) - 1
    assert done[-1].split()[0] == "verified"


@pytest.mark.slow
def test_the_reviewers_tutorial_runs(reader: Reader) -> None:
    *_, rows = reader.follow(tutorial("reports"))
    assert [row.split()[:2] for row in rows.splitlines()] == [["gaussian_probe", "linear"], ["gaussian_probe", "ties"]]
    assert "gaussian_probe(strength=0.005)" in (reader.folder / "schemes.md").read_text(encoding="utf-8")
    assert (reader.folder / "changes.md").is_file()
    assert "<table" in (reader.folder / "strong.html").read_text(encoding="utf-8")


def test_the_code_on_the_pages_of_mergers_and_the_matrix_is_python_that_runs() -> None:
    [(language, merge)] = tutorial("mergers")
    assert language == "python"
    scope: dict[str, object] = {}
    exec(compile(merge, "mergeguard.mergers", "exec"), scope)  # noqa: S102 - it is our own docstring
    assert set(scope["merged"]) == {"weight"}  # type: ignore[call-overload]
    [(_, run)] = tutorial("matrix")
    readme = code_blocks((ROOT / "README.md").read_text(encoding="utf-8"), "python")
    assert run in readme, "the matrix's example is the README's, which test_wheel.py runs"
