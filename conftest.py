"""The plugin (also when the package runs from a checkout that is not installed) and the suite's own fixtures."""

from __future__ import annotations

from hypothesis import settings

# Machines are shared: how long an example takes says nothing about the code.
settings.register_profile("mergeguard", deadline=None)
settings.load_profile("mergeguard")

pytest_plugins = ["mergeguard.pytest_plugin", "fixtures.matrix", "pytester"]
