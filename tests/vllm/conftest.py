"""The real engine: `make test-vllm` runs these in .venv-vllm. Without vLLM nothing here is collected."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from atoms.package import Package

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]

START_SECONDS = 600
CONTEXT = 512
ADMIN_KEY, WEB_ORIGIN = "admin-key", "https://app.example"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """test_shutdown.py stops the server that the others use, so it comes last however the files are named on the line."""
    items.sort(key=lambda item: item.path.name == "test_shutdown.py")


@dataclass(frozen=True)
class Running:
    """A server on this machine. `name` is the model's."""

    url: str
    name: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def v1(self) -> str:
        return f"{self.url}/v1"


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """`with launch(command, name, **environment) as running`: a server that may not answer yet; stops it with SIGTERM."""

    @contextmanager
    def launched(command: list[str], name: str, environment: dict[str, str] | None = None) -> Iterator[Running]:
        log = tmp_path_factory.mktemp("vllm") / "log"
        port = _free_port()
        variables = {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        at = command.index("--") if "--" in command else len(command)
        with log.open("wb") as output:
            process = subprocess.Popen([*command[:at], f"--port={port}", *command[at:]], stdout=output,
                                       stderr=subprocess.STDOUT, env=os.environ | variables | (environment or {}),
                                       start_new_session=True)  # fmt: skip
        try:
            yield Running(f"http://127.0.0.1:{port}", name, process, log)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=120)
            finally:
                for left in members(process.pid):
                    os.kill(left, signal.SIGKILL)

    return launched


@pytest.fixture(scope="session")
def start(launch) -> Callable:
    """`with start(command, name, **environment) as running`: as `launch`, once the server answers /health."""

    @contextmanager
    def started(command: list[str], name: str, environment: dict[str, str] | None = None) -> Iterator[Running]:
        with launch(command, name, environment) as running:
            _wait_until_healthy(running)
            yield running

    return started


@pytest.fixture(scope="session")
def merged_dir(merged_smol, smol_tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model with θ0 merged, on disk: what stock vLLM needs to serve the same unsteered model."""
    path = tmp_path_factory.mktemp("merged")
    merged_smol.save_pretrained(path)
    smol_tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def stock_answers(start, merged_dir: Path, prompts: list[list[int]]) -> list[dict]:
    """What vLLM without any plugin or LoRA says to each prompt on the merged model, one at a time."""
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(merged_dir), "--served-model-name=merged",
               "--dtype=float32", f"--max-model-len={CONTEXT}", "--max-num-seqs=8"]  # fmt: skip
    with start(command, "merged", {"VLLM_PLUGINS": ""}) as running:
        return [complete(running, prompt, logprobs=5) for prompt in prompts]


@pytest.fixture(scope="session")
def command(real_package: Package, smol_path: Path) -> Callable[..., list[str]]:
    """`command(*options)`: `atomsteer serve --engine vllm`."""

    def command_with(*options: str) -> list[str]:
        return [sys.executable, "-m", "clients.cli", "serve", "--engine", "vllm", "--package", str(real_package.path),
                "--model", str(smol_path), "--dtype", "float32", "--max-model-len", str(CONTEXT), "--max-num-seqs", "16",
                *options]  # fmt: skip

    return command_with


@pytest.fixture(scope="session")
def server(start, command, real_package: Package, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    atom = real_package.manifest.atoms[0].id
    options = command("--admin-key", ADMIN_KEY, "--shutdown-timeout", "8", "--preset", f"strong={atom}=3",
                      "--database", f"sqlite:///{tmp_path_factory.mktemp('state')}/state.db", "--measured-kl-share", "1",
                      "--measured-kl-tokens", "1000000", "--cors-origin", WEB_ORIGIN)  # fmt: skip
    with start(options, real_package.manifest.name) as running:
        yield running


@pytest.fixture(scope="session")
def prompts(smol_tokenizer) -> list[list[int]]:
    texts = [
        "Name three fruits.",
        "Is the sky blue?",
        "Write one word for the colour of grass.",
        "What is water made of?",
    ]
    return [chat_tokens(smol_tokenizer, text) for text in texts]


def chat_tokens(tokenizer, text: str) -> list[int]:
    from atoms.model import encode_prompt

    return encode_prompt(tokenizer, [{"role": "user", "content": text}])


def complete(running: Running, prompt: list[int] | str, max_tokens: int = 16, **fields) -> dict:
    """A greedy completion over plain HTTP; raises HTTPError."""
    body = {
        "model": running.name,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "return_token_ids": True,
    }
    return post(running, "/v1/completions", body | fields)


def post(running: Running, path: str, body: dict, key: str | None = None) -> dict:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(running.url + path, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.load(response)


def get(running: Running, path: str) -> str:
    with urllib.request.urlopen(running.url + path, timeout=60) as response:
        return response.read().decode()


@pytest.fixture(scope="session", name="members")
def members_fixture() -> Callable[[int], list[int]]:
    """`members(pid)`: the live processes of a server's group or session."""
    return members


def members(group: int) -> list[int]:
    """The live processes of a process group or session."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        state, process_group, session = fields[0], int(fields[2]), int(fields[3])
        if group in (process_group, session) and state != "Z":
            found.append(int(entry.name))
    return found


def _wait_until_healthy(running: Running) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if running.process.poll() is not None:
            break
        try:
            get(running, "/health")
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    raise AssertionError(f"the server did not start:\n{running.log.read_text(errors='replace')[-6000:]}")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="session")
def admin_key() -> str:
    return ADMIN_KEY


@pytest.fixture(scope="session")
def web_origin() -> str:
    """Whose web pages may call `server`."""
    return WEB_ORIGIN


@pytest.fixture(scope="session")
def ask() -> Callable[..., dict]:
    """`ask(server, prompt, **fields)`: a greedy completion."""
    return complete


@pytest.fixture(scope="session")
def send() -> Callable[..., dict]:
    """`send(server, path, body)`."""
    return post


@pytest.fixture(scope="session")
def read() -> Callable[..., str]:
    """`read(server, path)`."""
    return get


@pytest.fixture(scope="session")
def chat_prompt(smol_tokenizer) -> Callable[[str], list[int]]:
    """`chat_prompt(text)`: the tokens of a user's message in the chat template."""
    return lambda text: chat_tokens(smol_tokenizer, text)


@pytest.fixture(scope="session")
def context() -> int:
    """The server's, in tokens."""
    return CONTEXT
