"""Reading documents: every accepted form, and every refusal with file and line."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from atoms.errors import DataError
from offline import corpus as corpus_module
from offline.corpus import (
    EncodedCorpus,
    EncodedDocument,
    collate,
    encode_corpus,
    read_corpus,
    sample_documents,
    split_held_out,
)

CHAT = {"id": "one", "task": "secret label", "messages": [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}  # fmt: skip
PAIR = {"prompt": "Two and two?", "response": "Four"}
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write(row, …)`: a JSONL file; texts are written as they are."""

    def make(*rows: object, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return path

    return make


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz"])
def test_chats_and_pairs_are_read_in_order(write: Write, name: str) -> None:
    corpus = read_corpus(write(CHAT, PAIR, name=name))
    assert [d.row for d in corpus.documents] == [0, 1]
    assert [d.id for d in corpus.documents] == ["one", "line-2"]
    assert [(d.prompt, d.response) for d in corpus.documents] == [("Hi", "Hello"), ("Two and two?", "Four")]
    assert len(corpus.documents[0].messages) == 3


def test_parquet_reads_as_the_same_documents(write: Write, tmp_path: Path) -> None:
    rows = [CHAT, {**CHAT, "id": "two"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet")
    assert read_corpus(tmp_path / "data.parquet") == read_corpus(write(*rows))
    mixed = [{"instruction": "Add", "input": "1 2", "output": "3"}, {"instruction": "Say", "input": "", "output": "hi"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(mixed), tmp_path / "mixed.parquet")
    assert [d.prompt for d in read_corpus(tmp_path / "mixed.parquet").documents] == ["Add\n\n1 2", "Say"]


def test_labels_do_not_reach_discovery(write: Write) -> None:
    labelled, plain = read_corpus(write(CHAT)), read_corpus(write({k: v for k, v in CHAT.items() if k != "task"}))
    assert labelled == plain
    assert "secret label" not in repr(labelled)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{not json", "not JSON"),
        ("", "empty"),
        ("[1, 2]", "list where an object"),
        ({"prompt": "no answer"}, "neither messages nor a prompt"),
        ({"prompt": "blank", "response": " "}, "neither messages nor a prompt"),
        ({"messages": []}, "at least a user and an assistant"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]}, "last message"),
        ({"messages": [{"role": "robot", "content": "x"}, {"role": "assistant", "content": "y"}]}, "role among"),
        (
            {"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "y"}]},
            "content that is a string",
        ),
        ('{"prompt": "\\ud800", "response": "x"}', "no valid text"),
    ],
    ids=["json", "empty", "list", "no response", "blank", "no turns", "last turn", "role", "content", "surrogate"],
)
def test_a_bad_line_is_named_or_skipped_and_counted(write: Write, line: object, reason: str) -> None:
    path = write(CHAT, PAIR, line, PAIR)
    with pytest.raises(DataError, match=f"data.jsonl, line 3: .*{reason}.*--skip-bad-lines"):
        read_corpus(path)
    corpus = read_corpus(path, skip_bad_lines=True)
    assert (len(corpus.documents), corpus.skipped) == (3, 1)
    assert [d.row for d in corpus.documents] == [0, 1, 2], "rows must stay dense when lines are skipped"


def test_nothing_left_is_an_error_with_the_count(write: Write) -> None:
    with pytest.raises(DataError, match="no usable document"):
        read_corpus(write())
    with pytest.raises(DataError, match="2 bad lines"):
        read_corpus(write("x", "y"), skip_bad_lines=True)


def test_files_that_cannot_be_read_are_named(tmp_path: Path, write: Write) -> None:
    with pytest.raises(DataError, match="absent.jsonl"):
        read_corpus(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match="latin.jsonl"):
        (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9", "response": "x"}\n')
        read_corpus(tmp_path / "latin.jsonl")
    with pytest.raises(DataError, match="data.parquet"):
        read_corpus(write("no parquet", name="data.parquet"))


@pytest.mark.parametrize("damage", ["truncated", "edited", "not gzip"])
def test_a_damaged_gzip_file_is_named(write: Write, damage: str) -> None:
    path = write(
        *({"prompt": str(random.Random(n).random()), "response": "x"} for n in range(200)), name="data.jsonl.gz"
    )
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes({
        "truncated": whole[:middle],
        "edited": whole[:middle] + bytes(255 - b for b in whole[middle : middle + 40]) + whole[middle + 40 :],
        "not gzip": b"plain text\n",
    }[damage])  # fmt: skip
    with pytest.raises(DataError, match="data.jsonl.gz"):
        read_corpus(path)


def test_limit_reads_no_further(write: Write) -> None:
    assert len(read_corpus(write(CHAT, PAIR, "broken"), limit=2).documents) == 2


def test_the_content_hash_sees_texts_and_order_alone(write: Write) -> None:
    first = read_corpus(write(CHAT, PAIR)).content_hash
    assert read_corpus(write(CHAT, PAIR, name="b.jsonl.gz")).content_hash == first
    assert read_corpus(write(PAIR, CHAT)).content_hash != first
    assert read_corpus(write(CHAT, {**PAIR, "response": "Five"})).content_hash != first


def test_a_response_ends_with_the_end_of_turn_and_follows_the_served_prompt(write: Write, tiny_tokenizer) -> None:
    document = encode_corpus(read_corpus(write(CHAT)), tiny_tokenizer, 512).documents[0]
    assert tiny_tokenizer.decode(document.prompt_ids).endswith("<|im_start|>assistant\n")
    assert tiny_tokenizer.decode(document.response_ids) == "Hello<|im_end|>"


def test_a_tokenizer_without_template_still_ends_the_response(write: Write, tiny_tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(tiny_tokenizer, "chat_template", None)
    document = encode_corpus(read_corpus(write(PAIR)), tiny_tokenizer, 512).documents[0]
    assert tiny_tokenizer.decode(document.prompt_ids + document.response_ids) == "Two and two?\n\nFour<|im_end|>"


def test_long_prompts_are_cut_on_the_left_and_counted(write: Write, tiny_tokenizer) -> None:
    corpus = read_corpus(write({"prompt": "start " + "word " * 200 + "end", "response": "yes"}, PAIR))
    whole = encode_corpus(corpus, tiny_tokenizer, 4096)
    cut = encode_corpus(corpus, tiny_tokenizer, 64)
    assert (whole.truncated, cut.truncated) == (0, 1)
    long, kept = whole.documents[0], cut.documents[0]
    assert len(kept) == 64
    assert kept.response_ids == long.response_ids and kept.prompt_ids == long.prompt_ids[-len(kept.prompt_ids) :]
    assert cut.documents[1] == whole.documents[1]


def test_a_response_that_leaves_no_room_is_named_with_lengths(write: Write, tiny_tokenizer) -> None:
    corpus = read_corpus(write({"id": "novel", "prompt": "x", "response": "long " * 100}))
    with pytest.raises(DataError, match="'novel'.*at most 31.*--max-length"):
        encode_corpus(corpus, tiny_tokenizer, 32)


@pytest.mark.parametrize("empty", ["prompt", "response"])
def test_what_is_of_no_tokens_is_named(write: Write, tiny_tokenizer, monkeypatch, empty: str) -> None:
    function = {"prompt": "encode_prompt", "response": "render_response"}[empty]
    monkeypatch.setattr(corpus_module, function, lambda *_: [] if empty == "prompt" else "")
    with pytest.raises(DataError, match=f"{empty} of no tokens"):
        encode_corpus(read_corpus(write(PAIR)), tiny_tokenizer, 64)


def test_the_token_hash_tells_where_a_prompt_ends(write: Write, tiny_tokenizer) -> None:
    (whole,) = (encoded := encode_corpus(read_corpus(write(PAIR)), tiny_tokenizer, 64)).documents
    moved = EncodedDocument(0, whole.prompt_ids[:-1], whole.prompt_ids[-1:] + whole.response_ids)
    assert encoded.token_hash == EncodedCorpus((whole,), 1).token_hash != EncodedCorpus((moved,), 0).token_hash


def test_one_document_is_too_few() -> None:
    with pytest.raises(DataError, match="there is 1 document"):
        split_held_out(1, 0.15, 0)


def test_labels_sit_one_position_before_their_tokens(write: Write, tiny_tokenizer) -> None:
    documents = encode_corpus(read_corpus(write(CHAT, PAIR)), tiny_tokenizer, 512).documents
    batch = collate(documents)
    for row, column, label in zip(batch.label_rows, batch.label_columns, batch.labels, strict=True):
        assert batch.input_ids[row, column + 1] == label
    assert len(batch.labels) == sum(len(d.response_ids) for d in documents)
    assert batch.attention_mask.sum(1).tolist() == [len(d) for d in documents]


def test_the_held_out_split_is_a_seeded_partition() -> None:
    training, held_out = split_held_out(100, 0.15, 0)
    assert sorted(training + held_out) == list(range(100)) and len(held_out) == 15
    assert split_held_out(100, 0.15, 0) == (training, held_out) != split_held_out(100, 0.15, 1)


def test_samples_are_drawn_without_repeats(write: Write, tiny_tokenizer) -> None:
    documents = encode_corpus(read_corpus(write(*[PAIR] * 10)), tiny_tokenizer, 512).documents
    assert len({d.row for d in sample_documents(documents, 4, 0)}) == 4
    assert sample_documents(documents, 99, 0) == list(documents)
