"""`transformers serve` in a process of its own, for as long as a block: a real OpenAI-compatible server."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

# Port 0 lets the system choose; uvicorn then says which.
PROGRAM = "from transformers.cli.transformers import main; main()"
OPTIONS = ("serve", "--host", "127.0.0.1", "--port", "0", "--device", "cpu", "--log-level", "info")
READY = re.compile(r"Uvicorn running on (http://127\.0\.0\.1:\d+)")


@contextmanager
def transformers_serve() -> Iterator[str]:
    """The URL of a server that loads any folder that a request names as its model; it ends with the block."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *OPTIONS],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        said: list[str] = []
        # What it says later is read too: it would wait for a reader once the pipe is full.
        rest = threading.Thread(target=lambda: said.extend(process.stderr or ()), daemon=True)
        try:
            for line in process.stderr:
                said.append(line)
                if found := READY.search(line):
                    break
            else:
                raise AssertionError(f"the server ended: {''.join(said)[-2000:]}")
            rest.start()
            yield f"{found[1]}/v1"
        finally:
            process.terminate()
            process.wait()
            if rest.ident is not None:
                rest.join()
