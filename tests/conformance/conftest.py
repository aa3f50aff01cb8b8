"""One server for the suite: the embedded one, or vLLM where that is installed (`make test-vllm`). The tests do not know which."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from openai import OpenAI

from atoms.package import Package
from server.keys import create_key

START_SECONDS = 600
HAS_VLLM = importlib.util.find_spec("vllm") is not None


@dataclass(frozen=True)
class Host:
    """A running server. `atom` is one of its package's, `name` its model; the preset ``strong`` is that atom at 2. `link`
    leads to the package."""

    url: str
    name: str
    atom: str
    other: str
    key: str
    admin_key: str
    link: Path

    def sdk(self, key: str | None = None) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key or self.key, max_retries=0, timeout=300)


@pytest.fixture(scope="session")
def host(real_package: Package, smol_path: Path, tmp_path_factory: pytest.TempPathFactory,
         serving: Callable[[list[str], Path], AbstractContextManager[str]]) -> Iterator[Host]:  # fmt: skip
    root = tmp_path_factory.mktemp("conformance")
    keys = create_key(root / "api.json", "client"), create_key(root / "admin.json", "boss")
    atoms = [card.id for card in real_package.manifest.atoms]
    link = root / "package"
    link.symlink_to(real_package.path)
    options = [
        "--package", link, "--model", smol_path, "--dtype", "float32", "--max-model-len", "512", "--max-num-seqs",
        "8", "--preset", f"strong={atoms[0]}=2", "--database", "none", "--api-key-file", root / "api.json",
        "--admin-key-file", root / "admin.json", "--max-tokens", "64",
    ]  # fmt: skip
    start = _vllm if HAS_VLLM else serving
    with start([str(option) for option in options], root / "log") as url:
        yield Host(url, real_package.manifest.name, atoms[0], atoms[-1], *keys, link)


@contextmanager
def _vllm(options: list[str], log: Path) -> Iterator[str]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
                 "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip
    command = [
        sys.executable,
        "-m",
        "clients.cli",
        "serve",
        "--engine",
        "vllm",
        "--port",
        url.rpartition(":")[2],
        *options,
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | variables,
                                   start_new_session=True)  # fmt: skip
    try:
        for _ in range(START_SECONDS):
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except (urllib.error.URLError, TimeoutError):
                assert process.poll() is None, f"vLLM did not start:\n{log.read_text()[-5000:]}"
                time.sleep(1)
        yield url
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=120)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def client(host: Host) -> Iterator[OpenAI]:
    with host.sdk() as client:
        yield client
