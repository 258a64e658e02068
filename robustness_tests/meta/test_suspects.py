"""Suspects on disk: what of them is read, and those that are no models."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

import mergeguard
from mergeguard.checkpoints.source import StoredSource
from mergeguard.errors import (
    CheckpointError,
    IncompatibleModelsError,
    ParameterError,
    SchemeError,
    UnknownNameError,
)
from mergeguard.ownership.evidence_file import read_evidence
from mergeguard.ownership.suspect import LocalModels, without_secrets
from mergeguard.protections.gaussian_probe import keyed_gaussian
from mergeguard.protections.planted import AlwaysVerifies
from mergeguard.protections.registry import PROTECTIONS, make_protection
from mergeguard.verification import loading
from robustness_tests.meta.mini_world import mini, registered
from robustness_tests.meta.owned_models import SCHEMES, evidence_of, protected_family, save, verify_in

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module", autouse=True)
def schemes() -> Iterator[None]:
    with registered():
        yield


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return protected_family(tmp_path_factory.mktemp("family"))


# What is read, and how


def test_single_weights_are_read_without_loading_a_model(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = StoredSource.read

    def spy(source: StoredSource, name: str) -> torch.Tensor:
        read.append(f"{source.path.name}/{name}")
        return original(source, name)

    def refuse(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(StoredSource, "read", spy)
    monkeypatch.setattr(loading, "load_model", refuse)
    monkeypatch.setattr(loading, "load_tokenizer", refuse)
    assert verify_in(family, "gaussian_probe", "gaussian_probe", clean=[family / "donor"]).verified
    weight = read_evidence(family / "gaussian_probe.json").evidence.data["weight"]
    assert set(read) == {f"{model}/{weight}" for model in ("gaussian_probe", "base", "donor")}
    with pytest.raises(AssertionError, match="was loaded"):
        verify_in(family, "toy")


def test_streaming_and_loading_read_the_same(family: Path) -> None:
    file = read_evidence(family / "gaussian_probe.json")
    protection = make_protection("gaussian_probe")
    with LocalModels(protection, {"base": family / "base"}).open(family / "gaussian_probe") as suspect:
        (streamed,) = suspect.readings([file.evidence])
    model, base = (loading.load_model(family / name, "float32", "cpu") for name in ("gaussian_probe", "base"))
    loaded = protection.read(model, mini().tokenizer, file.evidence, {"base": base})
    assert (streamed.score, streamed.p_value) == (loaded.score, loaded.p_value)


def test_the_probe_reads_its_closed_form_off_a_file(family: Path, tmp_path: Path) -> None:
    state = load_file(family / "base" / "model.safetensors")
    name = read_evidence(family / "gaussian_probe.json").evidence.data["weight"]
    gaussian = keyed_gaussian("key", state[name].shape)
    save(tmp_path / "suspect", {**state, name: state[name] + 0.1 * gaussian})
    path = evidence_of(tmp_path, "gaussian_probe", weight=name, keys=["key"])
    found = mergeguard.verify(tmp_path / "suspect", path, base=family / "base")
    assert found.score == pytest.approx(float(gaussian.double().norm()), rel=1e-5)


def test_a_suspect_without_a_tokenizer_is_asked_with_anothers(family: Path, tmp_path: Path) -> None:
    suspect = Path(shutil.copytree(family / "toy", tmp_path / "suspect"))
    for file in suspect.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="transformers cannot load"):
        verify_in(family, suspect)
    assert verify_in(family, suspect, tokenizer=family / "base").verified


def test_a_hub_id_with_its_revision_is_downloaded(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def snapshot(name: str, revision: str | None = None, **_: object) -> str:
        asked.append((name, revision))
        return str(family / name.partition("/")[2])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    found = mergeguard.verify("org/toy@v2", family / "toy.json", base="org/base", clean=["org/donor@main"])
    assert (found.verified, found.model) == (True, "org/toy@v2")
    assert asked == [("org/donor", "main"), ("org/base", None), ("org/toy", "v2")]


def test_code_of_a_suspect_is_not_run(family: Path, tmp_path: Path) -> None:
    suspect = Path(shutil.copytree(family / "toy", tmp_path / "suspect"))
    (suspect / "evil.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')\nclass Evil: pass\n")
    for file, classes in (
        ("config.json", ("AutoConfig", "AutoModelForCausalLM")),
        ("tokenizer_config.json", ("AutoTokenizer",)),
    ):
        content = json.loads((suspect / file).read_text())
        content["auto_map"] = dict.fromkeys(classes, "evil.Evil")
        (suspect / file).write_text(json.dumps(content))
    assert verify_in(family, suspect).verified  # as transformers' own class for it
    unknown = {**json.loads((suspect / "config.json").read_text()), "model_type": "evil"}
    (suspect / "config.json").write_text(json.dumps(unknown))
    with pytest.raises(CheckpointError, match="transformers cannot load") as caught:
        verify_in(family, suspect)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "owned").exists()


# Suspects that are no models, and other wrong input


def test_pickles_are_refused_unopened(family: Path, tmp_path: Path) -> None:
    suspect = Path(shutil.copytree(family / "toy", tmp_path / "suspect"))
    (suspect / "model.safetensors").unlink()
    (suspect / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    for scheme in SCHEMES:
        with pytest.raises(CheckpointError, match=r"only pickled weights \(pytorch_model.bin\)"):
            verify_in(family, suspect, scheme)


def test_a_model_that_lacks_a_tensor_is_no_model(family: Path, tmp_path: Path) -> None:
    """transformers would make the tensor up, and the reading would be of what it made up."""
    suspect = Path(shutil.copytree(family / "toy", tmp_path / "suspect"))
    state = load_file(suspect / "model.safetensors")
    weight = read_evidence(family / "gaussian_probe.json").evidence.data["weight"]
    del state[weight]
    save_file(state, suspect / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks the tensor"):
        verify_in(family, suspect)
    with pytest.raises(IncompatibleModelsError, match=f"the suspect has no tensor '{weight}'"):
        verify_in(family, suspect, "gaussian_probe")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_damaged_and_absent_suspects_are_one_line(family: Path, tmp_path: Path, scheme: str) -> None:
    suspect = Path(shutil.copytree(family / "toy", tmp_path / "suspect"))
    weights = suspect / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for model in (suspect, tmp_path / "absent", tmp_path):
        with pytest.raises(CheckpointError) as caught:
            verify_in(family, model, scheme)
        assert str(model) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_suspect_of_another_shape_is_refused(family: Path, tmp_path: Path) -> None:
    state = load_file(family / "toy" / "model.safetensors")
    weight = read_evidence(family / "gaussian_probe.json").evidence.data["weight"]
    suspect = Path(shutil.copytree(family / "toy", tmp_path / "suspect"))
    save_file({**state, weight: state[weight][:, :-1].contiguous()}, suspect / "model.safetensors")
    with pytest.raises(IncompatibleModelsError, match=r"the base's is \(32, 64\)"):
        verify_in(family, suspect, "gaussian_probe")


def test_a_reference_that_is_needed_is_asked_for_by_name(family: Path) -> None:
    with pytest.raises(ParameterError, match=r"against the base model .*: add --base MODEL"):
        mergeguard.verify(family / "toy", family / "toy.json")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"decoys": 39}, "at least 40"),
        ({"clean": ["toy"]}, "is the suspect itself"),
        ({"clean": ["donor", "donor"]}, "named twice"),
        ({"device": "nowhere"}, "cannot be put on the device"),
    ],
    ids=["few decoys", "itself", "twice", "no device"],
)
def test_options_out_of_their_domain_are_refused(family: Path, options: dict[str, Any], said: str) -> None:
    given = {**options, "clean": [family / name for name in options.get("clean", ())]}
    with pytest.raises(ParameterError, match=said):
        verify_in(family, "toy", **given)


def test_a_scheme_that_is_not_installed_is_named(family: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="unknown protection 'theirs'"):
        mergeguard.verify(family / "toy", evidence_of(tmp_path, "theirs", keys=[1]))


@contextmanager
def using(scheme: type[Any], name: str) -> Iterator[None]:
    PROTECTIONS.register(name, scheme)
    try:
        yield
    finally:
        PROTECTIONS.unregister(name)


class Leaks(AlwaysVerifies):
    """Crashes with a key in its message."""

    name = "leaks"

    def hit(self, model: Any, key: Any) -> bool:
        raise KeyError(f"no answer to {key}")


class LeaksFirst(AlwaysVerifies):
    """Crashes as it makes decoys."""

    name = "leaks_first"

    def decoys(self, evidence: Any, n: int, rng: Any) -> Any:
        raise ValueError(f"no decoy like {evidence.data['keys']}")


class Moves(AlwaysVerifies):
    """Changes what it reads."""

    name = "moves"

    def hit(self, model: Any, key: Any) -> bool:
        with torch.no_grad():
            next(iter(model.parameters())).add_(1)
        return True


class Lies(AlwaysVerifies):
    """Returns no reading."""

    name = "lies"

    def read(self, *_: Any) -> Any:
        return 1.0


@pytest.mark.parametrize("scheme", [Leaks, LeaksFirst, Moves, Lies])
def test_a_scheme_that_breaks_gives_no_verdict_and_shows_no_key(family: Path, tmp_path: Path, scheme: Any) -> None:
    with using(scheme, scheme.name), pytest.raises(SchemeError) as caught:
        mergeguard.verify(family / "toy", evidence_of(tmp_path, scheme.name, keys=["hunter2 ハ"]))
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None or "hunter2" not in str(caught.value.__cause__)


def test_keys_are_taken_out_of_messages_in_every_form() -> None:
    data = {"keys": ["ハ\n-key"], "deep": [{"more": "other key"}], "short": "a"}
    for text in ("ハ\n-key", repr("ハ\n-key"), ascii("ハ\n-key"), "an other key!"):
        hidden = without_secrets(f"cannot ask {text}", data)
        assert "key" not in hidden.replace("<secret>", "")
    assert without_secrets("a cat", data) == "a cat"


def test_a_verification_holds_no_secret_and_is_plain_data(family: Path) -> None:
    for scheme in SCHEMES:
        file = read_evidence(family / f"{scheme}.json")
        found = verify_in(family, scheme, scheme)
        shown = json.dumps(found.to_json(), allow_nan=False) + repr(found)
        assert json.loads(json.dumps(found.to_json()))["schema_version"] == "1.0"
        assert file.salt not in shown
        assert all(json.dumps(key) not in shown for key in file.evidence.data["keys"])
