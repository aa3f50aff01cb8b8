"""The shipped evaluation prompts: complete, disjoint from all that anything was trained or chosen on, reproducible."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from atoms.detectors import DETECTORS
from atoms.errors import DataError
from offline.evaluation.prompts import choose_prompts, demo_data, read_neutral_prompts, read_prompts

FILE = demo_data("evaluation_prompts")
BEHAVIOURS = ("bulleted-list", "numbered-list", "fenced-code", "missing-input", "yes-no")


def words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z0-9]+", text.lower()))


def test_every_cell_has_a_hundred_held_out_prompts() -> None:
    cells = Counter((p.behaviour, p.kind, p.split) for p in read_prompts(FILE))
    assert {b for b, _, _ in cells} == set(BEHAVIOURS) <= set(DETECTORS)
    for behaviour in BEHAVIOURS:
        for kind in ("neutral", "inviting"):
            assert cells[behaviour, kind, "heldout"] >= 100 and cells[behaviour, kind, "dev"] >= 20


def test_no_prompt_occurs_twice() -> None:
    prompts = read_prompts(FILE)
    assert len({words(p.prompt) for p in prompts}) == len(prompts)
    assert len({p.id for p in prompts}) == len(prompts)


def test_prompts_are_new_to_training_naming_and_calibration() -> None:
    """No prompt shares three quarters of its words with a document's prompt, a demo prompt or a neutral prompt."""
    documents = demo_data("demo_documents").read_text(encoding="utf-8").splitlines()
    seen = [m["content"] for line in documents for m in json.loads(line)["messages"] if m["role"] == "user"]
    seen += [p.prompt for p in read_prompts(demo_data("demo_prompts"))] + read_neutral_prompts()
    known = [words(text) for text in seen]
    near = [p.prompt for p in read_prompts(FILE) for mine in [words(p.prompt)]
            if any(len(mine & other) >= 0.75 * len(mine | other) for other in known)]  # fmt: skip
    assert near == []


def test_the_file_is_what_its_generator_writes() -> None:
    spec = importlib.util.spec_from_file_location("make", FILE.with_name("make_evaluation_prompts.py"))
    assert spec is not None and spec.loader is not None
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    assert [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()] == make.rows()
    for behaviour, kind in make.CELLS:  # a topic never serves both for choosing and for reporting
        rows = [row for row in read_prompts(FILE) if (row.behaviour, row.kind) == (behaviour, kind)]
        topics = [topic for _, group in make.CELLS[behaviour, kind] for topic in group if len(topic) > 3]
        for topic in set(topics):
            with_topic = {row.split for row in rows if re.search(rf"\b{re.escape(topic)}\b", row.prompt, re.I)}
            assert len(with_topic) <= 1 or any(topic in other for other in topics if other != topic), topic


def test_a_cell_is_cut_in_file_order() -> None:
    prompts = read_prompts(FILE)
    five = choose_prompts(prompts, "yes-no", "neutral", "dev", 5)
    assert five == choose_prompts(prompts, "yes-no", "neutral", "dev")[:5]
    assert {(p.behaviour, p.kind, p.split) for p in five} == {("yes-no", "neutral", "dev")}


@pytest.mark.parametrize(
    ("change", "named"),
    [({"kind": "warm"}, "'warm'"), ({"split": "test"}, "'test'"), ({"prompt": " "}, "prompt"), ({"extra": 1}, "extra")],
    ids=["kind", "split", "empty", "extra"],
)
def test_a_bad_row_is_named(tmp_path: Path, change: dict, named: str) -> None:
    row = {"id": "x", "behaviour": "yes-no", "kind": "neutral", "split": "dev", "prompt": "Why?"}
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps(row) + "\n" + json.dumps(row | change) + "\n")
    with pytest.raises(DataError, match=r"prompts\.jsonl, line 2") as raised:
        read_prompts(file)
    assert named in str(raised.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.jsonl"):
        read_prompts(tmp_path / "absent.jsonl")
