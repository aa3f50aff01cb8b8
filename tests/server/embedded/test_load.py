"""A package with a tiny random base model, loaded and served: the whole path from a directory to steered answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from httpx import ASGITransport, AsyncClient
from transformers import AutoModelForCausalLM, PreTrainedModel

from atoms.adapter import Adapter
from atoms.engine import GenerationRequest, SamplingParams
from atoms.errors import ConfigError, PackageCorruptError, PackageError, WrongBaseError
from atoms.manifest import BaseModelRef
from atoms.mix import Mix
from atoms.model import config_hash, merge_adapter, weights_fingerprint
from atoms.package import Package, PackageContents, atom_id, write_package
from atoms.space import LoRAModule, LoRASpace
from server.config import ServeConfig
from server.embedded.app import create_app
from server.embedded.load import EngineOptions, LoadedPackage, load_package

CHAT: dict[str, Any] = {
    "model": "demo", "messages": [{"role": "user", "content": "Hello there"}], "max_tokens": 12, "temperature": 0,
    "ignore_eos": True,
}  # fmt: skip
OPTIONS = EngineOptions(dtype="float32", device="cpu", slots=4)


@pytest.fixture(scope="module")
def served(package: Package, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Package:
    """The toy package's cards on strong random directions of the tiny model."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    space = LoRASpace.of(
        LoRAModule(name, module.in_features, module.out_features, 2, 1.0)
        for name, module in model.named_modules()
        if name.endswith(("q_proj", "v_proj"))
    )
    generator = torch.Generator().manual_seed(1)
    base, *directions = (
        {tensor.key: torch.randn(tensor.shape, generator=generator) / 3 for tensor in space.tensors} for _ in range(4)
    )
    hashes = [space.hash_tensors(direction) for direction in directions]
    cards = [
        card.model_copy(update={"id": atom_id(hash_), "content_hash": hash_})
        for card, hash_ in zip(package.manifest.atoms, hashes, strict=True)
    ]
    adapter = Adapter(space, base, {"target_modules": ["q_proj", "v_proj"]})
    reference = BaseModelRef(id=str(tiny_model_dir), config_hash=config_hash(model), weights=weights_fingerprint(model))
    manifest = package.manifest.model_copy(
        update={"atoms": cards, "base_model": reference, "adapter_hash": adapter.content_hash()}
    )
    ids = [card.id for card in cards]
    contents = PackageContents(manifest, adapter, dict(zip(ids, directions, strict=True)), {"M": package.drift},
                               {"mean": torch.zeros(1)}, {})  # fmt: skip
    return write_package(tmp_path_factory.mktemp("served") / "demo", contents)


@pytest.fixture(scope="module")
def loaded(served: Package) -> Iterator[LoadedPackage]:
    loaded = load_package(served.path, OPTIONS)
    yield loaded
    loaded.engine.close()


@pytest.fixture
async def live(loaded: LoadedPackage):
    config = ServeConfig(package=loaded.package.path, presets=("listed=list=2",))
    app = create_app(loaded.package, loaded.engine, config, vocabulary=loaded.vocabulary)
    async with AsyncClient(transport=ASGITransport(app), base_url="http://test") as client:
        yield client


async def _answer(client: AsyncClient, **fields: object) -> str:
    response = await client.post("/v1/chat/completions", json=CHAT | fields)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


async def test_atoms_change_answers_and_an_empty_mix_does_not(live: AsyncClient) -> None:
    plain = await _answer(live)
    assert await _answer(live, steering={"atoms": {}}) == plain
    assert await _answer(live, steering={"atoms": {"list": 0}}) == plain
    steered = await _answer(live, steering={"atoms": {"list": 2}})
    assert steered != plain
    assert await _answer(live, model="demo:listed") == steered
    assert await _answer(live) == plain, "the steered request must leave nothing behind"


async def test_a_stream_says_what_the_whole_answer_says(live: AsyncClient) -> None:
    fields = {"steering": {"atoms": {"formal": -2}}}
    whole = await _answer(live, **fields)
    stream = await live.post("/v1/chat/completions", json=CHAT | fields | {"stream": True})
    chunks = [json.loads(line[6:]) for line in stream.text.split("\n\n") if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == whole


async def test_choices_with_a_seed_can_be_had_again(live: AsyncClient) -> None:
    body = CHAT | {"temperature": 1.5, "n": 3, "seed": 7}
    first, second = [(await live.post("/v1/chat/completions", json=body)).json()["choices"] for _ in range(2)]
    assert first == second
    assert len({choice["message"]["content"] for choice in first}) == 3


async def test_token_ids_beyond_the_vocabulary_harm_nobody(live: AsyncClient, loaded: LoadedPackage) -> None:
    for token, status in ((loaded.vocabulary - 1, 200), (loaded.vocabulary, 400)):
        response = await live.post("/v1/completions", json={"model": "demo", "prompt": [token], "max_tokens": 1})
        assert response.status_code == status
        biased = await live.post("/v1/chat/completions", json=CHAT | {"logit_bias": {str(token): 1}})
        assert biased.status_code == status


async def test_too_long_a_prompt(live: AsyncClient) -> None:
    response = await live.post("/v1/completions", json={"model": "demo", "prompt": "word " * 3000})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "prompt")


def test_theta_zero_is_merged(loaded: LoadedPackage, served: Package, tiny_model_dir: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    merge_adapter(reference, served.base_adapter)
    prompt = loaded.engine.encode_text("Hello there")
    with torch.no_grad():
        expected = reference.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=-1)
    sampling = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    (answer,) = loaded.engine.generate([GenerationRequest("r", prompt, Mix(), sampling)])
    assert list(answer.token_ids) == expected[0, len(prompt) :].tolist()


def test_another_model_is_refused(served: Package, tiny_model: PreTrainedModel, tmp_path: Path) -> None:
    with torch.no_grad():
        tiny_model.get_input_embeddings().weight.add_(1.0)
    tiny_model.save_pretrained(tmp_path)
    for file in Path(served.manifest.base_model.id).glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(WrongBaseError, match="other weights"):
        load_package(served.path, replace(OPTIONS, model=str(tmp_path)))


def test_an_edited_package_is_refused(served: Package, tmp_path: Path) -> None:
    for file in served.path.rglob("*"):
        if file.is_file():
            copy = tmp_path / "demo" / file.relative_to(served.path)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    target = tmp_path / "demo" / "drift.safetensors"
    target.write_bytes(target.read_bytes()[:-1])
    with pytest.raises(PackageCorruptError, match=r"drift\.safetensors"):
        load_package(tmp_path / "demo", OPTIONS)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda o: replace(o, device="tpu9"), ConfigError),
        (lambda o: replace(o, max_model_len=10**6), ConfigError),
    ],
)
def test_options_that_cannot_work(
    served: Package, change: Callable[[EngineOptions], EngineOptions], error: type[Exception]
) -> None:
    with pytest.raises(error):
        load_package(served.path, change(OPTIONS))


def test_a_directory_that_is_no_package(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="not an atomsteer package"):
        load_package(tmp_path, OPTIONS)
