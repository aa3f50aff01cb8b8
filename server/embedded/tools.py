"""Tool calls: what a request says of tools, what the model's chat template is given, and calls read back from its answer.

    tools, tool_choice  ->  Tools        definitions for the template; a schema that the answer must match if a call is forced
    text                ->  CallReader   content, and calls as they are complete

One form is read: ``<tool_call>{"name": …, "arguments": {…}}</tool_call>``, that of Hermes, Qwen and SmolLM3. A forced call
has no tags: the answer is held to the JSON inside.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json

from atoms.engine import Grammar
from server.errors import InvalidFieldError, UnsupportedFieldError
from server.limits import Limits

OPENING, CLOSING = "<tool_call>", "</tool_call>"
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_CHOICES = ("none", "auto", "required")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call; `arguments` is JSON text, as OpenAI sends it."""

    id: str
    name: str
    arguments: str

    @classmethod
    def of(cls, text: str, known: frozenset[str]) -> ToolCall | None:
        """Reads what stands between the tags; None for what is no call of a `known` tool."""
        try:
            call = from_json(text, allow_inf_nan=False)
        except ValueError:
            return None
        name = call.get("name") if isinstance(call, dict) else None
        if not isinstance(name, str) or name not in known:
            return None
        arguments = call.get("arguments", {})
        if not isinstance(arguments, dict):
            return None
        return cls(f"call_{uuid.uuid4().hex}", name, json.dumps(arguments, ensure_ascii=False))


@dataclass(frozen=True, slots=True)
class Tools:
    """The tools that a request may use. `forced` says that the answer must be a call; `names` are those it may call."""

    definitions: tuple[dict[str, Any], ...]
    names: frozenset[str]
    forced: bool
    parallel: bool

    def grammar(self, limits: Limits) -> Grammar | None:
        """The schema of a forced call; None where the model is free to call or not. Raises InvalidFieldError."""
        if not self.forced:
            return None
        asked = [tool["function"] for tool in self.definitions if tool["function"]["name"] in self.names]
        if len(asked) == 1:
            schema = _call_schema(asked[0], "#")
        else:
            schema = {"anyOf": [_call_schema(function, f"#/anyOf/{place}") for place, function in enumerate(asked)]}
        text = json.dumps(schema, ensure_ascii=False)
        if len(text.encode("utf-8", "surrogatepass")) > limits.max_grammar_bytes:
            raise InvalidFieldError(f"the parameters of the tools have {len(text)} characters together, more than an answer "
                                    "can be held to; send fewer tools", "tools")  # fmt: skip
        return Grammar("json_schema", text)


def read_tools(tools: object, choice: object, parallel: bool, limits: Limits) -> Tools | None:
    """None where there is nothing to call. Raises InvalidFieldError, UnsupportedFieldError."""
    if tools is not None and not isinstance(tools, list):
        raise InvalidFieldError("tools must be a list of functions", "tools")
    if not tools:
        if choice not in (None, "none", "auto"):
            raise InvalidFieldError("tool_choice asks for a call and there are no tools; send tools", "tool_choice")
        return None
    if len(tools) > limits.max_tools:
        raise InvalidFieldError(
            f"{len(tools)} tools were sent and the limit is {limits.max_tools}; leave some out", "tools"
        )
    definitions = tuple(_definition(tool, f"tools[{place}]") for place, tool in enumerate(tools))
    names = [definition["function"]["name"] for definition in definitions]
    if len(set(names)) < len(names):
        raise InvalidFieldError("two tools have the same name; rename one", "tools")
    asked = _asked(choice, names)
    if asked == "none":
        return None
    forced = asked != "auto"
    for place, tool in enumerate(tools):
        if tool["function"].get("strict") and not forced:
            where = f"tools[{place}].function.strict"
            raise UnsupportedFieldError(
                f"{where} holds for forced calls alone; set tool_choice, or leave strict out", where
            )
    allowed = frozenset(names) if asked in _CHOICES else frozenset({asked})
    return Tools(definitions, allowed, forced, parallel)


class CallReader:
    """Splits one answer, given piece by piece, into content and calls. What is no whole call of a known tool is content."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._pending = ""
        self.calls = 0

    def feed(self, text: str, *, last: bool) -> tuple[str, list[ToolCall]]:
        """What `text` completes; with `last` nothing is held back any more."""
        self._pending += text
        if self._tools.forced:
            return self._forced() if last else ("", [])
        content, calls = "", []
        while (start := self._pending.find(OPENING)) >= 0:
            end = self._pending.find(CLOSING, start)
            if end < 0:
                break
            whole = self._pending[start : end + len(CLOSING)]
            call = self._call(whole[len(OPENING) : -len(CLOSING)])
            content += self._pending[:start]
            if call is None:
                content += whole
            else:
                calls.append(call)
            self._pending = self._pending[end + len(CLOSING) :]
        free = len(self._pending) if last else _free(self._pending)
        rest, self._pending = self._pending[:free], self._pending[free:]
        blank = not (content + rest).strip()
        return ("" if self.calls and blank else content + rest), calls  # line breaks around calls are no content

    def _forced(self) -> tuple[str, list[ToolCall]]:
        call = self._call(self._pending)
        return (self._pending, []) if call is None else ("", [call])

    def _call(self, text: str) -> ToolCall | None:
        if self.calls and not self._tools.parallel:
            return None
        call = ToolCall.of(text, self._tools.names)
        self.calls += call is not None
        return call


def _free(text: str) -> int:
    """How much of `text` cannot belong to a call any more."""
    start = text.find(OPENING)
    if start >= 0:
        return start
    return next((place for place in range(max(0, len(text) - len(OPENING) + 1), len(text))
                 if OPENING.startswith(text[place:])), len(text))  # fmt: skip


def _definition(tool: object, where: str) -> dict[str, Any]:
    if not isinstance(tool, dict) or tool.get("type") != "function":
        raise UnsupportedFieldError(
            f'{where}.type must be "function"; this server has no tools of its own', f"{where}.type"
        )
    function = tool.get("function")
    if not isinstance(function, dict):
        raise InvalidFieldError(f"{where}.function must be an object with a name", f"{where}.function")
    name, description, parameters = function.get("name"), function.get("description"), function.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidFieldError(
            f"{where}.function.name must be 1-64 letters, digits, '_' or '-'", f"{where}.function.name"
        )
    if description is not None and not isinstance(description, str):
        raise InvalidFieldError(f"{where}.function.description must be a text", f"{where}.function.description")
    if parameters is not None and not isinstance(parameters, dict):
        raise InvalidFieldError(f"{where}.function.parameters must be a JSON schema", f"{where}.function.parameters")
    known = {"name": name, "description": description or "", "parameters": parameters or _NO_PARAMETERS}
    return {"type": "function", "function": known}


_NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}}


def _asked(choice: object, names: list[str]) -> str:
    """``none``, ``auto``, ``required``, or the name of the tool that must be called."""
    if choice is None:
        return "auto"
    if isinstance(choice, str) and choice in _CHOICES:
        return choice
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise InvalidFieldError(f'tool_choice must be one of {", ".join(_CHOICES)}, or {{"type": "function", "function": '
                                '{"name": …}}', "tool_choice")  # fmt: skip
    if name not in names:
        raise InvalidFieldError(f"tool_choice names {name[:64]!r}, which is none of the tools", "tool_choice")
    return name


def _call_schema(function: Mapping[str, Any], at: str) -> dict[str, Any]:
    """The schema of a call, which stands at the pointer `at` of the whole."""
    arguments = _referring_to(f"{at}/properties/arguments", function["parameters"])
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, "arguments": {"type": "object"} | arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _referring_to(root: str, schema: Any) -> Any:
    """`schema` with its references into itself (``#/$defs/…``) pointing to where it stands, at `root` of another."""
    if isinstance(schema, list):
        return [_referring_to(root, part) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    return {
        key: root + part[1:]
        if key == "$ref" and isinstance(part, str) and part.startswith("#")
        else _referring_to(root, part)
        for key, part in schema.items()
    }
