"""LoRA adapters as sources: the update by hand, and everything about an adapter that is refused."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from mergeguard.checkpoints.adapter_config import read_lora_config
from mergeguard.checkpoints.source import open_source
from mergeguard.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

State = dict[str, torch.Tensor]
PREFIX = "base_model.model."
LAYER = "model.layers.0.self_attn."
CONFIG = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 6,
    "target_modules": ["q_proj"],
    "base_model_name_or_path": "another/base",
    "bias": "none",
    "init_lora_weights": True,
    "lora_dropout": 0.1,
    "megatron_core": "megatron.core",
    "use_dora": False,
    "lora_bias": False,
    "loftq_config": {},
    "modules_to_save": None,
    "qalora_group_size": 16,
}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


BASE: State = {
    "model.embed_tokens.weight": draw(10, 4, seed=1),
    f"{LAYER}q_proj.weight": draw(6, 4, seed=2),
    f"{LAYER}o_proj.weight": draw(4, 4, seed=3),
    f"{LAYER}q_proj.bias": draw(6, seed=4),
    "lm_head.weight": draw(10, 4, seed=5),
}
FACTORS: State = {
    f"{LAYER}q_proj.lora_A.weight": draw(2, 4, seed=6),
    f"{LAYER}q_proj.lora_B.weight": draw(6, 2, seed=7),
}
DELTA = FACTORS[f"{LAYER}q_proj.lora_B.weight"] @ FACTORS[f"{LAYER}q_proj.lora_A.weight"]


def write(
    folder: Path,
    factors: State | None = None,
    *,
    base: State | None = None,
    model: dict[str, Any] | None = None,
    prefix: str = PREFIX,
    **changes: Any,
) -> str:
    """A base and an adapter; returns the reference to both."""
    (folder / "base").mkdir(exist_ok=True)
    (folder / "adapter").mkdir(exist_ok=True)
    save_file(BASE if base is None else base, folder / "base" / "model.safetensors")
    if model is not None:
        (folder / "base" / "config.json").write_text(json.dumps(model))
    named = {f"{prefix}{name}": value for name, value in (FACTORS if factors is None else factors).items()}
    save_file(named, folder / "adapter" / "adapter_model.safetensors")
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(CONFIG | changes))
    return f"{folder / 'base'}+{folder / 'adapter'}"


def merged(reference: str) -> State:
    with open_source(reference, allow_pickle=True) as source:
        return {name: source.read(name) for name in source.tensors}


def refusal(reference: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_source(reference)
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_the_update_is_added_to_its_target_and_to_nothing_else(tmp_path: Path) -> None:
    found = merged(write(tmp_path))
    assert found.keys() == BASE.keys()
    for name, value in BASE.items():
        assert torch.equal(found[name], value + 3 * DELTA if name == f"{LAYER}q_proj.weight" else value)


def test_a_reused_buffer_gives_the_same(tmp_path: Path) -> None:
    reference = write(tmp_path)
    expected = merged(reference)
    memory = bytearray(b"\xff" * 500)
    with open_source(reference) as source:
        for name in [*source.tensors] * 2:
            size = source.tensors[name].nbytes
            source.read_bytes(name, memoryview(memory)[:size])
            assert memory[:size] == expected[name].numpy().tobytes()


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({}, 3.0),
        ({"lora_alpha": 5}, 2.5),
        ({"use_rslora": True}, 6 / math.sqrt(2)),
        ({"r": 99, "rank_pattern": {"q_proj": 2}}, 3.0),
        ({"alpha_pattern": {"q_proj": 1}}, 0.5),
        ({"alpha_pattern": {"proj": 1}}, 3.0),
        ({"alpha_pattern": {r".*\.[qk]_proj": 1}}, 0.5),
        ({"alpha_pattern": {"layers.0.self_attn.q_proj": 1}}, 0.5),
        ({"alpha_pattern": {"layers.0.self_attn": 1}}, 3.0),
        ({"alpha_pattern": {"^model.layers.0.self_attn.q_proj": 1}}, 0.5),
        ({"alpha_pattern": {"^layers.0.self_attn.q_proj": 1}}, 3.0),
        ({"alpha_pattern": {"k_proj": 9, "q_proj": 1, ".*": 7}}, 0.5),
        ({"rank_pattern": {"k_proj": 7}, "alpha_pattern": {}}, 3.0),
    ],
    ids=str,
)
def test_the_scale_is_that_of_the_module(tmp_path: Path, changes: dict[str, Any], scale: float) -> None:
    found = merged(write(tmp_path, **changes))
    assert torch.equal(found[f"{LAYER}q_proj.weight"], BASE[f"{LAYER}q_proj.weight"] + DELTA * scale)


def test_a_bfloat16_base_is_rounded_once_after_a_linear_update_and_twice_with_an_embedding(tmp_path: Path) -> None:
    base = {name: value.bfloat16() for name, value in BASE.items()}
    embedding = {
        "model.embed_tokens.lora_embedding_A": draw(2, 10, seed=8),
        "model.embed_tokens.lora_embedding_B": draw(4, 2, seed=9),
    }
    found = merged(write(tmp_path, FACTORS | embedding, base=base))
    linear, table = f"{LAYER}q_proj.weight", "model.embed_tokens.weight"
    assert torch.equal(found[linear], (base[linear].float() + 3 * DELTA).bfloat16())
    update = (embedding["model.embed_tokens.lora_embedding_B"] @ embedding["model.embed_tokens.lora_embedding_A"]).T
    assert torch.equal(found[table], base[table] + (3 * update).bfloat16())
    assert not torch.equal(found[table], (base[table].float() + 3 * update).bfloat16())


def test_a_half_precision_adapter_is_multiplied_in_float32(tmp_path: Path) -> None:
    halves = {name: value.bfloat16() for name, value in FACTORS.items()}
    found = merged(write(tmp_path, halves))[f"{LAYER}q_proj.weight"]
    first, second = (value.float() for value in halves.values())
    assert torch.equal(found, BASE[f"{LAYER}q_proj.weight"] + (second @ first) * 3)


def transposed_update(*, square: bool) -> tuple[State, State, torch.Tensor]:
    """(base, factors, expected) of a layer stored as (in, out)."""
    outputs = 4 if square else 6
    base = {"transformer.h.0.attn.c_proj.weight": draw(4, outputs, seed=2)}
    first, second = draw(2, 4, seed=6), draw(outputs, 2, seed=7)
    factors = {"transformer.h.0.attn.c_proj.lora_A.weight": first, "transformer.h.0.attn.c_proj.lora_B.weight": second}
    return base, factors, next(iter(base.values())) + (second @ first).T * 3


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize(
    ("fan_in_fan_out", "model"),
    [(True, None), (True, {"model_type": "gpt2"}), (False, {"model_type": "gpt2", "tie_word_embeddings": False})],
)
def test_layers_stored_transposed_are_updated_transposed(
    tmp_path: Path, square: bool, fan_in_fan_out: bool, model: dict[str, Any] | None
) -> None:
    base, factors, expected = transposed_update(square=square)
    found = merged(write(tmp_path, factors, base=base, model=model, fan_in_fan_out=fan_in_fan_out))
    assert torch.equal(found["transformer.h.0.attn.c_proj.weight"], expected)


def test_gpt2s_original_checkpoint_lacks_the_models_prefix(tmp_path: Path) -> None:
    base, factors, expected = transposed_update(square=True)
    base = {name.removeprefix("transformer."): value for name, value in base.items()}
    found = merged(write(tmp_path, factors, base=base, model={"model_type": "gpt2"}))
    assert torch.equal(found["h.0.attn.c_proj.weight"], expected)


def test_fan_in_fan_out_of_plain_linear_layers_is_told_by_their_shapes_or_refused(tmp_path: Path) -> None:
    """peft resets the flag for them; a square matrix alone cannot tell."""
    found = merged(write(tmp_path, model={"model_type": "llama"}, fan_in_fan_out=True))
    assert torch.equal(found[f"{LAYER}q_proj.weight"], BASE[f"{LAYER}q_proj.weight"] + 3 * DELTA)
    square = {f"{LAYER}o_proj.lora_A.weight": draw(2, 4), f"{LAYER}o_proj.lora_B.weight": draw(4, 2)}
    assert "fan_in_fan_out" in refusal(write(tmp_path, square, model={"model_type": "llama"}, fan_in_fan_out=True))


@pytest.mark.parametrize("key", ["lm_head.weight", "lm_head.base_layer.weight"])
def test_a_module_that_the_adapter_holds_whole_replaces_the_bases_in_its_dtype(tmp_path: Path, key: str) -> None:
    new = draw(10, 4, seed=20)
    base = {name: value.half() for name, value in BASE.items()}
    found = merged(write(tmp_path, {key: new}, base=base, modules_to_save=["lm_head"]))
    assert torch.equal(found["lm_head.weight"], new.half())
    assert torch.equal(found["model.embed_tokens.weight"], base["model.embed_tokens.weight"])


def test_a_stored_base_layer_is_what_the_update_is_added_to(tmp_path: Path) -> None:
    new = draw(6, 4, seed=21)
    found = merged(write(tmp_path, FACTORS | {f"{LAYER}q_proj.base_layer.weight": new}))
    assert torch.equal(found[f"{LAYER}q_proj.weight"], new + 3 * DELTA)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA'"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"peft_type": None}, "peft_type None"),
        ({"use_dora": True}, "'use_dora'"),
        ({"lora_bias": True}, "'lora_bias'"),
        ({"bias": "all"}, "bias 'all'"),
        ({"bias": "lora_only"}, "bias 'lora_only'"),
        ({"target_parameters": ["experts.down_proj"]}, "'target_parameters'"),
        ({"trainable_token_indices": [1]}, "'trainable_token_indices'"),
        ({"layer_replication": [[0, 4], [2, 5]]}, "'layer_replication'"),
        ({"use_qalora": True}, "'use_qalora'"),
        ({"alora_invocation_tokens": [1]}, "'alora_invocation_tokens'"),
        ({"a_field_of_the_future": 1}, "'a_field_of_the_future'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights 'olora'"),
        ({"r": 0}, "0 as r"),
        ({"r": True}, "True as r"),
        ({"r": 2.0}, "2.0 as r"),
        ({"lora_alpha": "6"}, "'6' as lora_alpha"),
        ({"lora_alpha": math.nan}, "nan as lora_alpha"),
        ({"rank_pattern": {"q_proj": -1}}, "-1 as rank_pattern"),
        ({"rank_pattern": [1]}, "a rank_pattern that is not an object"),
        ({"alpha_pattern": {"q_proj": None}}, "None as alpha_pattern"),
        ({"alpha_pattern": {"(": 1}}, "the alpha_pattern '('"),
        ({"use_rslora": "yes"}, "'yes' as use_rslora"),
        ({"fan_in_fan_out": 1}, "1 as fan_in_fan_out"),
        ({"modules_to_save": "lm_head"}, "a modules_to_save that is not a list"),
    ],
    ids=str,
)
def test_what_is_not_plain_lora_is_refused_by_the_name_of_its_field(
    tmp_path: Path, changes: dict[str, Any], field: str
) -> None:
    message = refusal(write(tmp_path, **changes))
    assert message.startswith(str(tmp_path / "adapter" / "adapter_config.json"))
    assert field in message


def test_fields_that_are_unset_or_do_not_change_the_weights_are_no_hindrance(tmp_path: Path) -> None:
    reference = write(
        tmp_path, init_lora_weights="gaussian", use_dora=None, corda_config={"x": 1}, lora_dropout=0.5, unknown=None
    )
    assert torch.equal(merged(reference)[f"{LAYER}q_proj.weight"], BASE[f"{LAYER}q_proj.weight"] + 3 * DELTA)


def test_pefts_defaults_hold_where_the_file_is_silent(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    config = read_lora_config(tmp_path / "adapter_config.json")
    assert (config.rank, config.scale_of("q_proj"), config.modules_to_save) == (8, 1.0, ())


A, B = f"{LAYER}q_proj.lora_A.weight", f"{LAYER}q_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("factors", "expected"),
    [
        ({}, "holds no tensors"),
        ({A: FACTORS[A]}, "has no lora_B beside it"),
        ({B: FACTORS[B]}, "has no lora_A beside it"),
        ({A: draw(3, 4), B: draw(6, 3)}, "has shape [3, 4]; expected [2, 4], (r, inputs)"),
        ({A: draw(2, 5), B: FACTORS[B]}, "has shape [2, 5]; expected [2, 4], (r, inputs)"),
        ({A: FACTORS[A], B: draw(7, 2)}, "has shape [7, 2]; expected [6, 2], (outputs, r)"),
        ({A: draw(2), B: FACTORS[B]}, "has shape [2]; expected [2, 4]"),
        ({A: draw(2, 4, 1, 1), B: draw(6, 2, 1, 1)}, "has shape [2, 4, 1, 1]; expected [2, 4]"),
        ({"x.lora_A.weight": draw(2, 4), "x.lora_B.weight": draw(6, 2)}, "belongs to x.weight, which"),
        ({"x.weight": draw(2, 4)}, "belongs to x.weight, which"),
        ({"lm_head.weight": draw(11, 4)}, "has shape [11, 4]; expected [10, 4], that of lm_head.weight"),
        (FACTORS | {f"{LAYER}q_proj.lora_magnitude_vector": draw(6)}, "is not plain LoRA"),
        (FACTORS | {f"{LAYER}q_proj.lora_B.bias": draw(6)}, "is not plain LoRA"),
        ({A.replace(".weight", ""): draw(2, 4)}, "is not plain LoRA"),
        ({A.replace(".weight", ".default.weight"): draw(2, 4)}, "is not plain LoRA"),
        (FACTORS | {f"{LAYER}q_proj.weight": draw(6, 4)}, "is both updated and replaced"),
        (
            {"lm_head.weight": draw(10, 4), "lm_head.base_layer.weight": draw(10, 4)},
            "gives lm_head.weight a second time",
        ),
        (
            FACTORS | {f"{LAYER}q_proj.lora_embedding_A": draw(2, 6), f"{LAYER}q_proj.lora_embedding_B": draw(4, 2)},
            "a second time",
        ),
        ({f"{LAYER}q_proj.bias.lora_A.weight": draw(2, 4)}, "has no lora_B"),
    ],
)
def test_an_adapter_that_does_not_fit_its_base_is_refused(tmp_path: Path, factors: State, expected: str) -> None:
    message = refusal(write(tmp_path, factors))
    assert message.startswith(str(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert expected in message


def test_keys_without_pefts_prefix_are_refused(tmp_path: Path) -> None:
    assert "does not start with base_model.model." in refusal(write(tmp_path, prefix="model."))


def test_a_quantized_base_or_a_target_that_is_no_matrix_is_refused(tmp_path: Path) -> None:
    whole = BASE | {f"{LAYER}q_proj.weight": torch.zeros(6, 4, dtype=torch.int8)}
    assert "is int8, to which no LoRA can be added" in refusal(write(tmp_path, base=whole))
    convolution = BASE | {f"{LAYER}q_proj.weight": torch.zeros(6, 4, 1, 1)}
    assert "of shape [6, 4, 1, 1]; expected a matrix" in refusal(write(tmp_path, base=convolution))


def test_a_saved_module_that_the_adapter_lacks_is_refused(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, modules_to_save=["classifier", "lm_head"]))
    assert "tensor 'lm_head.weight' is in modules_to_save of" in message
    assert "the adapter lacks it" in message


TIED = {"model_type": "llama", "tie_word_embeddings": True}


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize(
    "factors",
    [
        {"lm_head.weight": draw(10, 4)},
        {"lm_head.lora_A.weight": draw(2, 4), "lm_head.lora_B.weight": draw(10, 2)},
    ],
    ids=["whole", "updated"],
)
def test_a_head_that_is_tied_cannot_be_changed_alone(tmp_path: Path, stored: bool, factors: State) -> None:
    base = {name: value for name, value in BASE.items() if name != "lm_head.weight"}
    base |= {"lm_head.weight": base["model.embed_tokens.weight"].clone()} if stored else {}
    message = refusal(write(tmp_path, factors, base=base, model=TIED))
    assert "belongs to lm_head.weight, which is tied to the embedding" in message


def test_an_embedding_with_a_tied_head_can_be_updated_but_not_replaced(tmp_path: Path) -> None:
    """peft's update changes the one parameter that both are; a replaced embedding would no longer be the head."""
    base = {name: value for name, value in BASE.items() if name != "lm_head.weight"}
    update = {
        "model.embed_tokens.lora_embedding_A": draw(2, 10),
        "model.embed_tokens.lora_embedding_B": draw(4, 2),
        "model.embed_tokens.base_layer.weight": base["model.embed_tokens.weight"],
    }
    assert "lm_head.weight" not in merged(write(tmp_path, update, base=base, model=TIED))
    whole = {"model.embed_tokens.weight": draw(10, 4)}
    assert "the head that is tied to it" in refusal(write(tmp_path, whole, base=base, model=TIED))


def test_folders_that_are_no_adapter_are_refused(tmp_path: Path) -> None:
    reference = write(tmp_path)
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    assert "has no adapter_model.safetensors" in refusal(reference)
    torch.save(
        {f"{PREFIX}{name}": value for name, value in FACTORS.items()}, tmp_path / "adapter" / "adapter_model.bin"
    )
    assert "--allow-pickle" in refusal(reference)
    assert torch.equal(merged(reference)[f"{LAYER}q_proj.weight"], BASE[f"{LAYER}q_proj.weight"] + 3 * DELTA)
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    assert "has no adapter_config.json" in refusal(reference)
    assert "there is no folder" in refusal(f"{tmp_path / 'base'}+{tmp_path / 'nowhere'}")


def test_the_files_of_both_are_digested_and_watched(tmp_path: Path) -> None:
    source = open_source(write(tmp_path))
    assert [file.name for file in source.files] == [
        "model.safetensors",
        "adapter_model.safetensors",
        "adapter_config.json",
    ]
    source.read(f"{LAYER}q_proj.weight")
    with (tmp_path / "adapter" / "adapter_model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors changed while it was used"):
        source.check_unchanged()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors changed while it was used"):
        source.close()
    with pytest.raises(CheckpointError, match="is closed already"):
        source.read("lm_head.weight")
