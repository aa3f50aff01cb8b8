"""The same through the real `openai` package for Node, where Node is; `make test` installs the package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
NODE_MODULES = HERE.parents[1] / ".cache" / "node" / "node_modules"


@pytest.mark.skipif(shutil.which("node") is None and "CI" not in os.environ, reason="Node is not installed")
def test_the_node_sdk(host: Any, tmp_path: Path) -> None:
    assert NODE_MODULES.is_dir(), "the package is not installed: run the tests through `make`"
    shutil.copy(HERE / "sdk.mjs", tmp_path)
    (tmp_path / "node_modules").symlink_to(NODE_MODULES)
    command = ["node", "sdk.mjs", f"{host.url}/v1", host.key, host.name, host.atom]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["models"] == [host.name, f"{host.name}:strong"]
    assert seen["whole"] and seen["whole"] == seen["streamed"] == seen["accumulated"] == seen["response"]
    assert seen["echo"]["atoms"] == {host.atom: 1.5} and seen["echo"]["mix"] == seen["header"] == seen["firstEcho"]
    assert seen["events"][0] == "response.created" and seen["events"][-1] in (
        "response.completed",
        "response.incomplete",
    )
    assert seen["errors"] == [
        ["NotFoundError", 404, "model_not_found", "model"],
        ["NotFoundError", 404, "atom_not_found", "steering.atoms.nope"],
        ["BadRequestError", 400, "invalid_value", "steering.strength"],
    ]
