"""Progress of stages: what is said, what is kept, and when freed memory goes back."""

from __future__ import annotations

import io
import re

import pytest

from offline import progress
from offline.progress import Progress


def test_a_stage_says_how_far_it_is_and_keeps_its_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_LINE_EVERY_SECONDS", 0.0)
    stream = io.StringIO()
    costs = Progress(stream=stream)
    with costs.task("gradients", 3, "documents", done=1) as bar:
        bar.advance(note="loss 2")
        bar.advance()
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("  gradients: 2/3 documents, 0 s left, loss 2")
    assert re.match(r"  gradients: 3/3 documents in \d+\.\d s, loss 2", lines[1])
    assert 0 <= costs.costs["gradients"].seconds < 60 and costs.costs["gradients"].peak_mib > 0


@pytest.mark.parametrize(("seconds", "times"), [(0.0, 4), (3600.0, 2)])
def test_freed_memory_goes_back_before_and_after_a_stage_and_now_and_then(
    monkeypatch: pytest.MonkeyPatch, seconds: float, times: int
) -> None:
    trims: list[None] = []
    monkeypatch.setattr(progress, "trim", lambda: trims.append(None))
    monkeypatch.setattr(progress, "_TRIM_EVERY_SECONDS", seconds)
    with Progress(quiet=True).task("gradients", 2, "documents") as bar:
        bar.advance()
        bar.advance()
    assert len(trims) == times
