"""Checkpoints on disk: what makes one, what is refused, and which stored tensors are no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mergeguard.checkpoints import resolve
from mergeguard.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mergeguard.checkpoints.resolve import resolve_path
from mergeguard.checkpoints.tied import TIED_BY_DEFAULT, TIED_PAIRS, hidden_tensors, ties_embeddings
from mergeguard.errors import CheckpointError

CONFIG = {"model_type": "llama", "time_step_limit": [0.0, float("inf")], "pad_token_id": -1}


def state(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.full((2, 2), float(place)) for place, name in enumerate(names)}


def write_index(folder: Path, weight_map: Any, name: str = "model.safetensors.index.json") -> None:
    (folder / name).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def write_sharded(folder: Path) -> dict[str, str]:
    """Two shards, `a` and `b` in the first, `c` in the second; returns the weight map."""
    folder.mkdir(exist_ok=True)
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    save_file(state("a", "b"), folder / one)
    save_file(state("c"), folder / two)
    weight_map = {"a": one, "b": one, "c": two}
    write_index(folder, weight_map)
    return weight_map


def refusal(path: Path, **options: bool) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path, **options)
    assert str(caught.value).isprintable()
    assert str(caught.value).startswith(str(path))
    return str(caught.value)


def test_a_folder_with_one_file_is_a_checkpoint(tmp_path: Path) -> None:
    save_file(state("b", "a"), tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "consolidated.safetensors").write_bytes(b"another format's copy of the weights")
    found = open_checkpoint(tmp_path)
    assert set(found.tensors) == {"a", "b"}
    assert found.config == CONFIG
    assert found.files == (tmp_path / "model.safetensors", tmp_path / "config.json")


def test_a_folder_with_shards_is_a_checkpoint(tmp_path: Path) -> None:
    weight_map = write_sharded(tmp_path)
    found = open_checkpoint(str(tmp_path))
    assert {name: tensor.path.name for name, tensor in found.tensors.items()} == weight_map
    assert found.config is None
    assert [file.name for file in found.files] == [*sorted(set(weight_map.values())), "model.safetensors.index.json"]
    assert [path.name for path in found.stamps] == sorted(set(weight_map.values()))


def test_a_file_alone_is_a_checkpoint_without_a_config(tmp_path: Path) -> None:
    save_file(state("a"), tmp_path / "any.safetensors")
    (tmp_path / "config.json").write_text("{}")
    found = open_checkpoint(tmp_path / "any.safetensors")
    assert (set(found.tensors), found.config, found.files) == ({"a"}, None, (tmp_path / "any.safetensors",))


def test_a_folder_without_weights_says_what_is_there_instead(tmp_path: Path) -> None:
    assert "has no weights; expected model.safetensors" in refusal(tmp_path)
    save_file(state("a"), tmp_path / "other.safetensors")
    assert "give the file itself" in refusal(tmp_path)
    save_file(state("a"), tmp_path / "model-00001-of-00002.safetensors")
    assert "no model.safetensors.index.json" in refusal(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "is an adapter" in refusal(tmp_path)
    assert "cannot be read" in refusal(tmp_path / "absent")


def test_one_file_beside_an_index_is_ambiguous(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    save_file(state("a"), tmp_path / "model.safetensors")
    assert "has both model.safetensors and model.safetensors.index.json" in refusal(tmp_path)


def test_a_shard_that_the_index_names_must_be_there(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert "lacks 'model-00002-of-00002.safetensors', which its index names" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("tensor", "file", "expected"),
    [
        (
            "d",
            "model-00001-of-00002.safetensors",
            "tensor 'd' is missing, but model.safetensors.index.json puts it here",
        ),
        ("b", None, "tensor 'b' is here, but model.safetensors.index.json does not name it"),
        ("b", "model-00002-of-00002.safetensors", "tensor 'b' is here, but model.safetensors.index.json puts it into"),
    ],
)
def test_index_and_shards_must_agree_on_every_tensor(
    tmp_path: Path, tensor: str, file: str | None, expected: str
) -> None:
    weight_map = write_sharded(tmp_path)
    weight_map.pop(tensor, None)
    write_index(tmp_path, weight_map | ({tensor: file} if file else {}))
    assert expected in refusal(tmp_path)


@pytest.mark.parametrize("name", ["/etc/passwd", "../secret.safetensors", "a/../../x", "..\\x", "", ".", "a\0b"])
def test_an_index_does_not_lead_out_of_its_folder(tmp_path: Path, name: str) -> None:
    save_file(state("a"), tmp_path / "secret.safetensors")
    (tmp_path / "model").mkdir()
    write_index(tmp_path / "model", {"a": name})
    assert "leads out of the folder" in refusal(tmp_path / "model")


@pytest.mark.parametrize("shards", [False, True])
def test_a_link_out_of_the_folder_is_refused_but_one_within_it_is_not(tmp_path: Path, shards: bool) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    name = "x.safetensors" if shards else "model.safetensors"
    if shards:
        write_index(folder, {"a": name})
    save_file(state("a"), tmp_path / "secret.safetensors")
    (folder / name).symlink_to(tmp_path / "secret.safetensors")
    assert "links to a file outside its folder" in refusal(folder)

    (folder / name).unlink()
    save_file(state("a"), folder / "inside.safetensors")
    (folder / name).symlink_to("inside.safetensors")
    assert set(open_checkpoint(folder).tensors) == {"a"}


def hub_cache(root: Path, name: str = "models--org--name") -> Path:
    """A snapshot as the Hugging Face cache keeps it: links to blobs."""
    snapshot, blobs = root / name / "snapshots" / "0123abcd", root / name / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file(state("a"), blobs / "f00d")
    (snapshot / "model.safetensors").symlink_to("../../blobs/f00d")
    return snapshot


def test_the_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    assert set(open_checkpoint(hub_cache(tmp_path)).tensors) == {"a"}
    assert "links to a file outside" in refusal(hub_cache(tmp_path, "elsewhere"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[]", "not a JSON object"),
        ("{}", "no weight_map"),
        ('{"weight_map": []}', "no weight_map"),
        ('{"weight_map": {"a": 1}}', "no weight_map"),
        ('{"weight_map": {}}', "names no tensors"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "names 'a' twice"),
        ("{", "not JSON"),
        ("\x80", "not UTF-8"),
        ("9" * 50, "not JSON"),
    ],
)
def test_an_index_that_is_none_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    assert expected in refusal(tmp_path)


def test_a_config_that_is_no_json_is_refused(tmp_path: Path) -> None:
    save_file(state("a"), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{")
    assert "config.json is not JSON" in refusal(tmp_path)


def test_pickles_are_refused_until_they_are_allowed(tmp_path: Path) -> None:
    torch.save(state("a"), tmp_path / "pytorch_model.bin")
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        assert "--allow-pickle" in refusal(path)
        found = open_checkpoint(path, allow_pickle=True)
        assert (found.pickles, dict(found.tensors)) == ((tmp_path / "pytorch_model.bin",), {})


def test_safetensors_are_preferred_to_pickles(tmp_path: Path) -> None:
    torch.save(state("old"), tmp_path / "pytorch_model.bin")
    save_file(state("new"), tmp_path / "model.safetensors")
    assert set(open_checkpoint(tmp_path, allow_pickle=True).tensors) == {"new"}


def hidden_of(found: Checkpoint, *, same: bool | None = None) -> dict[str, str]:
    def same_bytes(one: str, other: str) -> bool:
        assert same is not None, f"{one} and {other} need not be compared"
        return same

    return hidden_tensors(found.path, found.config, found.tensors, same_bytes)


def checkpoint(tmp_path: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None) -> Checkpoint:
    save_file(tensors, tmp_path / "model.safetensors")
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    return open_checkpoint(tmp_path)


@pytest.mark.parametrize(("head", "embedding"), TIED_PAIRS)
def test_a_tied_head_that_is_stored_too_is_no_weight_of_its_own(tmp_path: Path, head: str, embedding: str) -> None:
    found = checkpoint(tmp_path, state(head, embedding), {"tie_word_embeddings": True})
    assert hidden_of(found, same=True) == {head: f"it is tied to {embedding}"}
    with pytest.raises(CheckpointError, match=f"tensor '{head}' differs from {embedding}"):
        hidden_of(found, same=False)


def test_a_tied_head_of_another_dtype_differs_without_being_read(tmp_path: Path) -> None:
    tensors = {"lm_head.weight": torch.zeros(2, 2).half(), "model.embed_tokens.weight": torch.zeros(2, 2)}
    with pytest.raises(CheckpointError, match="set tie_word_embeddings to false"):
        hidden_of(checkpoint(tmp_path, tensors, {"tie_word_embeddings": True}))


@pytest.mark.parametrize("config", [None, {}, {"tie_word_embeddings": False}, {"model_type": "llama"}])
def test_an_untied_head_is_a_weight_even_if_it_equals_the_embedding(
    tmp_path: Path, config: dict[str, Any] | None
) -> None:
    assert hidden_of(checkpoint(tmp_path, state("lm_head.weight", "model.embed_tokens.weight"), config)) == {}


def test_a_head_that_is_stored_alone_is_a_weight(tmp_path: Path) -> None:
    assert hidden_of(checkpoint(tmp_path, state("lm_head.weight"), {"tie_word_embeddings": True})) == {}


def test_whether_a_model_is_tied_is_written_in_its_config_or_known_of_its_kind() -> None:
    assert ties_embeddings({"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}})
    assert ties_embeddings({"text_config": {"tie_word_embeddings": True}})
    assert ties_embeddings({"model_type": "gpt2"})
    assert not ties_embeddings({"model_type": "gpt2", "tie_word_embeddings": False})
    assert not ties_embeddings({"model_type": "llama"})
    assert not ties_embeddings(None)


def test_the_kinds_that_are_tied_by_default_are_so_in_transformers() -> None:
    from transformers import CONFIG_MAPPING

    assert {kind for kind in TIED_BY_DEFAULT if not CONFIG_MAPPING[kind]().tie_word_embeddings} == set()


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", (4,), True),
        ("rotary_emb.inv_freq", (4,), True),
        ("model.layers.0.self_attn.rotary_emb.inv_freq.weight", (4,), False),
        ("model.my_rotary_emb.inv_freq", (4,), False),
        ("h.0.attn.bias", (1, 1, 8, 8), True),
        ("transformer.h.0.attn.masked_bias", (), True),
        ("h.0.attn.bias", (8,), False),
        ("h.0.attn.c_attn.bias", (1, 1, 8, 8), False),
        ("h.0.attn.masked_bias", (8,), False),
    ],
)
def test_buffers_that_loading_recomputes_are_no_weights(
    tmp_path: Path, name: str, shape: tuple[int, ...], expected: bool
) -> None:
    found = checkpoint(tmp_path, {name: torch.zeros(shape), "w": torch.zeros(1)}, None)
    assert hidden_of(found) == ({name: "loading recomputes it"} if expected else {})


def test_a_path_that_exists_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_path("org/name") == Path("org/name")
    assert resolve_path("~/org/name") == tmp_path / "org" / "name"


@pytest.mark.parametrize("text", ["", "no_such_folder", "a/b/c", "/no/such", "org/na me", "x\0y", "org/" + "n" * 5000])
def test_a_text_that_is_neither_a_path_nor_a_hub_id_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(CheckpointError, match="there is no folder or file"):
        resolve_path(text)


@pytest.mark.parametrize("allow_pickle", [False, True])
@pytest.mark.parametrize(("text", "revision"), [("org/na-me.1", None), ("org/na-me.1@refs/pr/1", "refs/pr/1")])
def test_a_hub_id_is_downloaded_without_what_could_run_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, revision: str | None, allow_pickle: bool
) -> None:
    asked: list[Any] = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve_path(text, allow_pickle=allow_pickle) == tmp_path
    ((name, options),) = asked
    assert (name, options["revision"]) == ("org/na-me.1", revision)
    assert ("*.bin" in options["allow_patterns"]) is allow_pickle
    assert not {"*", "*.py", "*.pt", "*.pth", "*.pkl"} & set(options["allow_patterns"])


def test_an_error_of_the_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fail(*_: Any, **__: Any) -> None:
        raise LocalEntryNotFoundError("401 Client Error.\n\nRepository Not Found for url: https://...")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(CheckpointError, match=r"the hub did not give that model: 401 Client Error\.$") as caught:
        resolve_path("org/name")
    assert str(caught.value).isprintable()


def test_the_hub_gives_the_files_of_a_model_and_its_tokenizer() -> None:
    from huggingface_hub.utils import filter_repo_objects

    files = ["model.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.model", "merges.txt"]
    files += ["chat_template.jinja", "vocab.json", "spiece.model", "tokenizer.json"]
    others = ["modeling_x.py", "pytorch_model.bin", "onnx/model.safetensors", "consolidated.safetensors", "x.gguf"]
    allowed = filter_repo_objects(
        [*files, *others], allow_patterns=list(resolve.HUB_FILES), ignore_patterns=list(resolve.NOT_FROM_HUB)
    )
    assert list(allowed) == files
