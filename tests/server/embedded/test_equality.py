"""The invariants, on a real model in fp32: a row's text depends on its own prompt and mix alone.

Greedy texts may part at a near-tie; a difference counts when the top-2 logit gap there exceeds 1e-4.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedModel

from atoms.adapter import Delta
from atoms.engine import Generation, GenerationRequest, SamplingParams
from atoms.mix import Mix
from atoms.space import LoRAModule, LoRASpace
from atoms.steered import SteeredModel
from server.embedded.engine import EmbeddedEngine

MakeEngine = Callable[..., EmbeddedEngine]
ComposeFor = Callable[[PreTrainedModel], Callable[[Mix], Delta]]
NEAR_TIE = 1e-4
QUESTIONS = (
    "Name three colours.",
    "What is the capital of France?",
    "Tell me a story about a dog called Rex, a cat called Tom, and a very long journey over the mountains.",
    "Write a haiku about rain.",
    "What is 2 + 2?",
    "List the planets of the solar system in order.",
)


def _requests(engine: EmbeddedEngine, lengths: Sequence[int]) -> list[GenerationRequest]:
    """One request a question; every third one unsteered, the others each with a mix of their own."""
    return [
        GenerationRequest(
            str(index),
            engine.encode_chat([{"role": "user", "content": question}]),
            Mix.of({"a": index}) if index % 3 else Mix(),
            SamplingParams(max_tokens=length, temperature=0, logprobs=2, ignore_eos=True),
        )
        for index, (question, length) in enumerate(zip(QUESTIONS, lengths, strict=True))
    ]


def _assert_same(one: Generation, other: Generation) -> None:
    for a, b in zip(one.logprobs, other.logprobs, strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-3)
        if a.token_id != b.token_id:
            gap = a.top[0][3] - a.top[1][3]
            assert gap <= NEAR_TIE, f"request {one.request_id}: the texts part at a gap of {gap}"
            return


def _own_generate(model: PreTrainedModel, prompt: Sequence[int], count: int) -> list[int]:
    ids = torch.tensor([list(prompt)])
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    with torch.inference_mode():
        return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()


def test_solo_greedy_equals_transformers(smol_model: PreTrainedModel, make_engine: MakeEngine) -> None:
    engine = make_engine(smol_model)
    prompt = engine.encode_chat([{"role": "user", "content": QUESTIONS[0]}])
    request = GenerationRequest("r", prompt, sampling=SamplingParams(max_tokens=16, temperature=0))
    expected = _own_generate(smol_model, prompt, 16)
    assert list(engine.generate([request])[0].token_ids) == expected


def test_a_mixed_batch_with_joins_and_leaves_equals_each_alone(
    smol_model: PreTrainedModel, make_engine: MakeEngine
) -> None:
    """Six requests on three slots with answers of other lengths: rows join, leave and move. A small prefill budget cuts
    the prompts into chunks, a large one prefills several requests together."""
    chunked = make_engine(smol_model, slots=3, prefill_tokens_per_step=40)
    requests = _requests(chunked, lengths=(4, 12, 8, 9, 3, 7))
    batches = [chunked.generate(requests)]
    alone = [chunked.generate([request])[0] for request in requests]
    chunked.close()
    batches.append(make_engine(smol_model, slots=3, prefill_tokens_per_step=400).generate(requests))
    assert len({generation.token_ids for generation in alone}) == len(requests)
    for together in batches:
        for one, other in zip(together, alone, strict=True):
            _assert_same(one, other)


def test_a_steered_row_equals_the_merged_model(
    smol_model: PreTrainedModel, make_engine: MakeEngine, compose_for: ComposeFor
) -> None:
    engine = make_engine(smol_model)
    request = GenerationRequest(
        "r",
        engine.encode_chat([{"role": "user", "content": QUESTIONS[1]}]),
        Mix.of({"a": 2}),
        SamplingParams(max_tokens=12, temperature=0, logprobs=2, ignore_eos=True),
    )
    unsteered = GenerationRequest("u", request.prompt_token_ids, Mix(), request.sampling)
    steered, plain = engine.generate([request, unsteered])
    merged = merged_copy(bare_copy(smol_model), compose_for(smol_model)(request.mix))
    _assert_same(steered, make_engine(merged).generate([unsteered])[0])
    assert steered.token_ids != plain.token_ids


@pytest.mark.parametrize("prefix_cache_tokens", [0, 4096], ids=["read anew", "kept"])
def test_a_decode_phase_row_equals_an_unsteered_prompt_and_a_steered_answer(
    smol_model: PreTrainedModel, make_engine: MakeEngine, compose_for: ComposeFor, prefix_cache_tokens: int
) -> None:
    """The oracle is transformers alone: the plain model reads all but the prompt's last token, the merged one goes on."""
    engine = make_engine(smol_model, slots=4, prefill_tokens_per_step=200, prefix_cache_tokens=prefix_cache_tokens)
    long = "You answer in full sentences. " * 12
    prompts = [engine.encode_chat([{"role": "user", "content": text}]) for text in (long + QUESTIONS[1], QUESTIONS[3])]
    sampling = SamplingParams(max_tokens=10, temperature=0, ignore_eos=True)
    mixes = (Mix.of({"a": 2}), Mix.of({"a": 3}))
    requests = [
        GenerationRequest(f"{phase}-{place}-{index}", prompt, mix, sampling, phase)
        for place, prompt in enumerate(prompts)
        for index, mix in enumerate(mixes)
        for phase in ("decode", "all")
    ]
    first = engine.generate(requests)
    again = engine.generate(requests)  # with what the first round left in the cache of prefixes
    plain = bare_copy(smol_model)
    merged = {mix: merged_copy(plain, compose_for(smol_model)(mix)) for mix in mixes}
    differing = 0
    for request, *answers in zip(requests, first, again, strict=True):
        model = merged[request.mix]
        expected = _greedy_after(plain if request.phase == "decode" else model, model, request.prompt_token_ids, 10)
        assert [list(answer.token_ids) for answer in answers] == [expected, expected], request.request_id
        other = model if request.phase == "decode" else plain
        differing += expected != _greedy_after(other, model, request.prompt_token_ids, 10)
    assert differing, "no answer depends on how the prompt was read, so this shows nothing"


@torch.inference_mode()
def _greedy_after(reader: PreTrainedModel, writer: PreTrainedModel, prompt: Sequence[int], count: int) -> list[int]:
    """`reader` reads all but the last token of `prompt`, `writer` goes on from there."""
    cache = DynamicCache()
    reader(input_ids=torch.tensor([list(prompt[:-1])]), past_key_values=cache)
    tokens = [prompt[-1]]
    for _ in range(count):
        tokens.append(int(writer(input_ids=torch.tensor([tokens[-1:]]), past_key_values=cache).logits[0, -1].argmax()))
    return tokens[1:]


def bare_copy(model: PreTrainedModel) -> PreTrainedModel:
    copied = copy.deepcopy(model)
    for module in copied.modules():
        module._forward_hooks.clear()
    return copied


def merged_copy(model: PreTrainedModel, delta: Delta) -> PreTrainedModel:
    merged = copy.deepcopy(model)
    for name, factors in delta.items():
        merged.get_submodule(name).weight.data += factors.scaling * factors.lora_B @ factors.lora_A
    return merged


def test_a_decode_phase_prompt_of_one_token_is_steered(tiny: PreTrainedModel, make_engine: MakeEngine) -> None:
    engine = make_engine(tiny)
    sampling = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    one, other = engine.generate([GenerationRequest(phase, (7,), Mix.of({"a": 3}), sampling, phase)
                                  for phase in ("all", "decode")])  # fmt: skip
    plain = engine.generate([GenerationRequest("plain", (7,), Mix(), sampling)])[0]
    assert one.token_ids == other.token_ids != plain.token_ids


def test_an_empty_mix_is_bit_equal_to_no_hooks(smol_model: PreTrainedModel) -> None:
    ids = torch.tensor([[1, 5, 9, 200]] * 2)
    with torch.inference_mode():
        bare = smol_model(ids).logits
        linear = smol_model.get_submodule("model.layers.0.self_attn.q_proj")
        name = "model.layers.0.self_attn.q_proj"
        space = LoRASpace.of([LoRAModule(name, linear.in_features, linear.out_features, 4, 1.0)])
        steered = SteeredModel(smol_model, space, slots=2)
        with steered.rows([0, 1]):
            hooked = smol_model(ids).logits
        steered.close()
    assert torch.equal(bare, hooked)


def test_seeds_give_the_same_tokens_in_and_out_of_a_batch(smol_model: PreTrainedModel, make_engine: MakeEngine) -> None:
    engine = make_engine(smol_model, slots=4)
    prompt = engine.encode_chat([{"role": "user", "content": QUESTIONS[3]}])
    seeded = [
        GenerationRequest(
            str(seed), prompt, Mix.of({"a": 1}), SamplingParams(max_tokens=8, temperature=0.9, top_p=0.95, seed=seed)
        )
        for seed in (7, 7, 8)
    ]
    first, again, other = engine.generate(seeded)
    assert first.token_ids == again.token_ids == engine.generate(seeded[:1])[0].token_ids
    assert first.token_ids != other.token_ids


def test_cancelling_frees_the_slot_and_disturbs_nobody(smol_model: PreTrainedModel, make_engine: MakeEngine) -> None:
    engine = make_engine(smol_model, slots=2)
    doomed, survivor, queued, *_ = _requests(engine, lengths=(200, 9, 4, 1, 1, 1))

    async def consume(request: GenerationRequest) -> tuple[int, ...]:
        return tuple([token async for delta in engine.stream(request) for token in delta.token_ids])

    async def scenario() -> list[tuple[int, ...]]:
        stream = engine.stream(doomed)
        await anext(stream)
        others = [asyncio.create_task(consume(request)) for request in (survivor, queued)]
        await anext(stream)
        await stream.aclose()
        return await asyncio.gather(*others)

    results = asyncio.run(asyncio.wait_for(scenario(), 60))
    for request, tokens in zip((survivor, queued), results, strict=True):
        alone = engine.generate([request])[0]
        assert tokens[: len(alone.token_ids)] == alone.token_ids
    assert engine.drain(timeout=5) and engine.stats().running == 0


def test_long_rows_past_the_first_capacity_equal_transformers(tiny: PreTrainedModel, make_engine: MakeEngine) -> None:
    """The window grows from 256 columns, shifts when it meets the end, and shrinks when the longest row leaves."""
    engine = make_engine(tiny, max_model_len=520, slots=3)
    lengths = ((5, 500), (300, 50), (3, 400), (400, 30), (20, 200))
    requests = [
        GenerationRequest(
            str(index),
            tuple(torch.randint(3, 49152, (prompt,), generator=torch.Generator().manual_seed(index)).tolist()),
            sampling=SamplingParams(max_tokens=count, temperature=0, ignore_eos=True),
        )
        for index, (prompt, count) in enumerate(lengths)
    ]
    for request, result, (_, count) in zip(requests, engine.generate(requests), lengths, strict=True):
        expected = _own_generate(tiny, request.prompt_token_ids, count)
        assert list(result.token_ids) == expected
        assert len(set(expected)) > count // 2, "a model that repeats itself shows nothing"


def test_gemma3_sliding_windows_equal_transformers(make_engine: MakeEngine) -> None:
    """Window 8 with rows of other lengths, longer and shorter than the window, in chunks of the prompt."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=500, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=8, max_position_embeddings=256, initializer_range=0.3,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"], eos_token_id=1,
        tie_word_embeddings=False, query_pre_attn_scalar=1,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).eval()
    model.generation_config.eos_token_id = 1
    engine = make_engine(model, slots=3, prefill_tokens_per_step=12)
    lengths = ((4, 30), (25, 10), (9, 20), (40, 12), (3, 5))
    requests = [
        GenerationRequest(
            str(index),
            tuple(torch.randint(3, 500, (prompt,), generator=torch.Generator().manual_seed(index)).tolist()),
            sampling=SamplingParams(max_tokens=count, temperature=0, ignore_eos=True),
        )
        for index, (prompt, count) in enumerate(lengths)
    ]
    for request, result, (_, count) in zip(requests, engine.generate(requests), lengths, strict=True):
        expected = _own_generate(model, request.prompt_token_ids, count)
        assert list(result.token_ids) == expected, request.request_id
        assert len(set(expected)) > count // 2, "a model that repeats itself shows nothing"
