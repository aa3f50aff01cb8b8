"""Measured effect: how often detectors fire on free-running answers, per atom and coefficient.

Takes any `Engine`; prompts and detectors are data. Used by `label --from-detectors` and by the demo.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from atoms.detectors import DETECTORS, Detector, is_degenerate
from atoms.engine import Engine, GenerationRequest, SamplingParams
from atoms.errors import DataError
from atoms.manifest import AtomCard, Effect
from atoms.mix import Mix
from atoms.package import Package

SOUND_SHARE = 0.1
"""A coefficient counts as sound while at most this share more of the answers is degenerate than without steering."""
_MIXES_AT_ONCE = 8
"""Different mixes share a batch, so that answers that end early leave no slot idle."""


@dataclass(frozen=True, slots=True)
class EvaluationPrompt:
    """A prompt that invites a behaviour or is neutral to it; `split` is dev (for choosing) or heldout (for reporting)."""

    id: str
    behaviour: str
    kind: str
    split: str
    prompt: str


@dataclass(frozen=True, slots=True)
class Answer:
    """One free-running answer."""

    prompt: str
    mix: Mix
    text: str


def demo_data(name: str) -> Path:
    """Path of a data file that ships with the project: demo_documents, demo_prompts or neutral_prompts."""
    return Path(str(resources.files("offline") / "data" / f"{name}.jsonl"))


def read_prompts(path: Path) -> list[EvaluationPrompt]:
    """Raises DataError naming file and line for a malformed row."""
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            prompts.append(EvaluationPrompt(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{path}, line {number}: {error}; a row needs id, behaviour, kind, split and prompt"
            ) from None
    return prompts


def read_neutral_prompts() -> list[str]:
    """The neutral prompts of the calibration, in order."""
    return [
        json.loads(line)["prompt"] for line in demo_data("neutral_prompts").read_text(encoding="utf-8").splitlines()
    ]


def answer(
    engine: Engine,
    prompts: Sequence[str],
    mixes: Sequence[Mix],
    max_tokens: int,
    advance: Callable[[int], None] = lambda _: None,
) -> list[list[Answer]]:
    """Greedy answers to every prompt under every mix: one list a mix, in the order of `prompts`."""
    encoded = {prompt: engine.encode_chat([{"role": "user", "content": prompt}]) for prompt in prompts}
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    results: list[list[Answer]] = []
    for start in range(0, len(mixes), _MIXES_AT_ONCE):
        chunk = mixes[start : start + _MIXES_AT_ONCE]
        generations = engine.generate(
            [GenerationRequest(f"{m}-{p}", encoded[p], mix, sampling) for m, mix in enumerate(chunk) for p in prompts]
        )
        for m, mix in enumerate(chunk):
            texts = generations[m * len(prompts) : (m + 1) * len(prompts)]
            results.append([Answer(p, mix, g.text) for p, g in zip(prompts, texts, strict=True)])
        advance(len(chunk) * len(prompts))
    return results


def rate(answers: Sequence[Answer], detector: Detector) -> float:
    """Share of answers on which `detector` fires."""
    return sum(detector.detect(answer.text, answer.prompt) for answer in answers) / len(answers)


def degenerate_share(answers: Sequence[Answer]) -> float:
    return sum(is_degenerate(answer.text) for answer in answers) / len(answers)


def wilson_interval(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95% score interval of a proportion (Wilson 1927)."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def measure_cards(
    package: Package,
    engine: Engine,
    prompts: Sequence[str],
    coefficients: Sequence[float],
    max_tokens: int,
    advance: Callable[[int], None] = lambda _: None,
    detectors: Mapping[str, Detector] = DETECTORS,
) -> list[AtomCard]:
    """Cards with effects of every detector and the sound range, measured at `coefficients` on `prompts`."""
    cards = package.manifest.atoms
    mixes = [Mix(), *(Mix.of({card.id: c}) for card in cards for c in coefficients)]
    unsteered, *steered = answer(engine, prompts, mixes, max_tokens, advance)
    base_rates = {name: rate(unsteered, detector) for name, detector in detectors.items()}
    limit = degenerate_share(unsteered) + SOUND_SHARE
    measured = []
    for index, card in enumerate(cards):
        answers = dict(zip(coefficients, steered[index * len(coefficients) :], strict=False))
        effects = [
            Effect(
                detector=name,
                coefficient=c,
                n=len(prompts),
                rate_unsteered=base_rates[name],
                rate=rate(texts, detector),
            )
            for c, texts in answers.items()
            for name, detector in detectors.items()
        ]
        sound = [c for c, texts in answers.items() if degenerate_share(texts) <= limit]
        span = (min([0.0, *sound]), max([0.0, *sound]))
        measured.append(card.model_copy(update={"effects": effects, "sound_range": span}))
    return measured


def name_by_effect(cards: Sequence[AtomCard], min_change: float = 0.1) -> list[AtomCard]:
    """Each atom named after the detector whose rate it raises most at a positive coefficient.

    A detector names one atom, the strongest; atoms that raise none by `min_change` lose their alias.
    """
    gains = sorted(
        ((effect.rate - effect.rate_unsteered, effect.detector, card.id) for card in cards
         for effect in card.effects if effect.coefficient > 0), key=lambda item: (-item[0], item[1], item[2]),
    )  # fmt: skip
    names: dict[str, str] = {}
    for gain, detector, atom in gains:
        if gain >= min_change and atom not in names and detector not in names.values():
            names[atom] = detector
    return [card.model_copy(update={"alias": names.get(card.id)}) for card in cards]
