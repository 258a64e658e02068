"""Which tensors are in layers, told from names alone."""

from __future__ import annotations

import pytest

from mergeguard.mergers.layers import find_layers, is_before_layers
from robustness_tests.meta.planned_recipes import names


@pytest.mark.parametrize(
    ("tensors", "num_layers", "prefixes", "count"),
    [
        (names(3), 3, {"model.layers"}, 3),
        (names(3), None, {"model.layers"}, 3),
        (("h.0.attn.weight", "h.1.attn.weight", "wte.weight"), 2, {"h"}, 2),
        (("x.blocks.0.w", "x.blocks.1.w", "x.head.0.w", "x.head.1.w"), 2, {"x.blocks"}, 2),
        (("m.layers.0.w", "classifier.0.weight"), 1, {"m.layers"}, 1),
        ([f"m.layers.{i}.experts.{j}.w" for i in range(2) for j in range(2)], 2, {"m.layers"}, 2),
        ([f"m.layers.{i}.w" for i in range(4)], 3, {"m.layers"}, 3),
        (("m.stage.0.w", "m.stage.1.w"), 2, {"m.stage"}, 2),
        (("m.stage.0.w", "m.stage.1.w"), None, set(), 0),
        (("m.layers.0.w", "m.layers.2.w"), 3, set(), 3),
        (names(3), 10**9, set(), 10**9),
        ((), None, set(), 0),
    ],
)
def test_layers_are_told_from_the_names(
    tensors: tuple[str, ...], num_layers: int | None, prefixes: set[str], count: int
) -> None:
    layers = find_layers(tensors, num_layers)
    places = {layers.split(tensor) for tensor in tensors} - {None}
    assert {place[0] for place in places if place is not None} == prefixes
    assert layers.count == count


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        ("model.embed_tokens.weight", True),
        ("transformer.wte.weight", True),
        ("wpe.weight", True),
        ("gpt_neox.embed_in.weight", True),
        ("transformer.word_embeddings.weight", True),
        ("bert.embeddings.LayerNorm.bias", True),
        ("model.tok_embeddings.weight", True),
        ("shared.weight", True),
        ("embed_out.weight", False),
        ("lm_head.weight", False),
        ("model.norm.weight", False),
        ("transformer.ln_f.bias", False),
        ("score.weight", False),
        ("output.weight", False),
    ],
)
def test_what_stands_before_the_layers_is_told_from_the_name(tensor: str, expected: bool) -> None:
    assert is_before_layers(tensor) is expected
