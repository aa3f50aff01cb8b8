"""Streamed text equals decoding at once, whatever the tokens cut through; stop strings across token boundaries."""

from __future__ import annotations

import copy

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from server.embedded.detokenize import StopMatcher, TextStream, TokenBytes

TEXTS = ("Hello world,\n  two  spaces", "Grüße 👩‍👩‍👧 naïve 日本語 🇩🇪!", "\ttabs ▁ and <0x41> literal", " leading")


@pytest.fixture(scope="module")
def byte_level(smol_tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    return smol_tokenizer


@pytest.fixture(scope="module")
def pieces() -> PreTrainedTokenizerBase:
    """SentencePiece-like, with byte fallback, as Gemma's and Llama 2's."""
    tokens = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁helowrd", "▁hello", "▁world"]
    merges: list[tuple[str, str]] = []
    backend = Tokenizer(
        models.BPE({token: i for i, token in enumerate(tokens)}, merges, unk_token="<unk>", byte_fallback=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")


def _stream(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    text = TextStream(TokenBytes(tokenizer))
    return [*(text.feed(token) for token in ids), text.flush()]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["byte_level", "pieces"])
def test_streamed_text_is_the_text(text: str, kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    if kind == "pieces" and "▁" in text:
        pytest.skip("▁ itself cannot be told from a space in such vocabularies")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    parts = _stream(tokenizer, ids)
    assert "".join(parts) == text == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert not any("\ufffd" in part for part in parts)


def test_an_emoji_comes_whole_or_not_at_all(byte_level: PreTrainedTokenizerBase) -> None:
    ids = byte_level("🦩", add_special_tokens=False)["input_ids"]
    assert len(ids) > 1
    assert _stream(byte_level, ids) == [""] * (len(ids) - 1) + ["🦩", ""]


def test_a_broken_character_is_flushed_as_replacement(byte_level: PreTrainedTokenizerBase) -> None:
    ids = byte_level("a🦩", add_special_tokens=False)["input_ids"][:-1]
    assert "".join(_stream(byte_level, ids)) == "a\ufffd"


def test_special_tokens_have_bytes_but_no_text(byte_level: PreTrainedTokenizerBase) -> None:
    end = byte_level.eos_token_id
    assert _stream(byte_level, [end]) == ["", ""]
    assert TokenBytes(byte_level)[end] == byte_level.eos_token.encode()


def test_added_tokens_of_pieces_have_spaces_as_decoding_has(pieces: PreTrainedTokenizerBase) -> None:
    """Gemma adds its runs of spaces so. A special token is no text, whose name is left as it is."""
    extended = copy.deepcopy(pieces)
    extended.add_tokens([AddedToken("▁▁", normalized=False)])
    extended.add_special_tokens({"eos_token": "<end▁of▁turn>"})
    ids = extended.convert_tokens_to_ids(["▁hello", "▁▁", "▁world"])
    assert "".join(_stream(extended, ids)) == " hello   world" == extended.decode(ids)
    assert TokenBytes(extended)[extended.eos_token_id] == "<end▁of▁turn>".encode()


def test_added_tokens_of_bytes_are_their_own_text(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    """DeepSeek names its tool tokens with ▁, in a vocabulary where that is no space."""
    extended = copy.deepcopy(tiny_tokenizer)
    extended.add_tokens(["<tool▁call>"])
    assert _stream(extended, [extended.convert_tokens_to_ids("<tool▁call>")]) == ["<tool▁call>", ""]


def test_all_tokens_of_the_vocabulary_have_bytes(byte_level: PreTrainedTokenizerBase) -> None:
    table = TokenBytes(byte_level)
    assert all(table[token] for token in range(len(byte_level)))
    assert table[len(byte_level) + 10] == b""


@pytest.mark.parametrize(
    ("include", "expected"), [(False, ["ab", "", "", ""]), (True, ["ab", "", "STOP", ""])], ids=["cut", "included"]
)
def test_a_stop_string_across_pieces(include: bool, expected: list[str]) -> None:
    matcher = StopMatcher(["STOP"], include)
    assert [matcher.feed(part) for part in ("abS", "TO", "Prest", "more")] == expected
    assert matcher.matched == "STOP" and matcher.flush() == ""


def test_a_false_beginning_is_released() -> None:
    matcher = StopMatcher(["\n\nUser:", "xx"], include_stop=False)
    assert matcher.feed("one\n") == "one"
    assert matcher.feed("two\n\nUse") == "\ntwo"
    assert matcher.feed("d x") == "\n\nUsed "
    assert matcher.flush() == "x" and matcher.matched is None


def test_the_earliest_stop_wins() -> None:
    matcher = StopMatcher(["later", "soon"], include_stop=False)
    assert matcher.feed("a soon b later") == "a "
    assert matcher.matched == "soon"
