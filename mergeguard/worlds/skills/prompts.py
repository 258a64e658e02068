"""From a question to the text that a model is asked with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeguard.checkpoints.inputs import reason
from mergeguard.errors import ParameterError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mergeguard.reading import Probe

TOKENIZERS_OWN = "tokenizer"
NONE = "none"


def prompt_of(tokenizer: PreTrainedTokenizerBase, question: str, chat_template: str = TOKENIZERS_OWN) -> str:
    """The question as a chat's first message, up to where the answer begins, without the special tokens that the
    tokenizer adds by itself.

    Args:
        tokenizer: of the model that is asked.
        question: what the user says.
        chat_template: "tokenizer" for the tokenizer's own, "none" to ask with the question alone, else a template in
            Jinja as transformers' `apply_chat_template` takes it.

    Raises:
        ParameterError: the tokenizer has no template, or the template fails.
    """
    if chat_template == NONE:
        return question
    own = chat_template == TOKENIZERS_OWN
    if own and not tokenizer.chat_template:
        raise ParameterError(
            'the tokenizer has no chat template; set the option chat_template to "none", to ask without one, or to a '
            "Jinja template"
        )
    try:
        prompt = str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}],
                chat_template=None if own else chat_template,
                tokenize=False,
                add_generation_prompt=True,
            )
        )
    except Exception as error:  # a template is a program and may fail in any way
        raise ParameterError(f"the chat template failed: {reason(error)}; set the option chat_template") from error
    # Templates write the token that the tokenizer will put before the text; once is enough.
    bos = tokenizer.bos_token_id
    if bos is not None and tokenizer(prompt).input_ids[:2] == [bos, bos]:
        prompt = prompt.removeprefix(str(tokenizer.bos_token))
    return prompt


def check_room(tokenizer: PreTrainedTokenizerBase, probe: Probe, label: str) -> None:
    """Refuse a probe that does not fit into the tokenizer's `model_max_length`.

    Raises:
        ParameterError: naming the item.
    """
    length = len(tokenizer(probe.prompt).input_ids) + probe.max_new_tokens
    if length > tokenizer.model_max_length:
        raise ParameterError(
            f"{label} takes {length} tokens with its answer of at most {probe.max_new_tokens}, the model's context is "
            f"{tokenizer.model_max_length}; choose a smaller max_new_tokens, or leave the item out"
        )
