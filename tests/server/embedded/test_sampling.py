"""Penalties against hand formulas, filters against transformers' warpers, drawing against the distribution."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from atoms.engine import SamplingParams
from atoms.errors import EngineError
from server.embedded import sampling
from server.embedded.sampling import TokenSampler, sample_rows, token_logprobs

VOCABULARY = 600


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(0)) * 3


def test_count_penalties_follow_openais_formula(logits: Tensor) -> None:
    counts = torch.zeros(VOCABULARY)
    counts[3], counts[5] = 2, 1
    result = sampling.penalize_counts(logits, counts, presence=0.5, frequency=0.25)
    assert result[3].item() == pytest.approx(logits[3].item() - 0.5 - 2 * 0.25)
    assert result[5].item() == pytest.approx(logits[5].item() - 0.5 - 0.25)
    assert torch.equal(result[6:], logits[6:])


def test_repetition_penalty_equals_transformers(logits: Tensor) -> None:
    ids = torch.tensor([[1, 2, 2, 9]])
    seen = torch.zeros(VOCABULARY, dtype=torch.bool)
    seen[ids[0]] = True
    expected = RepetitionPenaltyLogitsProcessor(1.3)(ids, logits[None].clone())[0]
    torch.testing.assert_close(sampling.penalize_repetition(logits, seen, 1.3), expected)


@pytest.mark.parametrize("p", [0.01, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_top_p_equals_transformers(logits: Tensor, p: float, scale: float) -> None:
    """Scale 0.01 is nearly uniform: more tokens are needed than the first probe looks at."""
    kept = sampling.keep_top_p(logits * scale, p)
    expected = TopPLogitsWarper(p)(None, (logits * scale)[None])[0]
    assert abs(int(kept.isfinite().sum()) - int(expected.isfinite().sum())) <= 1  # rounding of the cumulative sum
    assert kept.argmax() == logits.argmax()
    if scale == 1.0:
        torch.testing.assert_close(kept, expected)


@pytest.mark.parametrize(("scale", "needed"), [(3.0, 200), (1.0, 2_000), (0.1, 30_000)])
def test_top_p_keeps_as_many_of_a_large_vocabulary_as_it_needs(scale: float, needed: int) -> None:
    """Each size is beyond one probe more; p is the mass of the `needed` most likely tokens, less half of the last."""
    logits = torch.randn(60_000, generator=torch.Generator().manual_seed(0)) * scale
    ordered = logits.softmax(-1).sort(descending=True)
    p = float(ordered.values[:needed].sum() - ordered.values[needed - 1] / 2)
    kept = sampling.keep_top_p(logits, p).isfinite().nonzero().flatten()
    assert kept.tolist() == sorted(ordered.indices[:needed].tolist())


def test_top_k_and_min_p_equal_transformers(logits: Tensor) -> None:
    torch.testing.assert_close(sampling.keep_top_k(logits, 7), TopKLogitsWarper(7)(None, logits[None])[0])
    torch.testing.assert_close(sampling.keep_min_p(logits, 0.1), MinPLogitsWarper(0.1)(None, logits[None])[0])


def test_draws_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2])
    sampler = TokenSampler(SamplingParams(seed=1), [0])
    drawn = torch.tensor([sampler.sample(probabilities.log()) for _ in range(4000)])
    observed = torch.bincount(drawn, minlength=5) / len(drawn)
    assert torch.allclose(observed, probabilities, atol=0.03)
    assert observed[0] == observed[2] == 0


def test_a_draw_at_either_end_has_positive_probability() -> None:
    logits = torch.tensor([-math.inf, 0.0, 0.0, -math.inf])
    assert sampling.draw(logits, 0.0) == 1
    assert sampling.draw(logits, 1 - 2**-53) == 2


@pytest.mark.parametrize("temperature", [1e-6, 1e-46, 5e-324])
@pytest.mark.parametrize("more", [{}, {"top_p": 0.9}, {"presence_penalty": 0.1}])
def test_a_tiny_temperature_is_greedy(logits: Tensor, temperature: float, more: dict) -> None:
    """1e-46 is 0 in float32, which nothing can be divided by."""
    sampler = TokenSampler(SamplingParams(temperature=temperature, seed=0, **more), [0])
    assert sampler.sample(logits) == int(logits.argmax())
    assert sampler.is_plain_greedy == ("presence_penalty" not in more)


def test_penalties_count_generated_tokens_and_repetition_the_prompt_too(logits: Tensor) -> None:
    best = int(logits.argmax())
    frequency = TokenSampler(SamplingParams(temperature=0, frequency_penalty=2.0), [best])
    assert frequency.sample(logits) == best  # the prompt does not count
    for _ in range(20):
        frequency.record(best)
    assert frequency.sample(logits) != best
    repetition = TokenSampler(SamplingParams(temperature=0, repetition_penalty=100.0), [best])
    assert repetition.sample(logits) != best


def test_logit_bias_forces_and_forbids(logits: Tensor) -> None:
    best = int(logits.argmax())
    sampler = TokenSampler(SamplingParams(temperature=0, logit_bias=((best, -100.0), (17, 100.0))), [0])
    assert sampler.sample(logits) == 17


def test_a_bad_row_fails_alone(logits: Tensor) -> None:
    batch = torch.stack([logits, logits * math.nan, logits])
    samplers = [
        TokenSampler(SamplingParams(temperature=0), [0]),
        TokenSampler(SamplingParams(temperature=0), [0]),
        TokenSampler(SamplingParams(logit_bias=((VOCABULARY, 1.0),)), [0]),
    ]
    good, not_finite, outside = sample_rows(batch, samplers)
    assert good == int(logits.argmax())
    assert isinstance(not_finite, EngineError) and "nan" in str(not_finite)
    assert isinstance(outside, EngineError) and str(VOCABULARY) in str(outside)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_half_precision_are_sampled_as_in_float32(logits: Tensor, dtype: torch.dtype) -> None:
    """Ties too, of which rounding makes many: the first of the largest wins."""
    batch = torch.stack([logits, logits * 0.01, torch.full_like(logits, 2.0)]).to(dtype)
    for params in (SamplingParams(temperature=0), SamplingParams(temperature=0, logit_bias=((7, 1.0),)),
                   SamplingParams(temperature=0.9, top_p=0.8, seed=4)):  # fmt: skip
        halves, floats = ([TokenSampler(params, [0]) for _ in batch] for _ in range(2))
        assert sample_rows(batch, halves) == sample_rows(batch.float(), floats)
    assert sample_rows(batch[2:], [TokenSampler(SamplingParams(temperature=0), [0])]) == [0]


def test_logprobs_are_the_log_softmax(logits: Tensor) -> None:
    expected = logits.double().log_softmax(-1)
    chosen, best = token_logprobs(logits, 11, top=3)
    assert chosen == pytest.approx(expected[11].item(), abs=1e-5)
    assert [token for token, _ in best] == expected.topk(3).indices.tolist()
    assert [value for _, value in best] == pytest.approx(expected.topk(3).values.tolist(), abs=1e-5)
    assert token_logprobs(logits, 11, top=0)[1] == []
