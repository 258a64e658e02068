"""The pytest plugin: options, header, parametrized cases, and the matrix as the terminal summary.

A test that asks for the fixtures `protection`, `merger` and `coefficient` runs once per case. Start-up stays light:
torch is loaded by the tests, not by this module.
"""

from __future__ import annotations

import json
import shutil
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


def _select(config: pytest.Config) -> Selection:
    from mergeguard.errors import ParameterError, UnknownNameError
    from mergeguard.matrix.cases import expand, parse_coefficients
    from mergeguard.matrix.recorded import read_records, recorded_file
    from mergeguard.mergers.registry import DEFAULT_COEFFICIENTS, DEFAULT_MERGERS
    from mergeguard.protections.registry import DEFAULT_PROTECTIONS, PROTECTIONS
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
    for spec in specs:
        if spec.name not in PROTECTIONS:
            raise UnknownNameError("protection", spec.name, PROTECTIONS)
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
    if all(name in metafunc.fixturenames for name in CASE_FIXTURES):
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
            scope="session",
        )
    elif "protection" in metafunc.fixturenames:
        schemes = dict.fromkeys(case.protection for case in selection(metafunc.config).cases)
        metafunc.parametrize(
            "protection", list(schemes), ids=[str(spec) for spec in schemes], indirect=True, scope="session"
        )


def _marks(record: Record | None) -> list[pytest.MarkDecorator]:
    """A recorded loss may only fail by losing its evidence; unless it is on the edge, it has to."""
    if record is None:
        return []
    return [pytest.mark.xfail(raises=EvidenceLost, reason=record.reason, strict=not record.on_edge)]


def pytest_collection_finish(session: pytest.Session) -> None:
    if any(item.get_closest_marker("gpu") for item in session.items):
        import torch

        if not torch.cuda.is_available():
            raise pytest.UsageError("tests marked gpu are selected, and there is no CUDA device; deselect them")


class Collector:
    """Gathers what the tests report, from every xdist worker, and shows it at the end."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.reported: dict[tuple[str, str], str] = {}
        self.problems: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        parts = [(name, str(value)) for name, value in report.user_properties if name in (OUTCOME, GATE, PLANTED)]
        if report.when == "call":
            self.reported.update(dict.fromkeys(parts, report.nodeid))
        if report.failed and (parts or "test_evidence_survives" in report.nodeid):
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
            from mergeguard.reports.bundle import prepare_folder, write_reports

            try:
                prepare_folder(Path(folder))
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
        from mergeguard.matrix.runner import environment
        from mergeguard.worlds.registry import load_world

        return Results(
            world={"name": chosen.world, "digests": dict(load_world(chosen.world).digests)},
            environment=environment(),
            outcomes=tuple(outcomes),
            before_merging=tuple(Gate(**data) for data in parts(GATE)),
            planted=tuple(Planted(**data) for data in parts(PLANTED)),
            problems=tuple(self.problems),
        )
