"""What a request asks for, the echo of what was applied, and the check that a server applied anything at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypedDict, cast

from openai import AsyncStream, BaseModel, NotGiven, Omit, OpenAIError, Stream
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response

MIX_HEADER = "x-atomsteer-mix"


class Steering(TypedDict, total=False):
    """The field `steering` of a request, as it is sent. `atoms` maps ids or aliases to coefficients; {} is unsteered."""

    atoms: Mapping[str, float]
    preset: str
    experiment: str
    max_kl: float
    on_exceed: Literal["error", "scale"]
    allow_out_of_range: bool
    phase: Literal["all", "decode"]


SteeringLike = Steering | Mapping[str, float]
"""A `Steering`, or the atoms alone: ``{"bulleted-list": 2}``."""


class Echo(BaseModel):
    """What a server applied. `predicted_kl` is in nats a token; `scaled_by` is below 1 where `max_kl` made it weaker."""

    mix: str
    atoms: dict[str, float]
    predicted_kl: float
    scaled_by: float
    preset: str | None = None
    experiment: str | None = None
    arm: str | None = None
    phase: Literal["all", "decode"] = "all"


class SteeredChatCompletion(ChatCompletion):
    """A chat completion with its echo."""

    steering: Echo


class SteeredChatCompletionChunk(ChatCompletionChunk):
    """A piece of a chat completion; the first has the echo."""

    steering: Echo | None = None


class SteeredCompletion(Completion):
    """A completion with its echo; of a stream, the first piece has it."""

    steering: Echo


class SteeredResponse(Response):
    """A response of the responses API with its echo."""

    steering: Echo


class SteeringIgnoredError(OpenAIError):
    """Steering was asked for, and the answer has no echo: whoever answered did not apply it."""


def with_steering(params: Mapping[str, Any], steering: SteeringLike | None) -> dict[str, Any]:
    """`params` of a create call with `steering` in its `extra_body`; None and OpenAI's `omit` say nothing of it.

    Raises TypeError if it is there already, or is no mapping.
    """
    if steering is None or isinstance(steering, Omit | NotGiven):
        return dict(params)
    extra = dict(params.get("extra_body") or {})
    if "steering" in extra:
        raise TypeError("steering is given twice: as an argument, and in extra_body; leave one out")
    return {**params, "extra_body": {**extra, "steering": wire_form(steering)}}


def wire_form(steering: SteeringLike) -> dict[str, Any]:
    """As a server reads it: a mapping of nothing but numbers is a mix of atoms, but for `max_kl`, which is a field.

    Raises TypeError for atoms that stand beside fields, and for what is no mapping.
    """
    if not isinstance(steering, Mapping):
        raise TypeError(f'steering is {steering!r}; it must be a mapping, such as {{"bulleted-list": 2}}')
    atoms = steering.keys() - Steering.__annotations__
    if atoms and len(atoms) < len(steering):
        fields = ", ".join(sorted(steering.keys() - atoms))
        raise TypeError(f"steering has atoms ({', '.join(sorted(atoms))}) beside fields ({fields}); put the atoms into "
                        '"atoms": {"atoms": {"bulleted-list": 2}, "max_kl": 0.5}')  # fmt: skip
    if all(_is_number(value) for value in steering.values()) and steering.keys() != {"max_kl"}:
        return {"atoms": dict(cast(Mapping[str, float], steering))}
    return dict(steering)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def asks_for_steering(body: object, options: Mapping[str, Any]) -> bool:
    """Whether a request's body, or what is merged into it, has a `steering` that is not null."""
    parts = (body, options.get("extra_json"))
    return any(isinstance(part, Mapping) and part.get("steering") is not None for part in parts)


def typed(cast_to: Any) -> Any:
    """The type with an echo of one of OpenAI's answers, or of a stream of them; other types as they are."""
    return _TYPED.get(cast_to, cast_to)


def is_steered(answer: Any) -> bool:
    """Whether an answer, a stream, or a raw response shows that a mix was applied."""
    if isinstance(answer, Stream | AsyncStream):
        return MIX_HEADER in answer.response.headers
    if isinstance(answer, BaseModel):
        return getattr(answer, "steering", None) is not None
    return MIX_HEADER in getattr(answer, "headers", {})


def ignored(base_url: object) -> SteeringIgnoredError:
    return SteeringIgnoredError(
        f"steering was asked for and the answer of {base_url} has no echo of it: the answer is not steered. Is it an "
        "atomsteer server, and do the proxies between pass its headers on? (vLLM needs the plugin: GET /ready tells)"
    )


def echo_of(answer: object) -> Echo | None:
    """The echo of any answer: a parsed or accumulated one, a first chunk, the event ``response.created``."""
    found = getattr(answer, "steering", None)
    if found is None:
        found = getattr(getattr(answer, "response", None), "steering", None)
    if found is None or isinstance(found, Echo):
        return found
    return Echo.construct(**found)


_TYPED: dict[Any, Any] = {
    ChatCompletion: SteeredChatCompletion,
    Completion: SteeredCompletion,
    Response: SteeredResponse,
    Stream[ChatCompletionChunk]: Stream[SteeredChatCompletionChunk],
    AsyncStream[ChatCompletionChunk]: AsyncStream[SteeredChatCompletionChunk],
    Stream[Completion]: Stream[SteeredCompletion],
    AsyncStream[Completion]: AsyncStream[SteeredCompletion],
}
