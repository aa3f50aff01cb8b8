"""Grammars on the real tokenizer: what is compiled and refused, what may come next, and what is kept."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
import torch
from jsonschema import validate
from transformers import PreTrainedTokenizerBase

from atoms.engine import Grammar, SamplingParams
from atoms.errors import ConfigError, GrammarError
from server.embedded import grammar as grammar_module
from server.embedded.detokenize import TokenBytes
from server.embedded.grammar import GrammarCompiler
from server.embedded.sampling import TokenSampler, sample_rows

VOCABULARY = 49152
END = frozenset({2})
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def schema(value: object) -> Grammar:
    return Grammar("json_schema", json.dumps(value))


@pytest.fixture(scope="module")
def compiler(smol_tokenizer: PreTrainedTokenizerBase) -> GrammarCompiler:
    return GrammarCompiler(smol_tokenizer, TokenBytes(smol_tokenizer), VOCABULARY, END, keep=3)


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        (Grammar("choice", '["yes","no"]'), ["yes", "no"], ["ye", "yesno", "maybe", ""]),
        (Grammar("choice", '["yes","yes please"]'), ["yes", "yes please"], ["yes p"]),
        (Grammar("choice", json.dumps(['a "b" \\ \n c'])), ['a "b" \\ \n c'], ["a b"]),
        (Grammar("regex", r"\d{3}-[a-c]+"), ["123-abc"], ["12-a", "123-", "123-d"]),
        (Grammar("regex", "(?i)yes"), ["YES", "yes"], ["no"]),
        (schema({"type": "array", "items": {"type": "integer"}}), ["[]", "[1, 2]", "[1,2]", "[\n  1\n]"], ["[1", "[a]"]),
        (schema({"const": {"a": None}}), ['{"a":null}'], ["{}"]),
    ],
)  # fmt: skip
def test_an_answer_matches_from_its_first_token_to_its_last(
    compiler: GrammarCompiler, grammar: Grammar, good: list[str], bad: list[str]
) -> None:
    assert [text for text in good if not _reachable(compiler, grammar, text)] == []
    assert [text for text in bad if _reachable(compiler, grammar, text)] == []


def _reachable(compiler: GrammarCompiler, grammar: Grammar, text: str) -> bool:
    """Whether some sequence of allowed tokens spells `text` and may end there: a search over all of them."""
    bytes_of, goal = compiler._token_bytes, text.encode()

    def search(path: tuple[int, ...], done: bytes) -> bool:
        matcher = compiler.matcher(grammar)
        for token in path:
            matcher.accept(token)
        if done == goal and (matcher.complete or matcher.allowed(VOCABULARY)[2]):
            return True
        if matcher.complete:
            return False
        allowed = matcher.allowed(VOCABULARY).nonzero().flatten().tolist()
        fits = [t for t in allowed if t not in END and bytes_of[t] and goal[len(done) :].startswith(bytes_of[t])]
        return any(
            search((*path, token), done + bytes_of[token]) for token in sorted(fits, key=lambda t: -len(bytes_of[t]))
        )

    return search((), b"")


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (schema({"not": {"type": "string"}}), "not"),
        (schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (schema({"type": "objekt"}), "objekt"),
        (schema({"type": "integer", "minimum": 5, "maximum": 3}), "minimum"),
        (schema({"type": "string", "format": "colour"}), "colour"),
        (schema({"$ref": "file:///etc/passwd"}), "not fetch"),
        (schema({"$ref": "http://127.0.0.1:1/schema"}), "not fetch"),
        (schema({"oneOf": [{"type": "integer", "minimum": 1}, {"type": "integer", "maximum": 5}]}), "oneOf"),
        (schema({"x-guidance": {"lenient": True}, "not": {}}), "not"),
        (Grammar("json_schema", '{"items":' * 300 + "{}" + "}" * 300), "recursion"),
        (Grammar("regex", "(a"), "unclosed"),
        (Grammar("regex", r"(a)\1"), "backreferences"),
        (Grammar("regex", "\ud800"), "surrogates"),
        (Grammar("choice", '["\\ud800"]'), "surrogates"),
    ],
)
def test_what_cannot_be_held_to_is_refused_with_the_reason(
    compiler: GrammarCompiler, grammar: Grammar, reason: str
) -> None:
    with pytest.raises(GrammarError, match=reason) as caught:
        compiler.matcher(grammar)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_a_schemas_own_options_loosen_nothing(compiler: GrammarCompiler) -> None:
    loose = {"x-guidance": {"whitespace_pattern": "x*"}, "type": "array", "items": {"type": "integer"}}
    assert not _reachable(compiler, schema(loose), "[x1]")
    assert _reachable(compiler, schema(loose), "[ 1]")


def test_blanks_cannot_fill_an_answer(compiler: GrammarCompiler) -> None:
    any_array = schema({"type": "array"})
    assert _reachable(compiler, any_array, "[\n    1]")
    assert not _reachable(compiler, any_array, "[  1]")
    assert not _reachable(compiler, any_array, "[\n\n1]")
    assert not _reachable(compiler, any_array, "\n[]")


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
def test_random_logits_give_answers_that_validate(
    compiler: GrammarCompiler, smol_tokenizer: PreTrainedTokenizerBase, temperature: float
) -> None:
    """The model has no say here, so only the mask can make this valid JSON of the schema. Penalties pull against it."""
    generator = torch.Generator().manual_seed(0)
    bytes_of = TokenBytes(smol_tokenizer)
    for seed in range(3):
        params = SamplingParams(temperature=temperature, seed=seed, grammar=schema(PERSON), frequency_penalty=2.0,
                                repetition_penalty=0.5, logit_bias=((5, 100.0),), top_p=0.9, min_p=0.01)  # fmt: skip
        sampler = TokenSampler(params, (1,), compiler.matcher(schema(PERSON)))
        assert not sampler.is_plain_greedy
        text = b""
        for _ in range(400):
            (token,) = sample_rows(torch.randn((1, VOCABULARY), generator=generator), [sampler])
            assert isinstance(token, int), token
            text += bytes_of[token] if token not in END else b""
            if sampler.complete:
                break
        validate(json.loads(text), PERSON)


def test_a_greedy_row_without_grammar_is_still_the_argmax(compiler: GrammarCompiler) -> None:
    logits = torch.randn((3, VOCABULARY), generator=torch.Generator().manual_seed(1))
    greedy = SamplingParams(temperature=0)
    yes = Grammar("choice", '["yes"]')
    constrained = TokenSampler(SamplingParams(temperature=0, grammar=yes), (1,), compiler.matcher(yes))
    tokens = sample_rows(logits, [TokenSampler(greedy, (1,)), constrained, TokenSampler(greedy, (1,))])
    assert (tokens[0], tokens[2]) == (int(logits[0].argmax()), int(logits[2].argmax()))
    allowed = compiler.matcher(yes).allowed(VOCABULARY)
    assert tokens[1] == int(logits[1].masked_fill(~allowed, -torch.inf).argmax())


def test_rows_beyond_the_tokenizers_vocabulary_are_never_allowed(compiler: GrammarCompiler) -> None:
    matcher = compiler.matcher(Grammar("regex", "(?s:.*)"))
    assert matcher.allowed(VOCABULARY + 100)[VOCABULARY:].sum() == 0
    assert matcher.allowed(VOCABULARY)[:].sum() > VOCABULARY / 2


def test_a_grammar_that_grows_without_bound_ends_its_row_alone(compiler: GrammarCompiler) -> None:
    hostile = Grammar("regex", "((a{1,500}){1,500}){1,500}")
    greedy = SamplingParams(temperature=0)
    params = SamplingParams(seed=0, grammar=hostile, logit_bias=((2, -1e4),))  # no early end
    sampler = TokenSampler(params, (1,), compiler.matcher(hostile))
    for _ in range(100):
        result, other = sample_rows(torch.zeros((2, VOCABULARY)), [sampler, TokenSampler(greedy, (1,))])
        assert other == 0
        if isinstance(result, Exception):
            break
    assert isinstance(result, GrammarError), "the grammar was followed to its end; find a worse one"


def test_the_latest_grammars_are_kept_and_copies_are_independent(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    source = grammar_module._source
    monkeypatch.setattr(grammar_module, "_source", lambda grammar: compiled.append(grammar.text) or source(grammar))
    one, *others = (Grammar("regex", f"kept{n}a*") for n in range(4))
    first, second = compiler.matcher(one), compiler.matcher(one)
    while not first.allowed(VOCABULARY)[2]:
        first.accept(int(first.allowed(VOCABULARY).nonzero()[0]))
    assert not second.allowed(VOCABULARY)[2]
    assert not compiler.matcher(one).allowed(VOCABULARY)[2], "a matcher advanced the grammar that is kept"
    for other in others[:2]:
        compiler.matcher(other)
    compiler.matcher(one)
    compiler.matcher(others[2])  # drops the one used longest ago: the first of the others
    compiler.matcher(one)
    assert compiled == ["kept0a*", "kept1a*", "kept2a*", "kept3a*"]
    compiler.matcher(others[0])
    assert compiled[-1] == "kept1a*"


def test_threads_share_a_compiler(compiler: GrammarCompiler) -> None:
    errors: list[BaseException] = []

    def work(n: int) -> None:
        try:
            for i in range(20):
                matcher = compiler.matcher(Grammar("regex", f"{(n + i) % 5}a*"))
                assert matcher.allowed(VOCABULARY).sum() >= 1
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_a_tokenizer_without_an_end_is_refused(smol_tokenizer: PreTrainedTokenizerBase) -> None:
    compiler = GrammarCompiler(smol_tokenizer, TokenBytes(smol_tokenizer), VOCABULARY, frozenset())
    with pytest.raises(ConfigError, match="end-of-sequence"):
        compiler.matcher(Grammar("regex", "a"))
