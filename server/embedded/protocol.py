"""Bodies of /v1/chat/completions and /v1/completions: what is read from them, checked strictly.

A null field is an absent one. No type is coerced: ``"0.5"`` is no number and ``true`` is not 1. Fields that are read
nowhere are `refusals`' concern.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from atoms.engine import Grammar, SamplingParams
from server.embedded.refusals import CHAT, COMPLETIONS, refuse_unsupported
from server.embedded.response_format import asked_grammar
from server.embedded.tools import Tools, read_tools
from server.errors import InvalidFieldError
from server.limits import Limits

_COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions
_INT64 = 2**63

Penalty = Annotated[float, Field(ge=-2, le=2)]
Prompt = str | tuple[int, ...]
"""Text, or token ids."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())


class StreamOptions(_Strict):
    """What a stream carries besides text."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False
    include_obfuscation: Literal[False] = False
    continuous_usage_stats: Literal[False] = False


class GenerationBody(_Strict, ABC):
    """Fields that both routes share, with OpenAI's names and defaults; from `top_k` on, vLLM's."""

    model: str
    n: int = Field(1, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    stop: str | list[str] = Field(default_factory=list)
    seed: int | None = Field(None, ge=-_INT64, lt=_INT64)
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field(default_factory=dict)
    user: str | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)
    steering: Any = None
    top_k: int = Field(0, ge=-1)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    response_format: Any = None
    structured_outputs: Any = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def grammar(self, limits: Limits) -> tuple[Grammar, str] | None:
        """The grammar that the answer must match, and the field that asks for it; None for free text.

        Raises InvalidFieldError, UnsupportedFieldError.
        """
        return asked_grammar(self.response_format, self.structured_outputs, limits)

    def check(self, limits: Limits) -> None:
        """Raises InvalidFieldError for what exceeds the server's limits or contradicts itself."""
        constrained = self.grammar(limits) is not None
        if constrained and self.ignore_eos:
            raise InvalidFieldError("ignore_eos is true and the answer must end where its grammar does; give one of them",
                                    "ignore_eos")  # fmt: skip
        if self.stream_options is not None and not self.stream:
            message = "stream_options is given and stream is false; set stream, or leave it out"
            raise InvalidFieldError(message, "stream_options")
        _at_most(self.n, limits.max_n, "n")
        if limits.max_tokens is not None:
            for name in ("max_tokens", "max_completion_tokens"):
                _at_most(getattr(self, name, None) or 0, limits.max_tokens, name, "tokens")
        _at_most(len(self.stop_strings()), limits.max_stop, "stop", "stop strings")
        _at_most(len(self.logit_bias), limits.max_logit_bias, "logit_bias", "entries")
        for text in self.stop_strings():
            if not text:
                raise InvalidFieldError("a stop string is empty; leave it out", "stop")
            _at_most(len(text.encode()), limits.max_stop_bytes, "stop", "bytes in one stop string")

    def sampling(self) -> SamplingParams:
        """As the engine takes it, for the first choice."""
        return SamplingParams(
            max_tokens=self.token_limit(),
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(0, self.top_k),
            min_p=self.min_p,
            seed=self.seed,
            stop=self.stop_strings(),
            include_stop=self.include_stop_str_in_output,
            ignore_eos=self.ignore_eos,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=_token_biases(self.logit_bias),
            logprobs=self.logprobs_asked(),
        )

    @abstractmethod
    def token_limit(self) -> int | None:
        """Tokens to generate at most; None: up to the end of the context."""

    @abstractmethod
    def logprobs_asked(self) -> int | None:
        """As `SamplingParams.logprobs`."""


class ChatBody(GenerationBody):
    """Body of /v1/chat/completions; `messages` are read by `messages.template_messages`."""

    messages: Any = None
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0)
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: bool = True

    @classmethod
    def read(cls, body: dict[str, Any], limits: Limits) -> Self:
        """Raises InvalidFieldError, UnsupportedFieldError."""
        refuse_unsupported(body, CHAT)
        return cls.parse(body, limits)

    @classmethod
    def parse(cls, body: dict[str, Any], limits: Limits) -> Self:
        """As `read`, of a body whose unsupported fields have been refused."""
        return _validate(cls, body, limits)

    def check(self, limits: Limits) -> None:
        super().check(limits)
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise InvalidFieldError("max_tokens and max_completion_tokens are both given; give one", "max_tokens")
        if self.top_logprobs is not None:
            if not self.logprobs:
                raise InvalidFieldError("top_logprobs is given and logprobs is not true; set logprobs", "top_logprobs")
            _at_most(self.top_logprobs, limits.max_logprobs, "top_logprobs")

    def called_tools(self, limits: Limits) -> Tools | None:
        """The tools that the answer may call. Raises InvalidFieldError, UnsupportedFieldError."""
        return read_tools(self.tools, self.tool_choice, self.parallel_tool_calls, limits)

    def grammar(self, limits: Limits) -> tuple[Grammar, str] | None:
        tools, asked = self.called_tools(limits), super().grammar(limits)
        if tools is None:
            return asked
        if asked is not None:
            raise InvalidFieldError("the answer is held to a format and may not be a tool call then; give one of them",
                                    "tools")  # fmt: skip
        forced = tools.grammar(limits)
        return (forced, "tools") if forced is not None else None

    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def logprobs_asked(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(GenerationBody):
    """Body of /v1/completions."""

    prompt: Any = None
    logprobs: int | None = Field(None, ge=0)

    @classmethod
    def read(cls, body: dict[str, Any], limits: Limits) -> Self:
        """Raises InvalidFieldError, UnsupportedFieldError."""
        refuse_unsupported(body, COMPLETIONS)
        return _validate(cls, body, limits)

    def check(self, limits: Limits) -> None:
        super().check(limits)
        if self.logprobs is not None:
            _at_most(self.logprobs, limits.max_logprobs, "logprobs")
        _at_most(len(self.prompts()) * self.n, limits.max_sequences, "prompt", "sequences (prompts times n)")

    def prompts(self) -> list[Prompt]:
        """The prompts, of which `prompt` may be one or a list. Raises InvalidFieldError."""
        value = self.prompt
        if isinstance(value, str) or _is_token_ids(value):
            return [_prompt(value)]
        if isinstance(value, list) and value:
            return [_prompt(item) for item in value]
        raise InvalidFieldError("prompt must be a text, a list of token ids, or a list of either; none empty", "prompt")

    def token_limit(self) -> int | None:
        return self.max_tokens or _COMPLETION_MAX_TOKENS

    def logprobs_asked(self) -> int | None:
        return self.logprobs


Body = TypeVar("Body", bound=GenerationBody)


def _validate(cls: type[Body], body: dict[str, Any], limits: Limits) -> Body:
    try:
        parsed = cls.model_validate({name: value for name, value in body.items() if value is not None})
    except ValidationError as error:
        raise _field_error(error) from None
    parsed.check(limits)
    return parsed


def _field_error(error: ValidationError) -> InvalidFieldError:
    """The first complaint, by field. Of a union's branches the first speaks."""
    first = error.errors(include_url=False)[0]
    names = [str(part) for part in first["loc"]][: 2 if first["loc"][0] in ("stream_options", "logit_bias") else 1]
    param = ".".join(names)[:128]
    if first["type"] == "missing":
        return InvalidFieldError(f"{param} is missing; send it", param)
    return InvalidFieldError(f"{param} is {repr(first['input'])[:80]}: {first['msg'].lower()}", param)


def _prompt(value: object) -> Prompt:
    if isinstance(value, str) and value:
        return value
    if _is_token_ids(value):
        return tuple(value)  # type: ignore[arg-type]
    raise InvalidFieldError("each prompt must be a text or a list of token ids, and none may be empty", "prompt")


def _is_token_ids(value: object) -> bool:
    """A non-empty list of whole numbers of at least 0."""
    return isinstance(value, list) and bool(value) and all(type(item) is int and item >= 0 for item in value)


def _token_biases(biases: dict[str, float]) -> tuple[tuple[int, float], ...]:
    for token in biases:
        if not (token.isascii() and token.isdigit() and len(token) <= 9):
            raise InvalidFieldError(f"logit_bias has the key {token[:32]!r}; keys are token ids", "logit_bias")
    return tuple((int(token), bias) for token, bias in biases.items())


def _at_most(value: int, limit: int, param: str, what: str = "") -> None:
    if value > limit:
        raise InvalidFieldError(f"{param} asks for {value} {what or param}; the limit is {limit}", param)
