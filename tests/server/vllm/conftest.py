"""Versions of the package that the servers' tests use, on its base adapter; and waiting within an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from atoms.package import Package


@pytest.fixture
def negated(package: Package, tmp_path: Path, another_version: Callable[..., Package]) -> Callable[..., Package]:
    """`negated(version, keep=None)`: the package as that version, with its first `keep` atoms turned around."""

    def make(version: str, keep: int | None = None) -> Package:
        return another_version(package, tmp_path / f"version-{version}", version, keep=keep)

    return make


@pytest.fixture(scope="session")
def until() -> Callable[[Callable[[], bool]], Awaitable[None]]:
    """`await until(condition)`: lets the loop run until `condition` is true, for at most 4 s. Raises AssertionError."""

    async def wait(condition: Callable[[], bool]) -> None:
        for _ in range(200):
            if condition():
                return
            await asyncio.sleep(0.02)
        raise AssertionError("it did not come")

    return wait
