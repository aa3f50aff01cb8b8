"""Answers that are none: stuck in a loop or empty, and refusals.

Rules over characters, words and lines, as in atoms/detectors.py: no model, and the same verdict every time.
"""

from __future__ import annotations

import re
from collections import Counter
from itertools import zip_longest

# --- degenerate answers ---------------------------------------------------------------------------

_TOKEN = re.compile(r"\w+")
_STUTTER = re.compile(r"(\S{1,8}?)\1{9,}")
_LOOP_SHARE = 0.5
_MIN_WORD_REPEATS = 4
_MIN_LINE_REPEATS = 3
_MIN_GRAM_REPEATS = 3
_GRAM = 4
_FENCE = re.compile(r"```[^`]*$")
_MIN_EMPTY_BLOCKS = 2
_DIVERSITY_FROM_WORDS = 20
_MIN_DISTINCT_SHARE = 0.25


def _loops_in_words(words: list[str]) -> bool:
    count = max(Counter(words).values())
    return count >= _MIN_WORD_REPEATS and count > _LOOP_SHARE * len(words)


def _loops_in_lines(lines: list[str]) -> bool:
    line, count = Counter(lines).most_common(1)[0]
    return count >= _MIN_LINE_REPEATS and count * len(line) > _LOOP_SHARE * sum(map(len, lines))


def _loops_in_grams(words: list[str]) -> bool:
    starts: dict[tuple[str, ...], list[int]] = {}
    for start in range(len(words) - _GRAM + 1):
        starts.setdefault(tuple(words[start : start + _GRAM]), []).append(start)
    # Repeats of one loop show up as several grams (one per phase), so all repeated grams cover together.
    covered = {
        start + step
        for places in starts.values()
        if len(places) >= _MIN_GRAM_REPEATS
        for start in places
        for step in range(_GRAM)
    }
    return len(covered) > _LOOP_SHARE * len(words)


def _loops_in_letters(text: str) -> bool:
    longest = max((len(match.group()) for match in _STUTTER.finditer(text)), default=0)
    return longest > _LOOP_SHARE * len(text)


def _loops_in_fences(lines: list[str]) -> bool:
    """Code block after code block with nothing in it. A block closes at the next fence without a language, or at the end."""
    fences = [(place, line) for place, line in enumerate(lines) if _FENCE.match(line)]
    pairs = list(zip_longest(fences[::2], fences[1::2], fillvalue=(len(lines), "```")))
    empty = sum(close == start + 1 and last == "```" for (start, _), (close, last) in pairs)
    return empty >= _MIN_EMPTY_BLOCKS and empty > _LOOP_SHARE * len(pairs)


def is_degenerate(response: str) -> bool:
    """Whether the response is empty or stuck in a loop, and so is no answer whatever its form."""
    text = response.strip().lower()
    words = _TOKEN.findall(text)
    if not words:
        return True
    if len(words) >= _DIVERSITY_FROM_WORDS and len(set(words)) < _MIN_DISTINCT_SHARE * len(words):
        return True
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (
        _loops_in_letters(text)
        or _loops_in_words(words)
        or _loops_in_lines(lines)
        or _loops_in_grams(words)
        or _loops_in_fences(lines)
    )


# --- refusals -------------------------------------------------------------------------------------

_REFUSAL_FROM = 200
"""Characters of the opening in which a refusal says so."""
_UNABLE = r"(?:can(?:no|['’])?t|could not|couldn['’]t|am (?:unable|not able) to|won['’]t|will not|must decline)"
_ACT = r"(?:help|assist|provide|answer|comply|fulfil+|do that|create|write|generate|engage|discuss|share|give|support|continue)"
_REFUSAL = re.compile(
    rf"\bi(?: am|['’]m) (?:sorry|afraid)\b[^.!?\n]{{0,40}}\bi {_UNABLE}"
    rf"|\bi {_UNABLE} (?:\w+ ){{0,2}}?{_ACT}\b"
    rf"|\bi(?:['’]m| am) (?:unable|not able) to (?:\w+ ){{0,2}}?{_ACT}\b"
    r"|\bas an ai\b[^.!?\n]{0,60}\b(?:can(?:no|['’])?t|unable|not able)\b",
    re.IGNORECASE,
)


def is_refusal(response: str) -> bool:
    """Whether the response opens by declining the request. English, and by phrase: one that declines in other words, or
    quotes a refusal, is judged wrongly."""
    return _REFUSAL.search(response[:_REFUSAL_FROM]) is not None
