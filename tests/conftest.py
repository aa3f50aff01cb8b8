"""What tests share: the real small model, a tiny random one with a real tokenizer, and a real discovered package."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # before torch loads: spinning threads starve whatever shares the cores

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from atoms.adapter import Adapter
from atoms.model import merge_adapter
from atoms.package import Package, PackageContents, write_package
from offline.config import (
    CalibrateConfig,
    CurvatureConfig,
    DictionaryConfig,
    DiscoverConfig,
    FinetuneConfig,
    SelectConfig,
    SteeringConfig,
)
from offline.demo_model import prepare_demo_model
from offline.pipeline import discover
from offline.progress import Progress
from offline.shipped import read_neutral_prompts, shipped_file

ROOT = Path(__file__).parents[1]
SERVER_START_SECONDS = 180
TINY_SHARD = 16
"""Documents in a shard of rows, so that the tiny corpus has several."""
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pytest_configure() -> None:
    """A shell starts what runs in the background with SIGINT ignored, and children inherit that: Ctrl-C could not be tested."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def state_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where servers that the tests start keep their database, in place of the user's own."""
    path = tmp_path_factory.mktemp("state")
    os.environ["XDG_STATE_HOME"] = str(path)
    return path


@pytest.fixture(scope="session")
def smol_path() -> Path:
    """Directory of SmolLM2-135M-Instruct, converted once per checkout."""
    return prepare_demo_model(ROOT / ".cache" / "models")


@pytest.fixture(scope="session")
def load_smol(smol_path: Path) -> Callable[[], PreTrainedModel]:
    """A fresh fp32 copy of the real model each time, for tests that put adapters on it or merge into it."""
    return lambda: AutoModelForCausalLM.from_pretrained(smol_path, dtype=torch.float32).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def smol_model(load_smol: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """The real model, shared: whoever adds hooks or adapters takes them off again, and nobody changes weights."""
    return load_smol()


@pytest.fixture(scope="session")
def smol_tokenizer(smol_path: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(smol_path)


def demo_rows(behaviours: Iterable[str], each: int, longest: int) -> list[dict]:
    """The first `each` demo documents of every behaviour with at most `longest` characters of text, led by a short system
    message in place of the template's long one."""
    rows = [json.loads(line) for line in shipped_file("demo_documents").read_text(encoding="utf-8").splitlines()]
    short = [row for row in rows if sum(len(m["content"]) for m in row["messages"]) <= longest]
    for row in short:
        row["messages"].insert(0, {"role": "system", "content": "Answer."})
    return [row for behaviour in behaviours for row in [r for r in short if r["task"] == behaviour][:each]]


def write_jsonl(path: Path, rows: Iterable[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def real_package(smol_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Package:
    """A small discovery on the real model: enough for real directions, far too little for good ones. Do not change it:
    copy its directory first."""
    root = tmp_path_factory.mktemp("real")
    data = write_jsonl(root / "data.jsonl", demo_rows(("yes-no", "one-word", "bulleted-list"), 8, 150))
    config = DiscoverConfig(
        model=str(smol_path), data=data, out=root / "package", name="real", dtype="float32", device="cpu",
        finetune=FinetuneConfig(epochs=0.5, batch_documents=5),
        curvature=CurvatureConfig(factor_documents=6, eigenvalue_documents=6, components=20),
        dictionary=DictionaryConfig(atoms=6, alpha=0.05, iterations=10),
        select=SelectConfig(keep=3, min_documents=2, min_z=-1e9, min_stability=0.0),
        steering=SteeringConfig(steps=2, documents=4, reference_documents=8),
        calibrate=CalibrateConfig(prompts=2, continuation_tokens=8, coefficients=(-3.0, -1.0, 1.0, 3.0),
                                  orientation_documents=2),
    )  # fmt: skip
    return discover(config, Progress(quiet=True))


@pytest.fixture(scope="session")
def merged_smol(real_package: Package, load_smol: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """The real model with the real package's θ0 merged: what a server runs."""
    model = load_smol()
    merge_adapter(model, real_package.base_adapter)
    return model


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 400 tokens with a chat template, trained on the neutral prompts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(read_neutral_prompts(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


@pytest.fixture(scope="session")
def tiny_model_dir(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama of hidden size 32 with the tiny tokenizer, saved: a discovery on it takes seconds."""
    path = tmp_path_factory.mktemp("tiny") / "model"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, initializer_range=0.2,
        bos_token_id=tiny_tokenizer.bos_token_id, eos_token_id=tiny_tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def tiny_model(tiny_model_dir: Path) -> PreTrainedModel:
    """The tiny model, loaded afresh in fp32."""
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 short documents of three behaviours as JSON lines."""
    rows = demo_rows(("yes-no", "one-word", "bulleted-list"), 16, 150)
    return write_jsonl(tmp_path_factory.mktemp("data") / "documents.jsonl", rows)


@pytest.fixture(scope="session")
def tiny_config(tiny_model_dir: Path, tiny_data: Path) -> Callable[..., DiscoverConfig]:
    """`tiny_config(out, **changes)`: a discovery on the tiny model, whose parts (`finetune=…`) may be replaced."""

    def config(out: Path, **changes: object) -> DiscoverConfig:
        settings: dict = {
            "model": str(tiny_model_dir), "data": tiny_data, "out": out, "name": "tiny", "dtype": "float32", "device": "cpu",
            "finetune": FinetuneConfig(rank=4, epochs=2, batch_documents=8, learning_rate=0.02, checkpoint_every=3),
            "curvature": CurvatureConfig(factor_documents=16, eigenvalue_documents=16, components=20),
            "dictionary": DictionaryConfig(atoms=6, alpha=0.05, iterations=10, held_out=0.25),
            "select": SelectConfig(keep=4, min_documents=2, min_z=-1e9, min_stability=0.0),
            "calibrate": CalibrateConfig(prompts=3, continuation_tokens=8, coefficients=(-1.0, 1.0)),
        }  # fmt: skip
        return DiscoverConfig(**(settings | changes))

    return config


@pytest.fixture(scope="session")
def tiny_package(tiny_config: Callable[..., DiscoverConfig], tmp_path_factory: pytest.TempPathFactory) -> Package:
    """A package of the tiny model from an unbroken run, with its working directory beside it. Do not change it: copy it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("offline.rows.SHARD_DOCUMENTS", TINY_SHARD)
        return discover(tiny_config(tmp_path_factory.mktemp("tiny-package") / "package"), Progress(quiet=True))


@pytest.fixture(scope="session")
def serving() -> Callable[[list[str], Path], AbstractContextManager[str]]:
    """`with serving(options, log) as url`: `atomsteer serve` on a free port, which SIGTERM must stop cleanly."""

    @contextmanager
    def run(options: list[str], log: Path) -> Iterator[str]:
        command = [sys.executable, "-m", "clients.cli", "serve", "--port", "0", *options]
        with log.open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            yield _url_of(process, log)
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait(timeout=60)
        assert code == 0, f"SIGTERM did not stop the server cleanly:\n{log.read_text()}"

    return run


def _url_of(process: subprocess.Popen[bytes], log: Path) -> str:
    for _ in range(SERVER_START_SECONDS * 5):
        if found := re.search(r"serves .* on (http://\S+)", log.read_text()):
            return found[1]
        if process.poll() is not None:
            break
        try:
            process.wait(0.2)
        except subprocess.TimeoutExpired:
            continue
    raise AssertionError(f"the server did not start:\n{log.read_text()}")


@pytest.fixture(scope="session")
def wait_for() -> Callable[..., bool]:
    """`wait_for(condition, seconds=5)`: whether `condition` came true in time."""

    def wait(condition: Callable[[], object], seconds: float = 5.0) -> bool:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                return False
            time.sleep(0.005)
        return True

    return wait


@pytest.fixture(scope="session")
def another_version() -> Callable[..., Package]:
    """`another_version(package, path, version, sign=-1, keep=None, base_scale=1, broken=False)`: the package as another
    version at `path`, with all atoms multiplied by `sign`, the first `keep` of them, and θ0 scaled. `broken` leaves the
    atoms other than their cards say, which only who reads their weights can see."""

    def make(package: Package, path: Path, version: str, *, sign: float = -1.0, keep: int | None = None,
             base_scale: float = 1.0, broken: bool = False) -> Package:  # fmt: skip
        old, space = package.base_adapter, package.base_adapter.space
        base = Adapter(space, {key: tensor * base_scale for key, tensor in old.tensors.items()}, old.targets)
        cards, directions = [], {}
        for card in package.manifest.atoms[:keep]:
            directions[card.id] = package.bank.direction(package.mix({card.id: sign}))
            content_hash = card.content_hash if broken else space.hash_tensors(directions[card.id])
            cards.append(card.model_copy(update={"content_hash": content_hash}))
        changes = {"version": version, "atoms": cards, "adapter_hash": base.content_hash()}
        drift = package.drift[: len(cards), : len(cards)].clone()
        contents = PackageContents(package.manifest.model_copy(update=changes), base, directions, {"M": drift},
                                   {"mean": torch.zeros(1)}, {})  # fmt: skip
        return write_package(path, contents)

    return make
