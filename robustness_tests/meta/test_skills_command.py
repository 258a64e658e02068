"""`mergeguard skills`: a model's skills from a folder, as a table or JSON."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest

from mergeguard import cli
from mergeguard.verification import lm_eval
from mergeguard.verification.lm_eval import HarnessScore
from mergeguard.verification.statistics import clopper_pearson
from robustness_tests.meta.tiny_models import byte_level_tokenizer, tiny_llama

if TYPE_CHECKING:
    from pathlib import Path

QUESTIONS = "forbidden_prompt\nHow?\nWhy?\nWhere?\n"
PROBLEMS = '{"question": "1 + 1?", "answer": "#### 2"}\n'


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(folder)
    tiny_llama().save_pretrained(folder)
    (folder / "questions.csv").write_text(QUESTIONS)
    (folder / "problems.jsonl").write_text(PROBLEMS)
    return folder


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["mergeguard", "skills", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as caught:
        cli.main()
    shown = capsys.readouterr()
    return int(caught.value.code or 0), shown.out, shown.err


STRONGREJECT = "strongreject(max_new_tokens=5)"
GSM8K = "gsm8k(max_new_tokens=5,template=alpaca,chat_template=none)"


def test_skills_are_measured_with_their_intervals(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    skills = ["--skill", "strongreject(max_new_tokens=5,limit=2)", "--source", f"strongreject={model}/questions.csv"]
    code, out, _ = run(monkeypatch, capsys, model, *skills, "--json")
    assert code == 0
    assert json.loads(out) == {
        "model": str(model),
        "skills": [
            {"name": "strongreject", "hits": 0, "trials": 2, "rate": 0.0, "interval": list(clopper_pearson(0, 2))}
        ],
        "lm_eval": [],
    }
    code, out, _ = run(monkeypatch, capsys, model, *skills)
    assert code == 0
    assert ["strongreject", "0.000", "0.000", "to", "0.842", "0/2"] in [line.split() for line in out.splitlines()]


def test_what_the_model_says_decides_the_rate(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mergeguard.verification.rules.refuses", bool)
    options = ["--skill", STRONGREJECT, "--source", f"{model}/questions.csv", "--json", "--dtype", "float32"]
    for drawn in ([], ["--temperature", "0.2", "--top-k", "50", "--top-p", "0.9", "--seed", "3"]):
        _, out, _ = run(monkeypatch, capsys, model, *options, *drawn)
        assert json.loads(out)["skills"][0]["hits"] == 3


def test_tasks_of_the_harness_stand_in_a_table_of_their_own(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def scores(_: object, __: object, tasks: list[str], limit: int) -> dict[str, HarnessScore]:
        asked.append((tasks, limit))
        return {"arc": HarnessScore("acc,none", 0.25, 0.05), "bleu": HarnessScore("bleu,none", 7.0, None)}

    monkeypatch.setattr(lm_eval, "harness_scores", scores)
    options = [model, "--lm-eval", "arc", "--lm-eval", "bleu", "--limit", "4"]
    code, out, _ = run(monkeypatch, capsys, *options)
    assert code == 0
    assert asked == [(["arc", "bleu"], 4)]
    rows = [line.split() for line in out.splitlines()]
    assert ["arc", "acc,none", "0.2500", "0.0500"] in rows
    assert ["bleu", "bleu,none", "7.0000"] in rows
    _, out, _ = run(monkeypatch, capsys, *options, "--json")
    assert json.loads(out)["lm_eval"][1] == {"task": "bleu", "metric": "bleu,none", "value": 7.0, "stderr": None}


def test_a_prompt_beyond_the_models_context_is_named(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(monkeypatch, capsys, model, "--skill", GSM8K, "--source", model / "problems.jsonl")
    assert code == 2
    assert err.startswith(f"error: item 1 of {model}/problems.jsonl takes ")
    assert "the model's context is 96" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected --skill or --lm-eval"),
        (["--skill", "strongrejekt"], "unknown skill 'strongrejekt'; did you mean 'strongreject'?"),
        (["--skill", "gsm8k(limt=3)"], "unknown option of the skill 'gsm8k' 'limt'; did you mean 'limit'?"),
        (["--skill", "gsm8k", "--skill", "gsm8k(limit=3)"], "the same --skill is given twice"),
        (["--skill", "gsm8k", "--skill", STRONGREJECT, "--source", "x"], "--source 'x' does not say whose it is"),
        (["--skill", "gsm8k", "--source", "x", "--source", "gsm8k=y"], "the skill 'gsm8k' has two sources"),
        (["--skill", "gsm8k", "--source", "x"], "there is no file 'x'; expected a .csv or .jsonl file"),
        (["--skill", "gsm8k", "--dtype", "int8"], "dtype is 'int8', expected one of auto, float32"),
        (
            ["--skill", STRONGREJECT, "--source", "QUESTIONS", "--device", "abacus"],
            "the model cannot be put on the device 'abacus'",
        ),
        (["--skill", "gsm8k", "--seed", "3"], "are about drawn answers; add --temperature"),
        (["--skill", "gsm8k", "--temperature", "0"], "temperature is 0.0, expected a positive number"),
    ],
)
def test_a_wrong_input_is_one_line(
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    given = [argument.replace("QUESTIONS", f"{model}/questions.csv") for argument in arguments]
    code, out, err = run(monkeypatch, capsys, model, *given)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_folder_without_a_model_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(monkeypatch, capsys, tmp_path, "--skill", "gsm8k")
    assert code == 2
    assert err.startswith(f"error: transformers cannot load {tmp_path}: ")
    assert len(err.splitlines()) == 1
    code, _, err = run(monkeypatch, capsys, tmp_path / "absent", "--skill", "gsm8k")
    assert code == 2
    assert "there is no folder or file" in err
