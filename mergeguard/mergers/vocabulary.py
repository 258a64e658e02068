"""Embedding rows that differ between models, matched by number under a named policy or by token; never a silent cut."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeguard.errors import IncompatibleModelsError, UnknownNameError
from mergeguard.mergers.vocabulary_plan import Fill, TokenizerOutput, VocabularyPlan, moved_ids
from mergeguard.mergers.vocabulary_tokens import (
    TokenizerSettings,
    TokenRow,
    TokenSetting,
    plan_tokens,
    tokenizer_settings,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from mergeguard.checkpoints.tokenizers import ModelVocabulary

__all__ = [
    "POLICIES",
    "TokenRow",
    "TokenSetting",
    "TokenizerOutput",
    "TokenizerSettings",
    "VocabularyPlan",
    "plan_vocabulary",
    "tokenizer_settings",
]

POLICIES = {
    "refuse": "models must have equally many rows",
    "base": "as many rows as the base (without one, the first model): others are cut or take the missing ones from it",
    "truncate": "the leading rows that all models have",
    "largest": "the rows of the largest model: a missing one is the base's, else the mean over the models that have it",
}
"""What `--vocabulary` may be."""


def plan_vocabulary(
    models: Sequence[ModelVocabulary],
    base_index: int | None,
    *,
    policy: str = "refuse",
    settings: TokenizerSettings | None = None,
    donor: ModelVocabulary | None = None,
) -> VocabularyPlan:
    """Decide the output's vocabulary before any tensor is read.

    Args:
        models: all merged models, the base included, in the order in which `align` gets their tensors.
        base_index: which of them is the recipe's base; None without one.
        policy: one of `POLICIES`; not asked where rows agree or tokens decide.
        settings: of the recipe; None matches rows by number.
        donor: the model of `settings.source` if it is not among the models.

    Raises:
        UnknownNameError: there is no such policy.
        IncompatibleModelsError: rows differ and the policy is "refuse", or a tokenizer is missing.
        ParameterError: `settings` names a model, token or id that is not there.
        CheckpointError: a tokenizer cannot be read.
    """
    if policy not in POLICIES:
        raise UnknownNameError("vocabulary policy", policy, POLICIES)
    if settings is not None:
        return plan_tokens(models, base_index, settings, donor)
    return _plan_rows(models, base_index, policy)


def _plan_rows(models: Sequence[ModelVocabulary], base_index: int | None, policy: str) -> VocabularyPlan:
    tensors = {name: [model.rows.get(name) for model in models] for model in models for name in model.rows}
    uneven = next((name for name, rows in tensors.items() if len({*rows} - {None}) > 1), None)
    first = base_index or 0
    everyone = tuple(range(len(models)))
    if uneven is None:
        rows = max((count for model in models for count in model.rows.values()), default=None)
        warnings = _differing_tokens(models, first, rows or 0)
        tokenizer = _copied(models, [first, *range(len(models))])
        every_row = range(rows or 0)
        return VocabularyPlan(
            rows=rows,
            changed=False,
            tensors=frozenset(tensors),
            own=tuple(every_row for _ in models),
            named=every_row,
            fills_for=lambda _members: {},
            warnings=warnings,
            tokenizer=tokenizer,
            members=everyone,
            moved_ids=_moved(models, first, tokenizer),
        )

    sizes = _one_size_each(models)
    if policy == "refuse":
        raise IncompatibleModelsError(_refusal(models, uneven, tensors[uneven]))
    rows = {"base": sizes[first], "truncate": min(sizes), "largest": max(sizes)}[policy]
    own = tuple(range(min(size, rows)) for size in sizes)
    preferred = base_index if policy == "largest" else first

    def fills_for(members: tuple[int, ...]) -> dict[int, Fill]:
        missing = range(min(sizes[member] for member in members), rows)
        fills: dict[int, Fill] = {}
        for row in missing:
            if preferred in members and row < sizes[preferred]:
                fills[row] = (members.index(preferred), row)
            elif policy == "largest" and any(row < sizes[member] for member in members):
                fills[row] = "mean"
            else:
                raise IncompatibleModelsError(
                    f"--vocabulary {policy} needs row {row} of {uneven!r}, but none of "
                    f"{', '.join(models[member].label for member in members)} may give it; "
                    "merge it with a model that has it, or choose --vocabulary truncate"
                )
        return fills

    fills = fills_for(everyone)
    same_size = [index for index, size in enumerate(sizes) if size == rows]
    tokenizer = _copied(models, [index for index in (first, *same_size) if index in same_size])
    warnings = (
        *_row_changes(models, sizes, rows, policy, fills),
        *_differing_tokens(models, first, min(sizes)),
        *_tokens_without_row(models, tokenizer, rows),
    )
    return VocabularyPlan(
        rows=rows,
        changed=True,
        tensors=frozenset(tensors),
        own=own,
        named=range(rows),
        fills_for=fills_for,
        warnings=warnings,
        tokenizer=tokenizer,
        members=everyone,
        moved_ids=_moved(models, first, tokenizer),
    )


def _one_size_each(models: Sequence[ModelVocabulary]) -> list[int]:
    for model in models:
        if len({*model.rows.values()}) != 1:
            found = ", ".join(f"{name!r} has {rows}" for name, rows in model.rows.items()) or "there are none"
            raise IncompatibleModelsError(
                f"models differ in vocabulary rows, and {model.label} has no single number of them ({found}); "
                "resize its embeddings first"
            )
    return [next(iter(model.rows.values())) for model in models]


def _refusal(models: Sequence[ModelVocabulary], name: str, counts: Sequence[int | None]) -> str:
    by_count: dict[int, list[str]] = {}
    for model, count in zip(models, counts, strict=True):
        if count is not None:
            by_count.setdefault(count, []).append(model.label)
    held = " and ".join(f"{count} rows in {', '.join(labels)}" for count, labels in by_count.items())
    token_maps = [model.tokens for model in models]
    padding = token_maps[0] is not None and all(tokens == token_maps[0] for tokens in token_maps)
    hint = "; their tokenizers are the same, so the rows beyond them are padding" if padding else ""
    return (
        f"{name!r} has {held}{hint}; choose --vocabulary base, truncate or largest, "
        "or set tokenizer_source (union, base or a model) in the recipe"
    )


def _row_changes(
    models: Sequence[ModelVocabulary], sizes: Sequence[int], rows: int, policy: str, fills: Mapping[int, Fill]
) -> Iterator[str]:
    for model, size in zip(models, sizes, strict=True):
        if size > rows:
            names = sorted((row, token) for token, row in (model.tokens or {}).items() if row >= rows)
            example = f", among them that of {names[0][1]!r}" if names else ""
            yield f"--vocabulary {policy}: {model.label} has {size} rows, its last {size - rows} are dropped{example}"
        if size < rows:
            taken = [fills[row] for row in range(size, rows)]
            givers = [models[fill[0]].label for fill in taken if isinstance(fill, tuple)]
            sources = [f"{givers.count(giver)} of {giver}" for giver in dict.fromkeys(givers)]
            if "mean" in taken:
                sources.append(f"{taken.count('mean')} means over the models that have them")
            yield f"--vocabulary {policy}: {model.label} has {size} rows and takes {' and '.join(sources)}"


def _differing_tokens(models: Sequence[ModelVocabulary], reference: int, rows: int) -> tuple[str, ...]:
    """One line for each model whose tokenizer gives the leading `rows` rows other meanings than the reference's."""
    known = [index for index in (reference, *range(len(models))) if models[index].tokenizer is not None]
    found = []
    for index in [index for index in range(len(models)) if known and index in known and index != known[0]]:
        ours, theirs = models[known[0]], models[index]
        if ours.tokenizer and theirs.tokenizer and ours.tokenizer.same_tokens(theirs.tokenizer):
            continue
        example = _first_difference(ours, theirs, rows)
        if example is not None:
            found.append(
                f"{example}, so rows of one number mean different tokens and are merged all the same; "
                "tokenizer_source in the recipe matches rows by token"
            )
    return tuple(found)


def _first_difference(ours: ModelVocabulary, theirs: ModelVocabulary, rows: int) -> str | None:
    left, right = ours.tokens or {}, theirs.tokens or {}
    names = ours.label, theirs.label
    for (first, one), (second, other) in (((names[0], left), (names[1], right)), ((names[1], right), (names[0], left))):
        for token, index in sorted(one.items(), key=lambda item: item[1]):
            if index < rows and other.get(token) != index:
                place = f"{other[token]} in {second}" if token in other else f"unknown to {second}"
                return f"token {token!r} is {index} in {first} and {place}"
    return None


def _tokens_without_row(
    models: Sequence[ModelVocabulary], tokenizer: TokenizerOutput | None, rows: int
) -> Iterator[str]:
    if tokenizer is None or tokenizer.index is None:
        return
    model = models[tokenizer.index]
    beyond = [token for token, row in (model.tokenizer.tokens if model.tokenizer else {}).items() if row >= rows]
    if beyond:
        yield (
            f"{len(beyond)} tokens of the tokenizer of {model.label}, e.g. {beyond[0]!r}, have no row there nor in the "
            "merged model; do not use them, or match rows by token (tokenizer_source in the recipe), which removes them"
        )


def _moved(
    models: Sequence[ModelVocabulary], first: int, tokenizer: TokenizerOutput | None
) -> Mapping[int, int | None]:
    if tokenizer is None or tokenizer.index is None or tokenizer.index == first:
        return {}
    ours, theirs = models[first].tokenizer, models[tokenizer.index].tokenizer
    return {} if ours is None or theirs is None or ours.same_tokens(theirs) else moved_ids(ours.tokens, theirs.tokens)


def _copied(models: Sequence[ModelVocabulary], candidates: Iterable[int]) -> TokenizerOutput | None:
    for index in candidates:
        tokenizer = models[index].tokenizer
        if tokenizer is not None:
            return TokenizerOutput(tokenizer.folder, index)
    return None
