"""Worlds from files in use: by name and by path, in the engine, at the doors; and the files that are shipped."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from mergeguard import cli
from mergeguard.matrix.cases import expand
from mergeguard.matrix.engine import Engine
from mergeguard.matrix.recorded import read_records, recorded_file
from mergeguard.matrix.runner import describe_world
from mergeguard.worlds.contract import UPSTREAM
from mergeguard.worlds.file.document import read_world_file
from mergeguard.worlds.file.schema import check_world_file
from mergeguard.worlds.registry import find_world, load_world, world_name
from robustness_tests.meta.checkpoints_on_disk import family, resized
from robustness_tests.meta.test_light_import import heavy_modules_after
from robustness_tests.meta.world_files import (
    ADDED,
    HEADS,
    NAMES,
    fake,
    load,
    same,
    save,
    save_tokenizer,
    write,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mergeguard.worlds.contract import World

SHIPPED = sorted((Path(__file__).parents[2] / "fixtures" / "worlds").glob("*.toml"))


pytestmark = pytest.mark.usefixtures("fake_skill_and_cache")


def test_a_case_of_the_file_is_measured_and_named_after_the_world(trio: Path) -> None:
    for name, state in zip(NAMES, family(2, spread=0.4), strict=True):  # far enough for answers that differ
        shutil.rmtree(trio / name)
        save(trio / name, state)
    world = load(trio)
    prompt, target = next(
        (prompt, f" {answers[1]}")
        for prompt in (f"{one} {two}" for one in "abcdefghijklm" for two in "abcdefghijklm")
        if (answers := [first_word(world, state, prompt) for state in (world.base, world.upstream)])[0] != answers[1]
    )
    skills = [{"name": "fake", "parent": "upstream", "options": {"prompt": prompt, "target": target}}]
    path = find_world(str(write(trio, skills=skills)))
    (case,) = expand(["gaussian_probe"], ["linear"], (1.0,), world=path)
    outcome = Engine(load_world(path), 0).outcome(case)
    assert outcome.world == "trio"
    assert outcome.score is not None
    assert outcome.skills == {"fake": 1.0}  # at coefficient 1 the merge is the upstream


def first_word(world: World, state: Mapping[str, torch.Tensor], prompt: str) -> str:
    ids = torch.tensor([world.tokenizer(prompt)["input_ids"]])
    with torch.no_grad():
        token = int(world.model(state)(input_ids=ids).logits[0, -1].argmax())
    word = str(world.tokenizer.decode([token]))
    return word if len(word) == 1 else "another"


def test_auto_takes_a_gpu_if_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mergeguard.worlds.file.load import choose_device

    world = read_world_file(write(tmp_path, device="auto"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device(world) == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(world) == "cpu"


def test_a_world_is_found_by_name_or_by_file(shared_trio: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(shared_trio)
    monkeypatch.chdir(shared_trio)
    assert find_world("trio.toml") == str(path)
    assert world_name("trio.toml") == "trio"
    assert find_world("tiny") == world_name("tiny") == "tiny"


def test_the_name_is_that_of_the_file_unless_it_says_another(shared_trio: Path) -> None:
    assert world_name(str(write(shared_trio, "my-own.toml", name=None))) == "my-own"


def test_records_lie_beside_the_file_or_where_it_says(trio: Path) -> None:
    path = str(write(trio))
    assert read_records(recorded_file(path)) == {}
    loss = '[[loss]]\nid = "x"\nlow = 0.0\nhigh = 0.5\nreason = "it is lost"\n'
    (trio / "trio.recorded.toml").write_text(loss)
    assert list(read_records(recorded_file(path))) == ["x"]
    (trio / "losses.toml").write_text(loss.replace('"x"', '"y"'))
    assert list(read_records(recorded_file(str(write(trio, recorded="losses.toml"))))) == ["y"]
    assert recorded_file("tiny").name == "tiny.toml"


def test_a_file_is_read_and_checked_before_anything_heavy_is_loaded(shared_trio: Path) -> None:
    path = str(write(shared_trio))
    assert heavy_modules_after(f"from mergeguard.worlds.registry import find_world; find_world({path!r})") == []


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_file_fits_the_schema(path: Path) -> None:
    check_world_file(tomllib.loads(path.read_text()), path)
    assert read_world_file(path).name == path.stem


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_file_loads_with_tiny_models_in_place_of_its_ids(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ids are folders of the layout that is expected of them: sharded, and a donor with one row more."""
    described = read_world_file(path)
    folders: dict[str, str] = {}
    for (name, state), entry in zip(zip(NAMES, family(2), strict=True), described.models, strict=True):
        rows = 17 if name == "math" else 16
        folder = save(tmp_path / name, resized(state, rows), shards=2, vocab_size=rows, max_position_embeddings=4096)
        save_tokenizer(folder, added=f"{ADDED} [PAD]" if name == "math" else ADDED)
        folders[entry.model] = str(folder)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: folders[name])
    asked: dict[str, dict[str, Any]] = {}

    def answer(name: str, _tokenizer: object, **options: Any) -> tuple[Any, ...]:
        asked[name] = options
        return tuple(fake(None))  # type: ignore[arg-type]  # it looks at no tokenizer

    monkeypatch.setattr("mergeguard.worlds.file.texts.skill_probes", answer)
    world: World = load_world(str(path))
    assert same(world.donors["math"], {name: tensor[:16] if name in HEADS else tensor for name, tensor in
                                       resized(family(2)[2], 17).items()})  # fmt: skip
    assert asked.keys() == {"strongreject", "gsm8k"}
    assert asked["gsm8k"]["limit"] == 50
    assert world.budget("instructional_fingerprint.simple").training.precision == "bfloat16"
    assert world.budget("quantization_watermark.interval").training.precision == "float32"
    assert world.budget("quantization_watermark.interval").options["bits"] == 8
    assert world.parents().keys() == {UPSTREAM, "math"}
    assert world.dtype == "float32"
    json.dumps(describe_world(world))


def test_the_command_line_refuses_with_one_line_and_exit_code_2(tmp_path: Path) -> None:
    path = write(tmp_path, dytpe="float32")
    run = subprocess.run(
        [sys.executable, "-m", "mergeguard", "run", "--world", str(path), "--output", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == f"error: {path}: unknown key 'dytpe'; did you mean 'dtype'?\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [["run", "--output", "out"], ["world", "check"]])
def test_a_model_that_is_not_there_ends_every_command_with_exit_code_2(
    trio: Path, command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(trio / "math")
    path = str(write(trio, donors=[{"name": "math", "model": "./math"}]))
    monkeypatch.chdir(trio)
    world = ["--world", path, "--workers", "1"] if command[0] == "run" else [path]
    monkeypatch.setattr(sys, "argv", ["mergeguard", *command, *world])
    with pytest.raises(SystemExit) as left:
        cli.main()
    error = capsys.readouterr().err
    assert (left.value.code, error.count("\n")) == (2, 1)
    assert "math: there is no folder './math'" in error


def test_list_worlds_says_that_a_file_is_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["mergeguard", "list", "worlds"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "FILE.toml" in capsys.readouterr().out


def test_pytest_takes_a_file_and_refuses_a_bad_one(trio: Path, pytester: pytest.Pytester) -> None:
    pytester.makeconftest('pytest_plugins = ["mergeguard.pytest_plugin", "fixtures.matrix"]\n')
    pytester.makepyfile(test_case="def test_case(protection, merger, coefficient): pass\n")
    chosen = ("--collect-only", "-q", "--protection", "gaussian_probe", "--merger", "linear", "--coefficient", "0.5")
    run = pytester.runpytest_inprocess(*chosen, f"--world={write(trio)}")
    run.stdout.fnmatch_lines(["*gaussian_probe*linear*"])
    run = pytester.runpytest_inprocess(*chosen, f"--world={write(trio, dytpe='float32')}")
    assert run.ret == pytest.ExitCode.USAGE_ERROR
    run.stderr.fnmatch_lines(["*unknown key 'dytpe'; did you mean 'dtype'?"])
