"""Which row of which model becomes which output row, and the tensors made so. torch is imported when tensors come."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

Fill: TypeAlias = "tuple[int, int] | Literal['mean', 'zero']"
"""Where an output row comes from that a model lacks: (position of a member, its row), or a rule."""


@dataclass(frozen=True)
class TokenizerOutput:
    """The tokenizer to write.

    Attributes:
        folder: its files are copied.
        index: the model that the folder belongs to; None if it is not merged.
        text: what to write as tokenizer.json instead of the folder's, without copies of older formats; None copies it.
        dropped: tokens of the folder's tokenizer that `text` lacks.
    """

    folder: Path
    index: int | None
    text: str | None = None
    dropped: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class VocabularyPlan:
    """How the vocabulary tensors of all models become tensors of equally many rows.

    Every output row of a model is a row of its own, a fill (a row of one model, the mean over the models that have the
    row, or zeros) or padding (the mean of the model's other output rows).

    Attributes:
        rows: of every vocabulary tensor in the output; None if there is none.
        changed: whether any tensor changes; if not, the output keeps its config's vocab_size.
        tensors: names of the tensors that `align` changes.
        own: for each model its own row of the leading output rows, or -1.
        named: the output rows that are not padding, in order.
        fills_for: the fills of a merge of only these models, by output row.
        warnings: one line each.
        tokenizer: what to write; None if no model has a tokenizer.
        moved_ids: ids of the base's tokens (without a base the first model's) that are others in the output, or None.
        members: indices of the models that the plan is for.
    """

    rows: int | None
    changed: bool
    tensors: frozenset[str]
    own: tuple[Sequence[int], ...]
    named: Sequence[int]
    fills_for: Callable[[tuple[int, ...]], dict[int, Fill]]
    warnings: tuple[str, ...]
    tokenizer: TokenizerOutput | None
    members: tuple[int, ...]
    moved_ids: Mapping[int, int | None] = field(default_factory=dict)

    @cached_property
    def fills(self) -> Mapping[int, Fill]:
        """Rows for models that lack them, by output row, sorted."""
        return dict(sorted(self.fills_for(self.members).items()))

    def restrict(self, members: Sequence[int]) -> VocabularyPlan:
        """The plan for a slice that reads only some of the models, by index, in this order.

        Raises:
            IncompatibleModelsError: no member has a row that the policy needs.
            ParameterError: a token's source is not a member.
        """
        chosen = tuple(members)
        plan = replace(self, members=chosen, own=tuple(self.own[self.members.index(index)] for index in chosen))
        _ = plan.fills  # so that what is missing is found now
        return plan

    def align(self, name: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The models' tensors with equally many rows.

        Args:
            name: of the tensor in the output.
            tensors: [rows of the model, ...], one per member in their order, already cast to the recipe's dtype.

        Returns:
            Tensors [rows, ...] in the inputs' promoted dtype, not to be written to: an input itself where nothing
            changes, a view where rows are cut, else a new tensor. Means are taken in that dtype, in the members' order.
        """
        import torch

        if not self.changed or name not in self.tensors or self.rows is None:
            return list(tensors)
        dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
        models = [tensor.to(dtype) for tensor in tensors]
        sources = [_index(own, self.rows) for own in self.own]
        fills = _filled_rows(models, sources, self.fills)
        return [
            _leading(model, self.rows) if source.equal(torch.arange(self.rows)) else self._aligned(model, source, fills)
            for model, source in zip(models, sources, strict=True)
        ]

    def _aligned(self, model: Tensor, source: Tensor, fills: Tensor) -> Tensor:
        import torch

        result = model.new_zeros((len(source), *model.shape[1:]))
        present = source >= 0
        result[present] = model[source[present]]
        places = torch.tensor(list(self.fills), dtype=torch.long)
        lacking = ~present[places]
        result[places[lacking]] = fills[lacking]
        if len(self.named) < len(result):
            padding = torch.ones(len(result), dtype=torch.bool)
            padding[torch.tensor(self.named)] = False
            leading = self.named == range(len(self.named))
            result[padding] = (result[: len(self.named)] if leading else result[~padding]).mean(dim=0)
        return result


def _leading(model: Tensor, rows: int) -> Tensor:
    return model if len(model) == rows else model[:rows]


def _index(own: Sequence[int], rows: int) -> Tensor:
    """A model's own row of each output row, -1 where it has none: [rows], int64."""
    import torch

    source = torch.full((rows,), -1)
    source[: len(own)] = torch.tensor(own, dtype=torch.long)
    return source


def _filled_rows(models: Sequence[Tensor], sources: Sequence[Tensor], fills: Mapping[int, Fill]) -> Tensor:
    """The rows of `fills` in their order: [number of fills, ...]."""
    import torch

    result = models[0].new_zeros((len(fills), *models[0].shape[1:]))
    for position, model in enumerate(models):
        taken = [(place, fill[1]) for place, fill in enumerate(fills.values()) if fill[0] == position]
        if taken:
            places, rows = torch.tensor(taken).T
            result[places] = model[rows]
    averaged = [(place, row) for place, (row, fill) in enumerate(fills.items()) if fill == "mean"]
    if averaged:
        places, rows = torch.tensor(averaged).T
        count = torch.zeros(len(rows), dtype=result.dtype)
        for model, source in zip(models, sources, strict=True):
            has = source[rows] >= 0
            result[places[has]] += model[source[rows[has]]]
            count += has
        result[places] /= count.reshape(-1, *[1] * (result.dim() - 1))
    return result


def moved_ids(tokens: Mapping[str, int], output: Mapping[str, int]) -> dict[int, int | None]:
    """Ids in `tokens` that mean another token in `output` -> the id there of the token that they mean, None without."""
    return {index: output.get(token) for token, index in tokens.items() if output.get(token) != index}
