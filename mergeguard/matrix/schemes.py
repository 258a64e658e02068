"""What the engine demands of schemes, which may be anybody's: no crash, the right types, no model changed unasked.

And that a call ends in time, if a limit is set.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch

from mergeguard.errors import ContractError, InvalidReading, MergeguardError, SchemeError
from mergeguard.reading import Reading
from mergeguard.worlds.contract import state_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import PreTrainedModel

    from mergeguard.protections.contract import Evidence, Protection
    from mergeguard.worlds.states import State

T = TypeVar("T")
_LIMIT: ContextVar[float | None] = ContextVar("seconds_per_call", default=None)


class _OutOfTime(BaseException):
    """Not an Exception, so that a scheme that catches everything does not catch it."""


@contextmanager
def seconds_per_call(limit: float | None) -> Iterator[None]:
    """Within it no call of a scheme may take longer than `limit` seconds; None: as long as it likes.

    A call is stopped by an alarm where the system has them and this is the main thread. The alarm waits for the
    current torch operation to end, as Python only looks at signals between operations. Elsewhere, and for whatever
    swallows the alarm, the time is taken when the call returns, so that a call that never returns is not stopped.
    """
    token = _LIMIT.set(limit)
    try:
        yield
    finally:
        _LIMIT.reset(token)


def limit_of_calls() -> float | None:
    """What `seconds_per_call` says here, for who starts another process."""
    return _LIMIT.get()


def is_ours(item: object) -> bool:
    """Whether the code of a class or function is part of the version that cache keys hold; a third party's is not."""
    return str(getattr(item, "__module__", "")).startswith("mergeguard.")


def guard(protection: Protection, action: str, call: Callable[[], T]) -> T:
    """What `call` returns.

    Raises:
        SchemeError: it crashed, or took longer than `seconds_per_call` allows; a `MergeguardError` is about the input
            and passes.
        ContractError: it made a reading that cannot be.
    """
    limit, started = _LIMIT.get(), time.monotonic()
    try:
        with _alarm(limit):
            result = call()
    except MergeguardError:
        raise
    except _OutOfTime:
        raise _too_slow(protection, action, limit) from None
    except InvalidReading as error:
        raise ContractError(f"{protection}.{action} made a reading that cannot be: {error}") from error
    except (Exception, SystemExit) as error:  # a scheme that ends the process would end it with its own exit code
        raise SchemeError(f"{protection} crashed in {action}: {type(error).__name__}: {error}") from error
    if limit is not None and time.monotonic() - started > limit:
        raise _too_slow(protection, action, limit)
    return result


def _too_slow(protection: Protection, action: str, limit: float | None) -> SchemeError:
    return SchemeError(
        f"{protection}.{action} took longer than {limit or 0:g} s; make it faster or allow more seconds per call"
    )


@contextmanager
def _alarm(seconds: float | None) -> Iterator[None]:
    """Raise `_OutOfTime` here after so many seconds; an alarm of somebody else's goes on afterwards."""
    if seconds is None or not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: Any) -> NoReturn:
        raise _OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    started = time.monotonic()
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, left - (time.monotonic() - started)), interval)


def require(protection: Protection, action: str, value: object, expected: type) -> None:
    """Refuse what a scheme returned if it is of another type.

    Raises:
        ContractError: it is.
    """
    if not isinstance(value, expected):
        raise ContractError(f"{protection}.{action} returned {type(value).__name__}, expected {expected.__name__}")


def checked_reading(protection: Protection, value: object) -> Reading:
    """What `read` returned, as a plain `Reading` whose numbers are its hits'.

    Raises:
        ContractError: it is no reading, or one that says more than its hits do, or details are no finite numbers.
    """
    require(protection, "read", value, Reading)
    assert isinstance(value, Reading)
    try:
        if type(value) is not Reading:
            _refuse_lies(value)
        plain = Reading(tuple(value.hits), value.score, value.p_value, value.details)
        for name, number in plain.details.items():
            if type(name) is not str or isinstance(number, bool | str) or not math.isfinite(number):
                raise InvalidReading(f"the detail {name!r} is no finite number")
    except (ValueError, TypeError, AttributeError) as error:
        raise ContractError(f"{protection}.read returned a reading that cannot be: {error}") from error
    return plain


def _refuse_lies(reading: Reading) -> None:
    """Of a subclass: its count, trials and rate have to be those of its hits."""
    if reading.hits:
        if reading.count > reading.trials:
            raise InvalidReading(f"{reading.count} hits of {reading.trials} trials")
        if not 0 <= reading.rate <= 1:
            raise InvalidReading(f"a rate of {reading.rate}, expected one in [0, 1]")
        if (reading.count, reading.trials) != (sum(reading.hits), len(reading.hits)):
            raise InvalidReading(f"{reading.count} hits of {reading.trials} trials are not those in its hits")


def check_evidence(protection: Protection, action: str, evidence: Evidence) -> None:
    """Refuse evidence that no file would give back as it was. Says where, and never what: it is secret.

    Raises:
        ContractError: its data is not plain JSON data, or a tensor is none.
    """
    data: Any = evidence.data  # a scheme may have put anything there
    tensors: Any = evidence.tensors
    problem = not_plain(data, "data") if isinstance(data, Mapping) else "data is no dict"
    if problem is None and not isinstance(tensors, Mapping):
        problem = "tensors are no dict"
    elif problem is None:
        for name, tensor in tensors.items():
            if type(name) is not str or not isinstance(tensor, torch.Tensor):
                problem = "tensors hold something that is no tensor"
            elif not bool(torch.isfinite(tensor).all()):
                problem = "tensors hold NaN or infinite values"
    if problem is not None:
        raise ContractError(
            f"{protection}.{action} returned evidence whose {problem}: not JSON serializable and back as it was; "
            "use dicts with string keys, lists, strings, finite numbers, booleans and None"
        )


def not_plain(value: object, where: str) -> str | None:
    """What in `value` JSON would not give back as it was, and where; None if nothing is."""
    if value is None or type(value) in (str, int, bool):
        return None
    if type(value) is float:
        return None if math.isfinite(value) else f"{where} holds NaN or infinity"
    if type(value) is list:
        return next((found for item in value if (found := not_plain(item, where))), None)
    if isinstance(value, Mapping):
        for key, item in value.items():
            if type(key) is not str:
                return f"{where} has a key of type {type(key).__name__}"
            if found := not_plain(item, where):
                return found
        return None
    return f"{where} holds a {type(value).__name__}"


def changed_tensors(protection: Protection, model: PreTrainedModel, clean: State) -> dict[str, Tensor]:
    """What a scheme changed, on the CPU.

    Args:
        protection: the scheme, named in errors.
        model: the protected one.
        clean: what it was before, on the model's device and in its dtype; each tensor is asked for once.

    Raises:
        ContractError: the model cannot be merged with the others: a tensor is absent, extra, of another shape or dtype,
            or not finite.
    """
    state, changed = state_of(model), {}
    if set(state) != set(clean):
        name = min(set(state) ^ set(clean))
        raise ContractError(f"{protection}.embed changed the model's tensors: {name!r} is in one of the models only")
    for name, tensor in state.items():
        before = clean[name]
        if (tensor.shape, tensor.dtype) != (before.shape, before.dtype):
            raise ContractError(
                f"{protection}.embed made {name!r} {tensor.dtype} of shape {tuple(tensor.shape)}, "
                f"expected {before.dtype} of shape {tuple(before.shape)}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise ContractError(f"{protection}.embed left NaN or infinite values in {name!r}")
        if not torch.equal(tensor.to(before.device), before):
            changed[name] = tensor.cpu()
    return changed


def contents(model: PreTrainedModel) -> list[tuple[int, float]]:
    """Identity and sum of every parameter, cheap enough to compare before and after a reading."""
    return [(id(parameter), float(parameter.detach().sum(dtype=torch.float32))) for parameter in model.parameters()]
