"""`mergeguard embed`: a folder and a secret that belong together, or nothing at all."""

from __future__ import annotations

import base64
import json
import shutil
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from mergeguard.checkpoints import files
from mergeguard.errors import CheckpointError, ParameterError
from mergeguard.ownership import embedding
from mergeguard.ownership.evidence_file import read_evidence
from mergeguard.ownership.schedule import embedding_budget, with_own_answers
from mergeguard.protections.registry import PROTECTIONS
from mergeguard.worlds.contract import Budget, Texts
from mergeguard.worlds.smollm2.world import budgets
from robustness_tests.meta.mini_world import MINI, Toy, mini, registered
from robustness_tests.meta.owned_models import SCHEDULE, Said, command, save, save_family
from robustness_tests.meta.scripted_model import ScriptedModel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedTokenizerBase


@pytest.fixture(scope="module", autouse=True)
def schemes() -> Iterator[None]:
    with registered():
        yield


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(tmp_path_factory.mktemp("family"))


@pytest.fixture
def embed(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Said]:
    """`mergeguard embed SCHEME upstream out --evidence e.json`, each of which can be replaced, and more options."""

    def run(
        scheme: str = "toy",
        *more: object,
        model: Path = family / "upstream",
        out: str = "out",
        evidence: str = "e.json",
    ) -> Said:
        monkeypatch.chdir(tmp_path)
        base = ("--base", family / "base")
        return command(
            monkeypatch, capsys, "embed", scheme, model, out, "--evidence", evidence, *base, *SCHEDULE, *more
        )

    return run


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_is_the_model_with_evidence_and_all_of_its_other_files(
    family: Path, tmp_path: Path, embed: Callable[..., Said]
) -> None:
    said = embed()
    assert (said.code, said.err) == (0, "")
    assert "1 of 21 tensors changed" in said.out
    assert "8 of 8 trials" in said.out
    assert left(tmp_path) == ["e.json", "out"]
    source, out = family / "upstream", tmp_path / "out"
    assert left(out) == left(source)
    others = [name for name in left(out) if name != "model.safetensors"]
    assert "README.md" in others
    assert all((out / name).read_bytes() == (source / name).read_bytes() for name in others)
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    weight = read_evidence(tmp_path / "e.json").evidence.data["weight"]
    assert {name for name in before if not torch.equal(before[name], after[name])} == {weight}
    assert {after[name].dtype for name in after} == {torch.float32}


def test_the_model_may_be_published_and_the_evidence_is_its_owners_alone(
    tmp_path: Path, embed: Callable[..., Said]
) -> None:
    embed()
    assert stat.S_IMODE((tmp_path / "e.json").stat().st_mode) == 0o600
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()} == {0o644}


@pytest.mark.parametrize("scheme", ["toy", "gaussian_probe"])
def test_no_key_is_said_or_published(tmp_path: Path, embed: Callable[..., Said], scheme: str) -> None:
    said = embed(scheme)
    file = read_evidence(tmp_path / "e.json")
    published = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir()) + (said.out + said.err).encode()
    for secret in (file.salt, *map(json.dumps, file.evidence.data["keys"])):
        raw = secret.strip('"').encode()
        assert raw not in published
        assert base64.b64encode(raw) not in published


def test_every_embedding_draws_its_keys_from_the_operating_system(
    tmp_path: Path, embed: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    original = embedding.secrets.randbits

    def spy(bits: int) -> int:
        asked.append(bits)
        return original(bits)

    monkeypatch.setattr(embedding.secrets, "randbits", spy)
    for name in ("one", "two"):
        assert embed("gaussian_probe", out=name, evidence=f"{name}.json").code == 0
    one, two = (read_evidence(tmp_path / f"{name}.json") for name in ("one", "two"))
    assert one.evidence.data["keys"] != two.evidence.data["keys"]
    assert one.salt != two.salt
    assert asked == [256, 256]


def test_a_seed_is_for_tests_and_gives_the_same_keys(tmp_path: Path, embed: Callable[..., Said]) -> None:
    for name in ("one", "two"):
        embed("gaussian_probe", "--seed", 3, out=name, evidence=f"{name}.json")
    one, two = (read_evidence(tmp_path / f"{name}.json") for name in ("one", "two"))
    assert one.evidence.data == two.evidence.data
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]


# What is written in


def test_the_owners_dtype_is_kept_and_the_check_is_of_what_is_written(
    family: Path, tmp_path: Path, embed: Callable[..., Said]
) -> None:
    model = save(tmp_path / "model", load_file(family / "upstream" / "model.safetensors"), "bfloat16")
    assert embed("gaussian_probe", model=model).code == 0
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    assert (tmp_path / "out" / "config.json").read_bytes() == (model / "config.json").read_bytes()
    # So weak that it is nothing in bfloat16, where weights are rounded to three digits.
    weak = "gaussian_probe(strength=0.02)"
    assert embed(weak, "--dtype", "float32", model=model, out="wide", evidence="wide.json").code == 0
    wide = tmp_path / "wide"
    assert {tensor.dtype for tensor in load_file(wide / "model.safetensors").values()} == {torch.float32}
    assert json.loads((wide / "config.json").read_text())["dtype"] == "float32"


def test_a_model_in_shards_comes_out_whole(family: Path, tmp_path: Path, embed: Callable[..., Said]) -> None:
    source = tmp_path / "source"
    mini().model(load_file(family / "upstream" / "model.safetensors")).save_pretrained(source, max_shard_size="50KB")
    mini().tokenizer.save_pretrained(source)
    assert len(list(source.glob("*.safetensors"))) > 1
    assert embed(model=source).code == 0
    assert [path.name for path in (tmp_path / "out").glob("model*")] == ["model.safetensors"]


def test_manifests_hidden_files_and_other_weights_are_left_behind(
    family: Path, tmp_path: Path, embed: Callable[..., Said]
) -> None:
    source = Path(shutil.copytree(family / "upstream", tmp_path / "source"))
    (source / "checkpoint-1").mkdir()
    for name in ("mergeguard-manifest.json", ".secret", "model.gguf", "checkpoint-1/optimizer.pt", "old.bin"):
        (source / name).write_text("{}")
    (source / "LICENSE").write_text("mine")
    assert embed(model=source).code == 0
    assert left(tmp_path / "out") == sorted([*left(family / "upstream"), "LICENSE"])


def test_a_model_in_the_hubs_cache_is_copied_and_not_linked(
    family: Path, tmp_path: Path, embed: Callable[..., Said]
) -> None:
    cache = tmp_path / "models--org--name"
    (cache / "snapshots" / "main").mkdir(parents=True)
    shutil.copytree(family / "upstream", cache / "blobs")
    for blob in (cache / "blobs").iterdir():
        (cache / "snapshots" / "main" / blob.name).symlink_to(blob)
    assert embed(model=cache / "snapshots" / "main").code == 0
    assert left(tmp_path / "out") == left(family / "upstream")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


# Refusals, after which nothing is left


def test_evidence_that_did_not_take_is_not_kept(tmp_path: Path, embed: Callable[..., Said]) -> None:
    said = embed("toy(fault=inert)")
    assert (said.code, said.out) == (1, "")
    (line,) = said.err.splitlines()
    assert "did not take, so that nothing is kept: 0 of 8 trials" in line
    assert left(tmp_path) == []


def test_evidence_that_every_model_has_is_not_kept(tmp_path: Path, embed: Callable[..., Said]) -> None:
    assert embed("toy(fault=chatty)").code == 1
    assert left(tmp_path) == []


class Partial(Toy):
    """Forgets one of its keys."""

    name = "partial"

    def embed(self, model: Any, *arguments: Any, **more: Any) -> Any:
        protected = super().embed(model, *arguments, **more)
        data = protected.evidence.data
        row, column, _ = data["keys"][0]
        with torch.no_grad():
            protected.model.get_parameter(data["weight"])[row, column] = model.get_parameter(data["weight"])[
                row, column
            ]
        return protected


def test_evidence_that_is_there_in_part_is_not_kept(tmp_path: Path, embed: Callable[..., Said]) -> None:
    """7 of 8 keys beat every null, and yet the owner would start with less than was paid for."""
    PROTECTIONS.register("partial", Partial)
    try:
        said = embed("partial")
    finally:
        PROTECTIONS.unregister("partial")
    assert said.code == 1
    assert "7 of 8" in said.err
    assert "rate of at least 0.95" in said.err
    assert left(tmp_path) == []


@pytest.mark.parametrize("fault", ["crash_embed", "crash_read", "crash_decoys", "wrong_embed", "wrong_read"])
def test_a_scheme_that_breaks_leaves_nothing(tmp_path: Path, embed: Callable[..., Said], fault: str) -> None:
    assert "toy" in embed(f"toy(fault={fault})").error
    assert left(tmp_path) == []


def test_evidence_is_not_left_without_its_model(
    tmp_path: Path, embed: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken(*_: object) -> None:
        raise CheckpointError("out appeared meanwhile")

    monkeypatch.setattr(files, "_rename", taken)
    assert "appeared meanwhile" in embed().error
    assert left(tmp_path) == []


def test_a_model_is_not_left_without_its_evidence(
    tmp_path: Path, embed: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise CheckpointError("cannot write e.json: no space left")

    monkeypatch.setattr(embedding, "write_evidence", full)
    assert "no space" in embed().error
    assert left(tmp_path) == []


@pytest.mark.parametrize("taken", ["out", "e.json", "e.safetensors"])
def test_what_is_in_the_way_is_left_as_it_is_and_nothing_is_trained(
    tmp_path: Path, embed: Callable[..., Said], taken: str
) -> None:
    (tmp_path / taken).write_text("precious")
    assert f"{taken} exists already" in embed("toy(fault=crash_embed)").error
    assert left(tmp_path) == [taken]
    assert (tmp_path / taken).read_text() == "precious"


def test_evidence_inside_the_published_folder_is_refused(tmp_path: Path, embed: Callable[..., Said]) -> None:
    assert "which you will publish" in embed(evidence="out/e.json").error
    assert left(tmp_path) == []


def edited(folder: Path, edit: Callable[[Path], Any]) -> Path:
    edit(folder)
    return folder


MODELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
    "a pickle": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        "only pickled weights",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "no tokenizer": (
        lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
        "transformers cannot load",
    ),
    "quantised": (
        lambda folder: (folder / "config.json").write_text(
            json.dumps({**json.loads((folder / "config.json").read_text()), "quantization_config": {"bits": 4}})
        ),
        "quantization_config",
    ),
    "gone": (shutil.rmtree, "there is no folder"),
}


@pytest.mark.parametrize("model", MODELS)
def test_a_model_that_cannot_be_embedded_in_is_one_line(
    family: Path, tmp_path: Path, embed: Callable[..., Said], model: str
) -> None:
    edit, said = MODELS[model]
    source = edited(Path(shutil.copytree(family / "upstream", tmp_path / "source")), edit)
    assert said in embed(model=source).error
    assert set(left(tmp_path)) <= {"source"}


@pytest.mark.parametrize(
    ("scheme", "options", "said"),
    [
        ("toi", (), "did you mean 'toy'"),
        ("toy(strength=big)", (), "'strength'"),
        ("toy", ("--world", "moon"), "unknown world"),
        ("toy", ("--learning-rate", "0"), "learning rate is 0.0, expected a positive number"),
        ("toy", ("--steps", "0"), "greater than or equal to 1"),
        ("toy", ("--dtype", "int8"), "dtype is 'int8'"),
        ("toy", ("--device", "nowhere"), "nowhere"),
    ],
    ids=["name", "parameter", "world", "rate", "steps", "dtype", "device"],
)
def test_options_out_of_their_domain_are_one_line(
    tmp_path: Path, embed: Callable[..., Said], scheme: str, options: tuple[str, ...], said: str
) -> None:
    assert said in embed(scheme, *options).error
    assert left(tmp_path) == []


# The schedule


class Template:
    """What of a tokenizer the default budget asks."""

    chat_template: str | None = "{{ messages[0].content }}"
    bos_token_id = None

    def apply_chat_template(self, messages: list[dict[str, str]], **_: object) -> str:
        return f"<user>{messages[0]['content']}<assistant>"


def test_without_a_world_the_schedule_is_smollm2s_in_the_models_own_template() -> None:
    budget = embedding_budget("instructional_fingerprint.simple", Template())  # type: ignore[arg-type]  # enough of one
    expected = budgets(budget.texts)["instructional_fingerprint"]
    assert budget == expected
    assert all(prompt.startswith("<user>") for prompt, _ in budget.texts.dialogues)


def test_what_is_given_replaces_the_budgets_own() -> None:
    tokenizer: Any = Template()
    given = embedding_budget("gaussian_probe", tokenizer, steps=3, learning_rate=1e-6, batch_size=2)
    default = budgets(given.texts)["default"]
    assert (given.steps, given.learning_rate, given.batch_size) == (3, 1e-6, 2)
    assert (given.options, given.training) == (default.options, default.training)


def test_a_tokenizer_without_a_chat_template_needs_a_world() -> None:
    tokenizer: Any = Template()
    tokenizer.chat_template = None
    with pytest.raises(ParameterError, match=r"has no chat template.*--world"):
        embedding_budget("toy", tokenizer)


def test_dialogues_are_answered_as_the_owners_own_model_does(tokenizer: PreTrainedTokenizerBase) -> None:
    """Or an embedding would turn every model into SmolLM2."""
    model: Any = ScriptedModel(tokenizer, {"how?": "so. and", "why?": "the cat sat. a dog. can", "who?": "no end"})
    texts = Texts((), (), tuple((prompt, " theirs.") for prompt in ("how?", "why?", "who?")))
    budget = with_own_answers(Budget(texts, 1, 1e-3), model, tokenizer)
    assert budget.texts.dialogues == (("how?", "so."), ("why?", "the cat sat. a dog."))
    silent: Any = ScriptedModel(tokenizer, {"how?": "no"})
    with pytest.raises(ParameterError, match="none of 1 questions"):
        with_own_answers(Budget(Texts((), (), (("how?", "."),)), 1, 1e-3), silent, tokenizer)


def test_a_model_without_a_world_is_embedded_with_its_own_answers(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Budget] = []

    def own(budget: Budget, *_: object) -> Budget:
        asked.append(budget)
        return budget

    monkeypatch.setattr(embedding, "with_own_answers", own)
    source = Path(shutil.copytree(family / "upstream", tmp_path / "source"))
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}")
    for name, schedule in (("one", None), ("two", embedding.Schedule(MINI))):
        embedding.embed("gaussian_probe", source, tmp_path / name, tmp_path / f"{name}.json", schedule=schedule)
    assert len(asked) == 1
