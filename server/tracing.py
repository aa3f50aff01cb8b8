"""OpenTelemetry spans, one a request, where the standard ``OTEL_`` variables ask for them; else nothing is imported.

On: ``OTEL_EXPORTER_OTLP_ENDPOINT``, ``OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`` or ``OTEL_TRACES_EXPORTER`` is set. Off, whatever
else is set: ``OTEL_SDK_DISABLED=true`` or ``OTEL_TRACES_EXPORTER=none``. Exporter, sampler, batching and resource read
their own variables. A span goes on the client's trace (W3C ``traceparent``) and holds no text.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from atoms.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span, Tracer

    from server.context import RequestContext

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_EXPORTER, _DISABLED = "OTEL_TRACES_EXPORTER", "OTEL_SDK_DISABLED"
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_SERVICE_NAME = "atomsteer"


def make_tracer(environment: Mapping[str, str]) -> Tracer | None:
    """None where no traces are asked for. Raises ConfigError for an exporter that is not here."""
    exporter = environment.get(_EXPORTER, "").strip().lower()
    asked = bool(exporter) or any(environment.get(name) for name in _ENDPOINTS)
    if not asked or exporter == "none" or environment.get(_DISABLED, "").strip().lower() == "true":
        return None
    if importlib.util.find_spec("opentelemetry.sdk") is None:
        raise ConfigError("OTEL_ variables ask for traces and OpenTelemetry is not installed; `pip install "
                          f"'atomsteer[otel]'`, or set {_DISABLED}=true")  # fmt: skip
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    named = environment.get("OTEL_SERVICE_NAME") or "service.name=" in environment.get("OTEL_RESOURCE_ATTRIBUTES", "")
    provider = TracerProvider(resource=Resource.create({} if named else {"service.name": _SERVICE_NAME}))
    provider.add_span_processor(BatchSpanProcessor(_exporter(exporter or "otlp", environment)))
    return provider.get_tracer("atomsteer")


def _exporter(name: str, environment: Mapping[str, str]) -> SpanExporter:
    if name == "console":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        return ConsoleSpanExporter()
    protocol = next((value for variable in _PROTOCOLS if (value := environment.get(variable))), "http/protobuf")
    if name != "otlp" or protocol != "http/protobuf":
        raise ConfigError(f"{_EXPORTER} is {name!r} and the protocol {protocol!r}; this server exports otlp over "
                          "http/protobuf, to console, or to none")  # fmt: skip
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter()


class TracingMiddleware:
    """Outermost: a span from a request's first byte to its answer's last."""

    def __init__(self, app: ASGIApp, tracer: Tracer) -> None:
        self._app = app
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        from opentelemetry import propagate
        from opentelemetry.trace import SpanKind, set_span_in_context

        parent = propagate.extract(dict(Headers(scope=scope)))
        span = self._tracer.start_span(scope["method"], parent, kind=SpanKind.SERVER)
        carrier: dict[str, str] = {}
        propagate.inject(carrier, set_span_in_context(span))
        scope["headers"] = list(scope["headers"])
        MutableHeaders(scope=scope).update(carrier)  # what traces inside, as vLLM can, goes on from here
        first = True

        async def send_noted(message: Message) -> None:
            nonlocal first
            if message["type"] == "http.response.body" and message.get("body") and first:
                first = False
                span.add_event("first byte of the answer")
            await send(message)

        try:
            await self._app(scope, receive, send_noted)
        finally:
            _describe(span, scope, scope.get("state", {}).get("context"))
            span.end()


def _describe(span: Span, scope: Scope, context: RequestContext | None) -> None:
    """What the request turned out to be, by OpenTelemetry's names for HTTP and generative AI where it has one."""
    from opentelemetry.trace import StatusCode

    attributes: dict[str, Any] = {"http.request.method": scope["method"], "url.path": scope["path"][:200]}
    if context is not None:
        attributes |= {
            "http.response.status_code": context.status, "atomsteer.request_id": context.request_id,
            "atomsteer.key": context.caller,
        }  # fmt: skip
        if context.generates:
            span.update_name(f"{scope['method']} {scope['path']}")  # only routes that exist generate
            attributes |= {
                "gen_ai.usage.input_tokens": context.prompt_tokens, "gen_ai.usage.output_tokens": context.generated_tokens,
            }  # fmt: skip
        if context.steering is not None:
            attributes |= {
                "atomsteer.mix": context.steering.digest, "atomsteer.preset": context.steering.preset,
                "atomsteer.experiment": context.steering.experiment, "atomsteer.arm": context.steering.arm,
                "atomsteer.predicted_kl": context.steering.predicted_kl,
            }  # fmt: skip
        if context.status >= 500:
            span.set_status(StatusCode.ERROR)
    span.set_attributes({name: value for name, value in attributes.items() if value is not None})
