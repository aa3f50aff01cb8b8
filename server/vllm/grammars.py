"""Grammars that an answer is held to: bounded in size as on the embedded server, and by a library that bounds its own work.

xgrammar, which vLLM takes if nobody chooses, has no bound: a regular expression of 30 characters holds the engine, and with
it every request. llguidance bounds a grammar, its lexer and each step, and refuses or ends what goes beyond.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

from server.errors import UnsupportedFieldError
from server.grammars import as_json, bounded
from server.limits import Limits

_STRICT_TOOLS_VARIABLE = "VLLM_ENFORCE_STRICT_TOOL_CALLING"
_UNBOUNDED = ("grammar", "structural_tag")
"""Only xgrammar knows the second. To read the first may take seconds of vLLM's event loop, whatever the library."""


def bound_work(arguments: Any, environment: MutableMapping[str, str]) -> None:
    """Chooses llguidance in vLLM's engine `arguments`, unless the operator has chosen another, and JSON without blanks, with
    which weak models would fill their answer. vLLM's own form of a forced tool call is known to xgrammar alone, so such a call
    is then held to its JSON schema."""
    settings = arguments.structured_outputs_config
    if settings.backend == "auto":
        settings.backend = "guidance"
        settings.disable_any_whitespace = True
    if is_work_bounded(arguments):
        environment.setdefault(_STRICT_TOOLS_VARIABLE, "0")


def log_no_text() -> None:
    """vLLM logs what llguidance says of an answer that it ends, with the answer and its schema from the second line on."""
    logging.getLogger("vllm.v1.structured_output.backend_guidance").addFilter(_first_lines)


def _first_lines(record: logging.LogRecord) -> bool:
    record.msg, record.args = record.getMessage().partition("\n")[0], ()
    return True


def is_work_bounded(arguments: Any) -> bool:
    """Once `bound_work` has been there: whether llguidance is what follows grammars."""
    return bool(arguments.structured_outputs_config.backend == "guidance")


def check_grammars(body: Mapping[str, Any], limits: Limits, *, is_work_bounded: bool) -> None:
    """Looks at every field of vLLM's that becomes a grammar; what is not of vLLM's form is left for vLLM to refuse.

    Raises InvalidFieldError for one that is too long; where work is to be bounded, UnsupportedFieldError for what cannot be.
    """
    if is_work_bounded:
        _refuse_unbounded(body)
    for where, grammar in _grammars(body):
        bounded(grammar if isinstance(grammar, str) else as_json(grammar), where, limits)
    if tools := _forced_tools(body):
        bounded(as_json(tools), "tools", limits)


def _grammars(body: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Each field that may have a grammar, and what it has; a schema that is not there is null."""
    for kind, constraint in _object(body, "structured_outputs").items():
        yield f"structured_outputs.{kind}", constraint
    form = _object(body, "response_format")
    if form.get("type") == "structural_tag":
        yield "response_format", form
    yield "response_format.json_schema.schema", _object(form, "json_schema").get("schema")
    yield "text.format.schema", _object(_object(body, "text"), "format").get("schema")  # responses
    yield "output_config.format.schema", _object(_object(body, "output_config"), "format").get("schema")  # messages


def _refuse_unbounded(body: Mapping[str, Any]) -> None:
    constraints, form = _object(body, "structured_outputs"), _object(body, "response_format").get("type")
    asked = {f"structured_outputs.{kind}": kind for kind in _UNBOUNDED if constraints.get(kind) is not None}
    if form in _UNBOUNDED:
        asked["response_format.type"] = form
    for where, kind in asked.items():
        raise UnsupportedFieldError(f"{where} asks for a {kind}, whose time this server cannot bound; send a JSON schema, a "
                                    "regular expression or a list of choices", where)  # fmt: skip
    if not _is_forced(body.get("tool_choice")):
        for place, tool in enumerate(_tools(body)):
            if _function(tool).get("strict"):
                where = f"tools[{place}].function.strict"
                raise UnsupportedFieldError(f"{where} holds for forced calls alone; set tool_choice, or leave strict out",
                                            where)  # fmt: skip


def _forced_tools(body: Mapping[str, Any]) -> list[Any]:
    """The tools of which one must be called, or whose arguments are to be held to their schema."""
    tools, choice = _tools(body), body.get("tool_choice")
    if not _is_forced(choice):
        return [tool for tool in tools if _function(tool).get("strict")]
    name = (choice.get("name") or _object(choice, "function").get("name")) if isinstance(choice, dict) else None
    return [tool for tool in tools if _function(tool).get("name") == name] or tools


def _is_forced(choice: object) -> bool:
    return (choice.get("type") if isinstance(choice, dict) else choice) not in (None, "none", "auto")


def _tools(body: Mapping[str, Any]) -> list[Any]:
    """Those of the request, and those that its messages add, as Anthropic's may."""
    tools = [*_list(body, "tools")]
    for message in _list(body, "messages"):
        tools += [block.get("tool") for block in _list(message, "content")
                  if isinstance(block, dict) and block.get("type") == "tool_addition"]  # fmt: skip
    return tools


def _list(value: object, field: str) -> list[Any]:
    inner = value.get(field) if isinstance(value, dict) else None
    return inner if isinstance(inner, list) else []


def _function(tool: object) -> Mapping[str, Any]:
    """What chat completions have inside of a tool, and other APIs outside."""
    return _object(tool, "function") or (tool if isinstance(tool, dict) else {})


def _object(value: object, field: str) -> Mapping[str, Any]:
    inner = value.get(field) if isinstance(value, dict) else None
    return inner if isinstance(inner, dict) else {}
