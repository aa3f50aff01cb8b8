"""The command with the options of an operator: hashed keys, JSON logs, a package replaced under a running server."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest
import torch

from atoms.adapter import Adapter
from atoms.package import Package, PackageContents, write_package
from server.keys import create_key
from server.limits import Quota

PROMPT = "a most peculiar and private question"
SECONDS = 60


@dataclass
class Operated:
    """A running server and what it was started with."""

    url: str
    log: Path
    package: Path
    api_keys: Path
    client_key: str
    admin_key: str

    def post(self, path: str, body: dict, key: str | None = None, **more) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key or self.client_key}"} | more
        return httpx.post(self.url + path, json=body, headers=headers, timeout=SECONDS)

    def ask(self, **fields) -> dict:
        body = {"model": "tiny", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 4, "temperature": 0}
        answer = self.post("/v1/chat/completions", body | fields)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def lines(self) -> list[dict]:
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def operated(
    tiny_package: Package, tmp_path_factory: pytest.TempPathFactory,
    serving: Callable[[list[str], Path], AbstractContextManager[str]],
) -> Iterator[Operated]:  # fmt: skip
    root = tmp_path_factory.mktemp("operated")
    shutil.copytree(tiny_package.path, root / "package")
    api, admin, log = root / "api.json", root / "admin.json", root / "log"
    keys = create_key(api, "shop", Quota(max_concurrent_requests=8)), create_key(admin, "boss")
    options = ["--package", root / "package", "--dtype", "float32", "--api-key-file", api, "--admin-key-file", admin,
               "--log-format", "json", "--max-tokens", "600", "--database", "none"]  # fmt: skip
    with serving([str(option) for option in options], log) as url:
        yield Operated(url, log, root / "package", api, *keys)


def replace_package(path: Path, version: str, *, scale: float = 1.0) -> Package:
    """Puts a new version in the place of the package at `path`, with θ0 scaled."""
    old = Package.read(path)
    base = Adapter(old.base_adapter.space, {key: tensor * scale for key, tensor in old.base_adapter.tensors.items()},
                   old.base_adapter.targets)  # fmt: skip
    manifest = old.manifest.model_copy(update={"version": version, "adapter_hash": base.content_hash()})
    directions = {card.id: old.bank.direction(old.mix({card.id: 1.0})) for card in manifest.atoms}
    contents = PackageContents(manifest, base, directions, {"M": old.drift}, {"mean": torch.zeros(1)}, {})
    write_package(path, contents, replace=True)
    return Package.read(path)


def test_every_line_of_the_log_is_json_without_prompts_and_keys(operated: Operated) -> None:
    forged = 'x"}\n{"level": "INFO", "message": "forged"}'
    answer = operated.post("/v1/chat/completions", {"model": "tiny", "max_tokens": 2, "ignore_eos": True, "messages": [
        {"role": "user", "content": PROMPT}]}, **{"X-Request-Id": "mine-1"})  # fmt: skip
    assert answer.headers["x-request-id"] == "mine-1"
    operated.post(f"/v1/atoms/{quote(forged)}", {})
    operated.post("/v1/chat/completions", {}, key="wrong-key-sesame")
    text = operated.log.read_text()
    started = text.index("{")
    assert all(json.loads(line)["level"] for line in text[started:].splitlines() if not line.startswith("atomsteer "))
    (line,) = [line for line in operated.lines() if line.get("request_id") == "mine-1"]
    assert line["logger"] == "atomsteer.access" and line["status"] == 200 and line["key"] == "shop"
    assert line["mix"].startswith("m-") and line["generated_tokens"] == 2 and line["prompt_tokens"] > 10
    assert re.match(r"\d{4}-\d\d-\d\dT", line["timestamp"]) and "prompt" not in line
    assert not any(line["message"] == "forged" for line in operated.lines())
    for secret in (PROMPT, operated.client_key, operated.admin_key, "sesame"):
        assert secret not in text


def test_a_key_is_made_and_withdrawn_while_the_server_runs(operated: Operated, wait_for) -> None:
    guest = create_key(operated.api_keys, "guest")
    assert wait_for(lambda: operated.post("/v1/steering/preview", {}, guest).status_code == 200, SECONDS)
    create_key(operated.api_keys, "guest", replace=True)
    assert wait_for(lambda: operated.post("/v1/steering/preview", {}, guest).status_code == 401, SECONDS)
    assert operated.post("/v1/steering/preview", {}).status_code == 200


def test_answers_end_at_the_servers_limit(operated: Operated) -> None:
    refused = operated.post("/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 601})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "max_tokens"
    answer = operated.ask(max_tokens=None, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 600 and answer["choices"][0]["finish_reason"] == "length"


def test_a_new_version_takes_over_under_load_without_a_failed_request(operated: Operated, wait_for) -> None:
    """Four clients ask all the while, in streams and not. θ0 differs, so the answers must too."""
    atom = Package.read(operated.package).manifest.atoms[0].id
    steering = {"atoms": {atom: 1.0}}
    before = operated.ask(steering=steering, max_tokens=24)
    stop, seen, failed = threading.Event(), [], []

    def ask() -> None:
        while not stop.is_set():
            try:
                answer = operated.ask(steering=steering, max_tokens=24)
                seen.append((answer["steering"]["mix"], answer["choices"][0]["message"]["content"]))
            except (AssertionError, httpx.HTTPError) as error:
                failed.append(error)

    clients = [threading.Thread(target=ask) for _ in range(4)]
    for client in clients:
        client.start()
    new = replace_package(operated.package, "2", scale=-3.0)
    try:
        done = operated.post("/v1/admin/reload", {}, operated.admin_key)
        assert done.status_code == 200, done.text
        assert done.json() | {"previous_version": ""} == {
            "object": "package.reloaded", "package": "tiny", "version": "2", "previous_version": "", "changed": True,
        }  # fmt: skip
        after = operated.ask(steering=steering, max_tokens=24)
        assert wait_for(lambda: after["steering"]["mix"] in {mix for mix, _ in list(seen)}, SECONDS)
    finally:
        stop.set()
        for client in clients:
            client.join()
    assert not failed, failed[0]
    assert after["steering"]["mix"] == new.digest(new.mix({atom: 1.0})) != before["steering"]["mix"]
    answers = {before["steering"]["mix"]: before, after["steering"]["mix"]: after}
    texts = {mix: answer["choices"][0]["message"]["content"] for mix, answer in answers.items()}
    assert len(set(texts.values())) == 2, "the versions answer alike, so the test would prove little"
    assert {mix for mix, _ in seen} == set(texts), "the clients saw one version only"
    assert all(text == texts[mix] for mix, text in seen), "an answer was made by another version than it names"


def test_a_broken_package_is_refused_and_sighup_takes_the_mended_one(operated: Operated, wait_for) -> None:
    pid = _server_pid(operated)
    served = operated.ask()["system_fingerprint"]
    file = operated.package / "drift.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    refused = operated.post("/v1/admin/reload", {}, operated.admin_key)
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "reload_failed")
    os.kill(pid, signal.SIGHUP)
    assert wait_for(lambda: any("SIGHUP: nothing was changed" in line["message"] for line in operated.lines()), SECONDS)
    assert operated.ask()["system_fingerprint"] == served
    file.write_bytes(whole)
    replace_package(operated.package, "3")
    os.kill(pid, signal.SIGHUP)
    version = lambda: httpx.get(operated.url + "/version", timeout=60).json()["package_version"]  # noqa: E731
    assert wait_for(lambda: version() == "3", SECONDS)
    assert operated.ask()["system_fingerprint"] != served
    assert operated.post("/v1/admin/reload", {}).status_code == 403


def test_metrics_count_composed_mixes_over_versions(operated: Operated) -> None:
    text = httpx.get(operated.url + "/metrics", timeout=60).text
    values = dict(line.rpartition(" ")[::2] for line in text.splitlines() if not line.startswith("#"))
    assert float(values["atomsteer_compose_seconds_count"]) > 5 and float(values["atomsteer_compose_seconds_sum"]) > 0
    assert float(values['atomsteer_reloads_total{result="failed"}']) == 2


def _server_pid(operated: Operated) -> int:
    """Of the server that was started with this package."""
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            try:
                arguments = (directory / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if str(operated.package).encode() in arguments:
                return int(directory.name)
    raise AssertionError("the server is not running")
