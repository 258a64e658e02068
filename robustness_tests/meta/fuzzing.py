"""What fuzzed merges share: one judgement of what a merge did, small models, and recipes to damage."""

from __future__ import annotations

import copy
import faulthandler
import json
import math
import resource
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypothesis import HealthCheck, currently_in_test_context, event, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from mergeguard.checkpoints.manifest import check_manifest
from mergeguard.errors import MergeguardError
from mergeguard.mergers.merge import Options, merge_checkpoints
from robustness_tests.meta.checkpoints_on_disk import family, save_model

if TYPE_CHECKING:
    from collections.abc import Iterator

HANGS = 120  # seconds; an example takes some hundredths
MEMORY = 256 << 20  # what an example may add to the peak of the process; the models have 9 kB

few = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def save_models(folder: Path) -> Path:
    """A folder with a base "b" and two models, "x" of one file and "y" of two."""
    for name, state, shards in zip("bxy", family(2), (1, 1, 2), strict=True):
        save_model(folder / name, state, shards=shards)
    return folder


@contextmanager
def watched() -> Iterator[None]:
    """End the process if the block does not end, and fail if it takes much memory."""
    faulthandler.dump_traceback_later(HANGS, exit=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < MEMORY


def merge_or_refuse(text: str | bytes, options: Options | None = None) -> str | None:
    """Merge by a recipe of this text; its error, None if it has none. All else fails here."""
    with tempfile.TemporaryDirectory() as name, watched():
        folder = Path(name)
        recipe, out = folder / "recipe.yml", folder / "out"
        recipe.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        try:
            merged = merge_checkpoints(recipe, out, options or Options(threads=2))
        except MergeguardError as error:
            refusal = str(error)
        else:
            refusal = None
        if refusal is not None:
            assert refusal
            assert refusal.isprintable(), f"one line, got {refusal!r}"
            assert [path.name for path in folder.iterdir()] == ["recipe.yml"], "a refused merge leaves nothing"
            return refusal
        if currently_in_test_context():
            event("merged")  # for --hypothesis-show-statistics
        assert all(warning.isprintable() for warning in merged.warnings), merged.warnings
        assert sorted(path.name for path in folder.iterdir()) == ["out", "recipe.yml"]
        assert check_manifest(out) == []
        tensors = {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}
        assert len(tensors) == merged.tensors
        assert all(tensor.isfinite().all() for tensor in tensors.values())
    return None


TWO = [{"model": name, "parameters": {"weight": 0.5}} for name in "xy"]
RECIPES: list[dict[str, Any]] = [
    {"merge_method": "linear", "models": TWO, "parameters": {"normalize": True}, "dtype": "float32"},
    {
        "merge_method": "ties",
        "base_model": "b",
        "models": [{"model": name, "parameters": {"weight": 0.5, "density": [0.3, 0.6]}} for name in "xy"],
        "parameters": {"lambda": 0.9, "normalize": [{"filter": "mlp", "value": False}, {"value": True}]},
    },
    {
        "merge_method": "slerp",
        "base_model": "x",
        "models": [{"model": "x"}, {"model": "y"}],
        "parameters": {"t": [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"value": 0.5}]},
        "out_dtype": "bfloat16",
    },
    {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "x", "layer_range": [0, 2]}]},
            {"sources": [{"model": "y", "layer_range": [1, 2]}]},
        ],
    },
    {"merge_method": "dare_ties", "base_model": "b", "models": TWO, "parameters": {"density": 0.5}},
    {"merge_method": "della", "base_model": "b", "models": TWO, "parameters": {"density": 0.5, "epsilon": 0.1}},
    {"merge_method": "breadcrumbs", "base_model": "b", "models": TWO, "parameters": {"density": 0.5, "gamma": 0.01}},
    {"merge_method": "model_stock", "base_model": "b", "models": [{"model": "x"}, {"model": "y"}]},
    {"merge_method": "nuslerp", "models": TWO},
]

WORDS = ["", "x", "b", "y", "nowhere", "../x", "x+y", "x@1", "base", "union", "ties", "float16", "mlp", "nan", "1e400",
         "\u2028", "\x07"]  # fmt: skip
NUMBERS = [0, 1, 2, 3, -1, 0.5, -0.5, 1e-320, 1e-9, 1e30, 1e308, -1e308, 10**30, 2**63, 10**400, math.nan, -math.inf]
junk = st.one_of(
    st.sampled_from([None, True, False]),
    st.sampled_from(NUMBERS),
    st.sampled_from(WORDS),
    st.sampled_from([[], {}, [[]], [None], [0.1, 0.9], [0, 2], [2, 0], {"filter": "mlp", "value": 1}, [{"value": 0}]]),
).map(copy.deepcopy)


def merge_with(models: Path, damaged: Path, method: str = "ties") -> str | None:
    """Merge the damaged model with whole ones."""
    base = {"base_model": str(models / "b")} if method == "ties" else {}
    each = {"weight": 0.5}
    recipe = {
        "merge_method": method,
        "models": [{"model": str(folder), "parameters": each} for folder in (damaged, models / "y")],
        **base,
    }
    return merge_or_refuse(json.dumps(recipe))


@contextmanager
def copied(model: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(shutil.copytree(model, Path(name) / "damaged"))


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_file(file: Path, header: dict[str, Any], data: bytes, *, twice: str | None = None) -> None:
    text = json.dumps(header)
    if twice is not None:
        text = f'{text[:-1]}, "{twice}": {json.dumps(header[twice])}}}'
    file.write_bytes(len(text.encode()).to_bytes(8, "little") + text.encode() + data)
