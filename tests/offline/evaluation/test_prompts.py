"""The shipped evaluation prompts: complete, disjoint from all that anything was trained or chosen on, reproducible."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from types import ModuleType

import pytest

from atoms.detectors import DETECTORS
from atoms.errors import DataError
from atoms.storage import sha256_file
from offline.evaluation.prompts import choose_prompts, read_prompts
from offline.shipped import read_neutral_prompts, shipped_file

FILES = tuple(shipped_file(f"evaluation_prompts{end}") for end in ("", "_2", "_3", "_4"))
FROZEN = {
    "evaluation_prompts": "02b2b35106998b5dfef9d5f4ba91781996a86ec4bc08ad4efbbb7a3195525e09",
    "evaluation_prompts_2": "e20105b25e567931975b5c0811810040de75e66e9e97de9e667c1ff03fe7f0ef",
    "evaluation_prompts_3": "5f54aec8bb2091c6f1b2703b94730c05405f53ce9ae6c49cff8b54e8a4f2adc0",
    "evaluation_prompts_4": "8423f3ee5d945be70a61a260c5108eaf0293ec62fdcf8ab86d639c75b5727c0f",
}
BEHAVIOURS = ("bulleted-list", "numbered-list", "fenced-code", "missing-input", "yes-no")


def words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z0-9]+", text.lower()))


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def file(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_the_prompts_are_those_that_were_reported_on(file: Path) -> None:
    assert sha256_file(file) == FROZEN[file.stem], "other prompts need another file: reports name these by their hash"


def test_every_cell_has_a_hundred_held_out_prompts(file: Path) -> None:
    cells = Counter((p.behaviour, p.kind, p.split) for p in read_prompts(file))
    assert {b for b, _, _ in cells} == set(BEHAVIOURS) <= set(DETECTORS)
    for behaviour in BEHAVIOURS:
        for kind in ("neutral", "inviting"):
            assert cells[behaviour, kind, "heldout"] >= 100 and cells[behaviour, kind, "dev"] >= 20


def test_no_prompt_occurs_twice() -> None:
    """All files have the first one's development prompts, and none another's held-out ones."""
    first, *others = (read_prompts(file) for file in FILES)
    dev = [p for p in first if p.split == "dev"]
    prompts = [*first]
    for other in others:
        assert [p for p in other if p.split == "dev"] == dev
        prompts += [p for p in other if p.split == "heldout"]
    assert len({words(p.prompt) for p in prompts}) == len({p.id for p in prompts}) == len(prompts)


def test_prompts_are_new_to_training_naming_and_calibration(file: Path) -> None:
    """No prompt shares three quarters of its words with a document's prompt, a demo prompt or a neutral prompt."""
    documents = shipped_file("demo_documents").read_text(encoding="utf-8").splitlines()
    seen = [m["content"] for line in documents for m in json.loads(line)["messages"] if m["role"] == "user"]
    seen += [p.prompt for p in read_prompts(shipped_file("demo_prompts"))] + read_neutral_prompts()
    known = [words(text) for text in seen]
    near = [p.prompt for p in read_prompts(file) for mine in [words(p.prompt)]
            if any(len(mine & other) >= 0.75 * len(mine | other) for other in known)]  # fmt: skip
    assert near == []


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make", FILES[0].with_name("make_evaluation_prompts.py"))
    assert spec is not None and spec.loader is not None
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    return make


def test_the_files_are_what_their_generator_writes(generator: ModuleType) -> None:
    made = generator.files()
    assert set(made) == {file.name for file in FILES}
    for file in FILES:
        assert [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] == made[file.name]


def test_a_topic_is_in_one_file(generator: ModuleType) -> None:
    every = [generator.read_topics(name) for name in generator.FILES.values()]
    for group in every[0]:
        topics = Counter(topic.lower() for named in every for topic in named[group])
        assert [topic for topic, times in topics.items() if times > 1] == [], group


def test_a_topic_serves_in_one_split_of_one_file(generator: ModuleType) -> None:
    """So what was seen of one split says nothing about another, but for the form of its questions."""
    every = [generator.read_topics(name) for name in generator.FILES.values()]
    splits = defaultdict(list)
    for file in FILES:
        for p in read_prompts(file):
            splits["dev" if p.split == "dev" else file.stem].append(p)
    for behaviour, kind in generator.CELLS:
        topics = {topic for _, group in generator.CELLS[behaviour, kind] for named in every for topic in named[group]}
        for topic in (topic for topic in topics if len(topic) > 3):
            whole = re.compile(rf"\b{re.escape(topic)}\b", re.IGNORECASE)
            found = {split for split, prompts in splits.items() for p in prompts
                     if (p.behaviour, p.kind) == (behaviour, kind) and whole.search(p.prompt)}  # fmt: skip
            assert len(found) <= 1 or any(topic.lower() in other.lower() for other in topics if other != topic), topic


def test_a_cell_is_cut_in_file_order() -> None:
    prompts = read_prompts(FILES[0])
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


@pytest.mark.parametrize("split", ["dev", "heldout"])
def test_a_prompt_may_stand_once_in_a_cell_and_in_one_split(tmp_path: Path, split: str) -> None:
    row = {"id": "x", "behaviour": "yes-no", "kind": "neutral", "split": "dev", "prompt": "Why?"}
    other = row | {"id": "y", "kind": "inviting"}
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in (row, other, row | {"id": "z", "split": split})))
    with pytest.raises(DataError, match=r"line 3: the prompt 'Why\?' is there already as 'x' \(dev\)"):
        read_prompts(file)


def test_a_line_ends_where_json_lines_end(tmp_path: Path) -> None:
    row = {"id": "x", "behaviour": "yes-no", "kind": "neutral", "split": "dev", "prompt": "One\u2028two\u0085three?"}
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        json.dumps(row, ensure_ascii=False) + "\r\n" + json.dumps(row | {"prompt": "Why?"}) + "\n", encoding="utf-8"
    )
    assert [p.prompt for p in read_prompts(file)] == [row["prompt"], "Why?"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.jsonl"):
        read_prompts(tmp_path / "absent.jsonl")
