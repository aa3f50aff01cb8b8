"""Another version of the package while requests run, on either server."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from atoms.package import Package

ASK: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Name three fruits."}],
    "max_tokens": 48,
    "temperature": 0,
}


@pytest.fixture
def reload(host: Any, real_package: Package) -> Iterator[Callable[[Path], httpx.Response]]:
    """`reload(path)`: has the link lead there, and the server read it. The first version comes back at the end."""

    def to(path: Path) -> httpx.Response:
        new = host.link.with_name("new")
        new.symlink_to(path)
        os.replace(new, host.link)
        return httpx.post(
            f"{host.url}/v1/admin/reload", headers={"Authorization": f"Bearer {host.admin_key}"}, timeout=300
        )

    yield to
    assert to(real_package.path).status_code == 200


def steered(host: Any, atom: str) -> dict[str, Any]:
    body = {"steering": {"atoms": {atom: 3.0}}, "ignore_eos": True}
    return {"model": host.name, **ASK, "extra_body": body}


def test_a_stream_ends_on_its_version_and_what_follows_begins_on_the_new(
    host: Any, client: OpenAI, reload, real_package: Package, another_version, tmp_path: Path
) -> None:
    second = another_version(real_package, tmp_path / "second", "2")
    before = client.chat.completions.create(**steered(host, host.atom))
    stream = client.chat.completions.create(**steered(host, host.atom), stream=True)
    chunks = [next(stream) for _ in range(4)]
    answer = reload(second.path)
    assert answer.json() == {"object": "package.reloaded", "package": host.name, "version": "2",
                             "previous_version": real_package.manifest.version, "changed": True}  # fmt: skip
    after = client.chat.completions.create(**steered(host, host.atom))
    chunks += stream
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    mixes = [version.digest(version.mix({host.atom: 3.0})) for version in (real_package, second)]
    assert [before.steering["mix"], chunks[0].steering["mix"], after.steering["mix"]] == [mixes[0], *mixes]
    assert text == before.choices[0].message.content != after.choices[0].message.content
    assert httpx.get(f"{host.url}/version", timeout=60).json()["package_version"] == "2"
    metrics = httpx.get(f"{host.url}/metrics", timeout=60).text
    assert 'version="2"' in next(line for line in metrics.splitlines() if line.startswith("atomsteer_package_info{"))


def test_the_same_package_again_is_no_change(host: Any, client: OpenAI, reload, real_package: Package) -> None:
    before = client.chat.completions.create(**steered(host, host.atom))
    assert reload(real_package.path).json()["changed"] is False
    after = client.chat.completions.create(**steered(host, host.atom))
    assert after.choices[0].message.content == before.choices[0].message.content and after.steering == before.steering


def test_a_broken_package_is_refused_and_the_old_version_goes_on(
    host: Any, client: OpenAI, reload, real_package: Package, another_version, tmp_path: Path
) -> None:
    """Whether a file of it or the weights of its atoms are wrong."""
    wrong = another_version(real_package, tmp_path / "wrong", "3", broken=True)
    truncated = another_version(real_package, tmp_path / "truncated", "4")
    file = truncated.path / "drift.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    before = client.chat.completions.create(**steered(host, host.atom))
    for path in (wrong.path, truncated.path, tmp_path / "nothing"):
        refused = reload(path)
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "reload_failed")
        assert refused.json()["error"]["message"].startswith("nothing was changed: ")
        after = client.chat.completions.create(**steered(host, host.atom))
        assert (
            after.choices[0].message.content == before.choices[0].message.content and after.steering == before.steering
        )
