"""Continuous batching on one thread: requests join and leave a batch whose rows each carry their own mix.

Knows the model, its cache and its tokenizer's bytes; nothing of threads, event loops, queues or packages. One `step()` is

    drop cancelled -> admit into a prefill group -> prefill one chunk (and join) -> decode one token for all rows
    -> if nobody waits and a slot is free, read a chunk of an answer to be scored

Rows 0..n-1 of the cache and slots 0..n-1 of the steered model belong together. A prefill group of k requests uses the
last k slots, so that rows may leave meanwhile; when it joins, its deltas move down beside the others.

A request that is steered from its prompt's last token on (phase "decode") prefills what comes before, unsteered, and
joins with that token as the first one to decode. While rows decode, a step prefills less, so that they wait less.
"""

from __future__ import annotations

import inspect
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from atoms.adapter import Delta
from atoms.engine import FinishReason, GenerationRequest, TokenDelta, TokenLogprob
from atoms.errors import AtomsteerError, EngineError, ModelError
from atoms.mix import Mix
from atoms.steered import SteeredModel
from server.embedded.detokenize import TextStream, TokenBytes
from server.embedded.kv import ColumnCache, prompt_cache
from server.embedded.prefixes import KnownPrefix, PrefixCache
from server.embedded.sampling import TokenMatcher, TokenSampler, sample_rows, token_logprobs
from server.embedded.scoring import DriftScore

_log = logging.getLogger(__name__)
_SUPPORTED_LAYERS = {"full_attention", "sliding_attention"}
_SHARE_BESIDE_ROWS = 4
"""While rows decode, a step prefills this part of the tokens that it may: a long prompt must not hold them up."""

_SCORED_LOGITS = 2**24
"""Most logits of a chunk of an answer that is scored: 64 MiB in fp32, a few of which live at once."""

Sink = Callable[[TokenDelta | EngineError], None]
"""Takes a sequence's deltas and, where it fails, its error. Called on the batcher's thread; must not block."""


class Job:
    """One request on its way: its sampler, its text so far, and where its deltas go."""

    def __init__(
        self,
        request: GenerationRequest,
        limit: int,
        token_bytes: TokenBytes,
        sink: Sink,
        matcher: TokenMatcher | None = None,
    ) -> None:
        params = request.sampling
        self.request = request
        self.limit = limit  # tokens to generate at most
        self.generated = 0
        self.last_token = -1
        self.finished = False
        self.cancelled = False  # set by any thread, read once a step
        self.sampler = TokenSampler(params, request.prompt_token_ids, matcher)
        prompt = request.prompt_token_ids
        self.is_read_unsteered = request.phase == "decode" and bool(request.mix) and len(prompt) > 1
        self.prefix = prompt[:-1] if self.is_read_unsteered else prompt  # what is prefilled
        self.prefix_mix = Mix() if self.is_read_unsteered else request.mix
        if self.is_read_unsteered:
            self.last_token = prompt[-1]
        self._text = TextStream(token_bytes, params.stop, params.include_stop)
        self._bytes = token_bytes
        self._sink = sink

    def accept(self, token: int, logits: Tensor, end_tokens: frozenset[int]) -> None:
        """Takes the token sampled from raw logits (V,), and sends what it adds."""
        self.generated += 1
        self.last_token = token
        ended = token in end_tokens and not self.request.sampling.ignore_eos
        text = "" if ended else self._text.feed(token)
        reason: FinishReason | None = None
        if ended or self._text.stop is not None or self.sampler.complete:
            reason = "stop"
        elif self.generated >= self.limit:
            reason = "length"
        if reason is not None:
            text += self._text.flush()
        self.finished = reason is not None
        self._sink(TokenDelta(text, (token,), self._logprobs(token, logits), reason, self._text.stop))

    def fail(self, error: EngineError) -> None:
        """Ends the sequence with `error`. Never raises."""
        self.finished = True
        try:
            self._sink(error)
        except Exception:  # a closed event loop: whoever waited has gone with it
            _log.debug("nobody waits for request %s any more", self.request.request_id)

    def _logprobs(self, token: int, logits: Tensor) -> tuple[TokenLogprob, ...]:
        count = self.request.sampling.logprobs
        if count is None:
            return ()
        chosen, best = token_logprobs(logits.float(), token, count)
        top = tuple((index, *self._render(index), logprob) for index, logprob in best)
        return (TokenLogprob(token, *self._render(token), chosen, top),)

    def _render(self, token: int) -> tuple[str, tuple[int, ...]]:
        exact = self._bytes[token]
        return exact.decode("utf-8", "replace"), tuple(exact)


@dataclass
class _PrefillGroup:
    """Requests prefilled together: prefixes (k, T) left-padded with `padding` columns each, `done` columns computed."""

    jobs: list[Job]
    tokens: Tensor
    padding: Tensor
    done: int = 0
    logits: Tensor | None = None  # (k, V) of the last column, once it is computed
    cache: Cache = field(default_factory=prompt_cache)

    @property
    def complete(self) -> bool:
        return self.done == self.tokens.shape[1]


class Batcher:
    """Prefills and decodes jobs. Not thread-safe, but for the counters and `load`, which any thread may read.

    Give it at most `free` jobs; they are prefilled in order of arrival.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        steered: SteeredModel,
        compose: Callable[[Mix], Delta | Tensor | None],
        end_tokens: frozenset[int],
        max_length: int,
        prefill_tokens: int,
        prefix_tokens: int,
    ) -> None:
        _refuse_unsupported(model)
        self._model = model
        self._steered = steered
        self._compose = compose
        self._end_tokens = end_tokens
        self._prefill_tokens = prefill_tokens
        self._scored_tokens = max(1, _SCORED_LOGITS // int(model.config.get_text_config().vocab_size))
        self._device = torch.device(model.get_input_embeddings().weight.device)  # type: ignore[arg-type]
        # an index, not a count: that would give the head a view, whose product copies its weight for every row
        last = torch.tensor([-1], device=self._device)
        self._last_only = {"logits_to_keep": last} if "logits_to_keep" in _forward_parameters(model) else {}
        self._cache = ColumnCache(steered.slots, max_length)
        self._prefixes = PrefixCache(prefix_tokens)
        self._arrived: deque[Job] = deque()
        self._scores: deque[DriftScore] = deque()
        self._group: _PrefillGroup | None = None
        self._rows: list[Job] = []
        self.prompt_tokens_total = 0
        self.generation_tokens_total = 0
        self.failed_steps = 0  # in a row, without a good one between
        self.failed_at = -math.inf  # when the last one did, on the monotonic clock

    @property
    def load(self) -> int:
        """Jobs taken and not finished."""
        return len(self._rows) + len(self._arrived) + (len(self._group.jobs) if self._group else 0)

    @property
    def free(self) -> int:
        return self._steered.slots - self.load

    @property
    def scoring(self) -> bool:
        """Whether there are answers to score."""
        return bool(self._scores)

    def add(self, job: Job) -> None:
        self._arrived.append(job)

    def add_score(self, score: DriftScore) -> None:
        if score.begin():
            self._scores.append(score)

    @torch.inference_mode()
    def step(self) -> None:
        """Brings every job as far as one step goes. Model errors end the jobs concerned, and are not raised."""
        self._drop_cancelled()
        computed = False
        while not computed and self._next_group():
            assert self._group is not None
            if computed := not self._group.complete:
                self._guard(self._prefill, self._fail_group)
            if self._group is not None and self._group.complete:
                self._guard(self._join, self._fail_all)
        if self._rows:
            self._guard(self._decode, self._fail_rows)
        if self._scores and self._group is None and not self._arrived and self.free:
            self._score()

    def take_scores(self) -> list[DriftScore]:
        """All unfinished scores, which the batcher forgets."""
        scores = list(self._scores)
        self._scores.clear()
        return scores

    def take_all(self) -> list[Job]:
        """All unfinished jobs, which the batcher forgets."""
        jobs = [*self._rows, *(self._group.jobs if self._group else ()), *self._arrived]
        self._rows, self._group = [], None
        self._arrived.clear()
        self._cache.clear()
        self._prefixes.clear()
        return jobs

    def _guard(self, stage: Callable[[], None], fail: Callable[[EngineError], None]) -> None:
        try:
            stage()
        except Exception as error:  # the model failed: out of memory, a kernel, a hook
            _log.exception("a model step failed")
            self.failed_steps += 1
            self.failed_at = time.monotonic()
            fail(_as_engine_error(error))
        else:
            self.failed_steps = 0

    def _drop_cancelled(self) -> None:
        self._arrived = deque(job for job in self._arrived if not job.cancelled)
        if self._group is not None and all(job.cancelled for job in self._group.jobs):
            self._group = None
        self._leave([row for row, job in enumerate(self._rows) if job.cancelled])

    @property
    def _budget(self) -> int:
        """Prompt tokens to compute in a step."""
        return max(1, self._prefill_tokens // _SHARE_BESIDE_ROWS) if self._rows else self._prefill_tokens

    def _next_group(self) -> bool:
        """Whether there is a group to prefill, after admitting one if need be."""
        if self._group is None:
            self._group = self._admit()
        return self._group is not None

    def _admit(self) -> _PrefillGroup | None:
        """The next requests that fit the prefill budget when padded to the longest (at least one), deltas loaded. One
        whose beginning is known from before goes alone."""
        jobs: list[Job] = []
        known: KnownPrefix | None = None
        width = 0
        while self._arrived and known is None:
            head = self._arrived[0]
            widest = max(width, len(head.prefix))
            known = self._prefixes.find(head.prefix_mix, head.prefix, whole=head.is_read_unsteered)
            if jobs and (known is not None or widest * (len(jobs) + 1) > self._budget):
                known = None
                break
            job = self._arrived.popleft()
            if self._load_delta(job, job.prefix_mix, self._steered.slots - 1 - len(jobs)):
                jobs.append(job)
                width = widest
            else:
                known = None
        if not jobs:
            return None
        jobs.reverse()  # slots were filled from the last one down; rows go with rising slots
        tokens = torch.zeros((len(jobs), width), dtype=torch.long)
        for row, job in enumerate(jobs):
            tokens[row, width - len(job.prefix) :] = torch.tensor(job.prefix)
        padding = torch.tensor([width - len(job.prefix) for job in jobs])
        group = _PrefillGroup(jobs, tokens.to(self._device), padding.to(self._device))
        if known is not None:
            group.cache, group.done = known.as_cache(), known.length
        return group

    def _load_delta(self, job: Job, mix: Mix, slot: int) -> bool:
        """Whether `mix` could be loaded; if not, the job has failed."""
        try:
            self._steered.set_slot(slot, self._compose(mix))
        except Exception as error:  # a mix that cannot be applied concerns its request alone
            job.fail(_as_engine_error(error))
            return False
        return True

    def _prefill(self) -> None:
        """Computes the group's next columns."""
        group = self._group
        assert group is not None
        count, width = group.tokens.shape
        end = min(width, group.done + max(1, self._budget // count))
        columns = torch.arange(end, device=self._device)
        with self._steered.rows(range(self._steered.slots - count, self._steered.slots)):
            logits = self._forward(
                tokens=group.tokens[:, group.done : end],
                mask=columns >= group.padding.unsqueeze(1),
                positions=(columns[group.done :] - group.padding.unsqueeze(1)).clamp(min=0),
                cache=group.cache,
            )
        group.done = end
        if end == width:
            group.logits = logits

    def _join(self) -> None:
        """Makes the jobs of a prefilled group rows. Those whose whole prompt was prefilled get their first token."""
        group = self._group
        assert group is not None
        first = self._steered.slots - len(group.jobs)
        sampled = [row for row, job in enumerate(group.jobs) if not job.is_read_unsteered]
        if sampled:
            assert group.logits is not None
            self._accept([group.jobs[row] for row in sampled], group.logits[sampled])
        for row, job in enumerate(group.jobs):
            self.prompt_tokens_total += len(job.request.prompt_token_ids)
            self._prefixes.keep(job.prefix_mix, job.prefix, group.cache, row)
            if job.finished or job.cancelled:
                continue
            target = len(self._rows)
            if job.is_read_unsteered:
                if not self._load_delta(job, job.request.mix, target):
                    continue
            elif target != first + row:
                self._steered.move_slot(first + row, target)
            self._cache.append(group.cache, row, len(job.prefix))
            self._rows.append(job)
        self._group = None

    def _decode(self) -> None:
        """One token for every row."""
        self._cache.reserve_column()
        tokens = torch.tensor([[job.last_token] for job in self._rows], device=self._device)
        with self._steered.rows(range(len(self._rows))):
            logits = self._forward(
                tokens=tokens,
                mask=self._cache.attention_mask(self._device),
                positions=self._cache.position_ids(self._device),
                cache=self._cache,
            )
        self._cache.advance()
        self._accept(self._rows, logits)
        self._leave([row for row, job in enumerate(self._rows) if job.finished])

    def _score(self) -> None:
        """Reads a chunk for the oldest score, in a slot that nobody uses now. It is no request: if it fails, it alone
        does."""
        score, slot = self._scores[0], self._steered.slots - 1
        try:
            self._steered.set_slot(slot, self._compose(score.mix))
            columns = max(1, min(self._budget // 2, self._scored_tokens))
            score.advance(columns, (partial(self._read, None), partial(self._read, slot)))
        except Exception as error:
            score.fail(_as_engine_error(error))
        if score.done.done():
            self._scores.popleft()

    def _read(self, slot: int | None, tokens: Tensor, start: int, cache: Cache, last: int) -> Tensor:
        """Logits (1, last, V) of the last columns of tokens (1, t), of which `start` columns are in `cache`."""
        end = start + tokens.shape[1]
        columns = torch.arange(end, device=self._device)[None]
        with self._steered.rows([slot]) if slot is not None else nullcontext():
            output = self._model(
                input_ids=tokens.to(self._device),
                attention_mask=torch.ones_like(columns, dtype=torch.bool),
                position_ids=columns[:, start:],
                past_key_values=cache,
                use_cache=True,
                **({"logits_to_keep": last} if self._last_only else {}),
            )
        logits: Tensor = output.logits
        return logits[:, -last:]

    def _forward(self, tokens: Tensor, mask: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Logits (n, V) of the last column, in the model's dtype; tokens (n, t), mask (n, past + t) bool, positions (n, t)."""
        output = self._model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **self._last_only,
        )
        logits: Tensor = output.logits
        return logits[:, -1]

    def _accept(self, jobs: list[Job], logits: Tensor) -> None:
        """Samples one token per job from logits (n, V); a failing row ends alone."""
        for job, row, token in zip(jobs, logits, sample_rows(logits, [job.sampler for job in jobs]), strict=True):
            try:
                if isinstance(token, Exception):
                    raise token
                job.accept(token, row, self._end_tokens)
                self.generation_tokens_total += 1
            except Exception as error:  # sampling, detokenising or sending: nobody else's concern
                job.fail(_as_engine_error(error))

    def _leave(self, rows: list[int]) -> None:
        """Removes rows, from the last up, so that the one moved into a gap is one that stays."""
        for row in reversed(rows):
            last = len(self._rows) - 1
            if row != last:
                self._steered.move_slot(last, row)
            self._cache.remove(row)
            self._rows[row] = self._rows[last]
            self._rows.pop()

    def _fail_group(self, error: EngineError) -> None:
        jobs, self._group = self._group.jobs if self._group else [], None
        for job in jobs:
            if not job.finished:
                job.fail(error)

    def _fail_rows(self, error: EngineError) -> None:
        jobs, self._rows = self._rows, []
        self._cache.clear()
        for job in jobs:
            if not job.finished:
                job.fail(error)

    def _fail_all(self, error: EngineError) -> None:
        """A join that failed halfway may have left the cache in any state."""
        self._fail_group(error)
        self._fail_rows(error)


def _as_engine_error(error: Exception) -> EngineError:
    if isinstance(error, EngineError):
        return error
    what = str(error) if isinstance(error, AtomsteerError) else f"{type(error).__name__}: {error}"
    wrapped = EngineError(f"generation failed: {what}")
    wrapped.__cause__ = error
    return wrapped


def _forward_parameters(model: PreTrainedModel) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


def _refuse_unsupported(model: PreTrainedModel) -> None:
    """Raises ModelError for models whose rows cannot share columns: recurrent states, or positions that are implied."""
    name = type(model).__name__
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - _SUPPORTED_LAYERS
    if kinds or getattr(model, "_is_stateful", False):
        raise ModelError(
            f"{name} has {', '.join(sorted(kinds)) or 'recurrent'} layers; the embedded engine serves models with full and "
            "sliding-window attention: use --engine vllm"
        )
    if "position_ids" not in _forward_parameters(model):
        raise ModelError(
            f"{name} takes no position_ids, so rows of other lengths cannot share a batch: use --engine vllm"
        )
