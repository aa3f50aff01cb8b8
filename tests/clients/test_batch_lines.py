"""What a batch makes of its lines: defaults by the names that each URL has, as the embedded server reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from clients.batch_lines import URLS, Defaults, read_lines
from server.embedded.protocol import ChatBody, CompletionBody, GenerationBody
from server.embedded.refusals import RESPONSES, refuse_unsupported
from server.embedded.responses_api import as_chat
from server.limits import Limits

CHAT, COMPLETIONS, RESPONSES_URL = URLS
PROMPTS: Mapping[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "Hi"}]},
    COMPLETIONS: {"prompt": "Hi"},
    RESPONSES_URL: {"input": "Hi"},
}
DEFAULTS = Defaults({"max_tokens": 5, "temperature": 0.5, "seed": 7})


def read_by_server(url: str, body: Mapping[str, Any]) -> GenerationBody:
    """As the route of `url` reads it. Raises what the route answers with 400."""
    asked = {"model": "m", **body}
    if url == CHAT:
        return ChatBody.read(asked, Limits())
    if url == COMPLETIONS:
        return CompletionBody.read(asked, Limits())
    refuse_unsupported(asked, RESPONSES)
    return ChatBody.parse(as_chat(asked), Limits())


def line_of(tmp_path: Path, url: str, body: Mapping[str, Any], defaults: Defaults = DEFAULTS) -> dict[str, Any]:
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"custom_id": "a", "url": url, "body": body}) + "\n")
    (line,) = read_lines(source, defaults)
    assert line.error is None
    return dict(line.body)


@pytest.mark.parametrize("url", URLS)
def test_defaults_fill_what_a_body_lacks_by_the_names_of_its_url(tmp_path: Path, url: str) -> None:
    taken = read_by_server(url, line_of(tmp_path, url, PROMPTS[url]))
    assert (taken.token_limit(), taken.temperature, taken.seed) == (5, 0.5, 7)


@pytest.mark.parametrize(
    ("url", "name"),
    [
        (CHAT, "max_tokens"),
        (CHAT, "max_completion_tokens"),
        (COMPLETIONS, "max_tokens"),
        (RESPONSES_URL, "max_output_tokens"),
    ],
)
def test_a_limit_that_a_body_gives_is_its_only_one(tmp_path: Path, url: str, name: str) -> None:
    body = line_of(tmp_path, url, PROMPTS[url] | {name: 3, "temperature": 1.0})
    taken = read_by_server(url, body)
    assert (taken.token_limit(), taken.temperature, taken.seed) == (3, 1.0, 7)
    assert [field for field in body if "tokens" in field] == [name]


def test_a_model_that_names_a_preset_says_the_mix(tmp_path: Path) -> None:
    """A default mix beside it would override atoms of the preset, or be added to them."""
    defaults = Defaults({}, {"atoms": {"a": 1.0}})
    assert "steering" not in line_of(tmp_path, CHAT, PROMPTS[CHAT] | {"model": "demo:brief"}, defaults)
    for model in ({}, {"model": None}, {"model": "demo"}):
        body = line_of(tmp_path, CHAT, PROMPTS[CHAT] | model, defaults)
        assert body["steering"] == {"atoms": {"a": 1.0}}
    own = line_of(tmp_path, CHAT, PROMPTS[CHAT] | {"model": "demo:brief", "steering": {"max_kl": 1}}, defaults)
    assert own["steering"] == {"max_kl": 1}
