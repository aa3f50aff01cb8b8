"""A real server on the real model, started once for all tests of clients."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from atoms.package import Package

ADMIN_KEY = "admin-key-of-the-tests"
START_SECONDS = 180


@pytest.fixture(scope="session")
def named_package(real_package: Package, tmp_path_factory: pytest.TempPathFactory) -> Package:
    """The real package under the name that the documentation uses, its atoms called as the documentation calls them."""
    path = tmp_path_factory.mktemp("named") / "package"
    shutil.copytree(real_package.path, path)
    package = Package.read(path)
    for card, alias in zip(package.manifest.atoms, ("bulleted-list", "yes-no"), strict=False):
        package = package.relabel(card.id, alias)
    return package


@pytest.fixture(scope="session")
def real_server(named_package: Package, smol_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL, with /v1, of `atomsteer serve` with an admin key; its model is called ``demo``."""
    home = tmp_path_factory.mktemp("serve")
    log = home / "log"
    command = [
        sys.executable, "-m", "clients.cli", "serve", "--package", str(named_package.path), "--model", str(smol_path),
        "--port", "0", "--dtype", "float32", "--served-model-name", "demo", "--admin-key", ADMIN_KEY,
        "--preset", "lists=bulleted-list=1.5", "--database", f"sqlite:///{home / 'atomsteer.db'}",
    ]  # fmt: skip
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield _url(process, log) + "/v1"
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=60)
    assert code == 0, f"SIGTERM did not stop the server cleanly:\n{log.read_text()}"


def _url(process: subprocess.Popen[bytes], log: Path) -> str:
    for _ in range(START_SECONDS * 5):
        if found := re.search(r"serves .* on (http://\S+)", log.read_text()):
            return found[1]
        if process.poll() is not None:
            break
        try:
            process.wait(0.2)
        except subprocess.TimeoutExpired:
            continue
    raise AssertionError(f"the server did not start:\n{log.read_text()}")
