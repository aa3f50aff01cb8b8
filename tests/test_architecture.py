"""What may be imported from where, and at what cost."""

from __future__ import annotations

import importlib
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("atoms", "offline", "server", "clients")


@pytest.mark.parametrize("name", PACKAGES)
def test_packages_come_from_this_distribution(name: str) -> None:
    """Their names are plain, so another distribution could shadow them."""
    assert set(metadata.packages_distributions()[name]) == {"atomsteer"}, f"another distribution also provides {name}"
    assert Path(str(importlib.import_module(name).__file__)).parent == ROOT / name


def loaded_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*sys.modules)"
    return set(
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    )


def test_the_command_line_answers_without_loading_torch() -> None:
    code = "from typer.testing import CliRunner; from clients.cli import app; assert 'discover' in CliRunner().invoke(app, ['--help']).output"
    heavy = {"torch", "transformers", "peft", "fastapi", "openai"} & loaded_after(code)
    assert not heavy, f"`atomsteer --help` loads {heavy}: a command imports it at the top"


def test_the_shared_core_needs_no_host() -> None:
    code = "import atoms.package, atoms.steered, atoms.mix, atoms.projection, atoms.detectors, atoms.engine"
    assert not {"transformers", "peft", "fastapi", "uvicorn", "offline", "server", "clients"} & loaded_after(code)
