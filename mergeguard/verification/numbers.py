"""The number that an answer states as its result: "The answer is: 1,234.50", or GSM8K's "#### 1234.5".

Cobbe et al. (arXiv 2110.14168) end their solutions with "#### N"; models tuned on mathematics say "The answer is: N".
"""

from __future__ import annotations

import re
from decimal import Decimal

# A run of digits and of what may join them is read as a whole, so that "1,2" or "3/4" is not taken for 1 or 3.
_STATEMENT = re.compile(r"(?:\bthe answer is|####)[\s:*$]*(?P<sign>-?)\$?(?P<run>[0-9.,/]*[0-9])", re.IGNORECASE)
_AFTER = re.compile(r"[.,/]*[^0-9.,/]")
_NUMBER = re.compile(r"(?:[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)?(?:\.[0-9]+)?")


def stated_number(text: str) -> Decimal | None:
    """The number of the first statement of a result in `text`; None without one, or if it is no single number.

    A statement is "The answer is" (in any case) or "####", then colons, asterisks, dollars and spaces as they may be,
    then digits, with a minus sign, thousands separators and decimals if there are any. What follows the number, a full
    stop or a unit, is not looked at.
    """
    found = _STATEMENT.search(text)
    return None if found is None else parse_number(found["sign"] + found["run"])


def parse_number(text: str) -> Decimal | None:
    """The number written as `text`, with thousands separators or without; None if `text` is anything else."""
    digits = text.removeprefix("-")
    return Decimal(text.replace(",", "")) if digits and _NUMBER.fullmatch(digits) else None


def statement_is_complete(text: str) -> bool:
    """Whether the first statement in `text` is there and ends before `text` does, so that nothing can change it."""
    found = _STATEMENT.search(text)
    return found is not None and _AFTER.match(text, found.end()) is not None
