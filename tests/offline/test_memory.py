"""Freed blocks go back to the system."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from offline.memory import unbounded_environment

FREES = """
import ctypes, json, sys
from pathlib import Path
import torch
from offline.memory import return_freed_memory, trim

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))

obeyed = return_freed_memory() if sys.argv[1] == "returned" else None
for _ in range(3):
    torch.ones(2**22)  # 16 MiB: freeing it makes glibc serve the next ones from its heap
before = anonymous()
held, pins = [], []
for _ in range(40):
    held.append(torch.ones(3 * 2**20))  # 12 MiB
    pins.append(torch.ones(2**17))  # 512 KiB: more than any hole that the imports left, so it lies behind the block
held.clear()
if sys.argv[1] == "trimmed":
    trim()
print(json.dumps([obeyed, anonymous() - before - 40 * 512]))
"""


KERNELS = """
import json, sys
from pathlib import Path
import torch
from offline.memory import bound_kernel_caches, trim

def anonymous():
    trim()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))

if sys.argv[1] == "bounded":
    bound_kernel_caches()
weight = torch.ones(64, 64)
multiply = lambda rows: torch.ops.mkldnn._linear_pointwise(torch.ones(rows, 64), weight, None, "none", [], "")
multiply(32)
before = anonymous()
for rows in range(33, 433):
    multiply(rows)
print(json.dumps(anonymous() - before))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="torch without oneDNN")
def test_kernels_of_past_shapes_are_let_go() -> None:
    def run(mode: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", KERNELS, mode], capture_output=True, text=True, check=True,
            env=unbounded_environment(),  # a discovery in this process has bounded them
        )  # fmt: skip
        return json.loads(done.stdout)

    kept = run("kept")
    if kept < 16 * 1024:
        pytest.skip("no kernel is made for a shape here")
    assert run("bounded") < kept / 3


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_freed_blocks_go_back_though_small_ones_lie_among_them() -> None:
    def run(mode: str) -> tuple[bool | None, int]:
        done = subprocess.run([sys.executable, "-c", FREES, mode], capture_output=True, text=True, check=True)
        obeyed, kib = json.loads(done.stdout)
        return obeyed, kib

    _, kept = run("kept")
    obeyed, left = run("returned")
    if not obeyed:
        pytest.skip("no glibc")
    assert kept > 100 * 1024, "glibc gives these back by itself now: is the call still needed?"
    assert left < 8 * 1024
    assert run("trimmed")[1] < 8 * 1024


def test_the_environment_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    from offline.memory import return_freed_memory

    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "33554432")
    assert return_freed_memory() is False
