"""Named yes/no tests for the visible form of a chat answer.

What this module knows: two strings, the answer and the prompt it answers. Every test is a small rule
over characters, words and lines, so it runs anywhere and gives the same verdict every time.

What it does not know: no model, no tokenizer, no training corpus, and not whether an answer is true,
polite or useful. A detector sees form only: ``arithmetic`` accepts a wrong number and ``rhyme`` goes by
spelling. Several detectors may hold for one answer ("Yes." is both ``yes-no`` and ``one-word``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import pairwise
from types import MappingProxyType

from atoms.errors import UnknownDetectorError


@dataclass(frozen=True, slots=True)
class Detector:
    """A named test: ``detect(response, prompt)`` says whether the response shows the behaviour."""

    name: str
    description: str
    detect: Callable[[str, str], bool]


# --- shared helpers -------------------------------------------------------------------------------

_FENCED_BLOCK = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_SENTENCE_BREAK = re.compile(r"(?<=[.!?])\s+|\n+")


def _lines(text: str) -> list[str]:
    """The non-blank lines, stripped; any line ending convention."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def _count_lines(pattern: re.Pattern[str], text: str) -> int:
    return sum(1 for line in _lines(text) if pattern.match(line))


def _prose(response: str) -> str:
    """The response without what is not prose: letter case in code and JSON follows other rules."""
    if _parses_as_json(response):
        return ""
    return _FENCED_BLOCK.sub(" ", response)


# --- lists ----------------------------------------------------------------------------------------

# "-" and "*" need a space after them, otherwise "-5" and "**bold**" would pass for list items.
_BULLET_LINE = re.compile(r"(?:[-*]\s+|[•‣◦▪]\s*)\S")
_NUMBERED_LINE = re.compile(r"\d{1,3}[.)]\s+\S")
_MIN_ITEMS = 2


def _bulleted_list(response: str, _prompt: str) -> bool:
    return _count_lines(_BULLET_LINE, response) >= _MIN_ITEMS


def _numbered_list(response: str, _prompt: str) -> bool:
    return _count_lines(_NUMBERED_LINE, response) >= _MIN_ITEMS


# --- short answers --------------------------------------------------------------------------------

# The word must stand alone as an answer: "No document is attached" and "True love" are not verdicts.
_VERDICT = re.compile(
    r"[\"'“*]*(?:yes|no|true|false)\b[\"'”*]*"
    r"(?:\s*(?:[,.;:!]|$)|\s+[-–—]|\s*[–—]|\s+(?:it|they|he|she|you|i|we|that|this|there|because)\b)",
    re.IGNORECASE,
)
_SHORT = 200
"""Characters of the longest text that a pattern of short answers is tried on: what it takes grows with their cube."""
_ONE_OR_TWO_WORDS = re.compile(
    r"[\"'“*(]*[^\W\d_][\w'’-]*(?:\.?\s+[^\W\d_][\w'’-]*)?[\"'”*)]*[.!?]?[\"'”*)]*", re.UNICODE
)
_BARE_NUMBER = re.compile(
    r"(?:the answer is|it is|it's|answer:|=)?\s*"
    r"[-−+]?\s*[$€£¥]?\s*[-−]?\d[\d,]*(?:\.\d+)?(?:/\d+)?"
    r"\s*(?:%|°[CF]?|[$€£¥]|[^\W\d_]{1,12}[²³]?)?\s*[.!]?",
    re.IGNORECASE,
)
_LABEL_PREFIX = re.compile(
    r"(?:label|sentiment|category|class|topic|tone|type|genre|intent|classification)\s*:\s*(?P<value>.+)",
    re.IGNORECASE,
)
_CLASSIFY_CUE = re.compile(
    r"\b(?:classif\w*|categor\w*|label\w*|sentiment|tag|topic|which class|tone|genre)\b", re.IGNORECASE
)
_USUAL_LABELS = frozenset(
    {"positive", "negative", "neutral", "mixed", "spam", "not spam", "ham", "toxic", "not toxic"}
    | {"relevant", "irrelevant", "fact", "opinion", "formal", "informal", "urgent", "not urgent"}
)


def _yes_no(response: str, _prompt: str) -> bool:
    lines = _lines(response)
    return bool(lines) and _VERDICT.match(lines[0]) is not None


def _is_one_or_two_words(text: str) -> bool:
    return len(text) <= _SHORT and _ONE_OR_TWO_WORDS.fullmatch(text) is not None


def _one_word(response: str, _prompt: str) -> bool:
    return _is_one_or_two_words(response.strip())


def _arithmetic(response: str, _prompt: str) -> bool:
    text = response.strip()
    return len(text) <= _SHORT and _BARE_NUMBER.fullmatch(text) is not None


def _label(response: str, prompt: str) -> bool:
    text = response.strip()
    if len(text) > _SHORT:
        return False
    prefixed = _LABEL_PREFIX.fullmatch(text)
    if prefixed:
        return _is_one_or_two_words(prefixed["value"].strip())
    if not _is_one_or_two_words(text):
        return False
    # Without a prefix any short answer has this form, so the word itself has to be a class name.
    value = text.strip("\"'“”*().!? ").lower()
    return value in _USUAL_LABELS or (
        _CLASSIFY_CUE.search(prompt) is not None and re.search(rf"\b{re.escape(value)}\b", prompt.lower()) is not None
    )


# --- code and data --------------------------------------------------------------------------------

_FENCE_WITH_CONTENT = re.compile(r"^[ \t]*```[^`\n]*\n(?:[ \t]*\n)*[ \t]*(?!```)\S", re.MULTILINE)
_OPENING_FENCE = re.compile(r"```[^`\n]*\n")


def _fenced_code(response: str, _prompt: str) -> bool:
    return _FENCE_WITH_CONTENT.search(response.replace("\r\n", "\n")) is not None


def _parses_as_json(response: str) -> bool:
    text = response.replace("\r\n", "\n").strip()
    opening = _OPENING_FENCE.match(text)
    body = text[opening.end() : -3].strip() if opening and text.endswith("```") else text
    if not body.startswith(("{", "[")):
        return False
    try:
        json.loads(body)
    except (ValueError, RecursionError):
        return False
    return True


def _json(response: str, _prompt: str) -> bool:
    return _parses_as_json(response)


# --- asking for what is missing -------------------------------------------------------------------

# Things a user can forget to include. A request or a question counts only next to one of these (or a
# pronoun that stands for one), so that ordinary advice such as "please send flowers" does not.
_INPUT_NOUN = (
    r"(?:texts?|articles?|paragraphs?|passages?|sentences?|letters?|e-?mails?|messages?|code|snippets?|files?"
    r"|documents?|attachments?|reports?|notes?|essays?|reviews?|recipes?|poems?|speech(?:es)?|stor(?:y|ies)"
    r"|pictures?|photos?|images?|charts?|graphs?|tables?|paintings?|recordings?|songs?|lyrics|lists?|names|numbers"
    r"|amounts?|currency|receipts?|invoices?|contracts?|clauses?|plans?|chapters?|pages?|exercises?|equations?"
    r"|problems?|questions?|errors?|captions?|descriptions?|tweets?|quotes?|lines|links?|data|titles?|chords"
    r"|wording|contents?|details|information|context|input|conversations?|dialogues?|offers?|draft|abstract"
    r"|options|instructions?|words?|topic|subject|statements?|reviews?|posts?|examples?|facts|figures|values)"
)
_SUPPLY_VERB = (
    r"(?:provid(?:e|ing)|shar(?:e|ing)|past(?:e|ing)|send(?:ing)?|post(?:ing)?|includ(?:e|ing)|attach(?:ing)?"
    r"|add(?:ing)?|typ(?:e|ing)|suppl(?:y|ying)|giv(?:e|ing) me|quot(?:e|ing)|upload(?:ing)?|describ(?:e|ing)"
    r"|writ(?:e|ing) (?:it|them) out|put(?:ting)?|cop(?:y|ying)|tell(?:ing)? me|specify(?:ing)?|clarify(?:ing)?"
    r"|show(?:ing)? me|let me know|resend(?:ing)?)"
)
_INPUT_OBJECT = rf"(?:\b(?:it|them|one|what you have)\b|\b{_INPUT_NOUN}\b)"
_NEAR = r"[^.?!\n]{0,60}?"
_MISSING_INPUT = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"\b(?:please|kindly)\b[^.?!\n]{{0,15}}?\b{_SUPPLY_VERB}\b{_NEAR}{_INPUT_OBJECT}",
        rf"\b(?:could|can|would|will) you\b[^.?!\n]{{0,25}}?\b{_SUPPLY_VERB}\b{_NEAR}{_INPUT_OBJECT}",
        rf"\b(?:if|once|when|as soon as) you\b[^.?!\n]{{0,15}}?\b{_SUPPLY_VERB}\b{_NEAR}{_INPUT_OBJECT}",
        rf"^{_SUPPLY_VERB}\b (?:the|your){_NEAR}\b{_INPUT_NOUN}\b[^.?!\n]*,? please",
        rf"\bi (?:don['’]t|do not|can['’]t|cannot|can not|couldn['’]t|could not|didn['’]t) "
        rf"(?:actually )?(?:see|find|view|read|have|open|receive|get|have access to)"
        rf" (?:access to )?(?:a|an|any|the|your|that|this) (?:\w+ )?{_INPUT_NOUN}\b",
        rf"\bi see no (?:\w+ )?{_INPUT_NOUN}\b",
        r"\byou (?:seem to have |have |may have |might have )?(?:forgot|forgotten|neglected) to\b",
        r"\byou (?:haven['’]t|have not|didn['’]t|did not) (?:yet )?"
        r"(?:provided?|given?|attach(?:ed)?|included?|shared?|pasted?|mention(?:ed)?|specif(?:y|ied)|send|sent|say|said)\b",
        rf"\b{_INPUT_NOUN}\b[^.?!\n]{{0,25}}?\b(?:is|are|was|were|seems?|appears?)(?: to be)?"
        r" (?:missing|left out|not (?:attached|included))",
        rf"\b{_INPUT_NOUN}\b (?:did not|didn['’]t) (?:come through|arrive|load|attach)",
        rf"\b(?:there(?:['’]s| is| are| was| were) )?no (?:\w+ )?{_INPUT_NOUN}\b"
        r"[^.?!\n]{0,20}?\b(?:attached|included|provided|came through|given|in your message|here|below)\b",
        r"\bthere(?:['’]s| is) no attachment\b",
        r"\bi(?:['’]m| am) missing\b",
        rf"\bi(?:['’]d| would|['’]ll| will)?(?: first)? need (?:to (?:see|read|know|have) )?"
        rf"(?:the|your|some|more|a bit more)\b{_NEAR}\b(?:{_INPUT_NOUN}|first)\b",
        rf"\b(?:what|which)\b(?: (?:is|are)|['’]s) (?:it|(?:the|your) (?:\w+ )?{_INPUT_NOUN})\b[^.\n]*\?",
        rf"\bwhich (?:\w+ )?(?:{_INPUT_NOUN}|one) (?:do|did|would|are|were|should) (?:you|i)\b",
        rf"\bwhat (?:{_INPUT_NOUN}) (?:and \w+ )?(?:do|did|would|are|should) (?:you|i)\b",
        rf"\bwhat (?:does|did|do) (?:it|they|the (?:{_INPUT_NOUN}|person)) (?:say|show|write|look like|mean)\b",
        r"\bwhat (?:did|does) the \w+ look like\?",
        rf"\bhow does your {_INPUT_NOUN} go\b",
        r"\b(?:could|can|would) you (?:please )?(?:be more specific|clarify|tell me more|give me more|elaborate)\b",
    )
)
_MISSING_INPUT_SENTENCES, _REQUEST = 3, 1000
"""Sentences in which the request stands, and characters of each that are looked at."""


def _missing_input(response: str, prompt: str) -> bool:
    # A business letter may well ask for documents; there the letter is the answer, not a question back.
    if _formal_email(response, prompt) or _parses_as_json(response):
        return False
    # The request comes early or it is an afterthought to an answer that was given.
    sentences = [part.strip() for part in _SENTENCE_BREAK.split(_prose(response)) if part.strip()]
    opening = sentences[:_MISSING_INPUT_SENTENCES]
    return any(pattern.search(sentence[:_REQUEST]) for sentence in opening for pattern in _MISSING_INPUT)


# --- repairing a sentence -------------------------------------------------------------------------

_QUOTED = re.compile(r"[\"“](?P<text>[^\"”]+)[\"”]")
_AFTER_COLON = re.compile(r":\s*(?P<text>\S.*)", re.DOTALL)
_SENTENCE_END = re.compile(r"[.!?][\"'”’)]*$")
_LONGEST_SENTENCE, _LONGEST_REQUEST = 1000, 10_000
"""Characters of an answer that may be a repaired sentence, and of the prompt in which it is looked for: comparing texts takes
the square of their lengths."""
_SAME_SENTENCE_RATIO = 0.7
_MIN_REPAIRED_WORDS = 3


def _repair_candidates(prompt: str) -> list[str]:
    """The sentences a user may want repaired: those in quotes or after a colon, else all of them."""
    spans = [match["text"].strip() for match in _QUOTED.finditer(prompt)]
    after_colon = _AFTER_COLON.search(prompt)
    if after_colon:
        spans.append(after_colon["text"].strip())
    spans = spans or [prompt.strip()]
    # The request may share a line with the sentence ("What is the right form of this? He can swims."),
    # and the sentence may itself hold several; whole spans and their parts both count.
    parts = [part.strip() for span in (*spans, prompt) for part in _SENTENCE_BREAK.split(span) if part.strip()]
    return list(dict.fromkeys(spans + parts))


def _spelled_alike(first: str, second: str) -> bool:
    """Whether two texts' lower-cased words are much the same by letters, as "sing" and "sings" are."""
    left, right = (" ".join(_WORD.findall(text.lower())) for text in (first, second))
    matcher = SequenceMatcher(None, left, right, autojunk=False)
    # Upper bounds of the ratio come first, at a fraction of its cost.
    ratios = (matcher.real_quick_ratio, matcher.quick_ratio, matcher.ratio)
    return all(ratio() >= _SAME_SENTENCE_RATIO for ratio in ratios)


def _grammar_fix(response: str, prompt: str) -> bool:
    text = response.strip()
    if (
        len(text) > _LONGEST_SENTENCE
        or len(_lines(text)) != 1
        or not _SENTENCE_END.search(text)
        or len(_WORD.findall(text)) < _MIN_REPAIRED_WORDS
    ):
        return False
    candidates = _repair_candidates(prompt[:_LONGEST_REQUEST])
    # Capitals or worked steps that reuse the user's words are other forms of answer.
    if text in candidates or text.isupper() or _step_by_step(text, prompt):
        return False
    # A statement close to a question is its answer ("The capital of Spain is ..."), not its repair.
    asks = text.rstrip("\"'”’)").endswith("?")
    return any(candidate.endswith("?") == asks and _spelled_alike(candidate, text) for candidate in candidates)


# --- verse ----------------------------------------------------------------------------------------

_VOWELS = "aeiouy"
_RIME = re.compile(rf"[{_VOWELS}]+[^{_VOWELS}]*$")
_MAGIC_E = re.compile(rf"(?P<vowel>[aeiouy])(?P<consonant>[^{_VOWELS}w])e$")
_UNSTRESSED_END = re.compile(rf"(?<![{_VOWELS}])(?:ing|ed|ers?|es|est|y|ey|le|en|on|al|or|ness|ment)$")
_MUTE_E = re.compile(rf"(?<=[{_VOWELS}])(?P<consonants>[^{_VOWELS}w]{{2,}})e$")
_CLIPPED_ED = re.compile(rf"(?<=[^{_VOWELS}td])ed$")
# Spelling of a rime -> the sounds it may stand for. Ambiguous spellings list every reading; two words
# rhyme when they share one.
_VOWEL_SOUNDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "ai": ("A",), "ay": ("A",), "ey": ("A", "E"), "ei": ("A", "E"), "ee": ("E",), "ea": ("E", "e"),
        "ie": ("I", "E"), "oa": ("O",), "oe": ("O",), "ow": ("O", "W"), "ou": ("W", "U"), "oo": ("U",),
        "ue": ("U",), "ew": ("U",), "oi": ("Y",), "oy": ("Y",), "au": ("o",), "aw": ("o",), "ui": ("U",),
        "uy": ("I",), "ye": ("I",),
    }
)  # fmt: skip
_LONG_SOUND: Mapping[str, str] = MappingProxyType({"a": "A", "e": "E", "i": "I", "o": "O", "u": "U", "y": "I"})
# A vowel that ends the word.
_OPEN_VOWELS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"a": ("a",), "e": ("E",), "i": ("I", "E"), "o": ("O",), "u": ("U",), "y": ("I", "E")}
)
_IRREGULAR: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "a": ("a",), "abroad": ("od",), "again": ("en", "An"), "break": ("Ak",), "do": ("U",), "done": ("un",),
        "eye": ("I",), "eyes": ("Is",), "friend": ("end",), "gone": ("on",), "great": ("At",), "half": ("af",),
        "heart": ("art",), "laugh": ("af",), "none": ("un",), "one": ("un",), "said": ("ed",), "sew": ("O",),
        "shoe": ("U",), "steak": ("Ak",), "through": ("U",), "to": ("U",), "tongue": ("ung",), "two": ("U",),
        "who": ("U",), "word": ("urd",), "work": ("urk",), "world": ("urld",), "you": ("U",), "young": ("ung",),
    }
)  # fmt: skip
_WHOLE_RIMES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "air": ("Ar",), "alk": ("ok",), "all": ("ol",), "alm": ("om",), "are": ("Ar",), "aught": ("ot",),
        "ave": ("Av", "av"), "ead": ("ed", "Ed"), "ear": ("Ar", "Er"), "eard": ("urd", "Erd"), "earn": ("urn",),
        "eer": ("Er",), "eigh": ("A",), "eight": ("At",), "eir": ("Ar",), "er": ("ur",), "ere": ("Ar", "Er"),
        "igh": ("I",), "ight": ("It",), "ign": ("In",), "ild": ("Ild", "ild"), "imb": ("Im",), "ind": ("Ind", "ind"),
        "ir": ("ur",), "ird": ("urd",), "ire": ("Ir",), "irl": ("url",), "ive": ("Iv", "iv"), "oar": ("Or",),
        "old": ("Old",), "olk": ("Ok",), "oll": ("Ol", "ol"), "omb": ("Um", "Om"), "ome": ("um", "Om"),
        "on": ("on", "un"), "one": ("On",), "ood": ("ud", "Ud"), "ook": ("uk",), "oor": ("Or",), "or": ("Or",),
        "ord": ("Ord", "urd"), "ore": ("Or",), "ost": ("Ost", "ost"), "oud": ("Wd",), "ough": ("O", "U", "uf"),
        "ought": ("ot",), "oul": ("Ol",), "ould": ("ud",), "our": ("Or", "Wr"), "ove": ("uv", "Ov", "Uv"),
        "ower": ("Wr",), "own": ("Wn", "On"), "um": ("um",), "umb": ("um",), "un": ("un",), "ur": ("ur",),
        "urn": ("urn",),
    }
)  # fmt: skip
_MAX_VERSE_WORDS, _MAX_LETTERS = 16, 30
_MIN_VERSE_WORDS = 2


def _tail(word: str) -> str:
    """The spelling from the last stressed vowel on, going one vowel further back past a weak ending."""
    mute = _MAGIC_E.search(word) or _MUTE_E.search(word)
    stem = word[:-1] if mute else word
    rime = _RIME.search(stem)
    if not rime:
        return word
    start = rime.start()
    if not mute and _UNSTRESSED_END.search(stem):
        earlier = list(re.finditer(rf"[{_VOWELS}]+", stem[:start]))
        if earlier:
            start = earlier[-1].start()
    return word[start:]


def _final_consonants(text: str) -> str:
    """One spelling for endings that sound alike: "ll" as "l", "ck" as "k", "ze" and "ce" as "s"."""
    text = _CLIPPED_ED.sub("d", text)
    if text.endswith("e") and len(text) > 1:
        text = text[:-1].replace("c", "s")
    return re.sub(r"([a-z])\1", r"\1", text.replace("ck", "k")).replace("c", "k").replace("z", "s")


def _rime_sounds(word: str) -> frozenset[str]:
    """The sounds a word's ending may have, as far as its spelling tells."""
    if word in _IRREGULAR:
        return frozenset(_IRREGULAR[word])
    word = word.replace("qu", "kw")  # that u is no vowel
    tail = _tail(word)
    if tail in _WHOLE_RIMES:
        return frozenset(_WHOLE_RIMES[tail])
    magic = _MAGIC_E.fullmatch(tail)
    if magic:
        return frozenset({_LONG_SOUND[magic["vowel"]] + _final_consonants(magic["consonant"] + "e")})
    lead = re.match(r"ow|ew|aw|[aeiouy]+", tail)
    if lead is None:
        return frozenset({tail})
    vowel, rest = lead.group(), tail[lead.end() :]
    sounds = _VOWEL_SOUNDS.get(vowel, (vowel,))
    if not rest and len(vowel) == 1:
        sounds = _OPEN_VOWELS[vowel]
        if vowel == "y" and len(re.findall(rf"[{_VOWELS}]+", word)) == 1:
            sounds = ("I",)  # "why", but "tiny"
    return frozenset(sound + _final_consonants(rest) for sound in sounds)


def _rhymes(first: str, second: str) -> bool:
    return first != second and not _rime_sounds(first).isdisjoint(_rime_sounds(second))


def _rhyme(response: str, prompt: str) -> bool:
    if _parses_as_json(response) or _bulleted_list(response, prompt) or _numbered_list(response, prompt):
        return False
    verses = [_WORD.findall(line.lower()) for line in _lines(_prose(response))]
    # Lines of verse are short; paragraphs that happen to end alike are not a poem.
    ends = [words[-1] if _MIN_VERSE_WORDS <= len(words) <= _MAX_VERSE_WORDS and len(words[-1]) <= _MAX_LETTERS else ""
            for words in verses]  # fmt: skip
    pairs = [*pairwise(ends), *zip(ends, ends[2:], strict=False)]
    return any(_rhymes(first, second) for first, second in pairs if first and second)


# --- letters and reasoning ------------------------------------------------------------------------

_GREETING_LINE = re.compile(
    r"(?:dear|hello|hi|good (?:morning|afternoon|evening)|to whom it may concern)\b[^!?]{0,60}[,:]$",
    re.IGNORECASE,
)
_CLOSING_LINE = re.compile(
    r"(?:(?:best|kind|warm|kindest|warmest|with (?:best|kind|warm))\s+(?:regards|wishes)|regards|(?:yours )?sincerely"
    r"|sincerely yours|yours (?:faithfully|truly)|respectfully(?: yours)?|with (?:thanks|gratitude)|many thanks"
    r"|cordially)(?:,|$)",
    re.IGNORECASE,
)
_STEP_MARK = re.compile(r"\bstep\s+(?P<number>\d+|one|two|three|four|five|six)\b", re.IGNORECASE)
# "First," opens a sequence; "First made in Peru" tells history.
_FIRST_MARK = re.compile(
    r"(?:^|[.!?:;]\s+|\n[^\S\n]*)(?:first(?:ly)?\s*[,:]|to (?:start|begin)\b|start by\b)", re.IGNORECASE
)
_NEXT_MARK = re.compile(
    r"(?:^|[.!?;,]\s+(?:and\s+)?|\n[^\S\n]*)(?:then|next|after that|afterwards|second(?:ly)?|third(?:ly)?|finally|lastly)\b",
    re.IGNORECASE,
)


def _formal_email(response: str, _prompt: str) -> bool:
    lines = _lines(response)
    greeting = next((n for n, line in enumerate(lines) if _GREETING_LINE.match(line)), None)
    return greeting is not None and any(_CLOSING_LINE.match(line) for line in lines[greeting + 1 :])


def _step_by_step(response: str, prompt: str) -> bool:
    if _numbered_list(response, prompt):
        return False
    if len({match["number"].lower() for match in _STEP_MARK.finditer(response)}) >= 2:
        return True
    first = _FIRST_MARK.search(response)
    return first is not None and _NEXT_MARK.search(response, first.end()) is not None


# --- letter case and language ---------------------------------------------------------------------

_MIN_LETTERS = 12
_SHOUTING_SHARE = 0.8
_ELISION = re.compile(r"\b(?:l|d|c|j|n|qu|s|m|t|jusqu|lorsqu|puisqu)['’](?=[^\W\d_])", re.IGNORECASE)
_PLAIN_WORD = re.compile(r"[^\W\d_]+")
_FRENCH_ONLY = frozenset(
    (
        "le les des du et est sont dans avec pour sur une il elle ils elles nous vous je tu ce cette ces cet "
        "aux au qui ne pas où être était ont sans chez très mais ou leur leurs mon ton ma mes tes ses votre "
        "notre vos nos donc puis à y été avoir fait faire bien aussi quand comme peu chaque entre sous vers "
        "par plus suis êtes sommes avez avons bonjour merci oui non "
    ).split()
)
# Also common in Spanish, Italian, Portuguese or English: they add weight but prove nothing alone.
_FRENCH_SHARED = frozenset(["de", "la", "un", "que", "se", "en", "si", "me", "te", "son", "sa", "on", "a", "as"])
_FRENCH_SHARE = 0.2
_MIN_FRENCH_WORDS = 2
# English words among the French ones; a text with only these is not French.
_ENGLISH_LOOKALIKES = frozenset(("pour sur ton ma ou tu y son on a as me plus par mes mon non des sous puis ").split())


def _letters(text: str) -> str:
    return "".join(character for character in text if character.isalpha())


def _lower_case(response: str, _prompt: str) -> bool:
    letters = _letters(_prose(response))
    return len(letters) >= _MIN_LETTERS and not any(letter.isupper() for letter in letters)


def _shouting(response: str, _prompt: str) -> bool:
    letters = _letters(_prose(response))
    return len(letters) >= _MIN_LETTERS and sum(map(str.isupper, letters)) >= _SHOUTING_SHARE * len(letters)


def _french(response: str, _prompt: str) -> bool:
    text = _prose(response).lower()
    elided = len(_ELISION.findall(text))
    words = _PLAIN_WORD.findall(_ELISION.sub("", text))
    common = [word for word in words if word in _FRENCH_ONLY or word in _FRENCH_SHARED]
    total, hits = len(words) + elided, len(common) + elided
    proof = elided + sum(1 for word in common if word in _FRENCH_ONLY and word not in _ENGLISH_LOOKALIKES)
    return hits >= _MIN_FRENCH_WORDS and proof >= 1 and hits >= _FRENCH_SHARE * total


# --- registry -------------------------------------------------------------------------------------

DETECTORS: Mapping[str, Detector] = MappingProxyType(
    {
        detector.name: detector
        for detector in (
            Detector("bulleted-list", "at least two lines that start with a bullet", _bulleted_list),
            Detector("numbered-list", "at least two lines that start with a number", _numbered_list),
            Detector("yes-no", "opens with a verdict: yes, no, true or false", _yes_no),
            Detector("fenced-code", "holds a fenced code block with something in it", _fenced_code),
            Detector("missing-input", "asks for text or details the user left out", _missing_input),
            Detector("one-word", "one or two words and nothing else", _one_word),
            Detector("arithmetic", "a bare number, perhaps with a unit", _arithmetic),
            Detector("grammar-fix", "repeats the user's sentence with small repairs", _grammar_fix),
            Detector("json", "is one JSON object or array", _json),
            Detector("rhyme", "short lines, some of which rhyme", _rhyme),
            Detector("formal-email", "a greeting line and a closing line", _formal_email),
            Detector("step-by-step", "marks its steps in words, not as a numbered list", _step_by_step),
            Detector("lower-case", "has no upper-case letter", _lower_case),
            Detector("french", "is in French, judged by common words", _french),
            Detector("label", "is only the name of a class", _label),
            Detector("shouting", "is written in capital letters", _shouting),
        )
    }
)


def get_detector(name: str) -> Detector:
    """Return the detector called ``name``; raise ``UnknownDetectorError`` if there is none."""
    try:
        return DETECTORS[name]
    except KeyError:
        known = ", ".join(sorted(DETECTORS))
        raise UnknownDetectorError(f"unknown detector {name!r}; known detectors: {known}") from None
