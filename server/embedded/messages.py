"""Chat messages as clients send them -> role and text, as chat templates read them.

Text parts are joined by line breaks, as vLLM does. ``developer`` is OpenAI's newer name of ``system`` and is passed on
as that. Whatever a template could read and we do not pass on is refused by name.
"""

from __future__ import annotations

from server.errors import InvalidFieldError, UnsupportedFieldError
from server.limits import Limits

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_UNSUPPORTED_ROLES = ("tool", "function")
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
    result: dict[str, object] = {
        "role": _role(message.get("role"), f"{where}.role"),
        "content": _content(message.get("content"), f"{where}.content"),
    }
    for key, value in message.items():
        if key == "name" and value is not None:
            if not isinstance(value, str):
                raise InvalidFieldError(f"{where}.name must be a text", f"{where}.name")
            result["name"] = value
        elif key not in ("role", "content") and value not in _EMPTY:
            raise UnsupportedFieldError(f"{where}.{key[:64]} is not supported by this server; leave it out",
                                        f"{where}.{key[:64]}")  # fmt: skip
    return result


def _role(role: object, where: str) -> str:
    if role in _UNSUPPORTED_ROLES:
        raise UnsupportedFieldError(f"{where} is {role!r}; tool calls are not supported by this server", where)
    if not isinstance(role, str) or role not in _ROLES:
        raise InvalidFieldError(f"{where} is {repr(role)[:80]}; it must be one of {', '.join(_ROLES)}", where)
    return _ROLES[role]


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
