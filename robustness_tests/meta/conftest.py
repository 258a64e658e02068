from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from robustness_tests.meta import tiny_models

if TYPE_CHECKING:
    from collections.abc import Iterator

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


@pytest.fixture
def fake_skill_and_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test of world files needs around it."""
    from robustness_tests.meta.world_files import fake_skill

    monkeypatch.setenv("MERGEGUARD_CACHE", str(tmp_path_factory.mktemp("cache")))
    with fake_skill():
        yield


@pytest.fixture(scope="module")
def shared_trio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base, upstream and donor on disk, for tests that change nothing."""
    from robustness_tests.meta.world_files import save_trio

    return save_trio(tmp_path_factory.mktemp("trio"))


@pytest.fixture
def trio(shared_trio: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(shared_trio, tmp_path / "trio"))
