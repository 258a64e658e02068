"""Which cases a test module measures, as options narrow them. No torch here, unless a protection has parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergeguard.errors import ParameterError
from mergeguard.matrix import recorded
from mergeguard.matrix.cases import DEFAULT_SEED, DEFAULT_WORLD, expand, parse_coefficients, with_axes
from mergeguard.mergers.registry import DEFAULT_COEFFICIENTS, DEFAULT_MERGERS, parse_merger
from mergeguard.protections.registry import DEFAULT_PROTECTIONS, make_protection
from mergeguard.specs import parse_spec
from mergeguard.worlds.registry import find_world

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mergeguard.matrix.cases import Case
    from mergeguard.matrix.recorded import Record

Row = tuple[str, tuple[float, ...]]
FULL: tuple[Row, ...] = tuple((merger, DEFAULT_COEFFICIENTS) for merger in DEFAULT_MERGERS)


@dataclass(frozen=True)
class Matrix:
    """What a test module measures where no option says otherwise: its variable `MATRIX`, or else the full one of tiny.

    Attributes:
        rows: mergers, each with its coefficients.
        costs: what to expect of protections that take long, by bare name; said before they run.
    """

    world: str = DEFAULT_WORLD
    protections: tuple[str, ...] = DEFAULT_PROTECTIONS
    rows: tuple[Row, ...] = FULL
    costs: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Options:
    """What the user asks for; None or nothing leaves it to the matrix."""

    world: str | None = None
    protections: Sequence[str] = ()
    mergers: Sequence[str] = ()
    coefficients: Sequence[str] = ()
    axes: str | None = None
    seed: int = DEFAULT_SEED


@dataclass(frozen=True)
class Selection:
    """What is measured. `full`: it is the whole matrix, so that a record without a case is stale."""

    cases: tuple[Case, ...]
    records: dict[str, Record]
    full: bool
    world: str
    seed: int


def select(matrix: Matrix, options: Options) -> Selection:
    """The cases of `matrix`, narrowed or replaced by `options`; the recorded losses are those of the world.

    Raises:
        MergeguardError: an option names something that does not exist or lies outside its domain.
    """
    world = find_world(options.world or matrix.world)
    if options.seed < 0:
        raise ParameterError(f"the seed is {options.seed}, expected a number from 0 on")
    specs = [parse_spec(text) for text in options.protections or matrix.protections]
    # Only parameters need the scheme's code, and with it torch: to check them, and to drop those that are defaults.
    specs = [make_protection(spec).spec if spec.parameters else spec for spec in specs]
    mergers = [parse_merger(name) for name in options.mergers or [name for name, _ in matrix.rows]]
    coefficients = {alpha for _, alphas in matrix.rows for alpha in alphas}
    cases = expand(
        specs,
        mergers if options.axes is None else with_axes(mergers, options.axes),
        parse_coefficients(",".join(options.coefficients)) if options.coefficients else sorted(coefficients),
        world=world,
        seed=options.seed,
    )
    if not (options.mergers or options.coefficients or options.axes):
        rows = {parse_merger(name): alphas for name, alphas in matrix.rows}
        cases = tuple(case for case in cases if case.coefficient is None or case.coefficient in rows[case.merger])
    narrowed = options.protections or options.mergers or options.coefficients or options.axes
    full = (matrix.protections, matrix.rows) == (DEFAULT_PROTECTIONS, FULL) and not narrowed
    records = recorded.read_records(recorded.recorded_file(world))
    return Selection(cases, records, full, world, options.seed)


def costs(matrix: Matrix, selection: Selection) -> list[str]:
    """What the selected protections cost, a line each, where the matrix says it."""
    known = dict(matrix.costs)
    schemes = dict.fromkeys(case.protection for case in selection.cases)
    return [f"{scheme}: {known[scheme.name]}" for scheme in schemes if scheme.name in known]
