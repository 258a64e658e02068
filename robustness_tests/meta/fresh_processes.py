"""New processes for tests of checks: each forked from one that knows the miniature world and has met no scheme.

What `mergeguard.testing.elsewhere` starts takes seconds, as it imports everything anew. Here that is done once: a fork
server is as ignorant of what happened in this process, and has another hash seed.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mergeguard.protections.contract import Evidence, Protection
from mergeguard.reading import Reading
from mergeguard.testing.elsewhere import HASH_SEED, Report, report
from robustness_tests.meta.mini_world import MINI, mini

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from mergeguard.testing.elsewhere import Elsewhere


@contextmanager
def fresh_processes() -> Iterator[Elsewhere]:
    """What stands in for `in_another_process`: a process of its own for each call, in an empty folder."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["robustness_tests.meta.preloaded_mini_world"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONHASHSEED", HASH_SEED)
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # Python 3.11's server knows no other path
        with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:

            def elsewhere(
                protection: Protection, world: str, seed: int, evidence: Evidence, changed: Mapping[str, Tensor]
            ) -> Report:
                assert (world, dict(evidence.tensors)) == (MINI, {}), "only this world, and evidence without tensors"
                scheme = (type(protection), protection.parameters)
                # Plain pickles: torch would share memory with the other process instead.
                parts = pickle.dumps((*scheme, seed, dict(evidence.data), dict(changed)))
                clean, own, *others = pool.submit(_report, parts).result()
                return Report(Reading(clean), Reading(own), *others)

            yield elsewhere


def _report(parts: bytes) -> tuple[Any, ...]:
    scheme, parameters, seed, data, changed = pickle.loads(parts)  # noqa: S301 - from the parent
    protection = scheme.create(**parameters)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        found = report(protection, mini(), seed, Evidence(str(protection), data), changed, alone_in=Path(folder))
        os.chdir("/")
    return found.clean.hits, found.own.hits, found.evidence, found.weights, found.changes
