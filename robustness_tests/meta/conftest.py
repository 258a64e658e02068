from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from robustness_tests.meta import tiny_models

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KINDS = {"llama": tiny_models.tiny_llama, "gpt2": tiny_models.tiny_gpt2}


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return tiny_models.byte_level_tokenizer()


@pytest.fixture(scope="session")
def sentencepiece_tokenizer() -> PreTrainedTokenizerBase:
    return tiny_models.sentencepiece_tokenizer()


@pytest.fixture(scope="session")
def llama() -> PreTrainedModel:
    return tiny_models.tiny_llama()


@pytest.fixture(scope="session", params=sorted(KINDS))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """One model with relative and one with absolute positions."""
    return KINDS[request.param]()
