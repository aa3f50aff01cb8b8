"""Words that mark an atom's documents."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

from offline.corpus import Document

_KEYWORDS = 6
_PRIOR_WEIGHT = 200.0
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?|[^\w\s]", re.UNICODE)


def keywords(documents: Sequence[Document], members: Sequence[int]) -> list[str]:
    """At most six words that mark `members` (row numbers): largest z of the log-odds with an informative Dirichlet prior.

    Monroe, Colaresi & Quinn 2008; the prior is the whole corpus, scaled to 200 words.
    """
    inside, everywhere = Counter[str](), Counter[str]()
    chosen = set(members)
    for document in documents:
        words = [word.lower() for word in _WORD.findall(f"{document.prompt} {document.response}")]
        everywhere.update(words)
        if document.row in chosen:
            inside.update(words)
    total_in, total = sum(inside.values()), sum(everywhere.values())
    scale = _PRIOR_WEIGHT / total

    def z(word: str) -> float:
        prior = everywhere[word] * scale
        a, b = inside[word] + prior, everywhere[word] - inside[word] + prior
        odds_in = math.log(a / (total_in + _PRIOR_WEIGHT - a))
        odds_out = math.log(b / (total - total_in + _PRIOR_WEIGHT - b))
        return (odds_in - odds_out) / math.sqrt(1 / a + 1 / b)

    return sorted((word for word in inside if z(word) > 1.0), key=lambda word: (-z(word), word))[:_KEYWORDS]
