"""The tables of bench_merge.py, made of what its .json file holds."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from robustness_tests.benchmarks.processes import Usage, medians

if TYPE_CHECKING:
    from collections.abc import Sequence

OURS, THEIRS, COPY, SYNCED_COPY = "mergeguard", "mergekit", "copy", "copy with fsync"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first two columns hold words, the others numbers."""
    marks = ["---"] * 2 + ["---:"] * (len(head) - 2)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, marks, *rows)) + "\n" if rows else ""


def quotient(upper: float | None, lower: float | None, text: str = "{:.2f}") -> str:
    return text.format(upper / lower) if upper is not None and lower else "-"


METHOD_HEAD = (
    "model", "method", "mergekit s", "ours s", "times faster (each round)", "mergekit CPU s", "ours CPU s",
    "mergekit peak MB", "ours peak MB", "ours of mergekit's", "mergekit anonymous MB", "ours anonymous MB",
    "ours / copy", "ours / copy with fsync",
)  # fmt: skip
SWEEP_HEAD = ("model", "method", "ours, one s", "ours, nine s", "nine / one", "nine mergekit runs / ours, nine")
CHECK_HEAD = ("model", "method", "elements", "differing", "largest difference", "problem")


def middle(found: dict[str, Any], side: str) -> dict[str, float]:
    """The medians of a side by name; empty if it did not run to its end."""
    usage = medians([Usage(**run) for run in found["runs"].get(side, [])])
    return asdict(usage) if usage else {}


def method_row(found: dict[str, Any]) -> list[str]:
    theirs, ours = middle(found, THEIRS), middle(found, OURS)
    both = zip(found["runs"].get(THEIRS, []), found["runs"].get(OURS, []), strict=False)
    ratios = [their["seconds"] / our["seconds"] for their, our in both]
    faster = quotient(theirs.get("seconds"), ours.get("seconds"), "{:.1f}")

    def figure(side: str, medians: dict[str, float], name: str, digits: int) -> str:
        return f"{medians[name]:.{digits}f}" if medians else "failed" if side in found["errors"] else "-"

    def pair(name: str, digits: int) -> list[str]:
        return [figure(THEIRS, theirs, name, digits), figure(OURS, ours, name, digits)]

    return [
        found["model"], found["method"], *pair("seconds", 2),
        f"{faster} ({min(ratios):.1f}-{max(ratios):.1f})" if ratios else faster,
        *pair("cpu_seconds", 1), *pair("peak_megabytes", 0),
        quotient(ours.get("peak_megabytes"), theirs.get("peak_megabytes"), "{:.0%}"), *pair("anonymous_megabytes", 0),
        *(quotient(ours.get("seconds"), middle(found, side).get("seconds")) for side in (COPY, SYNCED_COPY)),
    ]  # fmt: skip


def sweep_row(found: dict[str, Any], methods: Sequence[dict[str, Any]]) -> list[str]:
    """With nine times mergekit's single run, if this table has one: nine runs of it are not measured."""
    one, nine = (middle(found, side).get("seconds") for side in ("one", "nine"))
    same = [other for other in methods if (other["model"], other["method"]) == (found["model"], found["method"])]
    single = middle(same[0], THEIRS).get("seconds") if same else None
    seconds = [f"{value:.2f}" if value is not None else "failed" for value in (one, nine)]
    return [found["model"], found["method"], *seconds, quotient(nine, one),
            quotient(9 * single if single else None, nine, "{:.1f}")]  # fmt: skip


def check_row(found: dict[str, Any]) -> list[str]:
    if found["problem"]:
        return [found["model"], found["method"], "-", "-", "-", found["problem"].replace("|", "/")]
    return [found["model"], found["method"], str(found["elements"]), str(found["differing"]),
            f"{found['largest']:.1e}", "none"]  # fmt: skip


def report(results: dict[str, Any]) -> str:
    """The tables and how they were taken, in Markdown."""
    measurements = results["methods"] + results["sweeps"]
    how = [f"- {name}: {text}" for name, text in results["how"].items()]
    if measurements:
        busy = max(value for found in measurements for value in found["busy_cores"])
        load = max(value for found in measurements for value in found["load"])
        how.append(
            f"- before the rounds others used at most {busy:.2f} cores; load average (the rounds' own) <= {load:.2f}"
        )
    failed = [
        f"- {found['model']} {found['method']}, {side} failed: {text}"
        for found in measurements
        for side, text in found["errors"].items()
    ]
    tables = (
        table(METHOD_HEAD, [method_row(found) for found in results["methods"]]),
        table(SWEEP_HEAD, [sweep_row(found, results["methods"]) for found in results["sweeps"]]),
        table(CHECK_HEAD, [check_row(found) for found in results["checks"]]),
    )
    return "\n".join([*filter(None, tables), "\n".join([*how, *failed]) + "\n"])
