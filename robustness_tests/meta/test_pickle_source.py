"""Pickled checkpoints: flat dictionaries of tensors, once allowed, and nothing else. `test_source` reads them too."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from mergeguard.checkpoints.source import open_source
from mergeguard.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path


class Shared:
    """What no checkpoint should hold; unpickling it runs code."""


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([torch.zeros(2)], "holds a list, not a flat dictionary"),
        (torch.zeros(2), "holds a Tensor, not a flat dictionary"),
        ({"state_dict": {"a": torch.zeros(2)}}, "tensor 'state_dict' is a dict"),
        ({"a": torch.zeros(2), "step": 3}, "tensor 'step' is a int"),
        ({3: torch.zeros(2)}, "tensor '3' is a Tensor"),
        ({"a": torch.zeros(1).expand(1 << 40)}, "tensor 'a' is sparse, quantized, expanded"),
        ({"a": torch.zeros(2).to_sparse()}, "tensor 'a' is sparse"),
        ({"a": torch.zeros(2, device="meta")}, "tensor 'a' is sparse, quantized, expanded or without data"),
        ({"a": Shared()}, "cannot be loaded: it holds other things than tensors"),
    ],
    ids=["list", "tensor", "nested", "number", "unnamed", "expanded", "sparse", "meta", "class"],
)
def test_a_pickle_that_is_not_a_flat_dictionary_of_tensors_is_refused(
    tmp_path: Path, value: Any, expected: str
) -> None:
    torch.save(value, tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match=expected) as caught:
        open_source(str(tmp_path / "x.bin"), allow_pickle=True)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"PK\x03\x04 no zip either"])
def test_a_file_that_is_no_pickle_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin cannot be loaded") as caught:
        open_source(str(tmp_path), allow_pickle=True)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"more": "one.bin"}, "'more' is missing"),
        ({"mask": "one.bin", "scale": "two.bin"}, "'scale' is here, but the index does not"),
    ],
)
def test_pickles_and_their_index_must_agree(tmp_path: Path, change: dict[str, str], expected: str) -> None:
    torch.save({"scale": torch.ones(1)}, tmp_path / "one.bin")
    torch.save({"mask": torch.ones(2)}, tmp_path / "two.bin")
    weight_map = {"scale": "one.bin", "mask": "two.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map | change}))
    with pytest.raises(CheckpointError, match=expected):
        open_source(str(tmp_path), allow_pickle=True)


def test_a_pickled_tensor_that_is_a_view_is_read_in_its_own_shape(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    torch.save({"t": whole.T, "part": whole[1:, 2]}, tmp_path / "x.bin")
    with open_source(str(tmp_path / "x.bin"), allow_pickle=True) as source:
        assert torch.equal(source.read("t"), whole.T)
        assert torch.equal(source.read("part"), whole[1:, 2])
