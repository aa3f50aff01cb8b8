"""Documents: reading files, tokenising, and planning batches. Knows no model weights.

A document is a chat whose last turn is the response. Accepted rows: ``{"messages": [{"role", "content"}, …]}``,
``{"prompt", "response"}`` (also ``completion`` or ``output``, ``instruction`` with optional ``input``); as JSON lines,
plain or gzipped, or as Parquet. Labels such as ``task`` are never read here.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from atoms.errors import DataError
from atoms.model import encode_prompt, render_response

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_RESPONSE_KEYS = ("response", "completion", "output")
_PROMPT_KEYS = ("prompt", "instruction", "question")
_ROLES = {"system", "user", "assistant", "tool"}


@dataclass(frozen=True, slots=True)
class Document:
    """One chat; the last message is the assistant's response. `row` is its number in the corpus, from 0."""

    row: int
    id: str
    messages: tuple[Mapping[str, str], ...]

    @property
    def prompt(self) -> str:
        return self.messages[-2]["content"]

    @property
    def response(self) -> str:
        return self.messages[-1]["content"]


@dataclass(frozen=True, slots=True)
class EncodedDocument:
    """Token ids; T_i = len(response_ids) response tokens carry the loss."""

    row: int
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True, slots=True)
class Corpus:
    """All documents in file order, the number of bad lines that were skipped, and the hash of their content."""

    documents: tuple[Document, ...]
    skipped: int
    content_hash: str


@dataclass(frozen=True, slots=True)
class EncodedCorpus:
    """Documents as tokens, in the same order; `truncated` prompts were cut from the left."""

    documents: tuple[EncodedDocument, ...]
    truncated: int

    @property
    def tokens(self) -> int:
        return sum(len(document) for document in self.documents)

    @property
    def token_hash(self) -> str:
        """sha256 hex of all token ids: the texts are not all that decides them, but tokenizer and chat template, too."""
        digest = hashlib.sha256()
        for document in self.documents:
            for ids in (document.prompt_ids, document.response_ids):
                digest.update(array("q", (len(ids), *ids)).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Batch:
    """Right-padded tokens of b documents with n label positions in all.

    input_ids, attention_mask (b, t); label_rows, label_columns (n,): the positions whose logits predict `labels` (n,).
    """

    documents: tuple[EncodedDocument, ...]
    input_ids: Tensor
    attention_mask: Tensor
    label_rows: Tensor
    label_columns: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(self.documents, *(tensor.to(device) for tensor in (
            self.input_ids, self.attention_mask, self.label_rows, self.label_columns, self.labels)))  # fmt: skip

    @property
    def response_lengths(self) -> Tensor:
        """T_i, (b,) float32."""
        return torch.tensor([len(d.response_ids) for d in self.documents], dtype=torch.float32,
                            device=self.labels.device)  # fmt: skip


def read_corpus(path: Path, *, skip_bad_lines: bool = False, limit: int | None = None) -> Corpus:
    """Reads documents from JSONL (also .gz) or Parquet.

    Raises DataError naming file and line for a malformed row (unless `skip_bad_lines`, which counts them), and if no
    document is left.
    """
    documents: list[Document] = []
    skipped = 0
    for number, row in read_rows(Path(path)):
        if limit is not None and len(documents) == limit:
            break
        try:
            documents.append(parse_document(row, len(documents), number))
        except DataError as error:
            if not skip_bad_lines:
                raise DataError(
                    f"{path}, line {number}: {error}; mend it, or let `discover` leave such lines out with "
                    "--skip-bad-lines"
                ) from None
            skipped += 1
    if not documents:
        raise DataError(
            f"{path} has no usable document ({skipped} bad lines skipped); give chats or prompt/response pairs"
        )
    digest = hashlib.sha256()
    for document in documents:
        digest.update(json.dumps([document.id, [dict(m) for m in document.messages]]).encode())
    return Corpus(tuple(documents), skipped, digest.hexdigest())


def encode_corpus(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, max_length: int) -> EncodedCorpus:
    """Tokenises every document; a prompt is cut from the left until prompt + response ≤ `max_length` tokens.

    Raises DataError if a response alone leaves no room for a prompt token.
    """
    encoded, truncated = [], 0
    for document in corpus.documents:
        tokens, cut = encode_document(document, tokenizer, max_length)
        encoded.append(tokens)
        truncated += cut > 0
    return EncodedCorpus(tuple(encoded), truncated)


def encode_document(
    document: Document, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[EncodedDocument, int]:
    """The document's tokens, and how many of its prompt were cut. Raises as `encode_corpus` does."""
    prompt = encode_prompt(tokenizer, document.messages[:-1])
    response = tokenizer(render_response(tokenizer, document.messages), add_special_tokens=False)["input_ids"]
    if not prompt or not response:
        raise DataError(
            f"document {document.id!r} has a {'response' if prompt else 'prompt'} of no tokens under the model's chat "
            "template; a loss needs a token to predict and one before it: give it text"
        )
    room = max_length - len(response)
    if room < 1:
        raise DataError(
            f"document {document.id!r} has a response of {len(response)} tokens; at most {max_length - 1} fit beside a "
            "prompt; shorten it, or allow more with --max-length (`evaluate` takes that of the discovery)"
        )
    return EncodedDocument(document.row, tuple(prompt[-room:]), tuple(response)), max(0, len(prompt) - room)


def plan_batches(documents: Sequence[EncodedDocument], max_tokens: int) -> list[tuple[EncodedDocument, ...]]:
    """Groups documents of similar length so that padded tokens per batch stay ≤ `max_tokens`. Longest first."""
    batches: list[tuple[EncodedDocument, ...]] = []
    current: list[EncodedDocument] = []
    for document in sorted(documents, key=lambda d: (-len(d), d.row)):
        if current and len(current[0]) * (len(current) + 1) > max_tokens:
            batches.append(tuple(current))
            current = []
        current.append(document)
    return [*batches, tuple(current)] if current else batches


def make_batches(documents: Sequence[EncodedDocument], max_tokens: int, device: torch.device) -> list[Batch]:
    """The planned batches, padded, on `device`."""
    return [collate(group).to(device) for group in plan_batches(documents, max_tokens)]


def collate(documents: Sequence[EncodedDocument]) -> Batch:
    """Pads on the right, with token 0: under causal attention that changes no earlier position, so no gradient either."""
    width = max(len(document) for document in documents)
    input_ids = torch.zeros((len(documents), width), dtype=torch.long)
    mask = torch.zeros((len(documents), width), dtype=torch.long)
    rows: list[int] = []
    columns: list[int] = []
    labels: list[int] = []
    for i, document in enumerate(documents):
        input_ids[i, : len(document)] = torch.tensor(document.prompt_ids + document.response_ids)
        mask[i, : len(document)] = 1
        first = len(document.prompt_ids) - 1  # the position before a token predicts it
        rows += [i] * len(document.response_ids)
        columns += range(first, first + len(document.response_ids))
        labels += document.response_ids
    return Batch(tuple(documents), input_ids, mask, torch.tensor(rows), torch.tensor(columns), torch.tensor(labels))


def split_held_out(count: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """(training rows, held-out rows), both sorted; no atom is learned from held-out documents, though the mean and the leading
    components that rows are whitened by are those of all. Raises DataError for fewer than two documents."""
    if count < 2:
        raise DataError(
            f"there is {count} document, and discovery keeps some of them apart to check its atoms on; give at least 2, better "
            "some hundreds"
        )
    rows = list(range(count))
    random.Random(seed).shuffle(rows)
    held_out = max(1, round(count * share))
    return sorted(rows[held_out:]), sorted(rows[:held_out])


def sample_documents(documents: Sequence[EncodedDocument], count: int, seed: int) -> list[EncodedDocument]:
    """At most `count` documents, drawn without replacement."""
    if count >= len(documents):
        return list(documents)
    return random.Random(seed).sample(list(documents), count)


def read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(number from 1, row): an object of Parquet, or a line of JSON text as it stands."""
    if not path.is_file():
        raise DataError(f"{path} does not exist or is no file; give JSONL (plain or .gz) or Parquet")
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            yield from enumerate(file, 1)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}; give UTF-8 JSONL, plain or gzipped") from error


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error


def parse_document(row: Any, index: int = 0, number: int = 1) -> Document:
    """The document of a row (an object or its JSON text). Raises DataError, without file and line, if it is none."""
    if isinstance(row, str):
        if not row.strip():
            raise DataError("the line is empty")
        try:
            row = json.loads(row)
        except ValueError as error:
            raise DataError(f"not JSON ({error})") from None
    if not isinstance(row, dict):
        raise DataError(f"a {type(row).__name__} where an object is needed")
    messages = _messages(row["messages"]) if row.get("messages") is not None else _pair(row)
    document = Document(index, str(row.get("id", f"line-{number}")), messages)
    try:
        "".join([document.id, *(message["content"] for message in messages)]).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"no valid text: {error}") from None
    return document


def _messages(value: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or len(value) < 2:
        raise DataError("messages must be a list of at least a user and an assistant turn")
    messages = []
    for message in value:
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise DataError(f"a message needs a role among {', '.join(sorted(_ROLES))}")
        if not isinstance(message.get("content"), str):
            raise DataError("a message needs content that is a string")
        messages.append({"role": message["role"], "content": message["content"]})
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        raise DataError("the last message must be a non-empty assistant turn")
    return tuple(messages)


def _pair(row: Mapping[str, Any]) -> tuple[dict[str, str], ...]:
    prompt = next((row[key] for key in _PROMPT_KEYS if isinstance(row.get(key), str)), None)
    response = next((row[key] for key in _RESPONSE_KEYS if isinstance(row.get(key), str)), None)
    if prompt is None or response is None or not response.strip():
        raise DataError("neither messages nor a prompt with a non-empty response")
    if isinstance(row.get("input"), str) and row["input"].strip():
        prompt = f"{prompt}\n\n{row['input']}"
    return ({"role": "user", "content": prompt}, {"role": "assistant", "content": response})
