"""Prompts that measurements are made on: reading them, choosing a part of them, and the hash that freezes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from atoms.errors import DataError

KINDS = ("neutral", "inviting")
SPLITS = ("dev", "heldout")


@dataclass(frozen=True, slots=True)
class EvaluationPrompt:
    """A prompt that invites a behaviour or is neutral to it; `split` is dev (for choosing) or heldout (for reporting)."""

    id: str
    behaviour: str
    kind: str
    split: str
    prompt: str

    def __post_init__(self) -> None:
        for field in ("id", "behaviour", "prompt"):
            value = getattr(self, field)
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"{field} is {value!r}; it must be a text")
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}; it must be one of {', '.join(KINDS)}")
        if self.split not in SPLITS:
            raise ValueError(f"split is {self.split!r}; it must be one of {', '.join(SPLITS)}")


def read_prompts(path: Path) -> list[EvaluationPrompt]:
    """Raises DataError naming file and line for a malformed row, and for a prompt that a cell has twice."""
    prompts: dict[tuple[str, str, str], EvaluationPrompt] = {}
    for number, line in enumerate(read_text(path).removesuffix("\n").split("\n"), 1):
        try:
            row = EvaluationPrompt(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{path}, line {number}: {error}; a row needs id, behaviour, kind, split and prompt"
            ) from None
        cell = (row.behaviour, row.kind, row.prompt)
        if (first := prompts.setdefault(cell, row)) is not row:
            raise DataError(
                f"{path}, line {number}: the prompt {row.prompt[:60]!r} is there already as {first.id!r} ({first.split}); "
                f"{row.behaviour} may have each {row.kind} prompt once, or its answers would count twice"
            )
    return list(prompts.values())


def read_text(path: Path) -> str:
    """A whole file. Raises DataError if it cannot be read as UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}; give a UTF-8 file of prompts") from error


def choose_prompts(
    prompts: Sequence[EvaluationPrompt], behaviour: str, kind: str, split: str, most: int | None = None
) -> list[EvaluationPrompt]:
    """The first `most` (None: all) prompts of one cell, in file order."""
    cell = (p for p in prompts if (p.behaviour, p.kind, p.split) == (behaviour, kind, split))
    return list(islice(cell, most))
