"""/v1/chat/completions, /v1/responses and /v1/completions. The life of a request:

1 read_json, Body.read        bounded, strict; unsupported fields refused by name
2 Steering.resolve            one bounded mix, or an error; from here on every response carries its digest
3 Sequences.of                prompts x n rows for the engine
4 Sequences.run               deltas, until all have ended or the client hangs up
5 AnswerFormat                OpenAI's types, whole or as server-sent events
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from atoms.engine import Grammar, SamplingParams
from atoms.errors import GrammarError
from server.body import read_json
from server.context import RequestContext, Traffic, begin_generating
from server.embedded.answering import Answering, Recording
from server.embedded.formats import ChatFormat, CompletionFormat
from server.embedded.generation import Sequences, ServedEngine
from server.embedded.messages import template_messages
from server.embedded.protocol import ChatBody, CompletionBody, GenerationBody, Prompt
from server.embedded.refusals import RESPONSES, refuse_unsupported
from server.embedded.responses_api import ResponseFormat, as_chat, blaming_own_fields
from server.embedded.responses_api import sse as named_sse
from server.embedded.stream import EventStream, unless_disconnected
from server.errors import InvalidFieldError
from server.experiments.drift import Answered, DriftSampler
from server.experiments.spec import Subject
from server.limits import Limits
from server.metrics import ServerMetrics
from server.steering import ResolvedSteering, Steering


@dataclass(frozen=True)
class OpenAIRoutes:
    """The generation routes on one engine. `vocabulary` bounds token ids, None where it is not known. `drift`
    has the recorder of experiments; None where there are none."""

    engine: ServedEngine
    steering: Steering
    metrics: ServerMetrics
    traffic: Traffic
    limits: Limits
    fingerprint: str
    vocabulary: int | None = None
    drift: DriftSampler | None = None

    def router(self) -> APIRouter:
        router = APIRouter()
        router.add_api_route("/v1/chat/completions", self.chat, methods=["POST"], response_model=None)
        router.add_api_route("/v1/responses", self.respond, methods=["POST"], response_model=None)
        router.add_api_route("/v1/completions", self.complete, methods=["POST"], response_model=None)
        return router

    async def chat(self, request: Request) -> Response:
        context = self._begin(request)
        body = ChatBody.read(await read_json(request), self.limits)
        context.prompt = body.messages
        messages = template_messages(body.messages, self.limits)
        tools = body.called_tools(self.limits)
        steering = self._steer(request, body)
        shown = tools.definitions if tools is not None else ()
        prompts = [await asyncio.to_thread(self.engine.encode_chat, messages, shown)]  # long texts take a while
        answer_id = f"chatcmpl-{uuid.uuid4().hex}"
        form = ChatFormat(answer_id, body.model, self.fingerprint, steering.echo(), body.include_usage, tools)
        sampling = replace(body.sampling(), grammar=await self._grammar(body))
        sequences = self._sequences(answer_id, body, prompts, steering, sampling, "messages")
        recording = self._record(context, answer_id, steering, [_last_question(messages)] * body.n)
        answering = Answering(self.engine, self.metrics, context, sequences, form, "messages", recording)
        return await _respond(request, body, answering)

    async def respond(self, request: Request) -> Response:
        context = self._begin(request)
        data = await read_json(request)
        refuse_unsupported(data, RESPONSES)
        with blaming_own_fields():
            body = ChatBody.parse(as_chat(data), self.limits)
            context.prompt = data.get("input")
            messages = template_messages(body.messages, self.limits)
            steering = self._steer(request, body)
            prompts = [await asyncio.to_thread(self.engine.encode_chat, messages)]
            sampling = replace(body.sampling(), grammar=await self._grammar(body))
            answer_id = f"resp_{uuid.uuid4().hex}"
            sequences = self._sequences(answer_id, body, prompts, steering, sampling, "messages")
        form = ResponseFormat(answer_id, body, data.get("instructions"), steering.echo())
        recording = self._record(context, answer_id, steering, [_last_question(messages)])
        answering = Answering(self.engine, self.metrics, context, sequences, form, "input", recording)
        if body.stream:
            return EventStream(lambda: answering.events(include_usage=True), context, named_sse, end=b"")
        with blaming_own_fields():
            return await _respond(request, body, answering)

    async def complete(self, request: Request) -> Response:
        context = self._begin(request)
        body = CompletionBody.read(await read_json(request), self.limits)
        context.prompt = body.prompt
        steering = self._steer(request, body)
        prompts = await asyncio.to_thread(self._encode, body.prompts())
        answer_id = f"cmpl-{uuid.uuid4().hex}"
        form = CompletionFormat(answer_id, body.model, self.fingerprint, steering.echo(), body.include_usage)
        sampling = replace(body.sampling(), grammar=await self._grammar(body))
        sequences = self._sequences(answer_id, body, prompts, steering, sampling, "prompt")
        texts = [prompt if isinstance(prompt, str) else "" for prompt in body.prompts() for _ in range(body.n)]
        recording = self._record(context, answer_id, steering, texts)
        answering = Answering(self.engine, self.metrics, context, sequences, form, "prompt", recording)
        return await _respond(request, body, answering)

    def _begin(self, request: Request) -> RequestContext:
        context: RequestContext = request.state.context
        begin_generating(context, self.traffic)
        return context

    def _steer(self, request: Request, body: GenerationBody) -> ResolvedSteering:
        """Resolves the mix and records it. Raises what `Steering` raises."""
        preset = self.steering.preset_of_model(body.model)
        with self.metrics.counting_refusals():
            subject = Subject(body.user, body.metadata, request.headers)
            resolved = self.steering.resolve(body.steering, model_preset=preset, admin=request.state.admin,
                                             subject=subject)  # fmt: skip
        request.state.context.steering = resolved
        self.metrics.steered(resolved)
        return resolved

    def _record(
        self, context: RequestContext, answer_id: str, steering: ResolvedSteering, prompts: Sequence[str]
    ) -> Recording | None:
        """None for a request that takes no part in an experiment."""
        if self.drift is None or steering.assignment is None:
            return None
        measure = partial(self.drift.offer, steering, answer_id, score=self._score)
        return Recording(self.drift.recorder, steering.assignment, answer_id, context, prompts, measure)

    async def _score(self, answered: Answered) -> float:
        return await asyncio.wrap_future(self.engine.drift(answered.prompt, answered.response, answered.mix))

    def _encode(self, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
        return [self.engine.encode_text(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]

    async def _grammar(self, body: GenerationBody) -> Grammar | None:
        """The compiled grammar that the body asks for. Raises InvalidFieldError if the engine cannot compile it."""
        asked = body.grammar(self.limits)
        if asked is None:
            return None
        grammar, field = asked
        try:
            await self.engine.compile_grammar(grammar)
        except GrammarError as error:
            raise InvalidFieldError(f"{field} is refused: {error}", field) from error
        return grammar

    def _sequences(
        self,
        answer_id: str,
        body: GenerationBody,
        prompts: Sequence[tuple[int, ...]],
        steering: ResolvedSteering,
        sampling: SamplingParams,
        param: str,
    ) -> Sequences:
        """Raises InvalidFieldError for an empty prompt or a token id outside the vocabulary."""
        for prompt in prompts:
            if not prompt:
                raise InvalidFieldError("the prompt has no tokens; send some text", param)
            self._check_ids(max(prompt), param)
        self._check_ids(max((token for token, _ in sampling.logit_bias), default=0), "logit_bias")
        if self.limits.max_tokens is not None:  # where the body asks for more it has been refused
            room = max(1, self.engine.max_model_len - max(len(prompt) for prompt in prompts))
            sampling = replace(sampling, max_tokens=min(self.limits.max_tokens, sampling.max_tokens or room))
        return Sequences.of(answer_id, prompts, body.n, steering.mix, sampling, steering.phase)

    def _check_ids(self, largest: int, param: str) -> None:
        if self.vocabulary is not None and largest >= self.vocabulary:
            raise InvalidFieldError(f"token id {largest} is outside the vocabulary of {self.vocabulary} tokens", param)


def _last_question(messages: Sequence[dict[str, object]]) -> str:
    return next((str(turn["content"]) for turn in reversed(messages) if turn["role"] == "user"), "")


async def _respond(request: Request, body: GenerationBody, answering: Answering) -> Response:
    if body.stream:
        return EventStream(lambda: answering.events(body.include_usage), answering.context)
    return Response(await unless_disconnected(request.receive, answering.whole()), media_type="application/json")
