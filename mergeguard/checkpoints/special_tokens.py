"""Special tokens that settings name by text or by id, where the merged model's vocabulary is another one.

A text without an embedding row would be added to the tokenizer again when it is loaded, as an id beyond the rows; an id
of another vocabulary means another token (a model that never stops), and a padding id beyond the rows does not load.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mergeguard.checkpoints.tokenizers import MORE_SPECIAL

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping


def without_tokens(
    settings: Mapping[str, Any], tokens: Collection[str], where: str, warnings: list[str]
) -> dict[str, Any]:
    """Settings of a tokenizer that name none of `tokens` as a special one.

    Args:
        settings: tokenizer_config.json or special_tokens_map.json.
        tokens: that the merged model lacks.
        where: the file, for warnings.
        warnings: gets a line for each named token that is left out.
    """
    kept: dict[str, Any] = {}
    for name, value in settings.items():
        if name.endswith("_token") and _names_one(value, tokens):
            warnings.append(
                f"{where}: {name} {_content(value)!r} has no embedding row, so the merged model has no {name}; "
                "set another one where it is needed"
            )
            continue
        kept[name] = value
        if name in MORE_SPECIAL and isinstance(value, list):
            kept[name] = [token for token in value if not _names_one(token, tokens)]
        elif name in MORE_SPECIAL and isinstance(value, dict):
            kept[name] = {key: token for key, token in value.items() if not _names_one(token, tokens)}
    return kept


def _content(token: Any) -> Any:
    """The text of a token that is written as a text or as a mapping with its flags."""
    return token.get("content") if isinstance(token, dict) else token


def _names_one(token: Any, tokens: Collection[str]) -> bool:
    return isinstance(_content(token), str) and _content(token) in tokens


def with_moved_ids(
    settings: Mapping[str, Any], moved: Mapping[int, int | None], rows: int | None, where: str, warnings: list[str]
) -> dict[str, Any]:
    """A config whose `..._token_id` settings, ids or lists of ids, mean the same tokens in another vocabulary.

    Args:
        settings: config.json, a part of it or generation_config.json.
        moved: ids that mean another token there -> the token's new id, None if it has none.
        rows: embedding rows of the merged model: ids from there on are gone; None if they did not change.
        where: the file, for warnings.
        warnings: gets a line for each setting that loses an id.
    """

    def new(index: Any) -> Any:
        if type(index) is not int or index < 0:
            return index
        found = moved.get(index, index)
        return None if found is None or (rows is not None and found >= rows) else found

    changed = dict(settings)
    for name, value in settings.items():
        if not name.endswith(("_token_id", "_token_ids")):
            continue
        if isinstance(value, list):
            lost = [index for index in value if new(index) is None]
            kept = [new(index) for index in value if index not in lost]
            changed[name] = None if lost and not kept else kept
        else:
            changed[name] = new(value)
            lost = [value] if value is not None and changed[name] is None else []
        if lost:
            warnings.append(
                f"{where}: {name} {lost[0]} has no embedding row in the merged model and is left out; "
                "set another one where it is needed"
            )
    return changed
