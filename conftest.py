"""The plugin (also when the package runs from a checkout that is not installed) and the suite's own fixtures."""

from __future__ import annotations

pytest_plugins = ["mergeguard.pytest_plugin", "fixtures.matrix", "pytester"]
