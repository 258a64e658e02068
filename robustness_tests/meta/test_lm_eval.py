"""Tasks of lm-evaluation-harness on a loaded model."""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from mergeguard.errors import ParameterError
from mergeguard.verification.lm_eval import HarnessScore, harness_scores
from mergeguard.verification.matching import encode_prompt
from robustness_tests.meta.tiny_models import tiny_llama

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ITEMS = [("the cat sat on", " the mat", " a plan"), ("a man, a plan", " a canal", " the dog"), ("the", " dog", " cat")]


def likelihood(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> float:
    context, whole = encode_prompt(tokenizer, prompt), encode_prompt(tokenizer, prompt + answer)
    assert whole[: len(context)] == context
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(float(logits[place - 1, whole[place]]) for place in range(len(context), len(whole)))


@pytest.mark.filterwarnings("ignore")  # the harness's own
def test_a_task_of_the_harness_is_scored_as_by_hand(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    model = tiny_llama()
    data = tmp_path / "items.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": p, "choices": [first, second], "gold": 0}) + "\n" for p, first, second in ITEMS)
    )
    task = tmp_path / "which.yaml"
    task.write_text(f"""
task: which
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {tmp_path / "cache"}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: choices
doc_to_target: gold
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
""")
    right = [
        likelihood(model, tokenizer, prompt, first) > likelihood(model, tokenizer, prompt, second)
        for prompt, first, second in ITEMS
    ]
    [(name, score)] = harness_scores(model, tokenizer, [str(task)], limit=2).items()
    assert name == "which"
    assert score.metric == "acc,none"
    assert score.value == pytest.approx(sum(right[:2]) / 2)
    assert score.stderr is not None
    assert tokenizer.pad_token is None
    with pytest.raises(ParameterError, match="lm-evaluation-harness failed on no_such_task: "):
        harness_scores(model, tokenizer, ["no_such_task"])


def harness(monkeypatch: pytest.MonkeyPatch, results: Any) -> list[dict[str, Any]]:
    """A package `lm_eval` whose evaluation gives `results`, and the list of what it is asked for."""
    asked: list[dict[str, Any]] = []

    def simple_evaluate(model: Any, **options: Any) -> dict[str, Any]:
        asked.append({"model": model, **options})
        if isinstance(results, Exception):
            raise results
        return {"results": results}

    for name in ("lm_eval", "lm_eval.models"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", SimpleNamespace(simple_evaluate=simple_evaluate))
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", SimpleNamespace(HFLM=lambda **options: options))
    return asked


def test_the_first_metric_counts_with_its_error(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = {
        "a": {
            "alias": "a",
            "sample_len": 3,
            "exact_match,strict": 0.5,
            "exact_match_stderr,strict": 0.1,
            "acc,none": 1,
        },
        "b": {"alias": "b", "bleu,none": 7, "bleu_stderr,none": "N/A"},
        "group": {"alias": "group", " ": " "},
    }
    asked = harness(monkeypatch, results)
    assert harness_scores(llama, tokenizer, ("a", "b"), 5) == {
        "a": HarnessScore("exact_match,strict", 0.5, 0.1),
        "b": HarnessScore("bleu,none", 7.0, None),
    }
    assert asked[0]["tasks"] == ["a", "b"]
    assert asked[0]["limit"] == 5
    assert asked[0]["model"]["pretrained"] is llama


def test_what_the_harness_raises_is_one_line(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness(monkeypatch, ConnectionError("no route\nto host"))
    with pytest.raises(ParameterError, match=r"lm-evaluation-harness failed on a, b: no route$"):
        harness_scores(llama, tokenizer, ["a", "b"])


def test_an_absent_harness_is_named_with_its_extra(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("lm_eval", "lm_eval.evaluator"):  # the second too where an earlier test has loaded it
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ParameterError, match=r"need its package; install mergeguard\[lm-eval\]"):
        harness_scores(llama, tokenizer, ["a"])
