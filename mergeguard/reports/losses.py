"""Recorded losses from published results, so that nobody has to measure three seeds again."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from mergeguard.errors import ParameterError
from mergeguard.matrix.recorded import Record, read_records, recorded_file, write_records

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mergeguard.matrix.outcome import Results


def record_losses(path: Path, results: Sequence[Results]) -> list[Record]:
    """Write the losses of one world's results, each of another seed or of other cases, to a file of records.

    The file then holds the losses of these results and no others. Reasons that were reviewed are kept: those in `path`
    first, then those recorded for the world.

    Raises:
        ParameterError: there is no outcome, the results are of several worlds, or a cell occurs twice with one seed.
        CheckpointError: a file of records cannot be read or written.
    """
    outcomes = [outcome for one in results for outcome in one.outcomes]
    if not outcomes:
        raise ParameterError("the results hold no outcome; there is no loss to record")
    worlds = {(str(one.world["name"]), tuple(sorted(one.world["digests"].items()))) for one in results}
    names = sorted({name for name, _ in worlds} | {outcome.world for outcome in outcomes})
    if len(names) > 1 or len(worlds) > 1:
        what = f"several worlds ({', '.join(names)})" if len(names) > 1 else f"different models of world {names[0]!r}"
        raise ParameterError(f"the results are of {what}; records are of one")
    (name, seed), count = Counter((outcome.id, outcome.seed) for outcome in outcomes).most_common(1)[0]
    if count > 1:
        raise ParameterError(f"{name} with seed {seed} is in the results {count} times; expected other seeds or cells")
    kept = {**read_records(recorded_file(names[0])), **read_records(path)}
    return write_records(path, [one.outcomes for one in results], kept)
