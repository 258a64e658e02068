"""Special tokens by text and by id in settings whose vocabulary has changed."""

from __future__ import annotations

from typing import Any

import pytest

from mergeguard.checkpoints.special_tokens import with_moved_ids, without_tokens


def test_settings_lose_the_tokens_that_are_gone_and_only_those() -> None:
    settings = {
        "pad_token": "<pad>",
        "bos_token": {"content": "<pad>", "special": True},
        "eos_token": "<s>",
        "additional_special_tokens": ["<pad>", {"content": "<pad>"}, "<s>"],
        "extra_special_tokens": {"image_token": "<pad>", "audio_token": "<s>"},
        "add_bos_token": True,
        "name": "<pad>",
    }
    warnings: list[str] = []
    assert without_tokens(settings, {"<pad>"}, "here", warnings) == {
        "eos_token": "<s>",
        "additional_special_tokens": ["<s>"],
        "extra_special_tokens": {"audio_token": "<s>"},
        "add_bos_token": True,
        "name": "<pad>",
    }
    for line, name in zip(warnings, ("pad_token", "bos_token"), strict=True):
        assert line.startswith(f"here: {name} '<pad>' has no embedding row, so the merged model has no {name}; set")
    assert without_tokens(settings, (), "here", []) == settings


@pytest.mark.parametrize(
    ("value", "expected", "lost"),
    [
        (1, 1, None),
        (2, 7, None),
        (3, None, 3),
        (9, 9, None),
        (10, None, 10),  # beyond the rows
        (4, None, 4),  # moved beyond the rows
        (-1, -1, None),
        (None, None, None),
        (True, True, None),
        ("2", "2", None),
        ([1, 2], [1, 7], None),
        ([2, 3, 10], [7], 3),
        ([3], None, 3),
        ([], [], None),
    ],
    ids=str,
)
def test_an_id_follows_its_token(value: Any, expected: Any, lost: int | None) -> None:
    warnings: list[str] = []
    moved = {2: 7, 3: None, 4: 11}
    found = with_moved_ids({"eos_token_id": value, "hidden_size": 2}, moved, 10, "here", warnings)
    assert found == {"eos_token_id": expected, "hidden_size": 2}
    assert [line.split(" has")[0] for line in warnings] == ([f"here: eos_token_id {lost}"] if lost else [])


def test_where_nothing_moved_and_no_row_was_cut_ids_stay() -> None:
    settings = {"pad_token_id": 10**6, "bad_token_ids": [5, 6], "bos_token_id": 0}
    assert with_moved_ids(settings, {}, None, "here", []) == settings
