"""The embedded engine: `atoms.engine.Engine` on transformers, safe to call from any thread and any event loop.

Knows queues, threads and limits; the model's work is `server.embedded.batcher`'s. The life of a request:

    1 stream() / generate()   checks lengths, makes a Job, puts it in the bounded queue        caller's thread
    2 _run()                  hands jobs to the batcher as slots get free, steps it            worker thread
    3 batcher.step()          composes the mix, prefills, decodes; deltas go to the job's sink worker thread
    4 stream() / generate()   takes deltas from the sink; leaving early cancels the job        caller's thread

Only the worker touches the model. When there is nothing to do it sleeps on a condition variable. OpenMP's
own threads must sleep too, or they starve the event loop: `server.embedded.serve.set_up_threads`, before torch loads.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from atoms.adapter import Delta
from atoms.engine import EngineStats, Generation, GenerationRequest, Grammar, TokenDelta
from atoms.errors import (
    ConfigError,
    DataError,
    EngineError,
    EngineOverloadedError,
    EngineStoppedError,
    RequestTooLongError,
)
from atoms.mix import Mix
from atoms.model import context_length, encode_prompt, stop_token_ids, with_bos
from atoms.space import LoRASpace
from atoms.steered import SteeredModel
from server.embedded.batcher import Batcher, Job, Sink
from server.embedded.detokenize import TokenBytes
from server.embedded.grammar import GrammarCompiler
from server.embedded.scoring import DriftScore
from server.embedded.tools import OPENING

_log = logging.getLogger(__name__)
_DEFAULT_MAX_MODEL_LEN = 4096
_SICK_AFTER = 3
"""Model steps failing in a row before the engine calls itself unhealthy."""
_SICK_SECONDS = 30.0
"""How long it does after the last of them: nobody sends it the request that would show it well again while it is unhealthy."""


class EmbeddedEngine:
    """Continuous batching in which every row carries its own mix.

    `model` has the base adapter merged and belongs to the engine from now on. `compose` gives the weight delta of a
    mix, by module or packed (`atoms.steered`), None for none; it runs on the worker thread. Keys and values take up to
    slots · max_model_len tokens of memory, allocated as they are needed, and those of up to `prefix_cache_tokens` of
    prompts stay for others that begin alike (0: none). A step computes about `prefill_tokens_per_step` prompt tokens, a
    quarter of that between two decode steps.

    Raises ConfigError for sizes that cannot work, ModelError for a model that cannot be batched.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        space: LoRASpace,
        compose: Callable[[Mix], Delta | Tensor | None],
        *,
        slots: int = 16,
        max_model_len: int | None = None,
        max_waiting: int = 256,
        prefill_tokens_per_step: int = 512,
        prefix_cache_tokens: int = 4096,
    ) -> None:
        for name, value in (
            ("slots", slots), ("max_waiting", max_waiting), ("prefill_tokens_per_step", prefill_tokens_per_step)
        ):  # fmt: skip
            if value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        if prefix_cache_tokens < 0:
            raise ConfigError(f"prefix_cache_tokens is {prefix_cache_tokens}; it must be at least 0")
        self._max_model_len = _model_len(_steady_context(model), max_model_len)
        self._tokenizer = tokenizer
        self._tokenizer_lock = threading.Lock()  # fast tokenizers refuse to be used by two threads at once
        self._token_bytes = TokenBytes(tokenizer)
        self._slots = slots
        self._max_waiting = max_waiting
        self._steered = SteeredModel(model, space, slots)
        end_tokens = stop_token_ids(model, tokenizer)
        vocabulary = int(model.config.get_text_config().vocab_size)
        self._grammars = GrammarCompiler(tokenizer, self._token_bytes, vocabulary, end_tokens)
        self._compiling = ThreadPoolExecutor(1, "grammar-compiler")  # one: a costly grammar may not take all cores
        self._composing = _TimedCompose(compose)
        try:
            self._batcher = Batcher(
                model,
                self._steered,
                self._composing,
                end_tokens,
                self._max_model_len,
                prefill_tokens_per_step,
                prefix_cache_tokens,
            )
        except BaseException:
            self._steered.close()
            raise
        self._waiting: deque[Job] = deque()
        self._scores: deque[DriftScore] = deque()
        self._changed = threading.Condition()  # guards _waiting and the three flags
        self._draining = False
        self._closing = False
        self._stopped = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="embedded-engine", daemon=True)
        self._thread.start()

    @property
    def max_model_len(self) -> int:
        return self._max_model_len

    @property
    def healthy(self) -> bool:
        """Whether the worker runs and its last model steps did not all fail, or the last of them long ago. Then the next step
        decides."""
        return self._thread.is_alive() and not self._stopped and not self._sick

    @property
    def _sick(self) -> bool:
        batcher = self._batcher
        return batcher.failed_steps >= _SICK_AFTER and time.monotonic() - batcher.failed_at < _SICK_SECONDS

    @property
    def died(self) -> bool:
        """Whether the worker has ended though nobody closed the engine: it answers nothing any more."""
        return self._failure is not None

    @property
    def prompt_tokens_total(self) -> int:
        """Tokens of the prompts read since the start."""
        return self._batcher.prompt_tokens_total

    @property
    def generation_tokens_total(self) -> int:
        """Tokens generated since the start."""
        return self._batcher.generation_tokens_total

    def encode_chat(
        self, messages: Sequence[dict[str, object]], tools: Sequence[dict[str, object]] = ()
    ) -> tuple[int, ...]:
        """See `Engine.encode_chat`. Further raises DataError for messages that the chat template refuses."""
        if tools or any("tool_calls" in message or message["role"] == "tool" for message in messages):
            self._require_tools()
        if not self._tokenizer.chat_template:
            raise ConfigError("this model has no chat template; send plain text to /v1/completions instead")
        try:
            with self._tokenizer_lock:
                return tuple(encode_prompt(self._tokenizer, messages, tools))
        except TemplateError as error:
            raise DataError(f"the model's chat template refuses these messages: {error}") from error

    def _require_tools(self) -> None:
        """Raises ConfigError unless the chat template shows tools to the model, and calls in the form that is read."""
        template = str(self._tokenizer.chat_template)
        if "tools" not in template or OPENING not in template:
            raise ConfigError(
                f"this model's chat template has no tool calls of the form {OPENING}…; leave tools out, ask for JSON with "
                "response_format, or serve a model that was trained for tools"
            )

    def encode_text(self, text: str) -> tuple[int, ...]:
        with self._tokenizer_lock:
            return tuple(with_bos(self._tokenizer, self._tokenizer(text, add_special_tokens=False)["input_ids"]))

    async def compile_grammar(self, grammar: Grammar) -> None:
        """Compiles `grammar` away from the caller's thread and from the worker's; it is kept for the requests to come.

        Raises GrammarError, ConfigError for a tokenizer that cannot be used for grammars, EngineStoppedError.
        """
        try:
            compiling = self._compiling.submit(self._grammars.matcher, grammar)
        except RuntimeError as error:
            raise EngineStoppedError("the engine has stopped") from error
        await asyncio.wrap_future(compiling)

    async def stream(self, request: GenerationRequest) -> AsyncIterator[TokenDelta]:
        """See `Engine.stream`. The request is submitted, and refused, when the first delta is asked for."""
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[TokenDelta | EngineError] = asyncio.Queue()

        def sink(item: TokenDelta | EngineError) -> None:
            loop.call_soon_threadsafe(arrived.put_nowait, item)

        job = self._job(request, sink)
        self._submit([job], self._max_waiting)
        try:
            while True:
                item = await arrived.get()
                if isinstance(item, EngineError):
                    raise item
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            self._cancel([job])

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """See `Engine.generate`. The first failure cancels the rest and is raised."""
        collectors = [_Collector(request) for request in requests]
        jobs = [self._job(request, collector.take) for request, collector in zip(requests, collectors, strict=True)]
        self._submit(jobs, None)
        try:
            return [collector.result() for collector in collectors]
        finally:
            self._cancel(jobs)

    def drift(self, prompt: Sequence[int], response: Sequence[int], mix: Mix) -> Future[float]:
        """The mean over the response's tokens of KL(unsteered ‖ steered), nats, over the whole vocabulary.

        Computed in chunks while no request waits and a slot is free. The future may end with EngineError. Raises
        EngineStoppedError, EngineError for an empty prompt or response.
        """
        if not prompt or not response:
            raise EngineError("a prompt and a response are needed to measure drift; one is empty")
        score = DriftScore(prompt, response, mix)
        with self._changed:
            if self._stopped or self._closing or self._draining:
                raise EngineStoppedError("the engine is shutting down and takes no new work")
            self._scores.append(score)
            self._changed.notify_all()
        return score.done

    def stats(self) -> EngineStats:
        return EngineStats(self._batcher.load, len(self._waiting), self._slots, self._composing.count,
                           self._composing.seconds)  # fmt: skip

    def drain(self, timeout: float) -> bool:
        """Refuses new requests and waits up to `timeout` seconds for those in flight. Whether all have ended."""
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: self._stopped or not (self._waiting or self._batcher.load), timeout)

    def close(self) -> None:
        self._compiling.shutdown(wait=False)
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _job(self, request: GenerationRequest, sink: Sink) -> Job:
        grammar = request.sampling.grammar
        matcher = self._grammars.matcher(grammar) if grammar is not None else None
        return Job(request, self._token_limit(request), self._token_bytes, sink, matcher)

    def _token_limit(self, request: GenerationRequest) -> int:
        """How many tokens `request` may generate. Raises RequestTooLongError, or EngineError for what cannot be run."""
        prompt, asked, longest = len(request.prompt_token_ids), request.sampling.max_tokens, self._max_model_len
        if prompt == 0:
            raise EngineError("the prompt is empty; send at least one token")
        if "" in request.sampling.stop:
            raise EngineError("a stop string is empty; leave it out")
        if asked is not None and asked < 1:
            raise EngineError(f"max_tokens is {asked}; it must be at least 1")
        if prompt >= longest:
            raise RequestTooLongError(
                f"the prompt has {prompt} tokens and the context is {longest}; shorten the messages", param="messages"
            )
        if asked is not None and prompt + asked > longest:
            raise RequestTooLongError(
                f"{prompt} prompt tokens and max_tokens {asked} exceed the context of {longest}; "
                f"ask for at most {longest - prompt} tokens or shorten the messages",
                param="max_tokens",
            )
        return longest - prompt if asked is None else asked

    def _submit(self, jobs: Sequence[Job], max_waiting: int | None) -> None:
        with self._changed:
            if self._stopped or self._closing:
                raise EngineStoppedError("the engine has stopped" + (f": {self._failure}" if self._failure else ""))
            if self._draining:
                raise EngineStoppedError("the engine is shutting down and takes no new requests")
            if max_waiting is not None and len(self._waiting) >= max_waiting:
                raise EngineOverloadedError(
                    f"{len(self._waiting)} requests are waiting, and the limit is {max_waiting}; try again shortly"
                )
            self._waiting.extend(jobs)
            self._changed.notify_all()

    def _cancel(self, jobs: Sequence[Job]) -> None:
        """Drops unfinished jobs: waiting ones now, running ones before the next step."""
        with self._changed:
            for job in jobs:
                job.cancelled = True
            self._waiting = deque(job for job in self._waiting if not job.cancelled)

    def _run(self) -> None:
        try:
            while self._next_jobs():
                self._batcher.step()
        except BaseException as error:  # nothing may end the worker in silence
            _log.exception("the engine died")
            self._failure = error
        finally:
            self._stop()

    def _next_jobs(self) -> bool:
        """Moves jobs to the batcher as far as slots are free; sleeps while there are none. False when closing."""
        with self._changed:
            self._changed.notify_all()  # drain() may be waiting for the last job to leave
            self._changed.wait_for(
                lambda: self._closing or self._waiting or self._scores or self._batcher.load or self._batcher.scoring
            )
            while self._scores:
                self._batcher.add_score(self._scores.popleft())
            while self._waiting and self._batcher.free:
                self._batcher.add(self._waiting.popleft())
            return not self._closing

    def _stop(self) -> None:
        with self._changed:
            self._stopped = True
            jobs = [*self._batcher.take_all(), *self._waiting]
            scores = [*self._batcher.take_scores(), *self._scores]
            self._waiting.clear()
            self._scores.clear()
            self._changed.notify_all()
        reason = f"the engine died: {self._failure}" if self._failure else "the engine is shutting down"
        for job in jobs:
            job.fail(EngineStoppedError(reason))
        for score in scores:
            score.fail(EngineStoppedError(reason))
        self._steered.close()


class _TimedCompose:
    """Composes mixes, and notes how many and in how long."""

    def __init__(self, compose: Callable[[Mix], Delta | Tensor | None]) -> None:
        self._compose = compose
        self.count = 0
        self.seconds = 0.0

    def __call__(self, mix: Mix) -> Delta | Tensor | None:
        if not mix:
            return self._compose(mix)
        start = time.perf_counter()
        try:
            return self._compose(mix)
        finally:
            self.count += 1
            self.seconds += time.perf_counter() - start


class _Collector:
    """Gathers one sequence for `generate`."""

    def __init__(self, request: GenerationRequest) -> None:
        self._request = request
        self._deltas: list[TokenDelta] = []
        self._error: EngineError | None = None
        self._done = threading.Event()

    def take(self, item: TokenDelta | EngineError) -> None:
        if isinstance(item, EngineError):
            self._error = item
            self._done.set()
            return
        self._deltas.append(item)
        if item.finish_reason is not None:
            self._done.set()

    def result(self) -> Generation:
        """Waits for the end. Raises the sequence's error."""
        self._done.wait()
        if self._error is not None:
            raise self._error
        reason = self._deltas[-1].finish_reason
        assert reason is not None
        return Generation(
            self._request.request_id,
            "".join(delta.text for delta in self._deltas),
            tuple(token for delta in self._deltas for token in delta.token_ids),
            reason,
            tuple(entry for delta in self._deltas for entry in delta.logprobs),
        )


def _steady_context(model: PreTrainedModel) -> int:
    """Context length in tokens within which positions do not depend on the company.

    LongRoPE changes its frequencies for the whole batch as soon as one row exceeds the original context.
    """
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        original = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
        return min(context_length(model), int(original))
    return context_length(model)


def _model_len(context: int, asked: int | None) -> int:
    if asked is None:
        return min(context, _DEFAULT_MAX_MODEL_LEN)
    if not 2 <= asked <= context:
        raise ConfigError(f"max_model_len is {asked}; this model allows 2 to {context}")
    return asked
