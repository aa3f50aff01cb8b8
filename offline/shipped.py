"""Data files that ship with the project: documents and prompts of the demo, of the calibration and of evaluations."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path


def shipped_file(name: str) -> Path:
    """Path of ``offline/data/NAME.jsonl``, such as demo_documents, demo_prompts, evaluation_prompts."""
    return Path(str(resources.files("offline") / "data" / f"{name}.jsonl"))


def read_neutral_prompts() -> list[str]:
    """The neutral prompts of the calibration, in order."""
    lines = shipped_file("neutral_prompts").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines]
