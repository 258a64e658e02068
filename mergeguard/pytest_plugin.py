"""The pytest plugin: options, header, parametrized cases, and the matrix as the terminal summary.

A test that asks for the fixtures `protection`, `merger` and `coefficient` runs once per case. Which cases these are
its module says (`MATRIX`), and options. Start-up stays light: torch is loaded by the tests, not by this module.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import pytest

from mergeguard import __version__
from mergeguard.errors import EvidenceLost, MergeguardError
from mergeguard.matrix.outcome import GATE, OUTCOME, PLANTED

if TYPE_CHECKING:
    from collections.abc import Generator
    from types import ModuleType

    from mergeguard.matrix.outcome import Outcome, Results
    from mergeguard.matrix.recorded import Record
    from mergeguard.matrix.selection import Matrix, Selection
    from mergeguard.testing.cases import GateCase

WORLD = "mergeguard_world"
CASES = "mergeguard_cases"
"""The mark of tests that `mergeguard.testing.parametrize_with_cases` decorates."""
NO_GPU = "tests marked gpu are selected, and there is no CUDA device; deselect them"
CASE_FIXTURES = ("protection", "merger", "coefficient")
MARKERS = {
    "mergeguard_cases(scheme, options)": "made by mergeguard.testing.parametrize_with_cases",
    "gpu": "needs a CUDA device; without one, selecting it is an error",
    "real": "runs on a real language model",
    "slow": "takes minutes",
}


SELECTIONS = pytest.StashKey["dict[Matrix, Selection]"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mergeguard", "survival of evidence in merged models")
    group.addoption("--protection", action="append", help="a protection, e.g. quantization_watermark; repeatable")
    group.addoption("--merger", action="append", help="a merger, e.g. ties(density=0.4); repeatable")
    group.addoption("--coefficient", action="append", help="weights of the protected model, e.g. 0.1,0.5; repeatable")
    group.addoption("--axes", help="vary parameters of the mergers that have a density: normalize,density")
    group.addoption("--world", help="the world of models, a name or a .toml file (default: tiny; real, gpu: smollm2)")
    group.addoption("--seed", dest="mergeguard_seed", type=int, help="seed of keys, training and masks")
    group.addoption("--mergeguard-output", metavar="DIR", help="write the reports here: results.json, report.html, ...")


def pytest_configure(config: pytest.Config) -> None:
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Collector(config), "mergeguard_collector")


def matrix_of(module: ModuleType) -> Matrix:
    """What a test module measures where no option says otherwise."""
    from mergeguard.matrix.selection import Matrix

    found: Matrix = getattr(module, "MATRIX", Matrix())
    return found


def selection(config: pytest.Config, matrix: Matrix | None = None) -> Selection:
    """The cases of `matrix` (default: the full one of tiny) that the options select, made once.

    Raises:
        pytest.UsageError: an option names something that does not exist or lies outside its domain.
    """
    from mergeguard.matrix.selection import Matrix, Options, select

    chosen, matrix = config.stash.setdefault(SELECTIONS, {}), matrix or Matrix()
    if matrix not in chosen:
        options = Options(
            world=config.getoption("world"),
            protections=config.getoption("protection") or (),
            mergers=config.getoption("merger") or (),
            coefficients=config.getoption("coefficient") or (),
            axes=config.getoption("axes"),
            seed=config.getoption("mergeguard_seed") or 0,
        )
        try:
            chosen[matrix] = select(matrix, options)
        except MergeguardError as error:
            raise pytest.UsageError(f"mergeguard: {error}") from error
    return chosen[matrix]


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


def pytest_report_header(config: pytest.Config) -> str:
    from mergeguard.machine import cache_folder

    chosen = selection(config)
    return (
        f"mergeguard {__version__}: world {chosen.world}, seed {chosen.seed}, {len(chosen.cases)} cases, "
        f"{len(chosen.records)} recorded losses, cache {cache_folder()}"
    )


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> list[str]:
    """What other worlds than the header's are measured, and what to expect of that."""
    from mergeguard.matrix.selection import Matrix, costs

    lines = []
    gates = {id(case.plan): case.plan for item in items if (case := _gate_case(item))}
    for plan in gates.values():
        known, cells = len(plan.records), len(plan.cases)
        where = f"world {plan.options.world}, seed {plan.options.seed}"
        lines.append(f"mergeguard: gate of {plan.protection}: {where}, {cells} cells, {known} recorded losses")
    for matrix in dict.fromkeys(matrix_of(item.module) for item in items if _measures(item)):
        if matrix != Matrix():
            chosen = selection(config, matrix)
            records = f"{len(chosen.cases)} cases, {len(chosen.records)} recorded losses"
            lines += [f"mergeguard: world {chosen.world}, seed {chosen.seed}, {records}", *costs(matrix, chosen)]
    return lines


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if mark := metafunc.definition.get_closest_marker(CASES):
        _parametrize_with_gate(metafunc, mark)
        return
    asked = set(metafunc.fixturenames) - _parametrized_by_itself(metafunc)
    if asked.issuperset(CASE_FIXTURES):
        chosen = selection(metafunc.config, matrix_of(metafunc.module))
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
        chosen = selection(metafunc.config, matrix_of(metafunc.module))
        schemes = dict.fromkeys(case.protection for case in chosen.cases)
        metafunc.parametrize(
            "protection", list(schemes), ids=[str(spec) for spec in schemes], indirect=True, scope="function"
        )


def _parametrize_with_gate(metafunc: pytest.Metafunc, mark: pytest.Mark) -> None:
    """The cases of a third party's gate, which options narrow or move."""
    from mergeguard.testing.cases import gate_cases
    from mergeguard.testing.plan import moved, plan

    if "case" not in metafunc.fixturenames:
        raise pytest.UsageError(f"mergeguard: {metafunc.definition.nodeid} has to take the argument `case`")
    scheme, written = mark.args
    option = metafunc.config.getoption
    try:
        options, narrowed = moved(
            written,
            world=option("world"),
            seed=option("mergeguard_seed"),
            mergers=option("merger"),
            coefficients=option("coefficient"),
            axes=option("axes"),
        )
        found = plan(scheme, options, narrowed=narrowed)
    except MergeguardError as error:
        raise pytest.UsageError(f"mergeguard: {error}") from error
    metafunc.parametrize(
        "case", [pytest.param(case, id=case.id, marks=_marks(case.record)) for case in gate_cases(found)]
    )


def _gate_case(item: pytest.Item) -> GateCase | None:
    """The case of a third party's gate that a test runs, if it is one."""
    if item.get_closest_marker(CASES) is None or not isinstance(item, pytest.Function):
        return None
    found: Any = item.callspec.params["case"]
    return cast("GateCase", found)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """What a case of a gate measured goes into the test's report, also if the test fails by it."""
    case = _gate_case(item)
    try:
        return (yield)
    finally:
        if case is not None:
            item.user_properties += case.properties


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


def _measures(item: pytest.Item) -> TypeGuard[pytest.Function]:
    return isinstance(item, pytest.Function) and {"chosen", "engine"} <= set(item.fixturenames)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that measure say in which world in their reports, whatever they fail by and in whichever process."""
    for item in items:
        if case := _gate_case(item):
            item.user_properties.append((WORLD, case.world))
        elif _measures(item):
            item.user_properties.append((WORLD, selection(config, matrix_of(item.module)).world))


def pytest_collection_finish(session: pytest.Session) -> None:
    worker = getattr(session.config, "workerinput", None)
    if worker is None and any(map(_lacks_gpu, session.items)):
        raise pytest.UsageError(NO_GPU)
    if worker is not None and any(map(_may_use_gpu, session.items)):
        from mergeguard.matrix.executors import gpus, pin

        pin(int(worker["workerid"].removeprefix("gw")), gpus())


def _may_use_gpu(item: pytest.Item) -> bool:
    """Whether a test may start CUDA: it says so, or measures in a world that may compute there."""
    from mergeguard.matrix.cases import DEFAULT_WORLD

    world = dict(item.user_properties).get(WORLD, DEFAULT_WORLD)
    return item.get_closest_marker("gpu") is not None or world != DEFAULT_WORLD


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Under xdist only workers collect, and a usage error of theirs would be an internal error of the whole run."""
    if _lacks_gpu(item):
        pytest.fail(NO_GPU, pytrace=False)


def _lacks_gpu(item: pytest.Item) -> bool:
    if item.get_closest_marker("gpu") is None:
        return False
    import torch

    return not torch.cuda.is_available()


def _readable(name: str, value: str) -> dict[str, str]:
    """What CI services show of a property: short texts in the place of JSON."""
    if name not in (OUTCOME, GATE, PLANTED):
        return {name: value}
    from mergeguard.matrix.outcome import Gate, Outcome, Planted
    from mergeguard.reports import properties

    part = json.loads(value)
    if name == OUTCOME:
        return properties.outcome_properties(Outcome.from_json(part))
    return properties.gate_properties(Gate(**part)) if name == GATE else properties.planted_properties(Planted(**part))


class Collector:
    """Gathers what the tests report, from every xdist worker, and shows it at the end, a matrix for each world."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.reported: dict[str, dict[tuple[str, str], None]] = defaultdict(dict)
        self.problems: list[tuple[str | None, str]] = []
        self.started = time.perf_counter()
        self.session: pytest.Session | None = None
        self.seconds: dict[str, float] = defaultdict(float)
        self.done = 0

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self.session = session

    @pytest.hookimpl(tryfirst=True)  # before JUnit's reporter, which shows the properties that are left
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties = [(name, str(value)) for name, value in report.user_properties]
        world = dict(properties).get(WORLD)
        if report.when == "call" and world is not None:
            parts = [(name, value) for name, value in properties if name in (OUTCOME, GATE, PLANTED)]
            self.reported[world].update(dict.fromkeys(parts))
        shown = (pair for name, value in properties for pair in _readable(name, value).items())
        report.user_properties[:] = list(dict(shown).items())
        # A worker that dies leaves no properties.
        if report.failed and (world is not None or "test_evidence_survives" in report.nodeid):
            self.problems.append((world, f"{report.nodeid.rpartition('::')[2]} failed"))
        self.seconds[report.nodeid] += report.duration
        if report.when == "teardown":
            self.done += 1
            self._say_time_left(report.nodeid, world)

    def _say_time_left(self, name: str, world: str | None) -> None:
        """After each test that measures in a large world: how long the others may take."""
        from mergeguard.matrix.cases import DEFAULT_WORLD
        from mergeguard.matrix.progress import in_words, remaining

        terminal: Any = self.config.pluginmanager.get_plugin("terminalreporter")
        if world in (None, DEFAULT_WORLD) or self.session is None or terminal is None or terminal.verbosity < 0:
            return
        total = self.session.testscollected
        elapsed = time.perf_counter() - self.started
        left = remaining(
            {"test": list(self.seconds.values())}, {"test": max(0, total - self.done)}, elapsed, pace="test"
        )
        state = ", ".join(filter(None, (f"{self.done}/{total}", in_words(left))))
        terminal.ensure_newline()
        terminal.write_line(f"{name.rpartition('::')[2]}: {self.seconds[name]:.0f} s [{state}]")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        found = self.results()
        folder = self.config.getoption("mergeguard_output")
        for results in found:
            from mergeguard.reports.terminal import matrix_lines

            terminalreporter.section("mergeguard survival matrix")
            for line in matrix_lines(results, width=shutil.get_terminal_size().columns):
                terminalreporter.write_line(line)
            if folder:
                from mergeguard.reports.bundle import prepare_folder, write_reports

                own = Path(folder) / str(results.world["name"]) if len(found) > 1 else Path(folder)
                try:
                    prepare_folder(own)
                    write_reports(results, own)
                except MergeguardError as error:
                    raise pytest.UsageError(f"mergeguard: {error}") from error
                terminalreporter.write_line(f"reports: {own}")

    def results(self) -> list[Results]:
        """The run's results in each world, as far as tests reported parts of them."""
        return [found for world, parts in self.reported.items() if (found := self._results(world, list(parts)))]

    def _position(self, outcome: Outcome) -> tuple[int, str, int, str, float]:
        """As cases are collected; workers of xdist report in any order."""
        from mergeguard.mergers.registry import DEFAULT_MERGERS

        cases = [case.id for case in selection(self.config).cases]
        position = cases.index(outcome.id) if outcome.id in cases else len(cases)
        spec, alpha = outcome.merger_spec, outcome.coefficient
        row = DEFAULT_MERGERS.index(spec) if spec in DEFAULT_MERGERS else len(DEFAULT_MERGERS)
        return position, outcome.protection_spec, row, spec, -1.0 if alpha is None else alpha

    def _results(self, name: str, reported: list[tuple[str, str]]) -> Results | None:
        from mergeguard.matrix.outcome import Gate, Outcome, Planted, Results

        def parts(kind: str) -> list[dict[str, Any]]:
            return [json.loads(value) for found, value in reported if found == kind]

        outcomes = sorted(map(Outcome.from_json, parts(OUTCOME)), key=self._position)
        if not outcomes:
            return None
        from mergeguard.matrix.runner import describe_world, environment, matched_controls
        from mergeguard.worlds.registry import load_world

        world = load_world(name)
        return Results(
            world=describe_world(world),
            environment=environment(world.device),
            outcomes=tuple(outcomes),
            before_merging=tuple(Gate(**data) for data in parts(GATE)),
            planted=tuple(Planted(**data) for data in parts(PLANTED)),
            problems=tuple(dict.fromkeys(line for at, line in self.problems if at in (None, name))),
            matched_controls=matched_controls(outcomes),
            seconds=time.perf_counter() - self.started,
        )
