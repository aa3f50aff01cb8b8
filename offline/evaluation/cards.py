"""Measured effects for a package's cards, and names made from them: what `label --from-detectors` does."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from atoms.detectors import DETECTORS
from atoms.manifest import AtomCard, Effect
from atoms.mix import Mix
from atoms.package import Package
from offline.evaluation.answers import Answerer
from offline.evaluation.measures import degenerate_share, rate

_LEAST_GAIN = 0.1
"""A detector whose rate an atom raises by less does not name it."""
SOUND_SHARE = 0.1
"""A coefficient counts as sound while at most this share more of the answers is degenerate than without steering."""


def measure_cards(
    package: Package,
    answerer: Answerer,
    prompts: Sequence[str],
    coefficients: Sequence[float],
    advance: Callable[[int], None] = lambda _: None,
) -> list[AtomCard]:
    """Cards with effects of every detector and the sound range, measured at `coefficients` on `prompts`."""
    cards = package.manifest.atoms
    mixes = [Mix(), *(Mix.of({card.id: c}) for card in cards for c in coefficients)]
    unsteered, *steered = answerer.answer(prompts, mixes, advance)
    base_rates = {name: rate(unsteered, detector) for name, detector in DETECTORS.items()}
    limit = degenerate_share(unsteered) + SOUND_SHARE
    measured = []
    for index, card in enumerate(cards):
        answers = dict(zip(coefficients, steered[index * len(coefficients) :], strict=False))
        shares = {c: degenerate_share(texts) for c, texts in answers.items()}
        effects = [
            Effect(
                detector=name,
                coefficient=c,
                n=len(prompts),
                rate_unsteered=base_rates[name],
                rate=rate(texts, detector),
                prompts="neutral",
                degenerate=shares[c],
            )
            for c, texts in answers.items()
            for name, detector in DETECTORS.items()
        ]
        sound = [c for c, share in shares.items() if share <= limit]
        span = (min([0.0, *sound]), max([0.0, *sound]))
        measured.append(card.model_copy(update={"effects": effects, "sound_range": span}))
    return measured


def name_by_effect(cards: Sequence[AtomCard]) -> list[AtomCard]:
    """Each atom named after the detector whose rate it raises most at a positive coefficient.

    A detector names one atom, the strongest; atoms that raise none by 0.1 lose their alias.
    """
    gains = sorted(
        ((effect.change, effect.detector, card.id) for card in cards for effect in card.effects
         if effect.coefficient > 0 and not effect.invited), key=lambda item: (-item[0], item[1], item[2]),
    )  # fmt: skip
    names: dict[str, str] = {}
    for gain, detector, atom in gains:
        if gain >= _LEAST_GAIN and atom not in names and detector not in names.values():
            names[atom] = detector
    return [card.model_copy(update={"alias": names.get(card.id)}) for card in cards]
