"""The engine's promises around the tokens: limits, errors that stay with their request, streaming, stopping, closing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from atoms.engine import GenerationRequest, SamplingParams, TokenDelta
from atoms.errors import (
    ConfigError,
    DataError,
    EngineError,
    EngineOverloadedError,
    EngineStoppedError,
    ModelError,
    RequestTooLongError,
)
from atoms.mix import Mix
from atoms.space import LoRAModule, LoRASpace
from server.embedded import engine as engine_module
from server.embedded.engine import EmbeddedEngine

MakeEngine = Callable[..., EmbeddedEngine]
PROMPT = (10, 20, 30, 40)


def _request(
    name: str = "r", mix: Mix | None = None, prompt: tuple[int, ...] = PROMPT, **sampling: object
) -> GenerationRequest:
    params = {"max_tokens": 5, "temperature": 0.0, "ignore_eos": True, **sampling}
    return GenerationRequest(name, prompt, mix or Mix(), SamplingParams(**params))  # type: ignore[arg-type]


async def _collect(engine: EmbeddedEngine, request: GenerationRequest) -> list[TokenDelta]:
    return [delta async for delta in engine.stream(request)]


def _wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


@contextmanager
def _failing(model: PreTrainedModel, fails: Callable[[torch.Tensor], bool], error: BaseException) -> Iterator[None]:
    """Within the block, forward passes whose input ids satisfy `fails` raise `error`."""

    def hook(_module: object, _args: object, kwargs: dict[str, torch.Tensor]) -> None:
        if fails(kwargs["input_ids"]):
            raise error

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def test_streamed_deltas_make_up_the_generated_answer(tiny: PreTrainedModel, make_engine: MakeEngine) -> None:
    engine = make_engine(tiny)
    request = _request(max_tokens=12, logprobs=1)
    whole = engine.generate([request])[0]
    deltas = asyncio.run(_collect(engine, request))
    assert "".join(delta.text for delta in deltas) == whole.text
    assert tuple(token for delta in deltas for token in delta.token_ids) == whole.token_ids
    assert tuple(entry for delta in deltas for entry in delta.logprobs) == whole.logprobs
    assert [delta.finish_reason for delta in deltas] == [None] * 11 + ["length"]


def test_emoji_stream_whole(
    smol_model: PreTrainedModel, smol_tokenizer: PreTrainedTokenizerBase, make_engine: MakeEngine
) -> None:
    """The answer is forced by logit bias, one token a request, to be an emoji of several tokens."""
    engine = make_engine(smol_model)
    ids = smol_tokenizer("🦩", add_special_tokens=False)["input_ids"]
    assert len(set(ids)) == len(ids) > 1
    # Each token is biased above the next and used up by the frequency penalty, so that they come in order.
    bias = tuple((token, 100.0 - 5 * place) for place, token in enumerate(ids))
    request = _request(max_tokens=len(ids), logit_bias=bias, frequency_penalty=100.0)
    deltas = asyncio.run(_collect(engine, request))
    assert [token for delta in deltas for token in delta.token_ids] == ids
    assert [delta.text for delta in deltas] == [""] * (len(ids) - 1) + ["🦩"]


def test_a_stop_string_across_token_boundaries(smol_model: PreTrainedModel, make_engine: MakeEngine) -> None:
    engine = make_engine(smol_model)
    prompt = engine.encode_chat([{"role": "user", "content": "Count from one to ten in words."}])
    free = engine.generate([_request(prompt=prompt, max_tokens=16)])[0]
    parts = [delta.text for delta in asyncio.run(_collect(engine, _request(prompt=prompt, max_tokens=16)))]
    stop = free.text[len(parts[0]) + len(parts[1]) - 2 :][:5]  # begins inside the second token, ends in a later one
    expected = free.text[: free.text.index(stop)]
    cut = asyncio.run(_collect(engine, _request(prompt=prompt, max_tokens=16, stop=("never", stop))))
    assert "".join(delta.text for delta in cut) == expected
    assert (cut[-1].finish_reason, cut[-1].stop_reason) == ("stop", stop)
    kept = engine.generate([_request(prompt=prompt, max_tokens=16, stop=(stop,), include_stop=True)])[0]
    assert kept.text == expected + stop


def test_an_end_token_ends_the_answer_and_has_no_text(smol_model: PreTrainedModel, make_engine: MakeEngine) -> None:
    engine = make_engine(smol_model)
    end = smol_model.generation_config.eos_token_id
    prompt = engine.encode_text("One two three")
    answer = engine.generate([_request(prompt=prompt, ignore_eos=False, logit_bias=((end, 100.0),))])[0]
    assert (answer.text, answer.finish_reason, answer.token_ids) == ("", "stop", (end,))
    ignored = engine.generate([_request(prompt=prompt, max_tokens=3, logit_bias=((end, 100.0),))])[0]
    assert (ignored.text, ignored.finish_reason, len(ignored.token_ids)) == ("", "length", 3)


def test_logprobs_are_the_models_own(smol_model: PreTrainedModel, make_engine: MakeEngine) -> None:
    """Before temperature and penalties, whatever was drawn."""
    engine = make_engine(smol_model)
    prompt = engine.encode_text("The weather in Paris is")
    answer = engine.generate([_request(prompt=prompt, max_tokens=4, temperature=1.5, seed=3, logprobs=3)])[0]
    with torch.inference_mode():
        logits = smol_model(torch.tensor([[*prompt, *answer.token_ids]])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1)
    for row, token, entry in zip(expected, answer.token_ids, answer.logprobs, strict=True):
        assert entry.token_id == token and bytes(entry.bytes).decode("utf-8", "replace") == entry.text
        assert entry.logprob == pytest.approx(row[token].item(), abs=1e-3)
        assert [best[0] for best in entry.top] == row.topk(3).indices.tolist()
        assert [best[3] for best in entry.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-3)


def test_the_head_multiplies_one_contiguous_row_a_sequence(tiny: PreTrainedModel, make_engine: MakeEngine) -> None:
    """A view of the last columns of several prompts has torch copy the head's weight for each: in bf16 on a CPU, with a
    vocabulary of 262,144, seconds and gigabytes a prompt."""
    seen: list[tuple[tuple[int, ...], bool]] = []
    head = tiny.get_output_embeddings()
    handle = head.register_forward_pre_hook(
        lambda _module, inputs: seen.append((tuple(inputs[0].shape[:2]), inputs[0].is_contiguous()))
    )
    engine = make_engine(tiny)
    engine.generate([_request(str(n), prompt=PROMPT[n:], max_tokens=2) for n in range(3)])
    handle.remove()
    assert any(shape[0] > 1 for shape, _ in seen), "nothing was prefilled together"
    assert all(shape[1] == 1 and contiguous for shape, contiguous in seen), seen


def test_too_long_names_value_limit_and_field(tiny: PreTrainedModel, make_engine: MakeEngine) -> None:
    engine = make_engine(tiny, max_model_len=32)
    with pytest.raises(RequestTooLongError, match=r"40 tokens.*32") as prompt:
        engine.generate([_request(prompt=(5,) * 40)])
    assert prompt.value.param == "messages"
    with pytest.raises(RequestTooLongError, match=r"20.*30.*32.*at most 12") as asked:
        engine.generate([_request(prompt=(5,) * 20, max_tokens=30)])
    assert asked.value.param == "max_tokens"
    unbounded = engine.generate([_request(prompt=(5,) * 20, max_tokens=None)])[0]
    assert (len(unbounded.token_ids), unbounded.finish_reason) == (12, "length")


@pytest.mark.parametrize("bad", [{"prompt": ()}, {"max_tokens": 0}, {"stop": ("",)}])
def test_what_cannot_be_run_is_refused(tiny: PreTrainedModel, make_engine: MakeEngine, bad: dict[str, object]) -> None:
    with pytest.raises(EngineError):
        make_engine(tiny).generate([_request(**bad)])  # type: ignore[arg-type]


def test_a_full_queue_refuses_and_recovers(tiny: PreTrainedModel, make_engine: MakeEngine) -> None:
    engine = make_engine(tiny, slots=1, max_waiting=1)

    async def scenario() -> None:
        running = engine.stream(_request(max_tokens=1500))
        await anext(running)
        waiting = asyncio.create_task(_collect(engine, _request("waiting")))
        while engine.stats().waiting == 0:
            await asyncio.sleep(0.005)
        with pytest.raises(EngineOverloadedError, match="limit is 1") as refused:
            await anext(engine.stream(_request("refused")))
        assert refused.value.retry_after is None, "how long to wait is for the server to say"
        await running.aclose()
        assert len(await waiting) == 5

    asyncio.run(asyncio.wait_for(scenario(), 60))
    assert len(engine.generate([_request(str(i)) for i in range(4)])) == 4  # a blocking batch has no limit


def test_cancelling_a_waiting_request_removes_it(tiny: PreTrainedModel, make_engine: MakeEngine) -> None:
    engine = make_engine(tiny, slots=1)

    async def scenario() -> None:
        running = engine.stream(_request(max_tokens=1500))
        await anext(running)
        waiting = asyncio.create_task(_collect(engine, _request()))
        while engine.stats().waiting == 0:
            await asyncio.sleep(0.005)
        waiting.cancel()
        await asyncio.wait([waiting])
        assert engine.stats().waiting == 0
        await running.aclose()

    asyncio.run(asyncio.wait_for(scenario(), 60))
    _wait_until(lambda: engine.stats().running == 0)


def test_a_long_prompt_is_read_between_the_tokens_of_running_answers(
    tiny: PreTrainedModel, make_engine: MakeEngine
) -> None:
    """400 tokens in steps of 10, a quarter of 40: the running answer goes on by a token for each."""
    engine = make_engine(tiny, max_model_len=1000, prefill_tokens_per_step=40)
    sampling = SamplingParams(max_tokens=500, temperature=0, ignore_eos=True)

    async def scenario() -> int:
        running = engine.stream(GenerationRequest("running", (5, 6), sampling=sampling))
        await anext(running)
        long = GenerationRequest("long", tuple(range(3, 403)), sampling=SamplingParams(max_tokens=1))
        reading = asyncio.create_task(anext(engine.stream(long)))
        between = 0
        while not reading.done():
            await anext(running)
            between += 1
        await reading
        await running.aclose()
        return between

    assert asyncio.run(asyncio.wait_for(scenario(), 60)) >= 40


def test_an_error_in_one_request_ends_that_one_alone(tiny: PreTrainedModel, make_engine: MakeEngine) -> None:
    engine = make_engine(tiny)
    expected = engine.generate([_request(mix=Mix.of({"a": 1}))])[0].token_ids

    async def scenario() -> list[object]:
        requests = (
            _request("good", Mix.of({"a": 1})),
            _request("mix", Mix.of({"broken": 1})),
            _request("bias", logit_bias=((10**6, 1.0),)),
            _request("good too"),
        )
        return await asyncio.gather(*(_collect(engine, request) for request in requests), return_exceptions=True)

    good, mix, bias, plain = asyncio.run(scenario())
    assert isinstance(mix, EngineError) and "broken" in str(mix)
    assert isinstance(bias, EngineError) and "1000000" in str(bias)
    assert tuple(delta.token_ids[0] for delta in good) == expected
    assert len(plain) == 5
    assert engine.healthy


def test_a_failing_decode_step_ends_its_rows_and_the_loop_goes_on(
    tiny: PreTrainedModel, make_engine: MakeEngine
) -> None:
    engine = make_engine(tiny)
    expected = engine.generate([_request()])
    with _failing(tiny, lambda ids: ids.shape[1] == 1, RuntimeError("out of memory")):
        for _ in range(3):
            with pytest.raises(EngineError, match="out of memory"):
                engine.generate([_request(), _request()])
    assert engine.generate([_request()]) == expected
    assert engine.healthy


def test_a_failing_prefill_leaves_running_rows_alone(tiny: PreTrainedModel, make_engine: MakeEngine) -> None:
    engine = make_engine(tiny)

    async def scenario() -> int:
        running = engine.stream(_request(max_tokens=100))
        tokens = len((await anext(running)).token_ids)
        with pytest.raises(EngineError, match="poisoned"):
            await _collect(engine, _request(prompt=(7, 7, 7)))
        return tokens + len([delta async for delta in running])

    with _failing(tiny, lambda ids: ids[0, -1] == 7, RuntimeError("poisoned")):
        assert asyncio.run(scenario()) == 100


def test_repeated_failures_show_as_unhealthy(tiny: PreTrainedModel, make_engine: MakeEngine) -> None:
    engine = make_engine(tiny)
    with _failing(tiny, lambda _: True, RuntimeError("device lost")):
        for _ in range(3):
            with pytest.raises(EngineError, match="device lost"):
                engine.generate([_request()])
        assert not engine.healthy
    engine.generate([_request()])
    assert engine.healthy


def test_an_engine_without_traffic_gets_well_and_ill_again_at_the_next_failure(
    tiny: PreTrainedModel, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica that is not ready is sent nothing, so nothing could succeed there."""
    engine = make_engine(tiny)

    def fail(times: int) -> None:
        with _failing(tiny, lambda _: True, RuntimeError("device lost")):
            for _ in range(times):
                with pytest.raises(EngineError, match="device lost"):
                    engine.generate([_request()])

    fail(3)
    assert not engine.healthy
    monkeypatch.setattr(engine_module, "_SICK_SECONDS", 0.2)
    _wait_until(lambda: engine.healthy)
    monkeypatch.setattr(engine_module, "_SICK_SECONDS", 60.0)
    fail(1)
    assert not engine.healthy, "one failure is enough for an engine that has shown no success since the others"
    engine.generate([_request()])
    fail(2)
    assert engine.healthy, "a success resets the count"


def test_a_dead_worker_ends_everything_and_says_so(tiny: PreTrainedModel, make_engine: MakeEngine) -> None:
    engine = make_engine(tiny, slots=1)
    with (
        _failing(tiny, lambda _: True, SystemExit("killed")),
        pytest.raises(EngineStoppedError, match=r"died.*killed"),
    ):
        engine.generate([_request(), _request()])
    _wait_until(lambda: not engine.healthy)
    assert engine.died
    with pytest.raises(EngineStoppedError, match="killed"):
        engine.generate([_request()])


def test_a_closed_engine_has_not_died(tiny: PreTrainedModel, make_engine: MakeEngine) -> None:
    engine = make_engine(tiny)
    engine.close()
    assert not engine.healthy and not engine.died


def test_a_closed_event_loop_does_not_hurt_the_worker(tiny: PreTrainedModel, make_engine: MakeEngine) -> None:
    engine = make_engine(tiny)
    loop = asyncio.new_event_loop()
    stream = engine.stream(_request(max_tokens=1000))
    loop.run_until_complete(anext(stream))
    loop.close()  # without closing the stream
    assert len(engine.generate([_request()])[0].token_ids) == 5
    _wait_until(lambda: engine.stats().running == 0)
    assert engine.healthy


def test_drain_waits_and_refuses(tiny: PreTrainedModel, make_engine: MakeEngine) -> None:
    engine = make_engine(tiny)

    async def scenario() -> list[TokenDelta]:
        running = asyncio.create_task(_collect(engine, _request(max_tokens=1000)))
        while engine.generation_tokens_total == 0:
            await asyncio.sleep(0.005)
        assert not await asyncio.to_thread(engine.drain, 0.0)
        with pytest.raises(EngineStoppedError, match="shutting down"):
            await anext(engine.stream(_request()))
        assert await asyncio.to_thread(engine.drain, 60.0)
        return await running

    assert len(asyncio.run(asyncio.wait_for(scenario(), 120))) == 1000


def test_close_ends_streams_and_removes_the_hooks(tiny: PreTrainedModel, make_engine: MakeEngine) -> None:
    engine = make_engine(tiny)

    async def scenario() -> None:
        running = engine.stream(_request(max_tokens=1000))
        await anext(running)
        await asyncio.to_thread(engine.close)
        with pytest.raises(EngineStoppedError):
            async for _ in running:
                pass

    asyncio.run(asyncio.wait_for(scenario(), 60))
    engine.close()
    assert not engine.healthy
    assert not any(module._forward_hooks for module in tiny.modules())


def test_counters_and_stats(tiny: PreTrainedModel, make_engine: MakeEngine) -> None:
    engine = make_engine(tiny, slots=2)
    engine.generate([_request(str(index)) for index in range(3)])
    assert engine.drain(timeout=5)
    assert (engine.prompt_tokens_total, engine.generation_tokens_total) == (12, 15)
    assert (engine.stats().running, engine.stats().waiting, engine.stats().slots) == (0, 0, 2)


def test_a_chat_needs_a_template(
    tiny: PreTrainedModel,
    smol_tokenizer: PreTrainedTokenizerBase,
    make_engine: MakeEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = make_engine(tiny)
    chat: list[dict[str, object]] = [{"role": "user", "content": "Hello"}]
    assert "Hello" in smol_tokenizer.decode(engine.encode_chat(chat))
    monkeypatch.setattr(smol_tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match="alternate"):
        engine.encode_chat(chat)
    monkeypatch.setattr(smol_tokenizer, "chat_template", None)
    with pytest.raises(ConfigError, match="chat template"):
        engine.encode_chat(chat)


@pytest.mark.parametrize("options", [{"slots": 0}, {"max_model_len": 1}, {"max_model_len": 10**6}, {"max_waiting": 0}])
def test_sizes_that_cannot_work_are_refused(
    tiny: PreTrainedModel, make_engine: MakeEngine, options: dict[str, int]
) -> None:
    with pytest.raises(ConfigError, match=str(next(iter(options.values())))):
        make_engine(tiny, **options)


def test_recurrent_models_are_refused_and_left_without_hooks(smol_tokenizer: PreTrainedTokenizerBase) -> None:
    model = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=8, state_size=4, num_hidden_layers=1))
    linear = model.get_submodule("backbone.layers.0.mixer.in_proj")
    space = LoRASpace.of(
        [LoRAModule("backbone.layers.0.mixer.in_proj", linear.in_features, linear.out_features, 2, 1.0)]
    )
    with pytest.raises(ModelError, match="vllm"):
        EmbeddedEngine(model, smol_tokenizer, space, lambda _: None)
    assert not linear._forward_hooks
