"""`mergeguard merge` run in this process, for tests of what it prints and writes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import pytest

from mergeguard import cli

if TYPE_CHECKING:
    from pathlib import Path

NO_TOKENIZER = "warning: the merged model has no tokenizer: no model has one\n"


class Said(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def only_error(self) -> str:
        """The one line on stderr, of a refused merge that said nothing else."""
        (line,) = self.err.splitlines()
        assert line.startswith("error: ")
        assert (self.code, self.out) == (2, "")
        return line.removeprefix("error: ")


Door = Callable[..., Said]


def door(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Door:
    """`mergeguard merge` with the working directory `folder`."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(cli, "_leave_at_once", sys.exit)  # or it would be the end of the tests

    def call(*arguments: str | Path) -> Said:
        monkeypatch.setattr(cli, "_leave", sys.exit)
        monkeypatch.setattr(sys, "argv", ["mergeguard", "merge", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        return Said(int(caught.value.code or 0), captured.out, captured.err)

    return call
