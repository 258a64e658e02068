"""A thousand null cells: fresh keys on models that were never marked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeguard.matrix import null_campaign as campaign
from mergeguard.matrix.null_campaign import null_campaign

if TYPE_CHECKING:
    import pytest

    from mergeguard.matrix.engine import Engine


def test_no_false_survival_in_a_thousand_null_cells(engine: Engine) -> None:
    found = null_campaign(engine)
    assert found.cells >= 1000
    # Expected: 2e-5 a cell, 0.02 in all.
    assert found.false_survivals == 0, found.describe()
    assert found.uniformity > 1e-3, found.describe()


def test_a_null_that_is_too_narrow_is_noticed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted mistake: a score whose spread is twice what its p-value assumes."""
    from mergeguard.protections import gaussian_probe

    honest = gaussian_probe.projection_z
    monkeypatch.setattr(gaussian_probe, "projection_z", lambda delta, key: 2 * honest(delta, key))
    found = campaign.null_campaign(engine, keys=40, mergers=["linear"])
    assert found.uniformity < 1e-3
