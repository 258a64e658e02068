"""Leaderboards as a section of a Markdown page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeguard.matrix.outcome import format_coefficient
from mergeguard.reports import view
from mergeguard.reports.leaderboard import HARMLESS, SPECIFIC
from mergeguard.reports.markdown import escape, table

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mergeguard.matrix.outcome import Gate
    from mergeguard.reports.leaderboard import Leaderboard, MergerStanding, Standing

EXPLANATION = (
    "Schemes stand in one table only if they were measured on the same models, with the same seeds, in the same cells, "
    "and claim the same. Ranked by: every gate before merging passed, the share of thefts survived, the worst case, "
    "the mean area; equals share a rank. Worst case: the lowest VSR (or score) of a theft. Mean area: under VSR over "
    "alpha, averaged over mergers. Critical: for each merger the smallest theft from which every larger one survives, "
    "with every seed. Harmless: skills of the protected model before merging. Specific: unseen keys and clean models "
    "before merging, then the most unseen keys that answer on any merged model."
)
_COLUMNS = (
    "#", "scheme", "needs", "thefts survived", "worst case", "mean area", "critical", "harmless", "specific",
    "other gates",
)  # fmt: skip


def to_section(boards: Sequence[Leaderboard]) -> Iterator[str]:
    """The lines of the section, a table a board; nothing without a board."""
    if not boards:
        return
    yield from ("## Leaderboard", "")
    for board in boards:
        yield from (f"### {escape(_title(board))}", "", escape(_about(board)), "")
        yield from table(_COLUMNS, (_row(standing, _labels(board)) for standing in board.standings))
        yield ""
    yield from (escape(EXPLANATION), "")


def _title(board: Leaderboard) -> str:
    return f"World {board.world}, {_seeds(board)}: {board.claim}"


def _seeds(board: Leaderboard) -> str:
    return f"seed{'' if len(board.seeds) == 1 else 's'} {', '.join(map(str, board.seeds))}"


def _about(board: Leaderboard) -> str:
    digests = board.about_world.get("digests")
    parts = [
        f"{board.cells} cells of {len(board.mergers)} merger{'' if len(board.mergers) == 1 else 's'}",
        f"from {', '.join(board.files)}",
        f"measured with mergeguard {' and '.join(board.versions)}",
    ]
    parts += [
        f"{name} {value}"
        for key, item in board.about_world.items()
        if key not in ("name", "digests")
        for name, value in view.flat(key, item)
    ]
    if digests:
        parts.append(f"models {', '.join(f'{name} {value[:12]}' for name, value in view.flat('', digests))}")
    return "; ".join(parts)


def _labels(board: Leaderboard) -> dict[str, str]:
    """The name alone of mergers that have no namesake in the table."""
    names = [spec.partition("(")[0] for spec in board.mergers]
    return {
        spec: view.clean(name if names.count(name) == 1 else spec)
        for spec, name in zip(board.mergers, names, strict=True)
    }


def _row(standing: Standing, labels: Mapping[str, str]) -> tuple[str, ...]:
    others = [gate for gate in standing.gates if gate.gate not in (HARMLESS, SPECIFIC)]
    return (
        str(standing.rank),
        escape(standing.protection),
        escape(standing.access),
        f"{standing.survived} of {standing.thefts}",
        escape(_worst(standing, labels)),
        view.format_area(standing.mean_area),
        escape(", ".join(_critical(row, labels) for row in standing.mergers)),
        escape(_gates([gate for gate in standing.gates if gate.gate == HARMLESS])),
        escape("; ".join(filter(None, (_specific(standing), _on_merged(standing))))),
        escape(_marked(others)),
    )


def _worst(standing: Standing, labels: Mapping[str, str]) -> str:
    worst = standing.worst
    if worst is None:
        return "no theft"
    return f"{view.number(worst)} ({labels[worst.merger_spec]} at {format_coefficient(worst.coefficient)})"


def _critical(row: MergerStanding, labels: Mapping[str, str]) -> str:
    name = labels[row.merger_spec]
    if not row.thefts:
        return f"{name} no theft"
    if not row.coefficients:
        return f"{name} {'survived' if row.survived == row.thefts else 'lost'}"
    return f"{name} {view.format_critical(row.critical_coefficient)}"


def _specific(standing: Standing) -> str:
    return _gates([gate for gate in standing.gates if gate.gate == SPECIFIC])


def _on_merged(standing: Standing) -> str:
    most = standing.most_decoys
    merged = "" if most is None else f"merged: at most {most.decoy_hits}/{most.decoy_trials} unseen"
    return merged + f"; overclaims: {standing.overclaims}" * bool(standing.overclaims)


def _gates(gates: Sequence[Gate]) -> str:
    """The mark of all, and what each measured; `not measured` is no pass."""
    if not gates:
        return "not measured"
    mark = "✅" if all(gate.passed for gate in gates) else "❌"
    return f"{mark} {' / '.join(dict.fromkeys(gate.measured for gate in gates))}"


def _marked(gates: Sequence[Gate]) -> str:
    if not gates:
        return "not measured"
    failed = dict.fromkeys(gate.gate for gate in gates if not gate.passed)
    return f"❌ {', '.join(failed)}" if failed else f"✅ {', '.join(dict.fromkeys(gate.gate for gate in gates))}"
