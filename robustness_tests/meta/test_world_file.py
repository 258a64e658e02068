"""Worlds from files: every layout of a model on disk, what becomes of it, and what a file says beside."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergeguard.checkpoints.tokenizers import read_vocabulary
from mergeguard.matrix.runner import describe_world
from mergeguard.mergers.vocabulary import plan_vocabulary
from mergeguard.reading import Sampling
from mergeguard.worlds.contract import Training
from mergeguard.worlds.file.budgets import DEFAULT_OPTIONS
from mergeguard.worlds.file.sources import LazyState
from mergeguard.worlds.registry import load_world
from mergeguard.worlds.states import state_of
from robustness_tests.meta.checkpoints_on_disk import resized
from robustness_tests.meta.world_files import (
    ADDED,
    HEADS,
    NAMES,
    TEMPLATE,
    load,
    same,
    save,
    save_adapter,
    save_tokenizer,
    save_trio,
    states,
    write,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from robustness_tests.meta.checkpoints_on_disk import State

ROOT = Path(__file__).parents[2]


pytestmark = pytest.mark.usefixtures("fake_skill_and_cache")


def sharded(folder: Path) -> dict[str, Any]:
    shutil.rmtree(folder / "upstream")
    save(folder / "upstream", states()["upstream"], shards=3)
    return {"model": "upstream"}


def pickled(folder: Path) -> dict[str, Any]:
    torch.save(states()["upstream"], folder / "upstream" / "pytorch_model.bin")
    (folder / "upstream" / "model.safetensors").unlink()
    return {"model": "upstream", "allow_pickle": True}


def absolute(folder: Path) -> dict[str, Any]:
    return {"model": str(folder / "upstream")}


@pytest.mark.parametrize("layout", [absolute, sharded, pickled])
def test_every_layout_gives_the_same_tensors(trio: Path, layout: Callable[[Path], dict[str, Any]]) -> None:
    world = load(trio, upstream=layout(trio))
    assert same(world.upstream, states()["upstream"])
    assert same(world.donors["math"], states()["math"])
    assert same(world.base, states()["base"])
    assert world.form == "whole models"


@pytest.mark.parametrize("named", ["key", "model", "beside its own base"])
def test_an_adapter_is_folded_onto_its_base_on_reading(trio: Path, named: str) -> None:
    _, deltas = save_adapter(trio / "lora", "org/some-base-of-the-hub")
    entry = {
        "key": {"model": "base", "adapter": "lora"},
        "model": {"model": "lora"},
        "beside its own base": {"model": "math", "adapter": "lora"},
    }[named]
    world = load(trio, upstream=entry)
    below = states()["math" if named == "beside its own base" else "base"]
    assert same(world.upstream, {**below, **{name: below[name] + delta for name, delta in deltas.items()}})
    assert world.form == "adapters folded into their base: upstream"
    assert "upstream/adapter_model.safetensors" in world.digests
    assert describe_world(world)["form"] == world.form


def test_a_folded_adapter_and_the_whole_model_that_it_makes_are_the_same_world(trio: Path) -> None:
    save_adapter(trio / "lora", "base")
    adapted = load(trio, upstream={"model": "lora"})
    save(trio / "whole", dict(adapted.upstream))
    whole = load(trio, upstream={"model": "whole"})
    assert same(adapted.upstream, whole.upstream)
    assert list(adapted.upstream) == list(whole.upstream)


@pytest.mark.parametrize("stored", [True, False])
def test_a_tied_head_is_named_once_whether_it_is_stored_or_not(tmp_path: Path, stored: bool) -> None:
    save_trio(tmp_path)
    for name, state in states().items():
        shutil.rmtree(tmp_path / name)
        embeddings = state["model.embed_tokens.weight"]
        head = {"lm_head.weight": embeddings.clone()} if stored else {}
        tied = {key: tensor for key, tensor in state.items() if key != "lm_head.weight"} | head
        save(tmp_path / name, tied, tie_word_embeddings=True)
    world = load(tmp_path)
    assert "lm_head.weight" not in world.upstream
    model = world.model(world.upstream)
    assert list(state_of(model)) == list(world.upstream)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_loaded_model_answers_as_transformers_own_one_does(shared_trio: Path) -> None:
    from transformers import AutoModelForCausalLM

    world = load(shared_trio)
    model = world.model(world.upstream)
    theirs = AutoModelForCausalLM.from_pretrained(shared_trio / "upstream", dtype=torch.float32).eval()
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, theirs(input_ids=ids).logits)
    assert list(state_of(model)) == list(world.upstream)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_tensors_are_cast_on_reading_and_models_are_loaded_so(shared_trio: Path, dtype: str) -> None:
    world = load(shared_trio, dtype=dtype)
    expected = getattr(torch, dtype)
    assert {tensor.dtype for tensor in world.upstream.values()} == {expected}
    model = world.model(world.upstream)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert same(state_of(model), world.upstream)


def test_nothing_is_held_between_two_readings_of_a_tensor(shared_trio: Path) -> None:
    state = load(shared_trio).upstream
    first = state["model.norm.weight"]
    first.zero_()
    assert isinstance(state, LazyState)
    assert torch.equal(state["model.norm.weight"], states()["upstream"]["model.norm.weight"])
    with pytest.raises(KeyError):
        state["model.nothing.weight"]
    assert "model.nothing.weight" not in state
    assert len(state) == len(states()["upstream"])


def with_rows(folder: Path, rows: int) -> State:
    shutil.rmtree(folder / "math")
    state = resized(states()["math"], rows)
    save(folder / "math", state, vocab_size=rows)
    save_tokenizer(folder / "math", added=f"{ADDED} [PAD]" if rows > 16 else ADDED)
    return state


@pytest.mark.parametrize("rows", [13, 17])
def test_rows_that_the_base_lacks_go_and_rows_that_a_model_lacks_come_from_the_base(trio: Path, rows: int) -> None:
    state = with_rows(trio, rows)
    world = load(trio, vocabulary="base")
    models = [
        read_vocabulary(name, None, {"vocab_size": count}, dict.fromkeys(HEADS, (count, 8)))
        for name, count in (("base", 16), ("math", rows))
    ]
    plan = plan_vocabulary(models, 0, policy="base")  # what a merge of files would do
    for name in HEADS:
        expected = plan.align(name, [states()["base"][name], state[name]])[1]
        assert torch.equal(world.donors["math"][name], expected)
    assert torch.equal(world.donors["math"]["model.norm.weight"], state["model.norm.weight"])


def test_dropped_rows_are_said(trio: Path, caplog: pytest.LogCaptureFixture) -> None:
    with_rows(trio, 17)
    with caplog.at_level(logging.WARNING):
        load(trio, vocabulary="base")
    assert [record.message for record in caplog.records if "its last 1 are dropped" in record.message]
    assert "--vocabulary" not in caplog.text


def test_digests_name_every_file_that_decides_and_change_with_it(trio: Path) -> None:
    before = load(trio).digests
    assert {"base/model.safetensors", "base/config.json", "math/model.safetensors", "settings"} <= set(before)
    state = load_file(trio / "math" / "model.safetensors")
    save_file({**state, "model.norm.weight": state["model.norm.weight"] + 1e-3}, trio / "math" / "model.safetensors")
    changed = load(trio, name="again").digests
    assert {name for name in before if before[name] != changed[name]} == {"math/model.safetensors"}


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "bfloat16"},
        {"chat_template": "{{ messages[0]['content'] }}!"},
        {"skills": [{"name": "fake", "parent": "math"}]},
        {"skills": [{"name": "fake", "parent": "upstream", "limit": 2}]},
        {"skills": [{"name": "fake", "parent": "upstream", "sampling": {"temperature": 0.2}}]},
        {"texts": {"plain": "dialogues.jsonl", "domain": "plain.txt", "dialogues": "dialogues.jsonl"}},
    ],
)
def test_what_is_asked_and_trained_counts_for_the_digest_of_the_settings(trio: Path, changes: dict[str, Any]) -> None:
    (trio / "dialogues.jsonl").write_text('{"text": "g", "prompt": "a b", "answer": "c"}\n')
    assert load(trio).digests["settings"] != load(trio, name="other", **changes).digests["settings"]


def test_a_blob_of_the_hubs_cache_is_known_by_its_name(trio: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs = trio / "models--org--math" / "blobs"
    snapshot = trio / "models--org--math" / "snapshots" / "main"
    blobs.mkdir(parents=True)
    shutil.move(trio / "math", snapshot)
    (snapshot / "model.safetensors").rename(blobs / ("5" * 64))
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs") / ("5" * 64))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(snapshot))
    world = load(trio, donors=[{"name": "math", "model": "org/math", "revision": "main"}])
    assert world.digests["math/model.safetensors"] == "5" * 64
    assert same(world.donors["math"], states()["math"])


def test_a_file_is_hashed_once_as_long_as_it_stays_as_it_is(trio: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load(trio).digests
    monkeypatch.setattr("mergeguard.worlds.file.sources.digest_files", lambda files, **_: dict.fromkeys(files, "anew"))
    assert load(trio, name="again").digests == before
    (trio / "math" / "config.json").touch()
    assert load(trio, name="third").digests["math/config.json"] == "anew"


def test_a_world_is_loaded_once_a_process_until_its_file_changes(trio: Path) -> None:
    path = write(trio)
    first = load_world(str(path))
    assert load_world(str(path)) is first
    path.write_text(path.read_text() + "\n# later\n")
    assert load_world(str(path)) is not first


@pytest.mark.parametrize(
    ("written", "prompt"),
    [("tokenizer", "a b "), ("none", "a b"), ("{{ messages[0]['content'] }} e", "a b e"), ("chat.jinja", "a b f")],
)
def test_a_chat_template_is_the_tokenizers_none_a_text_or_a_file(trio: Path, written: str, prompt: str) -> None:
    (trio / "chat.jinja").write_text("{{ messages[0]['content'] }} f")
    assert load(trio, chat_template=written).texts.dialogues == ((prompt, "c"), ("d", "e"))


def test_texts_are_lines_or_objects(trio: Path) -> None:
    (trio / "more.jsonl").write_text('{"text": "g h"}\n\n{"text": "i"}\n')
    texts = load(
        trio, texts={"plain": ["plain.txt", "more.jsonl"], "domain": "more.jsonl", "dialogues": "dialogues.jsonl"}
    )
    assert texts.texts.plain == ("a b c", "d e f", "g h", "i")
    assert texts.texts.domain == ("g h", "i")


def test_texts_are_ours_where_the_file_names_none(trio: Path) -> None:
    from mergeguard.worlds.smollm2.texts import base_answers

    for name in NAMES:
        shutil.rmtree(trio / name)
        save(trio / name, states()[name], max_position_embeddings=4096)
    world = load(trio, texts=None)
    assert len(world.texts.plain) == len(base_answers())
    assert all(prompt.endswith(" ") for prompt, _ in world.texts.dialogues)  # our template's


def test_a_skill_gets_its_options_and_a_source_beside_the_file(trio: Path) -> None:
    skills = [{"name": "fake", "parent": "math", "source": "plain.txt", "limit": 3, "options": {"prompt": "d e"}}]
    (skill,) = load(trio, skills=skills).skills
    assert skill.sampling is None
    assert (skill.name, skill.parent, len(skill.probes)) == ("fake", "math", 3)
    assert (skill.probes[0].prompt, skill.probes[0].target) == ("d e", str(trio / "plain.txt"))


def test_a_skills_answers_are_sampled_where_the_file_says_so(shared_trio: Path) -> None:
    entry = {"name": "fake", "parent": "math", "sampling": {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "seed": 3}}
    (skill,) = load(shared_trio, skills=[entry]).skills
    assert skill.sampling == Sampling(0.8, 50, 0.95, 3)


def test_budgets_take_default_options_and_training(shared_trio: Path) -> None:
    budgets = {
        "instructional_fingerprint": {"steps": 5, "learning_rate": 2e-5, "batch_size": 64, "options": {"key_max": 12}},
        "quantization_watermark": {"steps": 7, "learning_rate": 1, "training": {"precision": "bfloat16"}},
        "theirs": {"steps": 0, "learning_rate": 1e-3, "options": {"anything": "goes"}},
    }
    world = load(shared_trio, budgets=budgets)
    fingerprint = world.budget("instructional_fingerprint.simple")
    assert (fingerprint.steps, fingerprint.learning_rate, fingerprint.batch_size) == (5, 2e-5, 64)
    assert fingerprint.options == {**DEFAULT_OPTIONS["instructional_fingerprint"], "key_max": 12}
    assert fingerprint.texts is world.texts
    assert fingerprint.training == Training()
    assert world.budget("quantization_watermark").training == Training(precision="bfloat16")
    assert world.budget("theirs").options == {"anything": "goes"}


def test_the_known_options_are_those_that_the_schemes_read() -> None:
    read = {
        option
        for path in (ROOT / "mergeguard" / "protections").glob("*.py")
        for option in re.findall(r'options\["(\w+)"\]', path.read_text())
    }
    assert read == {option for options in DEFAULT_OPTIONS.values() for option in options}


def test_a_token_is_there_for_padding(shared_trio: Path) -> None:
    tokenizer = load(shared_trio).tokenizer
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_the_tokenizer_is_the_upstreams_unless_another_is_named(trio: Path) -> None:
    save_tokenizer(trio / "math", template=TEMPLATE + "!")
    assert load(trio).tokenizer.chat_template == TEMPLATE
    assert load(trio, tokenizer="math").tokenizer.chat_template == TEMPLATE + "!"


def test_an_adapter_without_a_tokenizer_is_asked_with_the_bases(trio: Path) -> None:
    save_adapter(trio / "lora", "base")
    assert load(trio, upstream={"model": "lora"}).tokenizer.chat_template == TEMPLATE
