"""From tokens to text as they come: exact bytes of tokens, whole UTF-8 characters, and stop strings.

Knows a tokenizer and strings; nothing of models, requests or batches. Text is built from the tokens' bytes rather than
by decoding prefixes again and again: no leading space gets lost, and an incomplete character is simply not yet text.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@cache
def _byte_level_alphabet() -> dict[str, int]:
    """Character -> byte of GPT-2's byte-level BPE: printable bytes stand for themselves, the others for U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


class TokenBytes:
    """Exact bytes of every token of one tokenizer.

    Byte-level BPE and SentencePiece-like vocabularies (``▁`` for a space, ``<0xAB>`` for a byte) are read directly; a
    token of any other vocabulary is what decoding adds when it follows itself. Added tokens are their own text, in
    SentencePiece-like vocabularies with a space for ``▁``, too (Gemma adds runs of them); special ones are as written.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._added = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items()}
        self._special = frozenset(tokenizer.all_special_ids)
        decoder = _decoder_types(tokenizer)
        self._byte_level = "ByteLevel" in decoder
        of_pieces = not decoder or bool({"Metaspace", "ByteFallback", "Replace"} & decoder)
        self._pieces = of_pieces and not self._byte_level
        self._known: dict[int, bytes] = {}

    def is_special(self, token: int) -> bool:
        """Whether the token is a control token, whose text does not belong to the answer."""
        return token in self._special

    def __getitem__(self, token: int) -> bytes:
        """Bytes of `token`, of special tokens too; empty for an id that the tokenizer does not know."""
        if token not in self._known:
            self._known[token] = self._read(token)
        return self._known[token]

    def _read(self, token: int) -> bytes:
        if token in self._added:
            spaced = self._pieces and not self.is_special(token)
            return (_with_spaces(self._added[token]) if spaced else self._added[token]).encode()
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(piece, str):
            return b""
        if self._byte_level:
            return bytes(_byte_level_alphabet()[character] for character in piece)
        if self._pieces:
            byte = _BYTE_TOKEN.fullmatch(piece)
            return bytes([int(byte[1], 16)]) if byte else _with_spaces(piece).encode()
        once, twice = (str(self._tokenizer.decode([token] * times)) for times in (1, 2))
        return twice[len(once) :].encode()


def _with_spaces(piece: str) -> str:
    return piece.replace("▁", " ")


def _decoder_types(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Type names in the fast tokenizer's decoder; empty without one (a SentencePiece model read by Python)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return set()
    decoder = json.loads(backend.to_str()).get("decoder") or {"type": "none"}
    return {part["type"] for part in (decoder, *decoder.get("decoders", ()))}


class StopMatcher:
    """Finds the first stop string in a stream of text, and holds back text that may be the beginning of one."""

    def __init__(self, stops: Sequence[str], include_stop: bool) -> None:
        self._stops = tuple(stops)
        self._include = include_stop
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """Text that is certain after `text` was added. After a match: nothing more."""
        if self.matched is not None:
            return ""
        self._held += text
        found = [(start, stop) for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if found:
            start, self.matched = min(found, key=lambda match: match[0])
            end = start + len(self.matched) if self._include else start
            certain, self._held = self._held[:end], ""
            return certain
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return certain

    def flush(self) -> str:
        """The held-back text, at the end of the stream."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)


class TextStream:
    """The text of one sequence as its tokens come. Special tokens have no text."""

    def __init__(self, token_bytes: TokenBytes, stops: Sequence[str] = (), include_stop: bool = False) -> None:
        self._bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = StopMatcher(stops, include_stop)

    @property
    def stop(self) -> str | None:
        """The stop string that ended the text, if one did."""
        return self._stops.matched

    def feed(self, token: int) -> str:
        """Text that became certain with `token`."""
        if self._bytes.is_special(token):
            return ""
        return self._stops.feed(self._utf8.decode(self._bytes[token]))

    def flush(self) -> str:
        """All text held back, at the end of the sequence; the bytes of a broken character become U+FFFD."""
        return self._stops.feed(self._utf8.decode(b"", final=True)) + self._stops.flush()
