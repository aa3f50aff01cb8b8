"""A real server on the real model, started once for all tests of clients; and the command in this process."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from atoms.package import Package
from clients.cli import main

ADMIN_KEY = "admin-key-of-the-tests"
Serving = Callable[[list[str], Path], AbstractContextManager[str]]


@pytest.fixture(scope="session")
def named_package(real_package: Package, tmp_path_factory: pytest.TempPathFactory) -> Package:
    """The real package under the name that the documentation uses, its atoms called as the documentation calls them."""
    path = tmp_path_factory.mktemp("named") / "package"
    shutil.copytree(real_package.path, path)
    package = Package.read(path)
    for card, alias in zip(package.manifest.atoms, ("numbered-list", "one-word"), strict=False):
        package = package.relabel(card.id, alias)
    return package


@pytest.fixture(scope="session")
def real_server(
    named_package: Package, smol_path: Path, tmp_path_factory: pytest.TempPathFactory, serving: Serving
) -> Iterator[str]:
    """The URL, with /v1, of `atomsteer serve` with an admin key; its model is called ``demo``."""
    home = tmp_path_factory.mktemp("serve")
    options = [
        "--package", str(named_package.path), "--model", str(smol_path), "--dtype", "float32", "--served-model-name", "demo", "--admin-key", ADMIN_KEY,
        "--preset", "lists=numbered-list=1.5", "--database", f"sqlite:///{home / 'atomsteer.db'}",
    ]  # fmt: skip
    with serving(options, home / "log") as url:
        yield url + "/v1"


@pytest.fixture
def package(tiny_package: Package, tmp_path: Path) -> Package:
    shutil.copytree(tiny_package.path, tmp_path / "package")
    return Package.read(tmp_path / "package")


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`cli("inspect", path)`: exit status, standard output, standard error of the command."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["atomsteer", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_status:
            main()
        output = capsys.readouterr()
        return int(exit_status.value.code or 0), output.out, output.err

    return run
