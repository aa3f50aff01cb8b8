"""Spans, as a real collector receives them."""

from __future__ import annotations

import gzip
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from httpx import AsyncClient
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from atoms.errors import ConfigError
from atoms.package import Package
from server.tracing import make_tracer

CHAT = {
    "model": "demo",
    "messages": [{"role": "user", "content": "a private question"}],
    "steering": {"atoms": {"list": 1}},
}
TRACE = "0af7651916cd43dd8448eb211c80319c"


class Collector:
    """Takes what is exported to it over HTTP."""

    def __init__(self) -> None:
        self.exports: list[ExportTraceServiceRequest] = []
        self.arrived = threading.Event()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
                collector.exports.append(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.end_headers()
                collector.arrived.set()

            def log_message(self, *_: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def spans(self) -> list[Any]:
        return [
            span for export in self.exports for resource in export.resource_spans for scope in resource.scope_spans for span in scope.spans
        ]  # fmt: skip


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    collector = Collector()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server.server_port}")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    yield collector
    collector.server.shutdown()
    collector.server.server_close()


async def test_a_request_is_a_span_on_its_clients_trace(
    collector: Collector, client_of: Callable[..., AsyncClient], package: Package
) -> None:
    headers = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01", "X-Request-Id": "mine"}
    async with client_of() as client:
        assert (await client.post("/v1/chat/completions", json=CHAT, headers=headers)).status_code == 200
        assert (await client.get("/v1/atoms/no-such-atom", headers=headers)).status_code == 404
    assert collector.arrived.wait(10)
    for _ in range(100):
        if len(collector.spans) == 2:
            break
        threading.Event().wait(0.05)
    answer, missing = sorted(collector.spans, key=lambda span: span.start_time_unix_nano)
    assert (
        answer.trace_id.hex() == missing.trace_id.hex() == TRACE and answer.parent_span_id.hex() == "b7ad6b7169203331"
    )
    assert (answer.name, missing.name) == ("POST /v1/chat/completions", "GET"), "names are bounded"
    said = {entry.key: entry.value for entry in answer.attributes}
    assert said["http.response.status_code"].int_value == 200
    assert said["atomsteer.request_id"].string_value == "mine"
    assert said["atomsteer.mix"].string_value == package.digest(package.mix({"list": 1}))
    assert (said["gen_ai.usage.input_tokens"].int_value, said["gen_ai.usage.output_tokens"].int_value) == (4, 3)
    assert [event.name for event in answer.events] == ["first byte of the answer"]
    assert "private" not in str(collector.exports)
    resource = {
        entry.key: entry.value.string_value for entry in collector.exports[0].resource_spans[0].resource.attributes
    }
    assert resource["service.name"] == "atomsteer"


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_SERVICE_NAME": "x"},
        {"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"},
        {"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"},
    ],
)
def test_no_traces_unless_asked_for(environment: dict[str, str]) -> None:
    assert make_tracer(environment) is None


@pytest.mark.parametrize(
    "environment",
    [
        {"OTEL_TRACES_EXPORTER": "zipkin"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
    ],
)
def test_an_exporter_that_is_not_here_is_refused(environment: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="http/protobuf"):
        make_tracer(environment)


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.tracing.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"atomsteer\[otel\]"):
        make_tracer({"OTEL_TRACES_EXPORTER": "otlp"})


def test_nothing_is_imported_while_off() -> None:
    code = "import sys, server.tracing; server.tracing.make_tracer({}); print([m for m in sys.modules if m.startswith('opentelemetry')])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
