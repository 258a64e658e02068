"""Parity of vocabularies with the released mergekit 0.1.5: merges of Llamas with differing tokenizers, bit for bit.

Where mergekit leaves a result to the order of a hash table, the oracle is given the recipe's order: that of the models
that it reads tokenizers from, and that of the ordinary tokens that join a union. Nothing else is replaced.

Left out: new `tokens` with the source "base". mergekit adds them to the base's own tokenizer before it looks them up
there, so that the base seems to have them, in padding rows if it has any, else in no row (KeyError).
"""

from __future__ import annotations

import importlib
import json
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from mergeguard.checkpoints.tokenizers import ModelVocabulary, read_vocabulary
from mergeguard.mergers import merge_models, parse_merger
from mergeguard.mergers.merge import Options, merge_checkpoints
from mergeguard.mergers.recipe import load_recipe
from mergeguard.mergers.vocabulary import plan_vocabulary, tokenizer_settings
from robustness_tests.meta.oracle import needs

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = needs("mergekit")

State = dict[str, torch.Tensor]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
VOCABULARIES: dict[str, tuple[str, str, tuple[str, ...], int]] = {
    # kind, ordinary tokens, added tokens (special where they begin with "<"), rows beyond the tokenizer (negative: cut)
    "base": ("WordLevel", "<u> a b c d", ("<s>", "pp"), 3),
    "one": ("WordLevel", "<u> a b c d", ("pp", "<s>", "<q>"), 0),
    "two": ("WordLevel", "<u> b e f d a g", ("<q>", "<r>"), 2),
    "bpe": ("BPE", "a b c d e ab abc", ("<s>", "<x>", "<y>"), 0),
    "bpe_cut": ("BPE", "a b c d e ab abc", ("<s>", "<pad>"), -1),
    "bpe_more": ("BPE", "a b c d e ab abc de", ("<s>", "<pad>", "<x>"), 1),
}
MERGES = {"ab": ("a", "b"), "abc": ("ab", "c"), "de": ("d", "e")}


def write_tokenizer(folder: Path, kind: str, ordinary: str, added: tuple[str, ...]) -> int:
    words = ordinary.split()
    vocabulary = {word: index for index, word in enumerate(words)}
    if kind == "BPE":
        tokenizer = Tokenizer(models.BPE(vocabulary, [MERGES[word] for word in words if word in MERGES]))
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<u>"))  # noqa: S106  a token of a tokenizer
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    for text in added:
        tokenizer.add_tokens([AddedToken(text, special=text.startswith("<"))])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return tokenizer.get_vocab_size()


def random_state(rows: int, generator: torch.Generator, dtype: torch.dtype) -> State:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, 32), "lm_head.weight": (rows, 32)}
    for name, shape in {"q": (32, 32), "k": (16, 32), "v": (16, 32), "o": (32, 32)}.items():
        shapes[f"model.layers.0.self_attn.{name}_proj.weight"] = shape
    for name, shape in {"gate": (48, 32), "up": (48, 32), "down": (32, 48)}.items():
        shapes[f"model.layers.0.mlp.{name}_proj.weight"] = shape
    shapes |= {f"model.layers.0.{name}_layernorm.weight": (32,) for name in ("input", "post_attention")}
    shapes["model.norm.weight"] = (32,)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `<dtype>/<model>`."""
    from transformers import LlamaConfig

    root = tmp_path_factory.mktemp("vocabularies")
    for dtype in (torch.float32, torch.bfloat16):
        generator = torch.Generator().manual_seed(3)
        for name, (kind, ordinary, added, padding) in VOCABULARIES.items():
            folder = root / str(dtype) / name
            folder.mkdir(parents=True)
            rows = write_tokenizer(folder, kind, ordinary, added) + padding
            config = LlamaConfig(vocab_size=rows, num_hidden_layers=1, tie_word_embeddings=False, **SIZES)
            config.architectures = ["LlamaForCausalLM"]
            config.save_pretrained(folder)
            save_file(random_state(rows, generator, dtype), folder / "model.safetensors", metadata={"format": "pt"})
    return root


@pytest.fixture(scope="module", autouse=True)
def oracle() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing it warns about numpy.core among others; its merges may not warn
        importlib.import_module("mergekit.merge")


def follow_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the oracle read tokenizers in the recipe's order, the base first, and list tokens by id."""
    from mergekit.config import MergeConfiguration
    from transformers import PreTrainedTokenizerFast

    get_vocab = PreTrainedTokenizerFast.get_vocab

    def in_order(self: Any) -> list[Any]:
        inputs = self.models or next(iter(self.modules.values())).slices[0].sources
        listed = [entry.model for entry in inputs]
        return listed if self.base_model is None else list(dict.fromkeys([self.base_model, *listed]))

    def by_id(self: Any) -> dict[str, int]:
        return dict(sorted(get_vocab(self).items(), key=lambda item: item[1]))

    monkeypatch.setattr(MergeConfiguration, "referenced_models", in_order)
    monkeypatch.setattr(PreTrainedTokenizerFast, "get_vocab", by_id)


def recipe(folder: Path, method: str, names: list[str], base: str | None, other: dict[str, Any]) -> dict[str, Any]:
    listed = [{"model": str(folder / name), "parameters": {"weight": 0.3 + i / 5}} for i, name in enumerate(names)]
    written = {"merge_method": method, "models": listed, **other}
    return written if base is None else {**written, "base_model": str(folder / base)}


def mergekit_merge(written: dict[str, Any], output: Path, **options: bool) -> tuple[State, dict[str, int], int]:
    """The tensors, the token -> id map (empty without a tokenizer) and the vocab_size that mergekit writes."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions
    from transformers import AutoTokenizer

    settings = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True, **options)
    run_merge(MergeConfiguration.model_validate(written), str(output), settings)
    state = {name: tensor for shard in output.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    size = json.loads((output / "config.json").read_text())["vocab_size"]
    tokenizer = AutoTokenizer.from_pretrained(output).get_vocab() if (output / "tokenizer.json").is_file() else {}
    return state, tokenizer, size


def our_merge(written: dict[str, Any], tmp_path: Path, **choices: Any) -> tuple[State, dict[str, int], int]:
    """The same through a vocabulary plan, with the tensors in the order in which mergekit gathers them."""
    from transformers import AutoTokenizer

    folders = [entry["model"] for entry in written["models"]]
    base = written.get("base_model")
    order = folders if base is None or base in folders else [*folders, base]
    vocabularies, states = [], []
    for folder in order:
        vocabulary, state = opened(folder)
        vocabularies.append(vocabulary)
        states.append(state)
    (tmp_path / "recipe.yml").write_text(json.dumps(written))  # JSON is YAML
    tokenizer = load_recipe(tmp_path / "recipe.yml").tokenizer
    plan = plan_vocabulary(
        vocabularies,
        None if base is None else order.index(base),
        settings=None if tokenizer is None else tokenizer_settings(tokenizer),
        **choices,
    )
    aligned: list[State] = [{} for _ in order]
    for name in states[0]:
        for state, tensor in zip(aligned, plan.align(name, [state[name] for state in states]), strict=True):
            state[name] = tensor
    listed = [aligned[order.index(folder)] for folder in folders if folder != base]
    weights = [entry["parameters"]["weight"] for entry in written["models"] if entry["model"] != base]
    ancestor = aligned[0 if base is None else order.index(base)]
    merged = merge_models(parse_merger(written["merge_method"]), ancestor, listed, weights, seed=0)
    tokens: dict[str, int] = {}
    if tokenizer is not None:
        assert plan.tokenizer is not None
        saved = tmp_path / "ours"
        saved.mkdir()
        text = plan.tokenizer.text or (plan.tokenizer.folder / "tokenizer.json").read_text(encoding="utf-8")
        (saved / "tokenizer.json").write_text(text, encoding="utf-8")
        (saved / "tokenizer_config.json").write_text((plan.tokenizer.folder / "tokenizer_config.json").read_text())
        tokens = AutoTokenizer.from_pretrained(saved).get_vocab()
    assert plan.rows is not None
    return dict(merged), tokens, plan.rows


def opened(folder: str) -> tuple[ModelVocabulary, State]:
    from pathlib import Path

    state = load_file(f"{folder}/model.safetensors")
    config = json.loads((Path(folder) / "config.json").read_text())
    return read_vocabulary(folder, Path(folder), config, {n: tuple(t.shape) for n, t in state.items()}), state


def assert_equal(ours: tuple[State, dict[str, int], int], theirs: tuple[State, dict[str, int], int]) -> None:
    assert ours[1:] == theirs[1:]
    assert ours[0].keys() == theirs[0].keys()
    assert {name: tuple(t.shape) for name, t in ours[0].items()} == {n: tuple(t.shape) for n, t in theirs[0].items()}
    differing = {name: int((ours[0][name] != theirs[0][name]).sum()) for name in ours[0]}
    assert not any(differing.values()), f"elements that differ: {differing}"
    assert all(ours[0][name].dtype == theirs[0][name].dtype for name in ours[0])


TOKENS = {
    "<q>": {"source": {"kind": "zero"}},
    "pp": {"source": "{folder}/one", "force": True},
    "<new>": {"source": {"kind": "model_token", "model": "{folder}/two", "token": "e"}},
    "a": {"source": {"kind": "model_token", "model": "{folder}/base", "token_id": 9}, "force": True},
}
WORDS, PIECES = ["one", "two"], ["bpe_cut", "bpe"]
CASES: dict[str, tuple[str, list[str], str | None, dict[str, Any]]] = {
    "linear, base": ("linear", ["base", "one", "two"], None, {"tokenizer_source": "base"}),
    "linear, union": ("linear", ["base", "one", "two"], None, {"tokenizer_source": "union"}),
    "linear, a merged model": ("linear", ["base", "one", "two"], None, {"tokenizer_source": "{folder}/two"}),
    "linear, cut BPE": ("linear", ["bpe_cut", "bpe"], None, {"tokenizer_source": "union"}),
    "linear, first is base": ("linear", ["bpe", "bpe_more"], None, {"tokenizer_source": "base"}),
    "task_arithmetic, base": ("task_arithmetic", WORDS, "base", {"tokenizer_source": "base"}),
    "task_arithmetic, union": ("task_arithmetic", WORDS, "base", {"tokenizer_source": "union"}),
    "task_arithmetic, a merged model": ("task_arithmetic", WORDS, "base", {"tokenizer_source": "{folder}/one"}),
    "task_arithmetic, BPE": ("task_arithmetic", ["bpe", "bpe_more"], "bpe_cut", {"tokenizer_source": "base"}),
    "linear, padded": ("linear", ["base", "one", "two"], None, {"tokenizer": {"pad_to_multiple_of": 16}}),
    "task_arithmetic, padded": (
        "task_arithmetic",
        WORDS,
        "base",
        {"tokenizer": {"source": "base", "pad_to_multiple_of": 5}},
    ),
    "linear, tokens": ("linear", ["two", "one", "base"], None, {"tokenizer": {"source": "union", "tokens": TOKENS}}),
    "task_arithmetic, tokens": (
        "task_arithmetic",
        WORDS,
        "base",
        {"tokenizer": {"source": "{folder}/base", "tokens": TOKENS, "pad_to_multiple_of": 16}},
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_rows_that_follow_tokens_equal_mergekits_bit_for_bit(
    case: str, dtype: torch.dtype, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, names, base, other = CASES[case]
    folder = checkpoints / str(dtype)
    placed = json.loads(json.dumps(other).replace("{folder}", str(folder)))
    written = recipe(folder, method, names, base, placed)
    ours = our_merge(written, tmp_path)
    follow_the_recipe(monkeypatch)
    assert_equal(ours, mergekit_merge(written, tmp_path / "theirs"))


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_truncated_rows_equal_mergekits_bit_for_bit(method: str, checkpoints: Path, tmp_path: Path) -> None:
    names, base = (["base", "one", "two"], None) if method == "linear" else (WORDS, "base")
    written = recipe(checkpoints / "torch.bfloat16", method, names, base, {})
    ours, _, rows = our_merge(written, tmp_path, policy="truncate")
    theirs, _, _ = mergekit_merge(written, tmp_path / "theirs", unsafe_truncate_embeddings=True)
    assert rows == min(len(opened(entry["model"])[1]["lm_head.weight"]) for entry in written["models"])
    assert_equal((ours, {}, 0), (theirs, {}, 0))


# In 16 bits magnitudes tie at the threshold of TIES, and mergekit leaves their order to an unstable sort.
@pytest.mark.parametrize(("method", "dtype"), [("ties", torch.float32), ("task_arithmetic", torch.bfloat16)], ids=str)
@pytest.mark.parametrize("source", ["union", "base", "{folder}/two"])
def test_what_a_merge_writes_equals_what_mergekit_writes_bit_for_bit(
    source: str, method: str, dtype: torch.dtype, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    folder = checkpoints / str(dtype)
    placed: dict[str, Any] = {"tokenizer_source": source.format(folder=folder)}
    if method == "ties":
        placed["parameters"] = {"density": 0.4}
    written = recipe(folder, method, WORDS, "base", placed)
    (tmp_path / "recipe.yml").write_text(json.dumps(written))  # JSON is YAML
    out = tmp_path / "out"
    merge_checkpoints(tmp_path / "recipe.yml", out, Options(allow_unrelated=True))
    size = json.loads((out / "config.json").read_text())["vocab_size"]
    ours = load_file(out / "model.safetensors"), AutoTokenizer.from_pretrained(out).get_vocab(), size
    follow_the_recipe(monkeypatch)
    assert_equal(ours, mergekit_merge(written, tmp_path / "theirs"))
