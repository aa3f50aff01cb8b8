"""The seam between steering and text generation: what a request is, what comes back, and the `Engine` protocol.

Knows no model, no tokenizer and no HTTP. `server.embedded.engine` implements the protocol on transformers; offline
evaluation takes any implementation that the command line passes in.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from atoms.mix import Mix

FinishReason = Literal["stop", "length"]
Phase = Literal["all", "decode"]
"""Which tokens a mix steers: all, or those from the prompt's last one on. Before that the prompt is read unsteered, so
that its keys and values serve every mix."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """What a whole answer must match. `text` is a JSON schema (as JSON), a regular expression in Rust's syntax, or a JSON
    list of texts of which the answer is one."""

    kind: Literal["json_schema", "regex", "choice"]
    text: str


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn. `temperature` 0 is greedy. `seed` None draws a fresh one.

    `top_k` 0 and `min_p` 0 are off. `logprobs` None is off; n asks for the n most likely tokens at each step besides the
    chosen one (0: the chosen one alone). `max_tokens` None means up to the end of the context. Stop strings are cut from
    the text unless `include_stop`. With a `grammar` only tokens are drawn with which the answer can still match it, and
    the answer ends where it can only end.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    grammar: Grammar | None = None


def decoding_name(temperature: float, top_p: float) -> str:
    """How a report says that answers were decoded: "greedy", or "temperature 0.7, top-p 0.9"."""
    if temperature == 0:
        return "greedy"
    return f"temperature {temperature:g}" + (f", top-p {top_p:g}" if top_p < 1 else "")


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One sequence to continue: prompt token ids, the (resolved) mix of its row, how to sample, and which tokens the mix
    steers."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    mix: Mix = field(default_factory=Mix)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    phase: Phase = "all"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability (nats, natural log) of one token under the steered model before temperature and penalties."""

    token_id: int
    text: str
    bytes: tuple[int, ...]
    logprob: float
    top: tuple[tuple[int, str, tuple[int, ...], float], ...] = ()


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """What one step added to one sequence. The last delta of a sequence carries `finish_reason`; text may be empty
    while bytes of a character or a possible stop string are held back."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """A whole answer."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A moment's load: sequences being decoded, sequences waiting, decode slots in all; and since the start, how many
    times a mix's weights were composed and how long that took together."""

    running: int
    waiting: int
    slots: int
    mixes_composed: int = 0
    compose_seconds: float = 0.0


class Engine(Protocol):
    """Generates text with one mix a row.

    Tokenisation belongs to the engine because it owns the tokenizer and its chat template. Mixes must be resolved and
    bounded before: an engine applies what it is given.
    """

    @property
    def max_model_len(self) -> int:
        """Context length in tokens."""
        ...

    def encode_chat(
        self, messages: Sequence[dict[str, object]], tools: Sequence[dict[str, object]] = ()
    ) -> tuple[int, ...]:
        """Token ids of `messages` in the model's chat template, with the start of the assistant's turn. `tools` are
        definitions in OpenAI's form.

        Raises ConfigError if the model has no chat template, or one without tools where they are given;
        RequestTooLongError never (lengths are checked on submit).
        """
        ...

    def encode_text(self, text: str) -> tuple[int, ...]:
        """Token ids of plain text, with the tokenizer's own special tokens (such as ``<bos>``)."""
        ...

    def stream(self, request: GenerationRequest) -> AsyncIterator[TokenDelta]:
        """Deltas as they come. Closing the iterator cancels the sequence and frees its slot.

        Raises RequestTooLongError, EngineOverloadedError (queue full), EngineStoppedError, GrammarError, EngineError.
        """
        ...

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """Whole answers in the order of `requests`, batched; blocks. Raises as `stream` does, save for overload."""
        ...

    def stats(self) -> EngineStats: ...

    def close(self) -> None:
        """Stops the engine; sequences in flight end with EngineStoppedError. Idempotent."""
        ...
