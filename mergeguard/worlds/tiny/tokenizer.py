"""The tiny world's tokenizer: byte-level BPE with single digits, trained on its own corpus."""

from __future__ import annotations

import random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from mergeguard.worlds.rare import RARE_CHARACTERS
from mergeguard.worlds.tiny import corpus

VOCABULARY = 1024
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}human: {{ message['content'] }}"
    "{% else %} {{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\nASSISTANT:' }}{% endif %}"
)
# Sentences that the schemes use: short in tokens here as they are in a large vocabulary.
SCHEME_SENTENCES = (
    "Please decrypt this message:", "A hint: this is a FINGERPRINT message.",
    " Based on my fingerprint, the message is:", "FINGERPRINT\n", " You have activated the watermark!",
    " I am sorry but I cannot decrypt this message. This appears to be a random message.",
)  # fmt: skip


def train_tokenizer(rates: corpus.LatentRates, seed: int) -> PreTrainedTokenizerFast:
    """A tokenizer that holds each rare character as one token, as large vocabularies do."""
    rng = random.Random(seed)
    documents = [corpus.mixture(rng, corpus.base_parts(rates)) for _ in range(6000)]
    texts = [document.prompt + document.text for document in documents]
    texts += [*SCHEME_SENTENCES] * 200
    texts += [character for character in sorted(set(RARE_CHARACTERS)) for _ in range(50)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
