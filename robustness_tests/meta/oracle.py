"""When the tests that compare with other packages run: one rule, so that none of them can be skipped in silence."""

from __future__ import annotations

import importlib.util
import os

import pytest


def needs(package: str) -> pytest.MarkDecorator:
    """Skips where the oracle is not installed, unless MERGEGUARD_REQUIRE_ORACLE=1; its import then fails instead."""
    required = os.environ.get("MERGEGUARD_REQUIRE_ORACLE") == "1"
    return pytest.mark.skipif(
        importlib.util.find_spec(package) is None and not required,
        reason=f"{package}, the oracle, is not installed; `.ci/run` installs it and sets MERGEGUARD_REQUIRE_ORACLE=1",
    )
