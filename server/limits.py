"""How much one request, and one key, may ask for. Every number is a setting; none is hidden in a handler."""

from __future__ import annotations

from dataclasses import dataclass, fields

from atoms.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Upper bounds of one request.

    `max_body_bytes` counts the body as sent. `max_tokens` is the longest answer in tokens, None for what the context
    holds: more is refused, and an answer whose request says nothing ends there. `max_n` bounds `n` alone, `max_sequences`
    the product of prompts and `n`. `max_stop_bytes` is the length of one stop string in UTF-8, `max_grammar_bytes` that of
    a JSON schema, a regular expression or a list of choices.
    """

    max_body_bytes: int = 1 << 20
    max_tokens: int | None = None
    max_messages: int = 1024
    max_atoms_per_mix: int = 32
    max_tools: int = 128
    max_n: int = 16
    max_sequences: int = 64
    max_stop: int = 16
    max_stop_bytes: int = 1024
    max_logprobs: int = 20
    max_logit_bias: int = 1024
    max_grammar_bytes: int = 1 << 16

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{field.name} is {value!r}; it must be a whole number of at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftBudget:
    """How much of the engine's time may go into measuring the drift of experiments' responses.

    `share` of an arm's responses is measured at most, 0 for none; `tokens_per_minute` counts those read for it, which are
    twice those of prompt and answer.
    """

    share: float = 0.01
    tokens_per_minute: int = 20_000

    def __post_init__(self) -> None:
        share, tokens = self.share, self.tokens_per_minute
        if isinstance(share, bool) or not isinstance(share, int | float) or not (share == 0 or 1e-6 <= share <= 1):
            raise ConfigError(f"the share of responses whose KL is measured is {share!r}; it must be 0, or a number from "
                              "1e-6 to 1")  # fmt: skip
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
            raise ConfigError(
                f"tokens_per_minute of measured KL is {tokens!r}; it must be a whole number of at least 1"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """Bounds of one key. None: not bounded."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent_requests: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{field.name} is {value!r}; it must be a whole number of at least 1, or left out")
