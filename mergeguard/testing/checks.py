"""Every check by name, in the order in which a gate runs them; the promises of architecture.md come last."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeguard.errors import ContractError, SchemeError, UndecidableError
from mergeguard.matrix import gates
from mergeguard.matrix.verdict import HARMLESS_MARGIN
from mergeguard.protections.registry import make_protection
from mergeguard.specs import Spec
from mergeguard.testing.context import Context
from mergeguard.testing.decoy_checks import check_decoys_alike
from mergeguard.testing.embedding_checks import check_deterministic, check_owns_what_it_changes
from mergeguard.testing.evidence_checks import check_evidence_round_trips, check_fails_loudly
from mergeguard.testing.ownership_checks import (
    check_made_beforehand,
    check_silent_on_fine_tuned,
    check_silent_on_other_owners,
)
from mergeguard.testing.reading_checks import check_reads_only_weights, check_verification_is_pure
from mergeguard.testing.secrecy import check_secret

if TYPE_CHECKING:
    from collections.abc import Callable

    from mergeguard.matrix.engine import Engine
    from mergeguard.matrix.outcome import Gate
    from mergeguard.protections.contract import Protection

    Check = Callable[[Context], Gate]


def check_effective(context: Context) -> Gate:
    """The evidence is there at alpha 1: nearly every trial succeeds and beats every clean model."""
    return gates.effective(context.engine, context.embedded)


def check_harmless(context: Context) -> Gate:
    """Every skill stays within the context's margin of the clean upstream's, or inside its interval."""
    margin = HARMLESS_MARGIN if context.margin is None else context.margin
    return gates.harmless(context.engine, context.embedded, margin)


def check_specific(context: Context) -> Gate:
    """Unseen keys are silent on the protected model, and all keys are on the clean models."""
    return gates.specific(context.embedded)


def check_persistent(context: Context) -> Gate:
    """The protected model reads the same after it was saved and loaded."""
    return gates.persistent(context.engine, context.embedded)


CHECKS: dict[str, Check] = {
    check.__name__.removeprefix("check_"): check
    for check in (
        check_evidence_round_trips,
        check_deterministic,
        check_owns_what_it_changes,
        check_verification_is_pure,
        check_reads_only_weights,
        check_decoys_alike,
        check_silent_on_other_owners,
        check_silent_on_fine_tuned,
        check_made_beforehand,
        check_secret,
        check_fails_loudly,
        check_effective,
        check_harmless,
        check_specific,
        check_persistent,
    )
}


def run_check(context: Context, name: str) -> Gate:
    """One check by its name. A scheme that crashes in it fails it.

    Raises:
        ContractError: the scheme returned what its contract does not allow: bad input, which has no verdict.
    """
    try:
        return CHECKS[name](context)
    except ContractError:
        raise
    except (SchemeError, UndecidableError) as error:
        return context.gate(name, str(error), "the scheme does not crash, and ends in time")


def all_checks(
    engine: Engine, protection: Spec | Protection, world: str, *, margin: float | None = None
) -> tuple[Gate, ...]:
    """Every check on a scheme, in order; `margin` is how far a skill may move.

    Raises:
        SchemeError: it cannot even be embedded.
    """
    scheme = make_protection(protection) if isinstance(protection, Spec) else protection
    context = Context(engine, scheme, world, margin)
    engine.embedded(scheme)
    return tuple(run_check(context, name) for name in CHECKS)
