"""The limit of a call of somebody's scheme: what takes longer is red by name, never a skip."""

from __future__ import annotations

import math
import signal
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from mergeguard.errors import SchemeError
from mergeguard.matrix.cache import Cache
from mergeguard.matrix.engine import Engine
from mergeguard.matrix.schemes import guard, limit_of_calls, seconds_per_call
from robustness_tests.meta.mini_world import Toy, mini

if TYPE_CHECKING:
    from pathlib import Path

    from mergeguard.reading import Reading


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return Engine(mini(), 0, Cache(tmp_path))


class Slow(Toy):
    """Never ends while it reads, and catches what it can."""

    name = "slow"

    def read(self, *arguments: Any) -> Reading:
        while True:
            with suppress(Exception):
                sum(range(1000))


def test_a_call_that_does_not_end_is_a_red_error_by_name(engine: Engine) -> None:
    with seconds_per_call(0.2), pytest.raises(SchemeError, match=r"slow.read took longer than 0.2 s"):
        engine.embedded(Slow())


def test_an_alarm_of_somebody_elses_goes_on_afterwards() -> None:
    before = signal.signal(signal.SIGALRM, signal.SIG_IGN)
    signal.setitimer(signal.ITIMER_REAL, 100)
    try:
        with seconds_per_call(30):
            assert guard(Toy(), "read", lambda: signal.getitimer(signal.ITIMER_REAL)[0]) < 31
        assert 50 < signal.getitimer(signal.ITIMER_REAL)[0] <= 100
        assert signal.getsignal(signal.SIGALRM) is signal.SIG_IGN
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_where_there_is_no_alarm_the_time_is_taken_when_the_call_returns() -> None:
    found: list[BaseException] = []

    def in_a_thread() -> None:
        with seconds_per_call(0.01):
            try:
                guard(Toy(), "read", lambda: [math.sqrt(n) for n in range(10**6)])
            except SchemeError as error:
                found.append(error)

    thread = threading.Thread(target=in_a_thread)
    thread.start()
    thread.join()
    assert "toy.read took longer than 0.01 s" in str(found[0])


def test_other_processes_keep_to_the_limit() -> None:
    with seconds_per_call(7):
        assert limit_of_calls() == 7
    assert limit_of_calls() is None


def test_without_a_limit_calls_take_as_long_as_they_like(engine: Engine) -> None:
    with seconds_per_call(30):
        assert engine.embedded(Toy()).own.keys.count == 8
