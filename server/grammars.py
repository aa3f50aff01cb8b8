"""How large a grammar may be that an answer is held to: one limit on both servers."""

from __future__ import annotations

import json

from server.errors import InvalidFieldError
from server.limits import Limits


def bounded(text: str, where: str, limits: Limits) -> str:
    """`text`. Raises InvalidFieldError, for the field `where`, if it is longer in UTF-8 than `limits` allow."""
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > limits.max_grammar_bytes:
        raise InvalidFieldError(f"{where} has {size} bytes and the limit is {limits.max_grammar_bytes}; simplify it",
                                where)  # fmt: skip
    return text


def as_json(value: object) -> str:
    """The text of a grammar that came as JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
