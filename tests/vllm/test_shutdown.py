"""The end of the server that the other tests have used: this file comes last, and stops it."""

from __future__ import annotations

import json
import signal
import threading
import time
import urllib.error
import urllib.request

import pytest


def test_sigterm_drains_answers_everybody_and_leaves_no_process(server, ask, read, members, wait_for) -> None:
    stream, started = [], threading.Event()
    thread = threading.Thread(target=_stream, args=(server, stream, started))
    thread.start()
    assert started.wait(120), "the long request did not begin"
    server.process.send_signal(signal.SIGTERM)
    _until_draining(server, read)
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(server, "One more?")
    assert refused.value.code == 503 and refused.value.headers["Retry-After"]

    thread.join(120)
    assert not thread.is_alive(), "the request in flight was never answered"
    last = stream[-1]
    assert last == "[DONE]" or json.loads(last)["error"]["code"] == "engine_stopped", stream[-3:]
    assert server.process.wait(120) == 0
    assert wait_for(lambda: not members(server.process.pid), 30), "a process of the server lives on"


def _stream(server, lines: list[str], started: threading.Event) -> None:
    body = {"model": server.name, "prompt": "Once upon a time", "max_tokens": 480, "ignore_eos": True, "stream": True}
    request = urllib.request.Request(
        server.v1 + "/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        for line in response:
            if line.startswith(b"data: "):
                lines.append(line.decode().removeprefix("data: ").strip())
                started.set()


def _until_draining(server, read) -> None:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        try:
            read(server, "/ready")
        except urllib.error.HTTPError as error:
            assert error.code == 503
            return
        time.sleep(0.1)
    raise AssertionError("/ready never said that the server drains")
