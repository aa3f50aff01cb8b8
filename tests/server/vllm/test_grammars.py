"""Every field of vLLM's that becomes a grammar has a limit, and only kinds whose work is bounded are taken."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from server.embedded.response_format import asked_grammar
from server.errors import InvalidFieldError, UnsupportedFieldError
from server.grammars import as_json
from server.limits import Limits
from server.vllm.grammars import bound_work, check_grammars, is_work_bounded, log_no_text

LIMITS = Limits(max_grammar_bytes=200)
FITS = {"enum": ["x" * (200 - len(as_json({"enum": [""]})))]}
LARGE = {"enum": [*FITS["enum"], ""]}


def function(schema: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": schema} | more}


def fields(schema: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Where the error points, and a body, for each way in which vLLM takes `schema`."""
    text = as_json(schema)
    form = {"type": "json_schema", "schema": schema}
    return [
        ("response_format.json_schema.schema",
         {"response_format": {"type": "json_schema", "json_schema": {"name": "x" * 500, "schema": schema}}}),
        ("structured_outputs.json", {"structured_outputs": {"json": schema}}),
        ("structured_outputs.json", {"structured_outputs": {"json": text}}),
        ("structured_outputs.regex", {"structured_outputs": {"regex": text}}),
        ("structured_outputs.choice", {"structured_outputs": {"choice": ["x" * (len(text) - 4)]}}),
        ("text.format.schema", {"text": {"format": form}}),
        ("output_config.format.schema", {"output_config": {"format": form}}),
    ]  # fmt: skip


def test_each_field_has_the_embedded_servers_limit() -> None:
    for (where, large), (_, fits) in zip(fields(LARGE), fields(FITS)):
        check_grammars(fits, LIMITS, is_work_bounded=True)
        with pytest.raises(InvalidFieldError, match=f"has {len(as_json(LARGE))} bytes and the limit is 200") as refused:
            check_grammars(large, LIMITS, is_work_bounded=True)
        assert refused.value.param == where
        if where.startswith(("response_format", "structured_outputs")):
            asked_grammar(fits.get("response_format"), fits.get("structured_outputs"), LIMITS)
            with pytest.raises(InvalidFieldError) as embedded:
                asked_grammar(large.get("response_format"), large.get("structured_outputs"), LIMITS)
            assert (str(embedded.value), embedded.value.param) == (str(refused.value), where)


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "f"}}, {"type": "function", "name": "f"},
               {"type": "any"}, {"type": "tool", "name": "f"}]
)  # fmt: skip
def test_tools_of_a_forced_call_have_it_together(choice: Any) -> None:
    small = function({"type": "object"})
    flat = {"name": "f", "input_schema": LARGE}
    added = [{"role": "system", "content": [{"type": "tool_addition", "tool": flat}, {"type": "text", "text": "x"}]}]
    for body in ({"tools": [small, function(LARGE)]}, {"tools": [flat]}, {"tools": [], "messages": added}):
        with pytest.raises(InvalidFieldError, match="^tools has") as refused:
            check_grammars(body | {"tool_choice": choice}, LIMITS, is_work_bounded=True)
        assert refused.value.param == "tools"
    check_grammars({"tools": [small], "tool_choice": choice}, LIMITS, is_work_bounded=True)
    for free in ({}, {"tool_choice": "auto"}, {"tool_choice": {"type": "auto"}}, {"tool_choice": "none"}):
        check_grammars({"tools": [function(LARGE)] * 9} | free, LIMITS, is_work_bounded=True)


def test_a_named_call_counts_its_own_tool_alone() -> None:
    other = {"type": "function", "function": {"name": "other", "parameters": LARGE}}
    choice = {"type": "function", "function": {"name": "f"}}
    check_grammars({"tools": [function({}), other], "tool_choice": choice}, LIMITS, is_work_bounded=True)


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ({"structured_outputs": {"grammar": "start: 'a'"}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
        ({"response_format": {"type": "structural_tag", "format": {}}}, "response_format.type"),
        ({"tools": [function({}, strict=True)]}, "tools[0].function.strict"),
        ({"tools": [function({}, strict=True)], "tool_choice": "auto"}, "tools[0].function.strict"),
    ],
)
def test_what_cannot_be_bounded_is_refused_unless_the_operator_has_chosen_the_library(body: Any, where: str) -> None:
    with pytest.raises(UnsupportedFieldError) as refused:
        check_grammars(body, LIMITS, is_work_bounded=True)
    assert refused.value.param == where
    check_grammars(body, LIMITS, is_work_bounded=False)


def test_strict_is_taken_where_it_holds() -> None:
    body = {"tools": [function({}, strict=True)], "tool_choice": "required"}
    check_grammars(body, LIMITS, is_work_bounded=True)
    with pytest.raises(InvalidFieldError, match="^tools has"):
        check_grammars({"tools": [function(LARGE, strict=True)]}, LIMITS, is_work_bounded=False)


def test_what_has_no_form_is_left_to_vllm() -> None:
    for value in (None, 1, "x", [], [1], {}, {"type": 1}, {"json_schema": 1}, {"format": []}, {"json": None}):
        names = ("response_format", "structured_outputs", "text", "output_config", "tools", "tool_choice", "messages")
        check_grammars(dict.fromkeys(names, value), LIMITS, is_work_bounded=True)


@pytest.mark.parametrize(
    ("chosen", "taken", "bounded"),
    [("auto", "guidance", True), ("guidance", "guidance", True), ("xgrammar",) * 2 + (False,)],
)
def test_the_library_is_ours_to_choose_until_the_operator_does(chosen: str, taken: str, bounded: bool) -> None:
    settings, environment = SimpleNamespace(backend=chosen, disable_any_whitespace=False), {"A": "b"}
    arguments = SimpleNamespace(structured_outputs_config=settings)
    bound_work(arguments, environment)
    assert settings.backend == taken and is_work_bounded(arguments) == bounded
    assert settings.disable_any_whitespace == (chosen == "auto")
    assert environment == {"A": "b"} | ({"VLLM_ENFORCE_STRICT_TOOL_CALLING": "0"} if bounded else {})


def test_what_llguidance_says_of_an_answer_is_logged_without_the_answer(caplog: pytest.LogCaptureFixture) -> None:
    log_no_text()
    log = logging.getLogger("vllm.v1.structured_output.backend_guidance")
    log.warning("LLMatcher error: %s", "too many expressions\n<state>\nTokens: a secret")
    assert [record.getMessage() for record in caplog.records] == ["LLMatcher error: too many expressions"]
