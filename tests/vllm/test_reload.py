"""Another version of the package in the place of the one that is served, on the real engine and model in fp32."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from openai import AsyncOpenAI
from transformers import PreTrainedModel

from atoms.model import find_linear, merge_adapter
from atoms.package import Package

NEAR_TIE = 1e-4
LONG, SHORT = 120, 12
"""Tokens of an answer that is in flight across a reload, and of one that is compared with transformers."""
RELOADS = 12
MIB = 2**20


@dataclass
class Shop:
    """A server of this module's own, and the place where its package lies."""

    running: Any
    place: Path
    first: Package
    second: Package
    admin: dict[str, str]
    root: Path

    def put(self, package: Package) -> None:
        """By a rename, as an operator would."""
        new = Path(shutil.copytree(package.path, self.place.with_name("new")))
        shutil.rmtree(self.place)
        new.rename(self.place)

    def reload(self) -> httpx.Response:
        return httpx.post(f"{self.running.url}/v1/admin/reload", headers=self.admin, timeout=300)

    def serve(self, package: Package) -> None:
        self.put(package)
        answer = self.reload()
        assert answer.status_code == 200, answer.text

    def version(self) -> str:
        return str(httpx.get(f"{self.running.url}/version", timeout=60).json()["package_version"])


@pytest.fixture(scope="module")
def shop(real_package: Package, another_version, start, command, admin_key: str,
         tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:  # fmt: skip
    root = tmp_path_factory.mktemp("reload")
    first = Package(Path(shutil.copytree(real_package.path, root / "first")), real_package.manifest)
    second = another_version(first, root / "second", "2", keep=-1)
    place = Path(shutil.copytree(first.path, root / "served"))
    atom = first.manifest.atoms[0].id
    options = command("--package", str(place), "--admin-key", admin_key, "--shutdown-timeout", "8", "--database", "none",
                      "--preset", f"strong={atom}=3")  # fmt: skip
    with start(options, first.manifest.name) as running:
        yield Shop(running, place, first, second, {"Authorization": f"Bearer {admin_key}"}, root)


@pytest.fixture(autouse=True)
def on_the_first_version(shop: Shop) -> None:
    if shop.version() != shop.first.manifest.version:
        shop.serve(shop.first)


@dataclass
class Answer:
    """The tokens of an answer as they came, and the gap between the two likeliest at each."""

    mix: str | None = None
    tokens: list[int] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    done: bool = False
    started: asyncio.Event = field(default_factory=asyncio.Event)


async def stream(
    client: AsyncOpenAI, shop: Shop, prompt: list[int], tokens: int, answer: Answer, **steering: Any
) -> None:
    """Asks greedily and fills `answer`; it has started once eight tokens have come."""
    body = {"return_token_ids": True, "ignore_eos": True, "steering": steering}
    chunks = await client.completions.create(model=shop.running.name, prompt=prompt, max_tokens=tokens, temperature=0,
                                             logprobs=2, stream=True, extra_body=body)  # fmt: skip
    async for chunk in chunks:
        if getattr(chunk, "steering", None):
            answer.mix = chunk.steering["mix"]
        for choice in chunk.choices:
            answer.tokens += choice.token_ids or []
            for top in choice.logprobs.top_logprobs if choice.logprobs else []:
                best = sorted(top.values(), reverse=True)
                answer.gaps.append(best[0] - best[1])
        if len(answer.tokens) >= 8:
            answer.started.set()
    answer.done = True


async def ask(client: AsyncOpenAI, shop: Shop, prompt: list[int], tokens: int, **steering: Any) -> Answer:
    answer = Answer()
    await stream(client, shop, prompt, tokens, answer, **steering)
    assert len(answer.tokens) == tokens
    return answer


def assert_same(ours: Answer, reference: list[int], gaps: list[float], what: object) -> None:
    place = next((n for n, (a, b) in enumerate(zip(ours.tokens, reference, strict=True)) if a != b), None)
    assert place is None or gaps[place] <= NEAR_TIE, f"{what}: differs at {place}, where the gap is {gaps[place]}"


def greedy(package: Package, model: PreTrainedModel, prompt: list[int], atoms: dict[str, float]) -> tuple[list, list]:
    """Transformers' tokens with θ0 and the mix in the weights, and their gaps."""
    merge_adapter(model, package.base_adapter)
    for name, factors in (package.bank.compose(package.mix(atoms), package.composition) or {}).items():
        find_linear(model, name).weight.data += factors.scaling * (factors.lora_B @ factors.lora_A)
    output = model.generate(torch.tensor([prompt]), max_new_tokens=SHORT, min_new_tokens=SHORT, do_sample=False,
                            output_logits=True, return_dict_in_generate=True, pad_token_id=0, eos_token_id=[])  # fmt: skip
    best = [logits[0].topk(2).values for logits in output.logits]
    return output.sequences[0, len(prompt) :].tolist(), [float(values[0] - values[1]) for values in best]


@pytest.fixture
def long_prompt(chat_prompt: Callable[[str], list[int]]) -> list[int]:
    """Over several blocks of the prefix cache."""
    return chat_prompt("Here is a list of words. " + "apple pear plum " * 60 + "Name three of them.")


async def test_requests_in_flight_end_on_their_version_and_new_ones_begin_on_the_new(
    shop: Shop, prompts: list[list[int]], long_prompt: list[int], load_smol
) -> None:
    """The same long answers are streamed without a reload and across one: steered, in either phase, unsteered, by a preset,
    and by the atom that the new version lacks."""
    ids = [card.id for card in shop.first.manifest.atoms]
    cases: list[tuple[list[int], dict[str, Any]]] = [
        (prompts[0], {"atoms": {ids[0]: 3.0}}), (prompts[1], {"atoms": {ids[0]: -2.5, ids[-1]: 1.5}}), (prompts[2], {"atoms": {}}),
        (prompts[0], {"preset": "strong"}), (long_prompt, {"atoms": {ids[0]: 3.0}}),
        (long_prompt, {"atoms": {ids[0]: -3.0}, "phase": "decode"}), (prompts[3], {"atoms": {ids[-1]: 3.0}}),
    ]  # fmt: skip
    async with AsyncOpenAI(base_url=shop.running.v1, api_key="none", max_retries=0, timeout=300) as client:
        before = await asyncio.gather(*(ask(client, shop, prompt, LONG, **steering) for prompt, steering in cases))
        across = [Answer() for _ in cases]
        streams = [asyncio.create_task(stream(client, shop, prompt, LONG, answer, **steering))
                   for (prompt, steering), answer in zip(cases, across, strict=True)]  # fmt: skip
        await asyncio.gather(*(answer.started.wait() for answer in across))
        shop.put(shop.second)
        reload = await asyncio.to_thread(shop.reload)
        going_on = sum(not answer.done for answer in across)
        assert reload.json() == {"object": "package.reloaded", "package": "real", "version": "2",
                                 "previous_version": shop.first.manifest.version, "changed": True}  # fmt: skip
        assert going_on == len(cases), "answers ended before the reload, so nothing was in flight"
        both = [0, 2, 3, 4]  # of the cases, those whose atoms the new version has
        new = dict(zip(both, await asyncio.gather(*(ask(client, shop, cases[place][0], SHORT, **cases[place][1])
                                                    for place in both)), strict=True))  # fmt: skip
        await asyncio.gather(*streams)

        for (_, steering), once, again in zip(cases, before, across, strict=True):
            assert len(again.tokens) == LONG and again.mix == once.mix
            assert_same(again, once.tokens, once.gaps, steering)
        for place in (0, 3, 4):
            reference, gaps = greedy(shop.second, load_smol(), cases[place][0], {ids[0]: 3.0})
            assert new[place].mix == shop.second.digest(shop.second.mix({ids[0]: 3.0})) != before[place].mix
            assert_same(new[place], reference, gaps, cases[place])
        assert sum(new[place].tokens != before[place].tokens[:SHORT] for place in (0, 3, 4)) >= 2, (
            "the versions answer alike, so the test would prove little"
        )
        assert_same(new[2], before[2].tokens[:SHORT], before[2].gaps, "unsteered")
        gone = httpx.post(f"{shop.running.v1}/completions", timeout=60, json={
            "model": shop.running.name, "prompt": "x", "steering": {"atoms": {ids[-1]: 1.0}}})  # fmt: skip
        assert gone.status_code == 404


async def test_everything_that_names_a_version_names_the_new_one(shop: Shop) -> None:
    shop.serve(shop.second)
    ids = [card.id for card in shop.first.manifest.atoms]
    atoms = httpx.get(f"{shop.running.v1}/atoms", timeout=60).json()
    assert atoms["package"]["version"] == "2" and [card["id"] for card in atoms["data"]] == ids[:-1]
    metrics = httpx.get(f"{shop.running.url}/metrics", timeout=60).text
    (info,) = [line for line in metrics.splitlines() if line.startswith("atomsteer_package_info{")]
    assert 'version="2"' in info and shop.second.manifest.content_hash[:12] in info
    assert 'atomsteer_reloads_total{result="done"}' in metrics
    assert httpx.get(f"{shop.running.url}/ready", timeout=60).json()["steering"]["package_version"] == "2"
    listed = httpx.get(f"{shop.running.v1}/models", timeout=60).json()["data"]
    assert [model["id"] for model in listed] == [shop.running.name, f"{shop.running.name}:strong"]
    preview = httpx.post(f"{shop.running.v1}/steering/preview", json={"steering": {"atoms": {ids[0]: 1}}}, timeout=60)
    assert preview.json()["steering"]["mix"] == shop.second.digest(shop.second.mix({ids[0]: 1.0}))


async def test_what_cannot_be_served_is_refused_and_the_old_version_goes_on(
    shop: Shop, prompts: list[list[int]], another_version
) -> None:
    """A broken file, which the API server sees; wrong weights, which the workers see; another θ0; another name."""
    atom = shop.first.manifest.atoms[0].id
    other = shop.first.manifest.model_copy(update={"name": "other"}).sealed()
    named = Package(Path(shutil.copytree(shop.first.path, shop.root / "named")), other)
    (named.path / "manifest.json").write_text(other.model_dump_json())
    truncated = Package(Path(shutil.copytree(shop.second.path, shop.root / "truncated")), shop.second.manifest)
    file = truncated.path / "drift.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    async with AsyncOpenAI(base_url=shop.running.v1, api_key="none", max_retries=0, timeout=300) as client:
        before = await ask(client, shop, prompts[0], SHORT, atoms={atom: 3.0})
        for package, said in (
            (truncated, "drift.safetensors"),
            (
                another_version(shop.first, shop.root / "wrong", "3", broken=True),
                "is not the one that its card describes",
            ),
            (another_version(shop.first, shop.root / "base", "4", base_scale=1.5), "another base adapter (θ0)"),
            (named, "is called 'other'"),
        ):
            shop.put(package)
            refused = await asyncio.to_thread(shop.reload)
            assert (refused.status_code, refused.json()["error"]["code"]) == (409, "reload_failed"), said
            assert said in refused.json()["error"]["message"]
            after = await ask(client, shop, prompts[0], SHORT, atoms={atom: 3.0})
            assert (after.mix, shop.version()) == (before.mix, shop.first.manifest.version)
            assert_same(after, before.tokens, before.gaps, said)
    refused = httpx.post(f"{shop.running.url}/v1/admin/reload", timeout=60)
    assert refused.status_code == 403
    shop.put(shop.first)


def test_reloads_under_load_drop_nothing_and_leave_no_memory_behind(
    shop: Shop, prompts: list[list[int]], members
) -> None:
    """Four clients ask all the while; the two versions take turns."""
    atom = shop.first.manifest.atoms[0].id
    body = {"model": shop.running.name, "prompt": prompts[0], "max_tokens": 6, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True, "steering": {"atoms": {atom: 3.0}}}  # fmt: skip
    stop, seen, failed = threading.Event(), set(), []

    def client() -> None:
        with httpx.Client(timeout=120) as http:
            while not stop.is_set():
                answer = http.post(f"{shop.running.v1}/completions", json=body)
                if answer.status_code != 200:
                    return failed.append(answer.text)
                seen.add((answer.json()["steering"]["mix"], tuple(answer.json()["choices"][0]["token_ids"])))

    clients = [threading.Thread(target=client) for _ in range(4)]
    for one in clients:
        one.start()
    memory = []
    try:
        for number in range(RELOADS):
            shop.serve((shop.second, shop.first)[number % 2])
            memory.append(sum(resident(pid) for pid in members(shop.running.process.pid)))
    finally:
        stop.set()
        for one in clients:
            one.join()
    assert not failed, failed[0]
    mix = {version.manifest.version: version.digest(version.mix({atom: 3.0})) for version in (shop.first, shop.second)}
    assert {digest for digest, _ in seen} == set(mix.values()) and len(seen) == 2, (
        "an answer was made by another version than it names"
    )
    bank = sum(tensor.nbytes for half in (shop.first.bank.a, shop.first.bank.b) for tensor in half.values())
    print(f"bank {bank / MIB:.0f} MiB; resident after each reload, MiB: {[round(each / MIB) for each in memory]}")
    assert memory[-1] - memory[1] < 2 * bank, "each reload leaves a bank behind"


def test_sighup_reloads_too(shop: Shop, wait_for) -> None:
    """To the server's process alone, and to all of them: its engine goes on."""
    for send, package in ((os.kill, shop.second), (os.killpg, shop.first)):
        shop.put(package)
        send(shop.running.process.pid, signal.SIGHUP)
        assert wait_for(lambda version=package.manifest.version: shop.version() == version, 60)
    atoms = {shop.first.manifest.atoms[0].id: 1.0}
    body = {"model": shop.running.name, "prompt": "x", "max_tokens": 4, "steering": {"atoms": atoms}}
    assert httpx.post(f"{shop.running.v1}/completions", json=body, timeout=60).status_code == 200


def resident(pid: int) -> int:
    """Bytes of a process' own memory: files that are mapped, such as weights on disk, come and go with the page cache."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0
