"""Thousands of requests made from our own OpenAPI document by schemathesis, against the command with a real (tiny) model.

Valid and invalid bodies, headers, methods and paths: no answer may be a 5xx, and each must be one that the document names.
``ATOMSTEER_TEST_CASES`` is the least number of cases (default 10,000).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import pytest

from atoms.package import Package
from server.embedded.openapi import OPERATIONS
from server.keys import create_key

CASES = int(os.environ.get("ATOMSTEER_TEST_CASES", "10000"))
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
SLOW = "/v1/admin/reload"  # loads a model each time, and reads nothing of the request


@pytest.mark.parametrize("key", ["admin", "client"])
def test_no_request_breaks_the_server(
    tiny_package: Package, tmp_path: Path, serving: Callable[[list[str], Path], AbstractContextManager[str]], key: str
) -> None:
    """As an admin, who reaches all, and as a client."""
    files = {"client": tmp_path / "api.json", "admin": tmp_path / "admin.json"}
    keys = {kind: create_key(file, kind) for kind, file in files.items()}
    options = ["--package", tiny_package.path, "--dtype", "float32", "--api-key-file", files["client"],
               "--admin-key-file", files["admin"], "--max-tokens", "8", "--max-model-len", "256", "--preset", "calm=",
               "--database", f"sqlite:///{tmp_path}/state.db"]  # fmt: skip
    atom = tiny_package.manifest.atoms[0].id
    options[options.index("calm=")] = f"calm={atom}=1"
    each = max(1, CASES // (2 * len(OPERATIONS)))
    log = tmp_path / "log"
    with serving([str(option) for option in options], log) as url:
        command = [
            str(Path(sys.executable).with_name("schemathesis")), "run", f"{url}/openapi.json", "--checks", CHECKS,
            "--header", f"Authorization: Bearer {keys[key]}", "--exclude-path", SLOW, "--max-examples", str(each * 2),
            "--phases", "examples,coverage,fuzzing", "--seed", "1", "--request-timeout", "60", "--no-color",
            "--suppress-health-check", "all", "--continue-on-failure",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert httpx.get(f"{url}/ready").status_code == 200
    report = done.stdout
    print(report[-3000:])
    made = [int(number.replace(",", "")) for number in re.findall(r"([\d,]+) generated", report)]
    assert done.returncode == 0, report[-8000:]
    assert made and max(made) >= CASES // 2, f"only {made} cases were made"
    assert "Traceback" not in log.read_text()
