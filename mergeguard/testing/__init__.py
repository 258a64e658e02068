"""The kit for whoever writes a protection: gate a scheme in your own repository, with or without pytest.

A test file of your own is all it takes:

.. code-block:: python

    from mergeguard.testing import parametrize_with_cases
    from my_package import MyScheme


    @parametrize_with_cases(MyScheme())
    def test_my_scheme_survives_merging(case):
        case.check()

`pytest` then runs one test for each check (`my_scheme-deterministic`), for each mistake that is planted to show that
the gate closes, and for each cell of the matrix (`my_scheme-linear-0.5`): MyScheme embedded in the owner's model, that
merged with a stranger's, and the evidence read off the merge. It ends with the matrix; `--mergeguard-output DIR` writes
the reports. `--merger`, `--coefficient`, `--axes`, `--world` and `--seed` narrow or move it, and `-k deterministic`
runs one check. Without pytest, `check_protection(MyScheme())` does the same and raises `GateFailed`, and `mergeguard
gate` does it from a shell:

.. code-block:: bash

    pytest test_my_scheme.py --merger linear --coefficient 0.7
    mergeguard gate my_package:MyScheme --merger linear --coefficients 0.7 --output reports

What a scheme is
----------------

A class derived from `mergeguard.protections.contract.Protection` (or `TextProtection`, if the
suspect's answers are enough) with a `name`, `embed`, `decoys` and `read`. It is made again from its `parameters` in
other processes, so it has to be defined at the top of a module.

What is checked
---------------

Every check is a plain function of a `Context`, in `CHECKS` by name:

- `evidence_round_trips`: evidence is plain data that reads the same after JSON and in another process.
- `deterministic`: one seed gives one evidence and one model, also in another process; another seed other evidence.
- `owns_what_it_changes`: random state, torch's settings, tokenizer, references and files stay as they were.
- `verification_is_pure`: a reading depends on evidence and weights, not on what was read before or by whom.
- `reads_only_weights`: not on a name, a config or an object either.
- `decoys_alike`: n decoys are n trials of fresh keys, drawn as the owner's are.
- `silent_on_other_owners`, `silent_on_fine_tuned`, `made_beforehand`: what others embed, ordinary training, and
  evidence made from a model after the fact prove nothing.
- `secret`: keys are in no `repr`, log, error, detail, report or file of the model, in no common encoding.
- `fails_loudly`: evidence that lacks a part or is another scheme's raises; so does an unknown parameter.
- `effective`, `harmless`, `specific`, `persistent`: the evidence is there before merging, costs no skill, is this
  owner's alone, and stays through files.

Known losses
------------

A theft that loses the evidence is red until it is on record, with its range of VSR and a reason:
`@parametrize_with_cases(MyScheme(), recorded="recorded.toml")`, where `mergeguard gate
my_package:MyScheme --record-losses recorded.toml` writes the file and you the reasons, or a mapping such as
`{"my_scheme-linear-0.3": (0.0, 0.3, "too little of the delta is left")}`. Such a test is a strict xfail that accepts
`EvidenceLost` alone: a crash, a survival and a VSR outside the range are red.

What cannot be used
-------------------

An abstract class, a wrong signature, a NaN or evidence that is not plain data is one line, exit code 2 from the command
line, and never a verdict.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergeguard.testing.cases import GateCase
    from mergeguard.testing.checks import (
        CHECKS,
        all_checks,
        run_check,
    )
    from mergeguard.testing.context import Context, context_of
    from mergeguard.testing.doors import check_protection, parametrize_with_cases
    from mergeguard.testing.gate import GateReport

__all__ = [
    "CHECKS",
    "Context",
    "GateCase",
    "GateReport",
    "all_checks",
    "check_protection",
    "context_of",
    "parametrize_with_cases",
    "run_check",
]

_PLACES = {
    "CHECKS": "checks",
    "Context": "context",
    "GateCase": "cases",
    "GateReport": "gate",
    "all_checks": "checks",
    "check_protection": "doors",
    "context_of": "context",
    "parametrize_with_cases": "doors",
    "run_check": "checks",
}

if not TYPE_CHECKING:  # a type checker that saw this would take any name for one of ours

    def __getattr__(name: str) -> Any:
        if name not in _PLACES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
