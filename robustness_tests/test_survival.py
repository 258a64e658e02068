"""The matrix: each protection under each merge method at each coefficient, one test a cell."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mergeguard.matrix.recorded import Record, check_outcome, recorded_file, stale

if TYPE_CHECKING:
    from mergeguard.matrix.cases import Case
    from mergeguard.matrix.outcome import Outcome
    from mergeguard.matrix.selection import Selection


def test_evidence_survives(case: Case, outcome: Outcome, record: Record | None) -> None:
    assert outcome.id == case.id
    check_outcome(outcome, record)


def test_every_recorded_loss_is_a_case_of_the_full_matrix(chosen: Selection) -> None:
    if not chosen.full:
        pytest.skip("only a part of the matrix is selected, and a part calls no record stale")
    left_over = stale(chosen.records, (case.id for case in chosen.cases))
    assert not left_over, f"{recorded_file(chosen.world)} records losses of cases that do not exist: {left_over}"
