"""Planted mistakes: a suite that lets one of them through proves nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mergeguard.matrix.gates import catch
from mergeguard.protections.planted import PLANTED

if TYPE_CHECKING:
    from collections.abc import Callable

    from mergeguard.matrix.engine import Engine
    from mergeguard.matrix.outcome import Planted
    from mergeguard.protections.contract import Protection


@pytest.mark.parametrize(("scheme", "wanted"), PLANTED, ids=[scheme.name for scheme, _ in PLANTED])
def test_planted_mistake_is_caught(
    scheme: type[Protection], wanted: str, engine: Engine, report_planted: Callable[[Planted], None]
) -> None:
    found = catch(engine, scheme(), wanted)
    report_planted(found)
    assert found.caught_by == wanted, found.measured
