"""Words that mark documents."""

from __future__ import annotations

from offline.corpus import Document
from offline.keywords import keywords


def test_keywords_mark_a_group_and_leave_common_words() -> None:
    documents = [
        Document(n, str(n), ({"role": "user", "content": f"the question {n}"},
                             {"role": "assistant", "content": "the sea is blue" if n < 5 else "the land is green"}))
        for n in range(40)
    ]  # fmt: skip
    words = keywords(documents, range(5))
    assert {"sea", "blue"} <= set(words[:3]) and "the" not in words and "land" not in words
    assert words == keywords(documents, reversed(range(5)))
