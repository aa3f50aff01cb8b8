"""Versions of the package that the servers' tests use, on its base adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from atoms.package import Package


@pytest.fixture
def negated(package: Package, tmp_path: Path, another_version: Callable[..., Package]) -> Callable[..., Package]:
    """`negated(version, keep=None)`: the package as that version, with its first `keep` atoms turned around."""

    def make(version: str, keep: int | None = None) -> Package:
        return another_version(package, tmp_path / f"version-{version}", version, keep=keep)

    return make
