"""The four published recipes of arXiv:2404.05188, from the command line to the last bit, on small Llamas.

As there, the models are float16 with a tokenizer, the arithmetic is float32, and WizardMath has one row more than the
others: its padding token.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mergeguard.checkpoints.manifest import check_manifest
from mergeguard.mergers import merge_models, parse_merger
from mergeguard.mergers.vocabulary import POLICIES
from robustness_tests.meta.checkpoints_on_disk import State, family, resized, save_model, write_tokenizer
from robustness_tests.meta.merge_command import Door, door

RECIPES = Path(__file__).parent / "recipes"
BASE, CHAT, MATH = "Llama-2-7b-hf", "Llama-2-7b-chat-hf", "WizardMath-7B-V1.0"
EXPECTED = {
    "dare_task": ("dare_linear(density=0.4)", [0.1, 0.9]),
    "dare_ties": ("dare_ties(density=0.4,normalize=true)", [0.1, 0.9]),
    "task": ("task_arithmetic", [0.7, 0.7]),
    "ties": ("ties(density=0.4,normalize=true)", [0.6, 0.4]),
}
TWICE = ("dare_task", "dare_ties")  # their files say `models:` on two lines
ROWS = 16  # for Llama's 32000
WORDS = "<u> a b c d e f g h i j k l m <s> </s>"


@pytest.fixture
def merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Door:
    return door(tmp_path, monkeypatch, capsys)


@pytest.fixture
def states() -> dict[str, State]:
    """Of the base and the two models as they are stored, by name."""
    base, chat, math = family(2, dtype=torch.float16)
    return {BASE: base, CHAT: chat, MATH: resized(math, ROWS + 1)}


@pytest.fixture(params=EXPECTED)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def arguments(tmp_path: Path, states: dict[str, State], name: str) -> tuple[str, ...]:
    """The recipe for the models in `tmp_path`, and the option that it needs."""
    for model, state in states.items():
        rows = len(state["lm_head.weight"])
        save_model(tmp_path / model, state, shards=2, vocab_size=rows, torch_dtype="float16")
        write_tokenizer(tmp_path / model, WORDS, "" if rows == ROWS else "[PAD]")
    published = (RECIPES / f"{name}.yml").read_text()
    assert published.count("/path/") == len(states)
    (tmp_path / "recipe.yml").write_text(published.replace("/path/", f"{tmp_path}/"))
    return ("recipe.yml", *(["--allow-duplicate-keys"] if name in TWICE else []))


def test_a_published_recipe_gives_the_merge_in_memory_bit_for_bit(
    merge: Door, tmp_path: Path, states: dict[str, State], arguments: tuple[str, ...], name: str
) -> None:
    said = merge(*arguments, "out", "--vocabulary", "base", "--seed", "5", "--threads", "2")
    assert said.code == 0, said.err

    converted = {model: {key: tensor.float() for key, tensor in state.items()} for model, state in states.items()}
    for key in ("lm_head.weight", "model.embed_tokens.weight"):
        converted[MATH][key] = converted[MATH][key][:ROWS]
    spec, weights = EXPECTED[name]
    expected = merge_models(parse_merger(spec), converted[BASE], [converted[CHAT], converted[MATH]], weights, seed=5)
    found = load_file(tmp_path / "out/model.safetensors")
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == torch.float32
        assert torch.equal(found[key].view(torch.int32), tensor.view(torch.int32)), key
        assert not torch.equal(tensor, converted[BASE][key]), key

    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["vocab_size"] == ROWS
    assert {config.get("dtype"), config.get("torch_dtype")} <= {"float32", None}
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (tmp_path / BASE / "tokenizer.json").read_bytes()
    assert merge("--check", "out") == (0, "out: every file is as it was written\n", "")
    assert check_manifest(tmp_path / "out", inputs=True) == []


def test_a_published_recipe_with_its_extra_row_is_refused_and_told_the_choices(
    merge: Door, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    error = merge(*arguments, "out").only_error
    assert MATH in error
    assert "--vocabulary" in error
    assert all(policy in error for policy in POLICIES if policy != "refuse"), error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", TWICE)
def test_a_published_recipe_with_a_key_on_two_lines_is_refused_and_told_the_option(
    merge: Door, arguments: tuple[str, ...]
) -> None:
    error = merge(arguments[0], "out", "--vocabulary", "base").only_error
    assert error.startswith("recipe.yml:2: 'models' is given twice")
    assert "--allow-duplicate-keys" in error
