"""What is counted on answers: how often a detector fires, how many are degenerate, how long they are."""

from __future__ import annotations

from collections.abc import Sequence

from atoms.detectors import Detector, is_degenerate
from offline.evaluation.answers import Answer


def outcomes(answers: Sequence[Answer], detector: Detector) -> list[bool]:
    """Whether `detector` fires, answer by answer."""
    return [detector.detect(answer.text, answer.prompt) for answer in answers]


def rate(answers: Sequence[Answer], detector: Detector) -> float:
    """Share of answers on which `detector` fires."""
    return sum(outcomes(answers, detector)) / len(answers)


def degenerate_share(answers: Sequence[Answer]) -> float:
    return sum(is_degenerate(answer.text) for answer in answers) / len(answers)


def cut_share(answers: Sequence[Answer]) -> float:
    """Share of answers that reached max_tokens before they ended."""
    return sum(answer.finish_reason == "length" for answer in answers) / len(answers)


def mean_tokens(answers: Sequence[Answer]) -> float:
    return sum(len(answer.token_ids) for answer in answers) / len(answers)


def mean_words(answers: Sequence[Answer]) -> float:
    return sum(len(answer.text.split()) for answer in answers) / len(answers)
