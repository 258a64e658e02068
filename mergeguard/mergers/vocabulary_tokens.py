"""Vocabularies matched by token, as mergekit 0.1.5 does for `tokenizer_source` and `tokenizer` (its `tokenizer/`).

What mergekit leaves to the order of a hash table follows the recipe's order here: which model starts a merge without a
base, and in which order tokens of the others join a union (ordinary tokens by model and id, then added ones). Where
mergekit crashes on a token without a row, or takes a padding row of the base for a token that `tokens` adds to it, the
token is missing from that model here. A model without a tokenizer is refused; mergekit assumes the base's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from mergeguard.checkpoints.tokenizers import TokenizerBuilder
from mergeguard.errors import IncompatibleModelsError, ParameterError
from mergeguard.mergers.vocabulary_plan import Fill, TokenizerOutput, VocabularyPlan, moved_ids

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mergeguard.checkpoints.tokenizers import ModelVocabulary, Tokenizer
    from mergeguard.mergers.recipe import Token
    from mergeguard.mergers.recipe import Tokenizer as Written


@dataclass(frozen=True)
class TokenRow:
    """A row of one model: of a named token or id there, else of the same token.

    Attributes:
        model: label of the model.
    """

    model: str
    token: str | None = None
    token_id: int | None = None


@dataclass(frozen=True)
class TokenSetting:
    """What `tokenizer: tokens:` says of one token.

    Attributes:
        source: the row for models without the token; None where all models have it.
        force: whether models that have the token take that row too.
    """

    source: TokenRow | Literal["zero"] | None = None
    force: bool = False


@dataclass(frozen=True)
class TokenizerSettings:
    """`tokenizer_source` or `tokenizer` of a recipe.

    Attributes:
        source: "union", "base" or the label of a model, merged or not.
        tokens: rows of single tokens; tokens that the output lacks are added to it.
        pad_to_multiple_of: the output's rows are rounded up to a multiple of it.
    """

    source: str = "union"
    tokens: Mapping[str, TokenSetting] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None


def tokenizer_settings(written: Written) -> TokenizerSettings:
    """What a recipe's `tokenizer_source` or `tokenizer` says, without its lines."""
    tokens = {text: TokenSetting(_token_source(token), token.force) for text, token in written.tokens.items()}
    return TokenizerSettings(written.source, tokens, written.pad_to_multiple_of)


def _token_source(token: Token) -> TokenRow | Literal["zero"] | None:
    if token.kind == "zero":
        return "zero"
    return None if token.model is None else TokenRow(token.model, token.token, token.token_id)


def plan_tokens(
    models: Sequence[ModelVocabulary],
    base_index: int | None,
    settings: TokenizerSettings,
    donor: ModelVocabulary | None,
) -> VocabularyPlan:
    """The plan that matches rows by token; arguments and errors as in `plan_vocabulary`.

    Output row i is that of the output tokenizer's token i. A model that lacks the token takes the row that `tokens`
    says, else that of the only model that has it, else the base's, else the mean over the models that have it; a
    token in no model is zero. Rows of the inputs without a token (padding) are dropped; rows of the output without
    one (holes, `pad_to_multiple_of`) are the mean of the model's other output rows. A token whose id is beyond its
    model's vocabulary has no row there.
    """
    tokenizers = [_tokenizer_of(model) for model in models]
    start = base_index or 0
    index: int | None = start
    warnings: list[str] = []
    if settings.source in ("base", "union"):
        copied = tokenizers[start]
        builder = TokenizerBuilder(copied, models[start].limit)
        if settings.source == "union":
            others = [model for position, model in enumerate(models) if position != start]
            warnings += _join(builder, [models[start], *others])
    else:
        index = next((i for i, model in enumerate(models) if model.label == settings.source), None)
        giver = donor if index is None else models[index]
        if giver is None:
            raise ParameterError(f"the tokenizer's source {settings.source!r} is not open; give union, base or a model")
        copied = _tokenizer_of(giver)
        builder = TokenizerBuilder(copied, None if index is None else giver.limit)
    for token in settings.tokens:
        builder.add(token)

    vocabulary = dict(sorted(builder.tokens.items(), key=lambda item: item[1]))
    ids = sorted(set(vocabulary.values()))
    end = ids[-1] + 1 if ids else 0
    rows = -(-end // (settings.pad_to_multiple_of or 1)) * (settings.pad_to_multiple_of or 1)
    permutations = [_permutation(vocabulary, model.tokens or {}, end) for model in models]

    forced = {vocabulary[token] for token, setting in settings.tokens.items() if setting.force}

    def fills_for(members: tuple[int, ...]) -> dict[int, Fill]:
        chosen = [permutations[member] for member in members]
        base = members.index(base_index) if base_index in members else None
        lacking = forced.union(*(_absent(permutation) for permutation in chosen))
        fills: dict[int, Fill] = {}
        for token, row in vocabulary.items():
            if row in lacking:
                setting = settings.tokens.get(token)
                fills[row] = (
                    _default_fill(row, chosen, base)
                    if setting is None
                    else _chosen_fill(token, row, setting, [models[member] for member in members], chosen)
                )
        return fills

    everyone = tuple(range(len(models)))
    fills = fills_for(everyone)
    nowhere = [token for token, row in vocabulary.items() if fills.get(row) == "zero" and token not in settings.tokens]
    if nowhere:
        warnings.append(
            f"{len(nowhere)} tokens of the output, e.g. {nowhere[0]!r}, are in no model: their rows are zero"
        )
    own = tuple(
        [-1 if row in forced else source for row, source in enumerate(permutation)] for permutation in permutations
    )
    tensors = {name: count for model in models for name, count in model.rows.items()}
    identity = [*range(rows)]
    changed = any(source != identity for source in own) or any(
        count != rows for model in models for count in model.rows.values()
    )
    return VocabularyPlan(
        rows=rows,
        changed=changed,
        tensors=frozenset(tensors),
        own=own,
        named=range(end) if len(ids) == end else ids,
        fills_for=fills_for,
        warnings=tuple(warnings),
        tokenizer=TokenizerOutput(
            copied.folder,
            index,
            builder.text() if builder.changed else None,
            frozenset(copied.tokens.keys() - builder.tokens.keys()),
        ),
        members=everyone,
        moved_ids=moved_ids(tokenizers[start].tokens, vocabulary),
    )


def _tokenizer_of(model: ModelVocabulary) -> Tokenizer:
    if model.tokenizer is None:
        raise IncompatibleModelsError(
            f"the recipe matches vocabularies by token, but {model.label} has no tokenizer; "
            "put one beside its weights, or remove tokenizer_source and choose a --vocabulary policy"
        )
    return model.tokenizer


def _join(builder: TokenizerBuilder, models: Sequence[ModelVocabulary]) -> Iterator[str]:
    """Add the tokens of all models to the first one's, ordinary tokens before added ones; yields warnings."""
    added: dict[str, dict[str, Any]] = {}
    for model in models:
        for token, entry in _tokenizer_of(model).added.items():
            if token not in (model.tokens or {}):
                continue
            first = added.setdefault(token, entry)
            if {**first, "id": 0} != {**entry, "id": 0}:
                yield f"token {token!r} is added with other settings in {model.label}; the first model's hold"
    for model in models:
        known = builder.tokens
        ordinary = sorted((model.tokens or {}).items(), key=lambda item: item[1])
        new = [token for token, _ in ordinary if token not in known and token not in added]
        for token in new:
            builder.add(token)
        if new:
            yield (
                f"{len(new)} ordinary tokens of {model.label}, e.g. {new[0]!r}, become added tokens of the union, "
                "which are matched as they stand before any merge of the tokenizer"
            )
    for token, entry in added.items():
        builder.add(token, entry)


def _permutation(vocabulary: Mapping[str, int], tokens: Mapping[str, int], end: int) -> list[int]:
    """The model's row of each output row, -1 where it lacks the token."""
    rows = [-1] * end
    for token, row in vocabulary.items():
        rows[row] = tokens.get(token, -1)
    return rows


def _absent(permutation: Sequence[int]) -> set[int]:
    return {row for row, source in enumerate(permutation) if source < 0}


def _default_fill(row: int, permutations: Sequence[Sequence[int]], base: int | None) -> Fill:
    having = [position for position, permutation in enumerate(permutations) if permutation[row] >= 0]
    if not having:
        return "zero"
    if len(having) == 1 or base in having:
        giver = base if base in having else having[0]
        return giver, permutations[giver][row]
    return "mean"


def _chosen_fill(
    token: str,
    row: int,
    setting: TokenSetting,
    models: Sequence[ModelVocabulary],
    permutations: Sequence[Sequence[int]],
) -> Fill:
    source, place = setting.source, f"tokenizer: tokens: {token!r}"
    if source is None:
        raise ParameterError(f"{place} needs a source: a model, or a mapping with kind zero or model_token")
    if isinstance(source, str):
        return source
    position = next((i for i, model in enumerate(models) if model.label == source.model), None)
    if position is None:
        labels = ", ".join(model.label for model in models)
        raise ParameterError(f"{place} takes the row of {source.model!r}, which is not merged here; one of {labels}")
    model = models[position]
    if source.token_id is not None:
        found, wanted = source.token_id, f"a row {source.token_id}"
    elif source.token is not None:
        found, wanted = (model.tokens or {}).get(source.token, -1), f"a row of token {source.token!r}"
    else:
        found, wanted = permutations[position][row], "a row of that token"
    if not 0 <= found < min(model.rows.values(), default=0):
        raise ParameterError(f"{place} takes the row of {source.model!r}, which lacks {wanted}")
    return position, found
