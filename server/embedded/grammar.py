"""Grammars: compiled for one tokenizer by llguidance, then followed token by token.

Knows llguidance, a tokenizer's bytes and token ids; nothing of requests, models or sampling. llguidance either holds an
answer to the whole grammar or refuses the grammar with the reason; its bounds on size, lexer and parser stay in force
while an answer is generated.
"""

from __future__ import annotations

import copy
import json
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from atoms.engine import Grammar
from atoms.errors import ConfigError, GrammarError
from server.embedded.detokenize import TokenBytes

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer
    from transformers import PreTrainedTokenizerBase

_WHITESPACE = r"[ ]|\n[ ]{0,20}"
"""Between JSON's tokens: one space, or a line break with indentation. Weak models fill an answer with blanks if they may."""
_JSON_OPTIONS: Any = {
    "whitespace_pattern": _WHITESPACE,
    "whitespace_flexible": True,
    "item_separator": ",",
    "key_separator": ":",
    "lenient": False,
    "coerce_one_of": False,
}
"""All that a schema's own ``x-guidance`` could change: none may loosen what the schema says."""
_MAX_LEXER_STATES = 50_000  # 1-2 kB each
_LONGEST_REASON = 300


class GrammarCompiler:
    """Compiles grammars for one tokenizer, whose tokens are 0 to `vocabulary` - 1, and keeps the `keep` latest used.

    Safe to call from any thread. The first call prepares the tokenizer, which takes a second or so.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        token_bytes: TokenBytes,
        vocabulary: int,
        end_tokens: frozenset[int],
        keep: int = 64,
    ) -> None:
        self._tokenizer = tokenizer
        self._token_bytes = token_bytes
        self._vocabulary = vocabulary
        self._end_tokens = end_tokens
        self._keep = keep
        self._prepared: LLTokenizer | None = None
        self._preparing = threading.Lock()
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()  # never advanced; the latest used last
        self._lock = threading.Lock()  # guards _compiled

    def matcher(self, grammar: Grammar) -> GrammarMatcher:
        """A matcher at the beginning of `grammar`.

        Raises GrammarError if it cannot be compiled, ConfigError if the tokenizer cannot be used for grammars.
        """
        with self._lock:
            compiled = self._compiled.get(grammar)
        if compiled is None:
            compiled = self._compile(grammar)
        with self._lock:
            self._compiled[grammar] = compiled
            self._compiled.move_to_end(grammar)
            while len(self._compiled) > self._keep:
                self._compiled.popitem(last=False)
            return GrammarMatcher(compiled.deep_copy())

    def _compile(self, grammar: Grammar) -> LLMatcher:
        from llguidance import LLMatcher

        matcher = LLMatcher(self._ll_tokenizer(), _source(grammar), log_level=0, limits=_limits())
        _raise_error_of(matcher)
        matcher.compute_bitmask()  # some grammars, such as one that only refers to itself, fail at their first token
        _raise_error_of(matcher)
        return matcher

    def _ll_tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer, TokenizerWrapper

        with self._preparing:
            if self._prepared is None:
                vocabulary = _Vocabulary(self._tokenizer, self._token_bytes, self._vocabulary, self._end_tokens)
                self._prepared = LLTokenizer(
                    TokenizerWrapper(vocabulary), n_vocab=self._vocabulary, eos_token=sorted(self._end_tokens)
                )
            return self._prepared


class GrammarMatcher:
    """Follows one sequence through a compiled grammar; implements `sampling.TokenMatcher`. Not thread-safe."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def complete(self) -> bool:
        return self._matcher.is_stopped()

    def allowed(self, size: int) -> Tensor:
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        _raise_error_of(self._matcher)
        allowed = np.zeros(size, dtype=bool)
        known = min(size, 8 * len(bits))
        allowed[:known] = np.unpackbits(bits, count=known, bitorder="little")
        return torch.from_numpy(allowed)

    def accept(self, token: int) -> None:
        if not self._matcher.consume_token(token):
            _raise_error_of(self._matcher)


class _Vocabulary:
    """What llguidance asks of a tokenizer: the bytes of every token, and the usual tokens of a text that is forced."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, token_bytes: TokenBytes, size: int, end_tokens: frozenset[int]
    ) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or not end_tokens:
            lacks = "a fast tokenizer" if end_tokens else "an end-of-sequence token"
            raise ConfigError(f"this model has not {lacks}, which structured output needs; ask for plain text")
        self._backend = copy.deepcopy(backend)  # the engine's own is used by other threads
        self.eos_token_id = min(end_tokens)
        self.bos_token_id = None
        self.tokens = [token_bytes[token] for token in range(size)]
        self.special_token_ids = [token for token in range(size) if token_bytes.is_special(token)]

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids


def _source(grammar: Grammar) -> str:
    """`grammar` in llguidance's form. Raises GrammarError."""
    from llguidance import LLMatcher

    try:
        if grammar.kind == "regex":
            return LLMatcher.grammar_from_regex(grammar.text)
        if grammar.kind == "choice":
            texts = (json.dumps(text, ensure_ascii=False) for text in json.loads(grammar.text))
            return LLMatcher.grammar_from_lark(f"start: {' | '.join(texts)}")
        return LLMatcher.grammar_from_json_schema(grammar.text, overrides=_JSON_OPTIONS)
    except ValueError as error:  # no JSON, nested too deeply, or a text that is no UTF-8
        raise GrammarError(f"the grammar cannot be read: {_one_line(str(error))}") from error


def _limits() -> LLParserLimits:
    from llguidance import LLParserLimits

    return LLParserLimits(max_lexer_states=_MAX_LEXER_STATES, verbose_errors=False)


def _raise_error_of(matcher: LLMatcher) -> None:
    if error := matcher.get_error():
        raise GrammarError(f"the grammar cannot be followed: {_one_line(error)}")


def _one_line(reason: str) -> str:
    """`reason` with its line breaks and llguidance's own remarks taken out, cut to a readable length."""
    line = " ".join(reason.replace("<non-verbose/>", "").split())
    return line if len(line) <= _LONGEST_REASON else f"{line[: _LONGEST_REASON - 3]}..."
