"""Digests of files are right whatever passed by, cost no second read where it did, and stop when asked to."""

from __future__ import annotations

import hashlib
import os
import random
from concurrent.futures import CancelledError, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergeguard.checkpoints.digests import BackgroundDigests, StreamedDigest, digest_files
from mergeguard.errors import CheckpointError

QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
WAIT = 30
"""Seconds until a test that waits for another thread gives up."""


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@QUICK
@given(st.binary(max_size=400), st.randoms(use_true_random=False), st.integers(1, 9))
def test_a_streamed_digest_is_that_of_the_file_whatever_passed_by(
    tmp_path: Path, data: bytes, rng: random.Random, parts: int
) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    digest = StreamedDigest()
    cuts = sorted({0, len(data), *(rng.randint(0, len(data)) for _ in range(parts))})
    pieces = list(pairwise(cuts))
    rng.shuffle(pieces)
    for start, stop in pieces:
        stands = digest.position
        assert digest.feed(start, data[start:stop]) == (start == stands)
    with path.open("rb") as file:
        assert digest.finish(file.fileno()) == hashlib.sha256(data).hexdigest()


def test_bytes_that_passed_by_in_order_are_not_read_again() -> None:
    digest = StreamedDigest()
    assert digest.feed(0, b"ab")
    assert digest.feed(2, b"cd")
    assert not digest.feed(1, b"bcd")
    with Path(os.devnull).open("rb") as empty:
        assert digest.finish(empty.fileno()) == hashlib.sha256(b"abcd").hexdigest()


def test_threads_that_feed_and_follow_at_once_make_one_right_digest(tmp_path: Path) -> None:
    data = random.Random(0).randbytes(3_000_000)
    (tmp_path / "file").write_bytes(data)
    digest, step = StreamedDigest(), 10_000
    with (tmp_path / "file").open("rb") as file, ThreadPoolExecutor(4) as pool:
        feeds = [pool.submit(digest.feed, i, data[i : i + step]) for i in range(0, len(data), step)]
        follows = [pool.submit(digest.follow, file.fileno(), stop) for stop in (5_000, 1_500_000)]
        for future in (*feeds, *follows):
            future.result(WAIT)
        assert digest.finish(file.fileno()) == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("pace", [None, 1e9])
def test_digests_of_many_files_come_by_path_in_order(tmp_path: Path, pace: float | None) -> None:
    paths = [tmp_path / name for name in "cab"]
    for i, path in enumerate(paths):
        path.write_bytes(random.Random(i).randbytes(1_500_000 * i))
    expected = {path: sha256(path) for path in paths}
    with BackgroundDigests([*paths, paths[0]], threads=2, bytes_per_second=pace) as digests:
        assert list(digests.result().items()) == list(expected.items())
    assert digest_files(paths) == expected


def test_digests_that_are_left_early_stop_and_have_no_result(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(100))
    (tmp_path / "next").write_bytes(bytes(100))
    with BackgroundDigests([tmp_path / "file", tmp_path / "next"], bytes_per_second=1e-3) as digests:
        pass  # at that pace the first would take a day
    for future in digests._futures.values():
        with pytest.raises(CancelledError):
            future.result(WAIT)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^cannot read .*absent: No such file"):
        digest_files([tmp_path / "absent"])


@pytest.mark.parametrize("options", [{"threads": 0}, {"bytes_per_second": 0.0}])
def test_digests_by_nobody_or_without_pace_are_refused(options: Any) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        BackgroundDigests([], **options)
