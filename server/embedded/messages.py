"""Chat messages as clients send them -> role and text, and calls of tools, as chat templates read them.

Text parts are joined by line breaks, as vLLM does. ``developer`` is OpenAI's newer name of ``system`` and is passed on
as that. The arguments of a call are JSON text for clients and an object for templates. Whatever a template could read and
we do not pass on is refused by name.
"""

from __future__ import annotations

from typing import Any

from pydantic_core import from_json

from server.errors import InvalidFieldError, UnsupportedFieldError
from server.limits import Limits

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_EMPTY: tuple[object, ...] = (None, "", [], {})


def template_messages(messages: object, limits: Limits) -> list[dict[str, object]]:
    """Checked messages with the keys role, content and, if given, name.

    Raises InvalidFieldError, UnsupportedFieldError; `param` names the message.
    """
    if not isinstance(messages, list) or not messages:
        raise InvalidFieldError(
            "messages must be a list of at least one message, such as "
            '[{"role": "user", "content": "Hello"}]', "messages"
        )  # fmt: skip
    if len(messages) > limits.max_messages:
        raise InvalidFieldError(
            f"{len(messages)} messages were sent and the limit is {limits.max_messages}; drop the oldest", "messages"
        )
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _message(message: object, where: str) -> dict[str, object]:
    if not isinstance(message, dict):
        raise InvalidFieldError(f"{where} must be an object with role and content", where)
    role = _role(message.get("role"), f"{where}.role")
    calls = message.get("tool_calls") if role == "assistant" else None
    content = message.get("content")
    result: dict[str, object] = {
        "role": role,
        "content": "" if content is None and calls else _content(content, f"{where}.content"),
    }
    if calls:
        result["tool_calls"] = _calls(calls, f"{where}.tool_calls")
    texts = ("name", "tool_call_id") if role == "tool" else ("name",)
    for key, value in message.items():
        if key in texts and value is not None:
            if not isinstance(value, str):
                raise InvalidFieldError(f"{where}.{key} must be a text", f"{where}.{key}")
            result[key] = value
        elif key == "tool_calls" and calls:
            continue
        elif key not in ("role", "content") and value not in _EMPTY:
            raise UnsupportedFieldError(f"{where}.{key[:64]} is not supported by this server; leave it out",
                                        f"{where}.{key[:64]}")  # fmt: skip
    return result


def _role(role: object, where: str) -> str:
    if not isinstance(role, str) or role not in _ROLES:
        raise InvalidFieldError(f"{where} is {repr(role)[:80]}; it must be one of {', '.join(_ROLES)}", where)
    return _ROLES[role]


def _calls(calls: object, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise InvalidFieldError(f"{where} must be a list of calls", where)
    return [_call(call, f"{where}[{place}]") for place, call in enumerate(calls)]


def _call(call: object, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or call.get("type", "function") != "function" or not isinstance(function, dict):
        raise InvalidFieldError(f"{where} must be a call of a function, with name and arguments", where)
    name, arguments = function.get("name"), function.get("arguments", "{}")
    if not isinstance(name, str) or not isinstance(arguments, str):
        raise InvalidFieldError(f"{where}.function must have a name and arguments, both texts", f"{where}.function")
    try:
        read = from_json(arguments or "{}", allow_inf_nan=False)
    except ValueError:
        read = None
    if not isinstance(read, dict):
        raise InvalidFieldError(f"{where}.function.arguments must be a JSON object as text",
                                f"{where}.function.arguments")  # fmt: skip
    identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**identity, "type": "function", "function": {"name": name, "arguments": read}}


def _content(content: object, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise InvalidFieldError(f"{where} must be a text or a list of text parts", where)
    return "\n".join(_part(part, f"{where}[{index}]") for index, part in enumerate(content))


def _part(part: object, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(kind, str):
        raise InvalidFieldError(f'{where} must be a content part such as {{"type": "text", "text": "Hello"}}', where)
    if kind != "text":
        message = f"{where} is of type {kind[:64]!r}; this server reads text parts only"
        raise UnsupportedFieldError(message, f"{where}.type")
    text = part.get("text")
    if not isinstance(text, str):
        raise InvalidFieldError(f"{where}.text must be a text", f"{where}.text")
    return text
