"""Sampled answers: the right distribution, and the same draw whatever else is in the batch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from mergeguard.errors import ParameterError
from mergeguard.reading import Probe, Rule, Sampling
from mergeguard.verification.answers import answer_probes
from mergeguard.verification.generation import generate
from mergeguard.verification.sampling import candidates, draw, gumbel, row_keys
from robustness_tests.meta.tiny_models import tiny_llama

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LOGITS = torch.tensor([2.0, -1.0, 0.5, 0.0, -torch.inf, 1.0])
DRAWS = 4000
PROMPTS = [f"{word} {number}" for word in ("the", "a cat", "on the log") for number in range(3)]
HOT = Sampling(temperature=1.5, seed=3)


def fits(counts: torch.Tensor, probabilities: torch.Tensor) -> bool:
    possible = probabilities > 0
    assert not counts[~possible].any()
    expected = probabilities[possible].double() * counts.sum()
    expected *= counts.sum() / expected.sum()
    return bool(stats.chisquare(counts[possible].numpy(), expected.numpy()).pvalue > 1e-3)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0, seed=1),
        Sampling(0.2, seed=2),
        Sampling(0.8, top_k=50, top_p=0.95, seed=3),
        Sampling(2.0, top_k=3, seed=4),
        Sampling(1.0, top_p=0.7, seed=5),
    ],
    ids=str,
)
def test_draws_have_the_distribution_of_transformers_warpers(sampling: Sampling) -> None:
    scores = LOGITS[None]
    for warper in (
        TemperatureLogitsWarper(sampling.temperature),
        TopKLogitsWarper(sampling.top_k or len(LOGITS)),
        TopPLogitsWarper(sampling.top_p),
    ):
        scores = warper(None, scores)
    keys = row_keys(sampling, [f"prompt {number}" for number in range(DRAWS)])
    over_prompts = draw(LOGITS.expand(DRAWS, -1), sampling, keys, step=7)
    over_steps = torch.cat([draw(LOGITS[None], sampling, keys[:1], step) for step in range(DRAWS)])
    for tokens in (over_prompts, over_steps):
        assert fits(tokens.bincount(minlength=len(LOGITS)), scores.softmax(-1)[0])


def test_draws_of_successive_steps_and_of_two_seeds_are_independent() -> None:
    keys = row_keys(HOT, [f"prompt {number}" for number in range(DRAWS)])
    other = row_keys(Sampling(1.5, seed=4), [f"prompt {number}" for number in range(DRAWS)])
    logits = torch.zeros(DRAWS, 4)
    first, second, third = draw(logits, HOT, keys, 0), draw(logits, HOT, keys, 1), draw(logits, HOT, other, 0)
    for one in (second, third):
        table = (4 * first + one).bincount(minlength=16).reshape(4, 4)
        assert stats.chi2_contingency(table.numpy()).pvalue > 1e-3


def test_noise_is_standard_gumbel_and_unlike_for_neighbouring_tokens() -> None:
    noise = gumbel(row_keys(HOT, ["the"]), 0, torch.arange(20_000)[None])[0]
    assert stats.kstest(noise.numpy(), "gumbel_r").pvalue > 1e-3
    assert abs(stats.pearsonr(noise[:-1].numpy(), noise[1:].numpy()).statistic) < 0.03


def splitmix_finaliser(state: int) -> int:
    """Steele, Lea & Flood 2014, in Python's integers."""
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
    return state ^ state >> 31


@given(key=st.integers(0, 2**63 - 1), step=st.integers(0, 10**5), token=st.integers(0, 300_000))
def test_noise_is_the_stated_function_of_key_step_and_token(key: int, step: int, token: int) -> None:
    golden = 0x9E3779B97F4A7C15
    row = splitmix_finaliser((key + (step + 1) * golden) % 2**64)
    uniform = ((splitmix_finaliser((row + token * golden) % 2**64) >> 12) + 0.5) / 2**52
    [[noise]] = gumbel(torch.tensor([key]), step, torch.tensor([[token]])).tolist()
    assert noise == pytest.approx(-math.log(-math.log(uniform)))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    temperature=st.sampled_from([0.2, 0.8, 1.0, 3.0]),
    top_k=st.sampled_from([None, 1, 5, 50, 999]),
    top_p=st.sampled_from([0.01, 0.5, 0.95, 1.0]),
)
def test_candidates_are_those_of_transformers_warpers(
    seed: int, temperature: float, top_k: int | None, top_p: float
) -> None:
    logits = torch.randn(3, 60, generator=torch.Generator().manual_seed(seed)) * 3
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k is not None:
        expected = TopKLogitsWarper(top_k)(None, expected)
    expected = TopPLogitsWarper(top_p)(None, expected)
    scores, tokens = candidates(logits, Sampling(temperature, top_k, top_p))
    found = torch.full_like(logits, -torch.inf).scatter(-1, tokens, scores)
    torch.testing.assert_close(found.softmax(-1), expected.softmax(-1))


@settings(max_examples=12, deadline=None)
@given(
    prompts=st.lists(st.sampled_from(PROMPTS), min_size=1, max_size=6),
    batch_tokens=st.sampled_from([1, 60, 8192]),
    sampling=st.sampled_from([HOT, Sampling(0.8, 50, 0.95, seed=1)]),
)
def test_a_draw_does_not_depend_on_the_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    batch_tokens: int,
    sampling: Sampling,
) -> None:
    def answers(asked: list[str], batch_tokens: int) -> list[list[int]]:
        def stop(index: int, text: str) -> bool:
            return len(text) > len(asked[index]) % 4  # rows leave the batch at different steps

        return generate(
            model, tokenizer, asked, max_new_tokens=6, sampling=sampling, batch_tokens=batch_tokens, stop=stop
        )

    together = answers(prompts, batch_tokens)
    alone = [answers([prompt], 8192)[0] for prompt in prompts]
    assert together == alone


def test_seeds_and_prompts_draw_differently_and_torch_seeds_do_not_matter(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    def answers(sampling: Sampling | None) -> list[list[int]]:
        return generate(llama, tokenizer, PROMPTS, max_new_tokens=5, sampling=sampling)

    torch.manual_seed(1)
    first = answers(HOT)
    torch.manual_seed(2)
    assert answers(HOT) == first
    assert answers(Sampling(1.5, seed=4)) != first
    assert len({tuple(answer) for answer in first}) == len(PROMPTS)
    assert answers(None) != first


def test_a_temperature_near_zero_and_a_single_candidate_are_greedy(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    greedy = generate(llama, tokenizer, PROMPTS, max_new_tokens=5)
    for sampling in (Sampling(1e-30), Sampling(2.0, top_k=1), Sampling(2.0, top_p=1e-9)):
        assert generate(llama, tokenizer, PROMPTS, max_new_tokens=5, sampling=sampling) == greedy


def test_half_precision_logits_are_drawn_from_in_float32() -> None:
    keys = row_keys(HOT, PROMPTS)
    logits = LOGITS.expand(len(PROMPTS), -1)
    assert torch.equal(draw(logits.bfloat16(), HOT, keys, 0), draw(logits, HOT, keys, 0))
    assert candidates(logits.bfloat16(), HOT)[0].dtype == torch.float32


def test_probes_are_answered_by_the_sampled_text(tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny_llama()
    probes = [Probe(prompt, "zz", Rule.CONTAINS, 6) for prompt in PROMPTS]
    found = answer_probes(model, tokenizer, probes, HOT)
    assert found == answer_probes(model, tokenizer, probes, HOT)
    assert found != answer_probes(model, tokenizer, probes)


def test_a_probe_about_greedy_decoding_is_refused(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ParameterError, match="'the' is about greedy decoding; leave sampling out"):
        answer_probes(llama, tokenizer, [Probe("the", " cat")], HOT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0, expected a positive number; leave sampling out for greedy"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": 1.0, "top_k": 0}, "top_k is 0, expected at least 1, or None"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0, expected a number in"),
        ({"temperature": 1.0, "top_p": 1.1}, "top_p is 1.1"),
    ],
)
def test_numbers_outside_their_domain_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        Sampling(**options)
