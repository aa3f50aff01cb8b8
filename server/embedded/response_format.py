"""The body's `response_format` and vLLM's `structured_outputs` -> the grammar that the answer must match.

    {"type": "text"}                                            no grammar
    {"type": "json_object"}                                     any JSON object
    {"type": "json_schema", "json_schema": {"name", "schema"}}  that schema; enforced whatever `strict` says
    {"json" | "regex" | "choice" | "json_object": ...}          structured_outputs; exactly one of them

Knows form and size; whether a grammar can be compiled is the engine's to say.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from atoms.engine import Grammar
from server.errors import InvalidFieldError, UnsupportedFieldError
from server.grammars import as_json, bounded
from server.limits import Limits

ANY_OBJECT = Grammar("json_schema", '{"type":"object"}')
_FORMATS = ("text", "json_object", "json_schema")
_CONSTRAINTS = ("json", "regex", "choice", "json_object")


def asked_grammar(response_format: object, structured_outputs: object, limits: Limits) -> tuple[Grammar, str] | None:
    """The grammar that the two fields ask for, and the field that does; None where the answer is free text.

    Raises InvalidFieldError, UnsupportedFieldError.
    """
    by_format = _of_response_format(response_format, limits) if response_format is not None else None
    by_constraint = _of_structured_outputs(structured_outputs, limits) if structured_outputs is not None else None
    if by_format and by_constraint:
        raise InvalidFieldError("response_format and structured_outputs both constrain the answer; give one of them",
                                "structured_outputs")  # fmt: skip
    return by_format or by_constraint


def _of_response_format(value: object, limits: Limits) -> tuple[Grammar, str] | None:
    form = _object(value, "response_format", ("type", "json_schema"))
    kind = form.get("type")
    if kind not in _FORMATS:
        raise InvalidFieldError(f"response_format.type is {repr(kind)[:80]}; it must be one of {', '.join(_FORMATS)}",
                                "response_format.type")  # fmt: skip
    if kind != "json_schema":
        if "json_schema" in form:
            raise InvalidFieldError(f'json_schema stands beside the type "{kind}"; make the type "json_schema"',
                                    "response_format.json_schema")  # fmt: skip
        return (ANY_OBJECT, "response_format") if kind == "json_object" else None
    where = "response_format.json_schema"
    named = _object(form.get("json_schema"), where, ("name", "description", "schema", "strict"))
    if not isinstance(named.get("name"), str):
        raise InvalidFieldError(f"{where}.name must be a text", f"{where}.name")
    if not isinstance(named.get("strict", False), bool):
        raise InvalidFieldError(f"{where}.strict must be true or false", f"{where}.strict")
    if "schema" not in named:
        raise InvalidFieldError(f"{where}.schema is missing; send a JSON schema", f"{where}.schema")
    return _schema(named["schema"], f"{where}.schema", limits), f"{where}.schema"


def _of_structured_outputs(value: object, limits: Limits) -> tuple[Grammar, str]:
    given = _object(value, "structured_outputs", _CONSTRAINTS)
    if len(given) != 1:
        raise InvalidFieldError(f"structured_outputs needs exactly one of {', '.join(_CONSTRAINTS)}",
                                "structured_outputs")  # fmt: skip
    ((kind, constraint),) = given.items()
    where = f"structured_outputs.{kind}"
    if kind == "json":
        return _schema(constraint, where, limits), where
    if kind == "json_object":
        if constraint is not True:
            raise InvalidFieldError(f"{where} must be true; leave it out for free text", where)
        return ANY_OBJECT, where
    if kind == "regex":
        if not isinstance(constraint, str) or not constraint:
            raise InvalidFieldError(f"{where} must be a regular expression that is not empty", where)
        return Grammar("regex", bounded(constraint, where, limits)), where
    if not isinstance(constraint, list) or not constraint or not all(isinstance(c, str) and c for c in constraint):
        raise InvalidFieldError(f"{where} must be a list of texts of which none is empty", where)
    return Grammar("choice", bounded(as_json(constraint), where, limits)), where


def _schema(value: object, where: str, limits: Limits) -> Grammar:
    if isinstance(value, str):  # vLLM takes a schema as text too
        try:
            value = json.loads(bounded(value, where, limits))
        except (ValueError, RecursionError) as error:
            raise InvalidFieldError(f"{where} is no valid JSON", where) from error
    if not isinstance(value, dict):
        raise InvalidFieldError(f"{where} must be a JSON schema, an object", where)
    return Grammar("json_schema", bounded(as_json(value), where, limits))


def _object(value: object, where: str, known: tuple[str, ...]) -> Mapping[str, Any]:
    """`value` without its null fields. Raises UnsupportedFieldError for one that is not known."""
    if not isinstance(value, dict):
        raise InvalidFieldError(f"{where} must be an object", where)
    given = {key: field for key, field in value.items() if field is not None}
    for key in given:
        if key not in known:
            raise UnsupportedFieldError(f"{where} has the field {key[:64]!r}; this server knows {', '.join(known)}",
                                        f"{where}.{key[:64]}")  # fmt: skip
    return given
