"""Around vLLM's own routes: the body's `steering` becomes the request's mix, and the answer says what it was.

    body  ->  Steering.resolve  ->  `current`, which the engine's `generate` reads  ->  vLLM  ->  echo in the answer

Bodies and answers are vLLM's; only the echo is put in, as bytes, so that nothing else is parsed or changed.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from uuid import uuid4

from pydantic_core import from_json
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from atoms.errors import AtomsteerError, EngineStoppedError
from server.context import REQUEST_ID_HEADER, RequestContext, Traffic, begin_generating
from server.errors import InvalidFieldError, InvalidJSONError, UnsupportedFieldError, error_body, error_kind
from server.experiments.drift import Answered, DriftSampler
from server.experiments.measures import HUNG_UP
from server.experiments.recording import Choice, FinishedResponse
from server.experiments.spec import Subject
from server.limits import Limits
from server.metrics import SteeringMetrics
from server.responses import error_response
from server.routes import is_own_path
from server.steering import ResolvedSteering
from server.vllm.exposure import GENERATING_PATHS
from server.vllm.grammars import check_grammars
from server.vllm.versions import WorkerVersion, WorkerVersions

STEERED_PATHS = frozenset({
    "/v1/chat/completions", "/v1/chat/completions/batch", "/v1/completions", "/v1/responses", "/v1/messages",
})  # fmt: skip
_ERROR_CODE = re.compile(rb'"code": ?([45]\d\d)\b')
"""Within the object of an error; the quotes of a text in it are escaped."""
current: ContextVar[SteeredCall | None] = ContextVar("atomsteer_call", default=None)
"""The request that this task works for. Tasks started for it inherit it."""
Score = Callable[[WorkerVersion, Answered], Awaitable[float]]
"""As `server.experiments.drift.Score`, of an answer by a mix of that version."""


@dataclass
class SteeredCall:
    """One request on its way through vLLM, steered by a mix of `version`. `choices` is what the engine has generated for it,
    if it is recorded."""

    version: WorkerVersion
    steering: ResolvedSteering
    model: str
    prompt: str = ""
    choices: dict[tuple[str, int], Choice] = field(default_factory=dict)
    first_token_seconds: float | None = None
    context: RequestContext | None = None
    first: tuple[str, Sequence[int]] | None = None
    response: list[int] = field(default_factory=list)

    def read(self, sequence: str, prompt: Sequence[int]) -> None:
        """A prompt was computed for `sequence`. The first one's tokens are kept."""
        if self.context is not None:
            self.context.read(len(prompt))
        self.first = self.first or (sequence, prompt)

    def observe(self, sequence: str, index: int, text: str, tokens: Sequence[int], finish_reason: str | None) -> None:
        """`text` and `tokens` were added to output `index` of `sequence`. Texts are kept where a recorder wants them, and
        the tokens of the first output."""
        if self.context is not None:
            self.context.generated(len(tokens))
        if self.steering.assignment is None:
            return
        if index == 0 and self.first is not None and self.first[0] == sequence:
            self.response += tokens
        if self.first_token_seconds is None and self.context is not None:
            self.first_token_seconds = self.context.seconds
        before = self.choices.get((sequence, index), Choice("", 0, "", self.prompt))
        self.choices[sequence, index] = Choice(before.text + text, before.tokens + len(tokens),
                                               finish_reason or before.finish_reason, self.prompt)  # fmt: skip


class SteeringMiddleware:
    """Innermost of ours: keys and the size of the body have been looked at, and the context is there.

    `stopped` is set once the engine has been stopped: what it leaves unanswered then ends with an error. (vLLM itself
    would wait for such a request's client to hang up, for ever.)
    """

    def __init__(
        self,
        app: ASGIApp,
        versions: WorkerVersions,
        metrics: SteeringMetrics,
        traffic: Traffic,
        drift: DriftSampler | None,
        score: Score,
        stopped: asyncio.Event,
        limits: Limits,
        *,
        is_work_bounded: bool = True,
    ) -> None:
        self._app = app
        self._limits = limits
        self._is_work_bounded = is_work_bounded
        self._stopped = stopped
        self._versions = versions
        self._metrics = metrics
        self._traffic = traffic
        self._drift = drift
        self._score = score

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or is_own_path(scope["path"]):
            return await self._app(scope, receive, send)
        try:
            replayed, data = await _read(receive)
            body = _json_object(Headers(scope=scope), data)
            call = self._open(scope, body)
        except AtomsteerError as error:
            return await error_response(error)(scope, receive, send)
        token = current.set(call)
        answered = call if scope["path"] in STEERED_PATHS else None
        answer = _Answer(answered, send, self._traffic, self._drift, self._score)
        try:
            with call.version.used() if call is not None else nullcontext():
                await self._run(_with_own_id(scope), replayed, answer)
        except Exception as error:
            answer.failed(error)
            raise
        finally:
            answer.close()
            current.reset(token)

    async def _run(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        async def forward() -> None:
            await self._app(scope, receive, answer.send)

        work = asyncio.create_task(forward())
        stopped = asyncio.create_task(self._stopped.wait())
        try:
            await asyncio.wait({work, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if work.done() and not (self._traffic.draining and (answer.is_withheld or work.exception())):
                return work.result()
            work.cancel()
            await asyncio.wait({work})
            await answer.break_off(scope, receive, EngineStoppedError("the server is shutting down"))
        finally:
            stopped.cancel()
            work.cancel()

    def _open(self, scope: Scope, body: Mapping[str, Any] | None) -> SteeredCall | None:
        """The request's steering; None for a body that vLLM is to refuse or a path that does not generate."""
        if scope["path"] not in STEERED_PATHS:
            if body is not None and "steering" in body:
                raise UnsupportedFieldError(f"{scope['path'][:80]} cannot be steered; the paths that can are "
                                            f"{', '.join(sorted(STEERED_PATHS))}", "steering")  # fmt: skip
            return self._default(scope, body or {})
        context: RequestContext = scope["state"]["context"]
        begin_generating(context, self._traffic)
        if body is None:
            return None
        context.prompt = body.get("messages", body.get("prompt", body.get("input")))
        self._check_limits(body)
        version = self._versions.current
        model = body.get("model") or version.steering.served_name
        if not isinstance(model, str):
            raise InvalidFieldError("model must be a text", "model")
        user, metadata = body.get("user"), body.get("metadata")
        subject = Subject(user if isinstance(user, str) else None, metadata if isinstance(metadata, dict) else {},
                          Headers(scope=scope))  # fmt: skip
        preset = version.steering.preset_of_model(model)
        with self._metrics.counting_refusals():
            resolved = version.steering.resolve(body.get("steering"), model_preset=preset, admin=scope["state"]["admin"],
                                                subject=subject)  # fmt: skip
        if resolved.assignment is not None and body.get("request_id") is not None:
            raise UnsupportedFieldError("request_id cannot be given in an experiment, which records responses by the server's "
                                        "own ids; leave it out", "request_id")  # fmt: skip
        context.steering = resolved
        self._metrics.steered(resolved)
        return SteeredCall(version, resolved, model, _prompt(body), context=context)

    def _check_limits(self, body: Mapping[str, Any]) -> None:
        """Raises InvalidFieldError for longer answers, more of them, larger grammars, or more log-probabilities a token than
        may be asked for, UnsupportedFieldError for beam search, and what `check_grammars` does.

        (vLLM is told of the first limit for those that say nothing; its own of the last is higher, for measuring KL.)"""
        tokens, logprobs = self._limits.max_tokens, self._limits.max_logprobs
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            asked = _number(body.get(name))
            if tokens is not None and asked is not None and asked > tokens:
                raise InvalidFieldError(f"{name} asks for {asked:g} tokens; the limit is {tokens}", name)
        for name in ("logprobs", "top_logprobs", "prompt_logprobs"):
            asked = _number(body.get(name))
            if asked is not None and not 0 <= asked <= logprobs:
                raise InvalidFieldError(f"{name} is {asked:g}; it must lie between 0 and {logprobs}", name)
        if body.get("use_beam_search") not in (None, False):  # each beam's every step is a request to vLLM's engine
            raise UnsupportedFieldError("use_beam_search is not supported here: neither quotas nor experiments could tell what "
                                        "was generated for the answer; leave it out", "use_beam_search")  # fmt: skip
        self._check_sequences(body)
        check_grammars(body, self._limits, is_work_bounded=self._is_work_bounded)

    def _check_sequences(self, body: Mapping[str, Any]) -> None:
        """vLLM would take 16,384 in one request."""
        n = _number(body.get("n")) or 1
        if n > self._limits.max_n:
            raise InvalidFieldError(f"n is {n:g}; the limit is {self._limits.max_n}", "n")
        for name in ("prompt", "messages"):
            prompts = body.get(name)
            many = len(prompts) if isinstance(prompts, list) and prompts and isinstance(prompts[0], str | list) else 1
            if many * n > self._limits.max_sequences:
                raise InvalidFieldError(f"{many} prompts times n {n:g} are {many * n:g} sequences; the limit is "
                                        f"{self._limits.max_sequences}", name)  # fmt: skip

    def _default(self, scope: Scope, body: Mapping[str, Any]) -> SteeredCall:
        """Other paths that generate get the server's default mix. Raises UnsupportedFieldError for a preset there,
        ModelNotFoundError, PresetNotFoundError, and what `_check_limits` does."""
        context: RequestContext = scope["state"]["context"]
        version = self._versions.current
        if scope["path"] in GENERATING_PATHS:
            begin_generating(context, self._traffic)
            self._check_limits(body)
            model = body.get("model")
            if isinstance(model, str) and version.steering.preset_of_model(model) is not None:
                raise UnsupportedFieldError(
                    f"{scope['path']} cannot be steered, so not by the preset of model {model!r} either; give model "
                    f"{version.steering.served_name!r}, or use {', '.join(sorted(STEERED_PATHS))}", "model")  # fmt: skip
        return SteeredCall(version, version.steering.resolve(None), version.steering.served_name, context=context)


class _Answer:
    """The answer on its way out. Its first message waits for the second, which may be of another length. Without a
    `call` it passes as it is. While the server drains, a failure is withheld: `is_withheld` says so. One of an experiment is
    recorded with its last byte, or when it is closed without."""

    def __init__(
        self, call: SteeredCall | None, send: Send, traffic: Traffic, drift: DriftSampler | None, score: Score
    ) -> None:
        self.is_withheld = False
        self._call = call
        self._send = send
        self._traffic = traffic
        self._score = score
        self._drift = drift if call is not None and call.steering.assignment is not None else None
        self._begun = self._ended = False
        self._start: Message | None = None
        self._status = 0
        self._failure: int | None = None
        self._is_stream = self._echoed = False
        self._response_id: str | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.is_withheld = self._traffic.draining and message["status"] >= 500
            self._start, self._status = message, message["status"]
            return
        if self.is_withheld:
            return
        if message["type"] == "http.response.body":
            body, last = message.get("body", b""), not message.get("more_body")
            self._failure = self._failure or _failure_in(body)
            if self._call is not None and not self._echoed and self._status == 200 and body:
                message = {**message, "body": self._with_echo(self._call, body)}
                if self._echoed and self._failure is None:
                    self._expose()
            if body or last:
                await self._release()
            if last:
                self._ended = True
                self._record()
        await self._send(message)

    async def break_off(self, scope: Scope, receive: Receive, error: Exception) -> None:
        """Ends an answer that will not be finished: with the error's status, or with its event where a stream runs."""
        self.failed(error)
        if not self._begun:
            await error_response(error)(scope, receive, self._send)
        elif not self._ended:
            event = _error_event(scope["path"], error) if self._is_stream else b""
            await self._send({"type": "http.response.body", "body": event, "more_body": False})

    def failed(self, error: Exception) -> None:
        """What answers was left with `error`."""
        self._failure = self._failure or error_kind(error).status

    def close(self) -> None:
        """Nothing more will come."""
        self._record()

    def _with_echo(self, call: SteeredCall, body: bytes) -> bytes:
        """`body` with the echo, where it begins the answer's (first) object."""
        assert self._start is not None or self._is_stream
        if self._start is not None:
            headers = MutableHeaders(raw=self._start["headers"])
            self._is_stream = headers.get("content-type", "").startswith("text/event-stream")
        echoed = with_echo(body, call.steering.echo(), is_stream=self._is_stream)
        self._echoed = len(echoed) > len(body)
        if self._echoed:
            self._response_id = _find_id(body)
        if self._start is not None and "content-length" in headers:
            headers["content-length"] = str(int(headers["content-length"]) + len(echoed) - len(body))
        return echoed

    async def _release(self) -> None:
        start, self._start = self._start, None
        if start is not None:
            self._begun = True
            await self._send(start)

    def _expose(self) -> None:
        """The unit is being answered under its arm. One whose request vLLM refuses is not."""
        if self._drift is not None and self._call is not None:
            self._drift.recorder.exposed(self._call.steering.assignment)

    def _record(self) -> None:
        call, drift, self._drift = self._call, self._drift, None
        if drift is None or call is None or call.context is None:
            return
        assignment, seconds, status = call.steering.assignment, call.context.seconds, self._outcome()
        if status == 200 and self._response_id is not None:
            choices = tuple(choice for _, choice in sorted(call.choices.items()))
            response = FinishedResponse(self._response_id, choices, seconds, call.first_token_seconds)
            drift.recorder.finished(assignment, response)
            prompt = call.first[1] if call.first is not None else ()
            drift.offer(call.steering, self._response_id, prompt, call.response, partial(self._score, call.version))
        elif status >= 500 or status == HUNG_UP:
            drift.recorder.exposed(assignment)  # where nothing came before
            response_id = self._response_id or f"failed-{uuid4().hex}"
            drift.recorder.finished(assignment, FinishedResponse(response_id, (), seconds, status=status))

    def _outcome(self) -> int:
        """The status that says how the answer came out, which a stream's own does not."""
        if self._failure is not None:
            return self._failure
        is_answered = self._ended and (self._status != 200 or self._response_id is not None)
        return self._status if is_answered else HUNG_UP  # vLLM says null, status 200, to a client that hung up


def _with_own_id(scope: Scope) -> Scope:
    """The request as vLLM gets it: from the header of the request's id vLLM makes the response's, under which experiments
    record. A client may send one id with many requests; the answer's header still has the client's."""
    headers = MutableHeaders(raw=list(scope["headers"]))
    headers[REQUEST_ID_HEADER] = uuid4().hex
    return {**scope, "headers": headers.raw}


def with_echo(body: bytes, echo: Mapping[str, object], *, is_stream: bool) -> bytes:
    """`body` with `steering` as the first field of its object; of a stream, of its first event's object. A comment that
    keeps a stream alive has none and stays as it is.

    The first event of the responses API carries the response inside; there the echo is the response's field.
    """
    entry = b'"steering":' + json.dumps(echo, separators=(",", ":")).encode() + b","
    opening = b"data: {" if is_stream else b"{"
    if b'"type":"response.created"' in body:
        opening = b'"response":{'
    before, found, after = body.partition(opening)
    return before + found + entry + after if found else body


def _failure_in(event: bytes) -> int | None:
    """The status of the error that an event of a stream reports, None for every other: vLLM ends a stream that fails as it
    ends one that does not. Its form of Anthropic's API tells no status."""
    if event.startswith(b"event: error\n"):
        return 500
    if not event.startswith(b'data: {"error"'):
        return None
    code = _ERROR_CODE.search(event)
    return int(code[1]) if code else 500


def _error_event(path: str, error: Exception) -> bytes:
    """Clients of Anthropic's API look at an event's name."""
    if path == "/v1/messages":
        return b"event: error\ndata: " + json.dumps({"type": "error", **error_body(error)}).encode() + b"\n\n"
    return b"data: " + json.dumps(error_body(error)).encode() + b"\n\n"


async def _read(receive: Receive) -> tuple[Receive, bytes]:
    """The whole body, and a `receive` that gives it once more and then whatever comes."""
    pieces: list[bytes] = []
    more = True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            break
        pieces.append(message.get("body", b""))
        more = message.get("more_body", False)
    data = b"".join(pieces)
    waiting: list[Message] = [{"type": "http.request", "body": data, "more_body": False}]
    if more:
        waiting.append(message)

    async def replay() -> Message:
        return waiting.pop(0) if waiting else await receive()

    return replay, data


def _json_object(headers: Headers, data: bytes) -> dict[str, Any] | None:
    """None for what is not declared as JSON: vLLM refuses that in its own words.

    Raises InvalidJSONError for what is no object, or what only a laxer parser would read: vLLM's must see no `steering`
    that we have not.
    """
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        return None
    try:
        value = from_json(data)
    except ValueError as error:
        raise InvalidJSONError(f"the body is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidJSONError(f"the body is a JSON {type(value).__name__}; send an object")
    return value


def _number(value: object) -> float | None:
    """What vLLM would read `value` as where it wants a whole number: it takes "16" and 16.0 for one. None for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _prompt(body: Mapping[str, Any]) -> str:
    """What the answer answers: the last message of the user, or the text to continue."""
    if isinstance(body.get("prompt"), str):
        return str(body["prompt"])
    turns = body.get("messages", body.get("input"))
    if isinstance(turns, str):
        return turns
    texts = [turn.get("content") for turn in turns if isinstance(turn, dict) and turn.get("role") == "user"
             ] if isinstance(turns, list) else []  # fmt: skip
    return texts[-1] if texts and isinstance(texts[-1], str) else ""


def _find_id(body: bytes) -> str | None:
    """The first `id` of an answer, which is the response's."""
    _, found, rest = body.partition(b'"id":"')
    return rest.partition(b'"')[0].decode() if found else None
