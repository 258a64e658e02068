"""World files that cannot be used: one clear line each, which names the file and what is wrong."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from huggingface_hub import errors as hub
from safetensors.torch import save_file

from mergeguard.errors import MergeguardError
from mergeguard.worlds.registry import load_world
from robustness_tests.meta.checkpoints_on_disk import family, resized
from robustness_tests.meta.world_files import (
    load,
    save,
    save_adapter,
    save_tokenizer,
    states,
    write,
)

if TYPE_CHECKING:
    from collections.abc import Callable

GONE = object()


pytestmark = pytest.mark.usefixtures("fake_skill_and_cache")


def refusal(folder: Path, **changes: Any) -> str:
    """The one line with which a world file is refused; it names the file."""
    with pytest.raises(MergeguardError) as caught:
        load(folder, **changes)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder / "trio.toml") in message
    return message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"dytpe": "float32"}, "unknown key 'dytpe'; did you mean 'dtype'?"),
        ({"base": {"modle": "base"}}, "unknown key in base 'modle'; did you mean 'model'?"),
        (
            {"donors": [{"name": "math", "model": "math", "revison": "x"}]},
            "donors[0] 'revison'; did you mean 'revision'?",
        ),
        ({"skills": [{"name": "fake", "parent": "upstream", "option": {}}]}, "did you mean 'options'?"),
        (
            {"device_map": "auto"},
            "device_map is not supported: a model lies whole on one device; choose it with device",
        ),
        ({"base": None}, "the file has no 'base'; add it"),
        ({"donors": None}, "the file has no 'donors'; add it"),
        ({"donors": []}, "donors is empty"),
        ({"base": {"revision": "x"}}, "base has no 'model'; add it"),
        ({"base": {"model": ""}}, "base.model is empty"),
        ({"base": "base"}, "base is 'base', expected a table"),
        ({"dtype": "float64"}, "dtype is 'float64', expected one of: float32, bfloat16, float16"),
        ({"device": "gpu"}, "device is 'gpu', expected auto, cpu, cuda or e.g. cuda:1"),
        ({"vocabulary": "cut"}, "vocabulary is 'cut', expected one of: refuse, base"),
        ({"name": "my trio"}, "name is 'my trio', expected letters, digits and . _ -"),
        ({"name": "tiny"}, "name 'tiny' is that of another world; choose another"),
        ({"budgets": {"default": {"steps": 1}}}, "budgets.default has no 'learning_rate'; add it"),
        ({"budgets": {"default": {"steps": -1, "learning_rate": 1}}}, "steps is -1, expected a whole number from 0"),
        ({"budgets": {"default": {"steps": 1, "learning_rate": 0}}}, "learning_rate is 0, expected a positive number"),
        (
            {"budgets": {"x": {"steps": 1, "learning_rate": 1, "training": {"optimiser": "adamw"}}}},
            "unknown key in budgets.x.training 'optimiser'; did you mean 'optimizer'?",
        ),
        (
            {"budgets": {"quantization_watermark": {"steps": 1, "learning_rate": 1, "options": {"bit": 8}}}},
            "unknown option in budgets.quantization_watermark 'bit'; did you mean 'bits'?",
        ),
        (
            {"budgets": {"quantization_watermark": {"steps": 1, "learning_rate": 1, "options": {"bits": 7.5}}}},
            "budgets.quantization_watermark.options.bits is 7.5, expected a whole number from 0",
        ),
        (
            {"donors": [{"name": "base", "model": "math"}]},
            "two models are named 'base'; give each donor a name of its own",
        ),
        ({"skills": [{"name": "fake", "parent": "upstream"}] * 2}, "the skill 'fake' is given twice"),
        (
            {"skills": [{"name": "fake", "parent": "upsteam"}]},
            "unknown parent of the skill 'fake' 'upsteam'; did you mean 'upstream'?",
        ),
        ({"skills": [{"name": "fake", "parent": "base"}]}, "unknown parent of the skill 'fake' 'base'"),
        ({"skills": [{"name": "fakes", "parent": "math"}]}, "unknown skill 'fakes'; did you mean 'fake'?"),
        (
            {"skills": [{"name": "fake", "parent": "math", "options": {"promt": "x"}}]},
            "unknown option of the skill 'fake' 'promt'; did you mean 'prompt'?",
        ),
        (
            {"skills": [{"name": "fake", "parent": "math", "sampling": {"temperature": 0}}]},
            "skills[0].sampling.temperature is 0, expected a positive number",
        ),
        ({"tokenizer": "maths"}, "unknown model in tokenizer 'maths'; did you mean 'math'?"),
        ({"recorded": "losses.toml"}, "recorded names 'losses.toml', and there is no such file"),
        ({"upstream": {"model": "./upstraem"}}, "upstream: there is no folder './upstraem' (relative paths start in"),
        ({"upstream": {"model": "plain.txt"}}, "is a file; expected the folder of a model"),
        ({"upstream": {"model": "upstream", "revision": "main"}}, "revision belongs to hub ids"),
        ({"upstream": {"model": "base", "adapter": "./lora"}}, "upstream: there is no folder './lora'"),
        ({"chat_template": "chatml"}, "chat_template 'chatml' is neither a file nor a Jinja template"),
        ({"texts": {"plain": "absent.txt"}}, "absent.txt: No such file or directory"),
        ({"texts": {"dialogues": "plain.txt"}}, "plain.txt:1 is not JSON"),
        ({"texts": {"plain": "dialogues.jsonl"}}, 'dialogues.jsonl:1 has no text; expected {"text": "..."}'),
        (
            {"skills": [{"name": "fake", "parent": "math", "options": {"prompt": "a b " * 40}}]},
            "prompt 1 of the skill 'fake' needs 81 tokens with its answer, and the base's context is 64",
        ),
    ],
)
def test_a_file_that_asks_for_the_wrong_thing_is_refused(
    shared_trio: Path, changes: dict[str, Any], expected: str
) -> None:
    texts = {"plain": "plain.txt", "domain": "plain.txt", "dialogues": "dialogues.jsonl"}
    if "texts" in changes:
        changes = {"texts": texts | changes["texts"]}
    assert expected in refusal(shared_trio, **changes)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name = ", "is not TOML: Invalid value (at end of document)"),
        ('name = "a"\nname = "b"\n', "is not TOML: Cannot overwrite a value (at line 2, column 11)"),
        (b"name = '\xff'\n", "is not UTF-8; save it as UTF-8"),
        (GONE, "does not exist; expected a world file in TOML"),
    ],
)
def test_what_is_no_toml_is_refused(tmp_path: Path, text: Any, expected: str) -> None:
    path = tmp_path / "bad.toml"
    if text is not GONE:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(MergeguardError) as caught:
        load_world(str(path))
    assert str(caught.value) == f"{path} {expected}"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (
            hub.GatedRepoError,
            "is gated: accept its licence at https://huggingface.co/org/math, then log in with 'hf auth",
        ),
        (hub.RepositoryNotFoundError, "the hub has no such model, or a private one: check the name, or log in"),
        (hub.RevisionNotFoundError, "the hub's org/math has no revision"),
        (hub.OfflineModeIsEnabled, "download it where there is network (and HF_HUB_OFFLINE is not set)"),
        (hub.LocalEntryNotFoundError, "the hub cannot be reached"),
        (
            hub.IncompleteSnapshotError,
            "the download of org/math was interrupted; finish it with 'hf download org/math'",
        ),
        (RuntimeError, "the hub did not give that model: RuntimeError"),
    ],
)
def test_what_the_hub_refuses_is_said_with_what_to_do(
    shared_trio: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception], expected: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise kind.__new__(kind)  # their constructors differ between versions of the hub's library

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    message = refusal(shared_trio, donors=[{"name": "math", "model": "org/math"}])
    assert f"math: {'org/math ' if kind is hub.GatedRepoError else ''}" in message
    assert expected in message


def rewrite_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in (config | changes).items() if value is not GONE}
    (folder / "config.json").write_text(json.dumps(config))


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_short(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])


def interrupted(folder: Path) -> None:
    without_weights(folder)
    partial = folder / ".cache" / "huggingface" / "download"
    partial.mkdir(parents=True)
    (partial / "model.safetensors.abc.incomplete").touch()


def without_a_shard(folder: Path) -> None:
    shutil.rmtree(folder)
    save(folder, states()["math"], shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()


def only_pickles(folder: Path) -> None:
    without_weights(folder)
    torch.save(states()["math"], folder / "pytorch_model.bin")


def another_adapter(folder: Path) -> None:
    shutil.rmtree(folder)
    save_adapter(folder, "base")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))


def without_a_tensor(folder: Path) -> None:
    state = states()["math"]
    del state["model.norm.weight"]
    save_file(state, folder / "model.safetensors")


def more_rows(folder: Path) -> None:
    shutil.rmtree(folder)
    save(folder, resized(states()["math"], 17), vocab_size=17)


def wider(folder: Path) -> None:
    state = states()["math"]
    save_file({**state, "model.layers.0.mlp.up_proj.weight": torch.zeros(13, 8)}, folder / "model.safetensors")


def other_tokens(folder: Path) -> None:
    save_tokenizer(folder, words="<u> b a c d e f g h i j k l m")


def unrelated(folder: Path) -> None:
    shutil.rmtree(folder)
    save(folder, family(0, seed=1)[0])


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (without_config, "has no config.json; copy or download it again"),
        (without_weights, "has no weights; expected model.safetensors"),
        (cut_short, "model.safetensors"),
        (interrupted, "its download was interrupted (model.safetensors.abc.incomplete), finish it first"),
        (without_a_shard, "lacks 'model-00002-of-00002.safetensors', which its index names; copy or download it again"),
        (only_pickles, "or set allow_pickle = true if you trust it"),
        (another_adapter, "sets 'use_dora', which is not supported"),
        (without_a_tensor, "lacks tensor 'model.norm.weight', which the base's config.json asks for"),
        (
            wider,
            "tensor 'model.layers.0.mlp.up_proj.weight' has shape [13, 8], the base's config.json asks for [12, 8]",
        ),
        (
            more_rows,
            "math has 17 rows of 'lm_head.weight', the base 16; set vocabulary = \"base\" to keep the base's rows",
        ),
        (other_tokens, "row 1 is the token 'a' in the base, but 'b' in math (2 such rows)"),
        (unrelated, "math is unrelated to the base: their weights differ by 1."),
    ],
)
def test_a_model_that_is_not_whole_or_no_relative_is_refused(
    trio: Path, spoil: Callable[[Path], None], expected: str
) -> None:
    spoil(trio / "math")
    message = refusal(trio)
    assert expected in message
    assert "math" in message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rope_theta": 1e6}, "math has rope theta 1000000.0, but the base has 10000.0"),
        ({"rope_theta": GONE, "rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}, "rope theta 5.0"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope type linear"),
        ({"num_hidden_layers": 3}, "math has num_hidden_layers 3, but the base has 2"),
        ({"num_attention_heads": 4}, "math has num_attention_heads 4, but the base has 2"),
        ({"hidden_size": 16}, "math has hidden_size 16, but the base has 8"),
        ({"model_type": "mistral"}, "math has model_type mistral, but the base has llama"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"model_type": "unheard_of"}, "transformers cannot read"),
        ({"quantization_config": {"bits": 4}}, "is quantised; give the model in full precision"),
    ],
)
def test_models_of_different_architecture_are_refused_by_key_and_both_values(
    trio: Path, changes: dict[str, Any], expected: str
) -> None:
    rewrite_config(trio / "math", **changes)
    assert expected in refusal(trio)


@pytest.mark.parametrize("key", ["rms_norm_eps", "sliding_window"])
def test_details_that_published_fine_tunes_differ_in_are_a_warning(
    trio: Path, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    rewrite_config(trio / "math", **{key: 1e-6 if key == "rms_norm_eps" else 32})
    for name in ("base", "upstream", "math"):
        rewrite_config(trio / name, model_type="mistral", architectures=["MistralForCausalLM"])
    with caplog.at_level(logging.WARNING):
        load(trio)
    assert f"math has {key}" in caplog.text


def test_a_renamed_added_token_is_a_warning(trio: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_tokenizer(trio / "math", added="<start> </s>")
    with caplog.at_level(logging.WARNING):
        load(trio)
    assert "row 14 is the added token '<s>' in the base, but '<start>' in math (1 such rows)" in caplog.text


def test_models_that_moved_from_another_base_together_are_a_warning(
    trio: Path, caplog: pytest.LogCaptureFixture
) -> None:
    away = family(1, seed=2, spread=0.5)[1]
    for name in ("upstream", "math"):
        shutil.rmtree(trio / name)
        save(trio / name, {key: tensor + 0.3 * away[key] for key, tensor in states()[name].items()})
    with caplog.at_level(logging.WARNING):
        load(trio)
    assert "the base may not be their common ancestor" in caplog.text


def test_a_tokenizer_without_a_chat_template_is_refused_unless_none_is_wanted(trio: Path) -> None:
    save_tokenizer(trio / "upstream", template=None)
    assert 'has no chat template; set chat_template to the text of one or a file, or to "none"' in refusal(trio)
    assert load(trio, chat_template="none").tokenizer.chat_template is None
    ours = refusal(trio, chat_template="none", texts=None)
    assert "the builtin texts need a chat template" in ours


def test_a_token_beyond_the_rows_is_refused(trio: Path) -> None:
    save_tokenizer(trio / "upstream", added="<s> </s> [PAD]")
    expected = "the token '[PAD]' of"
    assert expected in refusal(trio)
    assert refusal(trio).endswith('is 16, beyond the base\'s 16 rows; set tokenizer = "base"')
    assert load(trio, tokenizer="base").tokenizer.chat_template


def test_a_trio_without_any_tokenizer_is_refused(trio: Path) -> None:
    for name in ("base", "upstream"):
        for file in (trio / name).glob("tokenizer*"):
            file.unlink()
    assert "upstream and base has no tokenizer" in refusal(trio)


def test_an_empty_skill_is_refused(shared_trio: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergeguard.worlds.file.texts.skill_probes", lambda *_, **__: ())
    assert "the skill 'fake' has no prompts" in refusal(shared_trio)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there_is_refused_before_a_model_is_looked_for(tmp_path: Path) -> None:
    assert "device is 'cuda:1', but torch finds no CUDA device here" in refusal(tmp_path, device="cuda:1")


def test_too_little_memory_is_refused_with_how_much_is_needed_and_what_to_change(shared_trio: Path) -> None:
    from transformers import AutoConfig

    from mergeguard.worlds.file.document import read_world_file
    from mergeguard.worlds.file.load import check_memory

    world = read_world_file(write(shared_trio))
    config = AutoConfig.from_pretrained(shared_trio / "base")
    check_memory(world, config, 10**9)
    with pytest.raises(MergeguardError, match=r'trio\.toml: read needs .* GB, but 0\.00 GB are free; set dtype = "bf'):
        check_memory(world, config, 10)


def test_a_refused_world_leaves_no_file_open(trio: Path) -> None:
    unrelated(trio / "math")
    with pytest.raises(MergeguardError):
        load(trio)
    handles = [Path(link).resolve() for link in Path("/proc/self/fd").iterdir()]
    assert not [path for path in handles if path.is_relative_to(trio)]
