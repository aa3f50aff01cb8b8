"""Runs the Python and shell blocks of docs/recipes.md against the real server."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

RECIPES = Path(__file__).parents[2] / "docs" / "recipes.md"
RUN = {"python": [sys.executable, "-c"], "sh": ["sh", "-c"]}
BLOCKS = [
    (token.info, token.content)
    for token in MarkdownIt().parse(RECIPES.read_text())
    if token.type == "fence" and token.info in RUN
]


def test_the_page_has_its_blocks() -> None:
    assert [language for language, _ in BLOCKS].count("python") == 4 and len(BLOCKS) == 6


@pytest.mark.parametrize("place", range(len(BLOCKS)))
def test_a_recipe_runs_as_it_is_written(real_server: str, place: int) -> None:
    language, code = BLOCKS[place]
    environment = {**os.environ, "ATOMSTEER_BASE_URL": real_server}
    done = subprocess.run([*RUN[language], code], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    if language == "sh":
        assert '"predicted_kl"' in done.stdout
