"""Where log lines go: one text line or one JSON object each, on stderr."""

from __future__ import annotations

import logging
import os
from contextlib import suppress

from pythonjsonlogger.json import JsonFormatter

_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_STDERR = 2


def set_up_logging(log_format: str, logger: str | None = None) -> None:
    """Gives `logger` (None: the root) a handler for stderr, unless whoever embeds the server has given it one.

    `log_format` is ``text`` or ``json``; a JSON object has timestamp (UTC, ISO 8601), level, logger, message and, for
    access lines, a field for each thing that is known of the request.
    """
    target = logging.getLogger(logger)
    if not target.handlers:
        handler = StderrHandler()
        handler.setFormatter(_json_formatter() if log_format == "json" else logging.Formatter(_TEXT))
        target.addHandler(handler)
        target.setLevel(logging.INFO)
        target.propagate = logger is None
    logging.getLogger("alembic").setLevel(logging.WARNING)  # a dozen lines about itself at every start


class StderrHandler(logging.Handler):
    """Writes each record at once, as one line. One that cannot be written (a full disk, a closed pipe) is lost, and neither
    kept nor waited for: Python's own stream would keep it, and fail again when the process ends."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = (self.format(record) + "\n").encode("utf-8", "backslashreplace")
        except Exception:  # a record with values that do not fit its message
            self.handleError(record)
            return
        with suppress(OSError):
            while line:
                line = line[os.write(_STDERR, line) :]


def _json_formatter() -> JsonFormatter:
    return JsonFormatter(
        "%(levelname)s %(name)s %(message)s",
        rename_fields={"levelname": "level", "name": "logger"},
        timestamp=True,
    )
