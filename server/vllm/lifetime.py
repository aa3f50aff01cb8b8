"""When processes of vLLM end: none outlives the one that started it, none ends at a hangup, and a start can be stopped.

vLLM 0.32 leaves an engine behind whose API server was killed; goes on with a start that SIGTERM was to end, and waits ten
minutes for an engine that has ended meanwhile; and looks at SIGINT only once the engine runs.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

_LOOK_SECONDS = 0.5


def follow_parent() -> None:
    """Kills this process as soon as its parent has ended, if a process of vLLM's has started it: nobody could get its
    answers, and it would hold its memory for ever. Children that are forked from it, which load no plugins, follow too.

    Until then it goes on at SIGHUP, which has the server's process reload where it is sent to all of them, as by systemd."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        _end_after(parent.join)
        _ignore_hangups()
    os.register_at_fork(after_in_child=lambda: _end_after(partial(_until_adopted, os.getppid())))


def _ignore_hangups() -> None:
    if hasattr(signal, "SIGHUP") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)


def _end_after(wait: Callable[[], None]) -> None:
    def end() -> None:
        wait()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=end, name="atomsteer-parent", daemon=True).start()


def _until_adopted(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)


def let_signals_end_a_start() -> None:
    """To be called before this process starts an engine: from then on SIGINT does what vLLM has SIGTERM do, which is to
    raise, and what is raised ends the start. Once vLLM serves it handles both in its own way."""
    _pass_interrupts_on()
    handler = signal.getsignal(signal.SIGTERM)
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, handler)


def _pass_interrupts_on() -> None:
    """vLLM waits for its engines inside a context that drops KeyboardInterrupt."""
    from server.vllm.upstream import engine_utils

    dropping = engine_utils.zmq_socket_ctx
    if getattr(dropping, "passes_interrupts", False):
        return

    @contextmanager
    def zmq_socket_ctx(*args: Any, **kwargs: Any) -> Iterator[Any]:
        interrupt = None
        with dropping(*args, **kwargs) as socket:
            try:
                yield socket
            except KeyboardInterrupt as error:
                interrupt = error
                raise
        if interrupt is not None:
            raise interrupt

    zmq_socket_ctx.passes_interrupts = True  # type: ignore[attr-defined]
    engine_utils.zmq_socket_ctx = zmq_socket_ctx
