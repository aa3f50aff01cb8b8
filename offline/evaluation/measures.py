"""What is counted on answers: how often a detector fires, how many are degenerate, how long they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from atoms.detectors import Detector
from atoms.non_answers import is_degenerate
from offline.evaluation.answers import Answer
from offline.evaluation.statistics import wilson_interval


@dataclass(frozen=True, slots=True)
class Rate:
    """`count` of `n` answers, with the 95% score interval low … high of the share."""

    count: int
    n: int
    share: float
    low: float
    high: float

    @classmethod
    def of(cls, fired: Sequence[bool]) -> Rate:
        count, n = sum(fired), len(fired)
        return cls(count, n, count / n, *wilson_interval(count, n))

    def __str__(self) -> str:
        return f"{self.share:.0%} [{100 * self.low:.0f}, {100 * self.high:.0f}]"


@dataclass(frozen=True, slots=True)
class Form:
    """Shares of degenerate answers and of answers cut at max_tokens; mean length in tokens and in words."""

    degenerate: float
    cut: float
    tokens: float
    words: float

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> Form:
        n = len(answers)
        return cls(
            degenerate=degenerate_share(answers),
            cut=sum(answer.finish_reason == "length" for answer in answers) / n,
            tokens=sum(len(answer.token_ids) for answer in answers) / n,
            words=sum(len(answer.text.split()) for answer in answers) / n,
        )


def outcomes(answers: Sequence[Answer], detector: Detector) -> list[bool]:
    """Whether `detector` fires, answer by answer."""
    return [detector.detect(answer.text, answer.prompt) for answer in answers]


def rate(answers: Sequence[Answer], detector: Detector) -> float:
    """Share of answers on which `detector` fires."""
    return sum(outcomes(answers, detector)) / len(answers)


def degenerate_share(answers: Sequence[Answer]) -> float:
    return sum(is_degenerate(answer.text) for answer in answers) / len(answers)
