"""The pytest plugin: options, header, parametrized cases, and the matrix as the terminal summary.

A test that asks for the fixtures `protection`, `merger` and `coefficient` runs once per case. Start-up stays light:
torch is loaded by the tests, not by this module.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mergeguard import __version__
from mergeguard.errors import EvidenceLost, MergeguardError

if TYPE_CHECKING:
    from mergeguard.matrix.cases import Case
    from mergeguard.matrix.outcome import Results
    from mergeguard.matrix.recorded import Record

OUTCOME, GATE, PLANTED = "mergeguard_outcome", "mergeguard_gate", "mergeguard_planted"
PART_OF_GATE = "mergeguard_part_of_gate"
NO_GPU = "tests marked gpu are selected, and there is no CUDA device; deselect them"
CASE_FIXTURES = ("protection", "merger", "coefficient")
MARKERS = {
    "gpu": "needs a CUDA device; without one, selecting it is an error",
    "real": "runs on a real language model",
    "slow": "takes minutes",
}


@dataclass(frozen=True)
class Selection:
    """What the options select."""

    cases: tuple[Case, ...]
    records: dict[str, Record]
    full: bool
    world: str
    seed: int


SELECTION = pytest.StashKey[Selection]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mergeguard", "survival of evidence in merged models")
    group.addoption("--protection", action="append", help="a protection, e.g. quantization_watermark; repeatable")
    group.addoption("--merger", action="append", help="a merger, e.g. ties(density=0.4); repeatable")
    group.addoption("--coefficient", action="append", help="weights of the protected model, e.g. 0.1,0.5; repeatable")
    group.addoption("--world", default="tiny", help="the world of models (default: tiny)")
    group.addoption("--seed", dest="mergeguard_seed", type=int, default=0, help="seed of keys, training and masks")
    group.addoption("--mergeguard-output", metavar="DIR", help="write results.json, report.md and junit.xml here")


def pytest_configure(config: pytest.Config) -> None:
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Collector(config), "mergeguard_collector")


def selection(config: pytest.Config) -> Selection:
    """The cases that the options select, made once.

    Raises:
        pytest.UsageError: an option names something that does not exist or lies outside its domain.
    """
    if SELECTION not in config.stash:
        try:
            config.stash[SELECTION] = _select(config)
        except MergeguardError as error:
            raise pytest.UsageError(f"mergeguard: {error}") from error
    return config.stash[SELECTION]


def pytest_sessionstart(session: pytest.Session) -> None:
    """A wrong option ends the run before it starts, with or without a header."""
    selection(session.config)
    folder = session.config.getoption("mergeguard_output")
    if folder and not hasattr(session.config, "workerinput"):
        from mergeguard.reports.bundle import prepare_folder

        try:
            prepare_folder(Path(folder))
        except MergeguardError as error:
            raise pytest.UsageError(f"mergeguard: {error}") from error


def _select(config: pytest.Config) -> Selection:
    from mergeguard.errors import ParameterError, UnknownNameError
    from mergeguard.matrix.cases import expand, parse_coefficients
    from mergeguard.matrix.recorded import read_records, recorded_file
    from mergeguard.mergers.registry import DEFAULT_COEFFICIENTS, DEFAULT_MERGERS
    from mergeguard.protections.registry import DEFAULT_PROTECTIONS, make_protection
    from mergeguard.specs import parse_spec
    from mergeguard.worlds.registry import WORLDS

    protections, mergers = config.getoption("protection"), config.getoption("merger")
    coefficients, world = config.getoption("coefficient"), config.getoption("world")
    seed = config.getoption("mergeguard_seed")
    if world not in WORLDS:
        raise UnknownNameError("world", world, WORLDS)
    if seed < 0:
        raise ParameterError(f"the seed is {seed}, expected a number from 0 on")
    specs = [parse_spec(text) for text in protections or DEFAULT_PROTECTIONS]
    # Only parameters need the scheme's code, and with it torch: to check them, and to drop those that are defaults.
    specs = [make_protection(spec).spec if spec.parameters else spec for spec in specs]
    cases = expand(
        specs,
        mergers or DEFAULT_MERGERS,
        parse_coefficients(",".join(coefficients)) if coefficients else DEFAULT_COEFFICIENTS,
        world=world,
        seed=seed,
    )
    full = not (protections or mergers or coefficients)
    return Selection(cases, read_records(recorded_file(world)), full, world, seed)


def pytest_report_header(config: pytest.Config) -> str:
    from mergeguard.matrix.cache import cache_folder

    chosen = selection(config)
    return (
        f"mergeguard {__version__}: world {chosen.world}, seed {chosen.seed}, {len(chosen.cases)} cases, "
        f"{len(chosen.records)} recorded losses, cache {cache_folder()}"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    asked = set(metafunc.fixturenames) - _parametrized_by_itself(metafunc)
    if asked.issuperset(CASE_FIXTURES):
        chosen = selection(metafunc.config)
        metafunc.parametrize(
            CASE_FIXTURES,
            [
                pytest.param(
                    case.protection,
                    case.merger,
                    case.coefficient,
                    id=case.id,
                    marks=_marks(chosen.records.get(case.id)),
                )
                for case in chosen.cases
            ],
            indirect=True,
            scope="function",  # a wider one would have pytest reorder the cases
        )
    elif asked.issuperset(("protection", "chosen")):  # "protection" alone may be another project's fixture
        schemes = dict.fromkeys(case.protection for case in selection(metafunc.config).cases)
        metafunc.parametrize(
            "protection", list(schemes), ids=[str(spec) for spec in schemes], indirect=True, scope="function"
        )


def _parametrized_by_itself(metafunc: pytest.Metafunc) -> set[str]:
    """Names that the test gives values of its own."""
    names: set[str] = set()
    for mark in metafunc.definition.iter_markers("parametrize"):
        given = mark.args[0] if mark.args else mark.kwargs["argnames"]
        names.update(name.strip() for name in (given.split(",") if isinstance(given, str) else given))
    return names


def _marks(record: Record | None) -> list[pytest.MarkDecorator]:
    """A recorded loss may only fail by losing its evidence; unless it is on the edge, it has to."""
    if record is None:
        return []
    return [pytest.mark.xfail(raises=EvidenceLost, reason=record.reason, strict=not record.on_edge)]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that measure something say so in their reports, whatever they fail by and in whichever process."""
    for item in items:
        if {"chosen", "engine"} <= set(getattr(item, "fixturenames", ())):
            item.user_properties.append((PART_OF_GATE, True))


def pytest_collection_finish(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput") and any(map(_lacks_gpu, session.items)):
        raise pytest.UsageError(NO_GPU)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Under xdist only workers collect, and a usage error of theirs would be an internal error of the whole run."""
    if _lacks_gpu(item):
        pytest.fail(NO_GPU, pytrace=False)


def _lacks_gpu(item: pytest.Item) -> bool:
    if item.get_closest_marker("gpu") is None:
        return False
    import torch

    return not torch.cuda.is_available()


class Collector:
    """Gathers what the tests report, from every xdist worker, and shows it at the end."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.reported: dict[tuple[str, str], str] = {}
        self.problems: list[str] = []
        self.started = time.perf_counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties = [(name, str(value)) for name, value in report.user_properties]
        parts = [(name, value) for name, value in properties if name in (OUTCOME, GATE, PLANTED)]
        if report.when == "call":
            self.reported.update(dict.fromkeys(parts, report.nodeid))
        # A worker that dies leaves no properties.
        if report.failed and (PART_OF_GATE in dict(properties) or "test_evidence_survives" in report.nodeid):
            self.problems.append(f"{report.nodeid.rpartition('::')[2]} failed")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        results = self.results()
        if results is None:
            return
        from mergeguard.reports.terminal import matrix_lines

        terminalreporter.section("mergeguard survival matrix")
        for line in matrix_lines(results, width=shutil.get_terminal_size().columns):
            terminalreporter.write_line(line)
        folder = self.config.getoption("mergeguard_output")
        if folder:
            from mergeguard.reports.bundle import write_reports

            try:
                write_reports(results, Path(folder))
            except MergeguardError as error:
                raise pytest.UsageError(f"mergeguard: {error}") from error
            terminalreporter.write_line(f"reports: {folder}")

    def results(self) -> Results | None:
        """The run's results, as far as tests reported parts of them; None if there are none."""
        from mergeguard.matrix.outcome import Gate, Outcome, Planted, Results

        def parts(kind: str) -> list[dict[str, Any]]:
            return [json.loads(value) for name, value in self.reported if name == kind]

        chosen = selection(self.config)
        order = {case.id: position for position, case in enumerate(chosen.cases)}
        outcomes = sorted(
            (Outcome.from_json(data) for data in parts(OUTCOME)), key=lambda o: order.get(o.id, len(order))
        )
        if not outcomes:
            return None
        from mergeguard.matrix.runner import environment, matched_controls
        from mergeguard.worlds.registry import load_world

        return Results(
            world={"name": chosen.world, "digests": dict(load_world(chosen.world).digests)},
            environment=environment(),
            outcomes=tuple(outcomes),
            before_merging=tuple(Gate(**data) for data in parts(GATE)),
            planted=tuple(Planted(**data) for data in parts(PLANTED)),
            problems=tuple(dict.fromkeys(self.problems)),
            matched_controls=matched_controls(outcomes),
            seconds=time.perf_counter() - self.started,
        )
