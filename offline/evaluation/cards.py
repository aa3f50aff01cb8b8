"""Measured effects for a package's cards, and names made from them: what `label --from-detectors` does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Measured:
    """What one atom did: its effects on every detector, and the coefficients at which its answers stay sound."""

    effects: list[Effect]
    sound_range: tuple[float, float]


def measure_atoms(
    package: Package,
    answerer: Answerer,
    prompts: Sequence[str],
    coefficients: Sequence[float],
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, Measured]:
    """Every atom at `coefficients` on neutral `prompts`, by id."""
    cards = package.manifest.atoms
    mixes = [Mix(), *(Mix.of({card.id: c}) for card in cards for c in coefficients)]
    unsteered, *steered = answerer.answer(prompts, mixes, advance)
    base_rates = {name: rate(unsteered, detector) for name, detector in DETECTORS.items()}
    limit = degenerate_share(unsteered) + SOUND_SHARE
    measured = {}
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
        measured[card.id] = Measured(effects, span)
    return measured


def names_by_effect(measured: Mapping[str, Measured]) -> dict[str, str]:
    """Atom id -> the detector whose rate it raises most at a positive coefficient.

    A detector names one atom, the strongest; atoms that raise none by 0.1 have no name.
    """
    gains = sorted(
        ((effect.change, effect.detector, atom) for atom, found in measured.items() for effect in found.effects
         if effect.coefficient > 0), key=lambda item: (-item[0], item[1], item[2]),
    )  # fmt: skip
    names: dict[str, str] = {}
    for gain, detector, atom in gains:
        if gain >= _LEAST_GAIN and atom not in names and detector not in names.values():
            names[atom] = detector
    return names


def cards_with_measured(cards: Sequence[AtomCard], measured: Mapping[str, Measured]) -> list[AtomCard]:
    """Cards with what was measured and the names made from it. Curves that are there already and are of more answers, such as
    those of `evaluate`, stay."""
    names = names_by_effect(measured)
    return [
        card.model_copy(update={"alias": names.get(card.id), "sound_range": measured[card.id].sound_range,
                                "effects": _stronger(card.effects, measured[card.id].effects)})
        for card in cards
    ]  # fmt: skip


def _stronger(old: Sequence[Effect], new: Sequence[Effect]) -> list[Effect]:
    """`new` without the series of which `old` has more answers a point, and of `old` what is of no series in that."""
    answers: dict[str, int] = {}
    for effect in old:
        answers[effect.series] = max(effect.n, answers.get(effect.series, 0))
    taken = [effect for effect in new if effect.n >= answers.get(effect.series, 0)]
    series = {effect.series for effect in taken}
    return [*(effect for effect in old if effect.series not in series), *taken]
