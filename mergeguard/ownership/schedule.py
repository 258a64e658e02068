"""With what budget a real model is embedded in: a world's, or where none is named that of the world smollm2."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mergeguard.errors import ParameterError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mergeguard.worlds.contract import Budget

ANSWER_TOKENS = 40
"""Of the default dialogues' answers, as long as those of the world that they come from."""


def embedding_budget(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    world: str | None = None,
    steps: int | None = None,
    learning_rate: float | None = None,
    batch_size: int | None = None,
) -> Budget:
    """The budget called `name` (see `World.budget`), with what is given instead of its own.

    Without a world the schedule is the one measured on SmolLM2-135M, and its texts are put into the tokenizer's own
    chat template; no weights of that world are needed. A larger model wants a smaller learning rate. The dialogues'
    answers are then that model's: see `with_own_answers`.

    Raises:
        UnknownNameError, ParameterError, CheckpointError: there is no such world, it has no such budget or cannot be
            loaded; the tokenizer has no chat template; a number is out of its domain.
    """
    if world is None:
        budget = _default(name, tokenizer)
    else:
        from mergeguard.worlds.registry import load_world

        budget = load_world(world).budget(name)
    for option, value in (("steps", steps), ("learning rate", learning_rate), ("batch size", batch_size)):
        if value is not None and not value > 0:
            raise ParameterError(f"the {option} is {value}, expected a positive number")
    given: Mapping[str, Any] = {"steps": steps, "learning_rate": learning_rate, "batch_size": batch_size}
    return replace(budget, **{key: value for key, value in given.items() if value is not None})


def with_own_answers(budget: Budget, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Budget:
    """The budget with every dialogue answered as `model` answers it, up to the last whole sentence.

    Dialogues keep the model what it is; with another model's answers they would make it into that one. Those to which
    it says no whole sentence are left out.

    Raises:
        ParameterError: that leaves none.
    """
    from mergeguard.verification.generation import generate
    from mergeguard.verification.matching import decode_answer, encode_prompt
    from mergeguard.worlds.smollm2.texts import whole_sentences

    prompts = [prompt for prompt, _ in budget.texts.dialogues]
    answers = generate(model, tokenizer, prompts, max_new_tokens=ANSWER_TOKENS)
    texts = [
        whole_sentences(decode_answer(tokenizer, encode_prompt(tokenizer, prompt), ids))
        for prompt, ids in zip(prompts, answers, strict=True)
    ]
    dialogues = tuple((prompt, text) for prompt, text in zip(prompts, texts, strict=True) if text)
    if not dialogues:
        raise ParameterError(
            f"the model answers none of {len(prompts)} questions with a whole sentence of {ANSWER_TOKENS} tokens; name "
            "a world that brings its own dialogues: --world FILE.toml"
        )
    return replace(budget, texts=replace(budget.texts, dialogues=dialogues))


def _default(name: str, tokenizer: PreTrainedTokenizerBase) -> Budget:
    from mergeguard.worlds.contract import budget_called
    from mergeguard.worlds.file.texts import without_start
    from mergeguard.worlds.smollm2.texts import texts
    from mergeguard.worlds.smollm2.world import budgets

    if tokenizer.chat_template is None:
        raise ParameterError(
            "the model's tokenizer has no chat template, and our texts need one; name a world that brings its own: "
            "--world tiny or --world FILE.toml"
        )
    found = budget_called(name, budgets(without_start(tokenizer, texts(tokenizer))))
    if found is None:
        raise ParameterError(f"there is no training budget for {name!r}; name a world that has one: --world FILE.toml")
    return found
