"""The choice of an atom and a coefficient for each goal, on development prompts alone.

Four rounds, each one batch over all goals. Every atom at ± one coefficient gives a shortlist, on a few prompts whose unsteered
answers are not yet as wanted; the shortlist at that coefficient, on all prompts, gives the candidates; those at every
coefficient, one answer to each prompt, give the finalists; and those, `dev_samples` answers to each prompt, give the choice.
It is the setting that changes the detector's rate most in the wanted direction, of those whose predicted and measured KL and
whose share of degenerate answers are within the limits; among equals the one of least predicted KL.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from atoms.detectors import get_detector
from atoms.mix import Mix
from offline.evaluation.answers import Answer
from offline.evaluation.config import EvaluateConfig
from offline.evaluation.harness import Harness
from offline.evaluation.measures import degenerate_share, outcomes, rate
from offline.evaluation.results import Choice, Goal, Round, Trial
from offline.evaluation.statistics import wilson_interval
from offline.progress import Progress

Prompts = Mapping[Goal, Sequence[str]]


@dataclass(frozen=True, slots=True)
class Setting:
    """One atom at one coefficient, as it did on a goal's development prompts. `gain` is positive where wanted."""

    atom: str
    coefficient: float
    n: int
    rate: float
    gain: float
    degenerate: float
    predicted_kl: float

    @property
    def mix(self) -> Mix:
        return Mix.of({self.atom: self.coefficient})


@dataclass(frozen=True)
class Tried:
    """What a round showed of a goal: the unsteered answers with the detector's rate on them, and every setting tried."""

    unsteered: list[Answer]
    rate_unsteered: float
    settings: list[Setting]

    def trials(self, stage: Round, kls: Mapping[tuple[str, float], float]) -> tuple[Trial, ...]:
        """For the record. `kls` are the measured ones by atom and coefficient."""
        return tuple(Trial(**self.shown(s), round=stage, kl=kls.get((s.atom, s.coefficient))) for s in self.settings)

    def shown(self, setting: Setting) -> dict[str, Any]:
        """The fields of `Shown`."""
        return {
            "atom": setting.atom, "coefficient": setting.coefficient, "n": setting.n, "rate_unsteered": self.rate_unsteered,
            "rate": setting.rate, "degenerate": setting.degenerate, "predicted_kl": setting.predicted_kl,
        }  # fmt: skip


@dataclass(frozen=True)
class Search:
    """What came of a goal. `choice` is None where no setting within the limits moves the behaviour as wanted; `trials` are
    all that were looked at on all development prompts."""

    choice: Choice | None
    trials: tuple[Trial, ...]


def choose_settings(
    harness: Harness, prompts: Prompts, atoms: Sequence[str], config: EvaluateConfig, progress: Progress
) -> dict[Goal, Search]:
    """One choice a goal, and what it was made from."""
    cells = {
        goal: [(atom, c) for atom in found for c in signed_within_range(harness, atom, config.coefficients)]
        for goal, found in find_candidates(harness, prompts, atoms, config, progress).items()
    }
    tried = try_settings(harness, prompts, cells, "choose", progress)
    finalists: dict[Goal, Mapping[tuple[str, float], float]] = {}
    with progress.task("KL of finalists", len(tried), "goals") as bar:
        for goal, found in tried.items():
            finalists[goal] = _finalists(harness, found, config)
            bar.advance()
    last = {goal: list(kls) for goal, kls in finalists.items()}
    confirmed = try_settings(harness, prompts, last, "confirm", progress, config.dev_samples)
    return {
        goal: Search(
            _choose(harness, found, finalists[goal], config),
            (*tried[goal].trials("choose", finalists[goal]), *found.trials("confirm", finalists[goal])),
        )
        for goal, found in confirmed.items()
    }


def find_candidates(
    harness: Harness, prompts: Prompts, atoms: Sequence[str], config: EvaluateConfig, progress: Progress
) -> dict[Goal, Sequence[str]]:
    """The atoms that are tried at every coefficient. Few prompts leave a shortlist: on them many atoms gain as much, so that
    what is best of those is seen on all prompts."""
    if len(atoms) <= config.candidates:
        return dict.fromkeys(prompts, atoms)
    ends = [(atom, c) for atom in atoms for c in clipped_to_range(harness, atom, config.screen_coefficient)]
    cells: dict[Goal, list[tuple[str, float]]] = dict.fromkeys(prompts, ends)
    most = max(config.shortlist, config.candidates)
    if len(atoms) > most:
        few = screening_prompts(harness, prompts, config.screen_prompts, progress)
        screened = try_settings(harness, few, cells, "screen", progress)
        cells = {
            goal: [(s.atom, s.coefficient) for s in best_settings(tried.settings, most)]
            for goal, tried in screened.items()
        }
    tried = try_settings(harness, prompts, cells, "shortlist", progress)
    return {goal: [s.atom for s in best_settings(found.settings, config.candidates)] for goal, found in tried.items()}


def screening_prompts(harness: Harness, prompts: Prompts, most: int, progress: Progress) -> dict[Goal, list[str]]:
    """At most `most` prompts a goal, those first whose unsteered answer is not yet as wanted: no atom shows on the others."""
    answers = harness.answer("unsteered", [(goal, Mix()) for goal in prompts], prompts, progress)
    chosen = {}
    for goal, texts in prompts.items():
        fired = outcomes(answers[goal, Mix()], get_detector(goal.behaviour))
        order = sorted(range(len(texts)), key=lambda place: fired[place] == (goal.wanted == "up"))
        chosen[goal] = [texts[place] for place in order[:most]]
    return chosen


def try_settings(
    harness: Harness,
    prompts: Prompts,
    cells: Mapping[Goal, Sequence[tuple[str, float]]],
    stage: str,
    progress: Progress,
    samples: int = 1,
) -> dict[Goal, Tried]:
    """Answers every goal's prompts unsteered and under its cells, atoms with coefficients: one batch job."""
    asked = [(goal, mix) for goal in prompts for mix in (Mix(), *(Mix.of({a: c}) for a, c in cells[goal]))]
    answers = harness.answer(stage, asked, prompts, progress, samples)
    tried = {}
    for goal in prompts:
        detector, unsteered = get_detector(goal.behaviour), answers[goal, Mix()]
        base, settings = rate(unsteered, detector), []
        for atom, c in cells[goal]:
            mix = Mix.of({atom: c})
            share = rate(answers[goal, mix], detector)
            settings.append(
                Setting(atom, c, len(unsteered), share, goal.sign * (share - base), degenerate_share(answers[goal, mix]),
                        harness.package.predicted_kl(mix))
            )  # fmt: skip
        tried[goal] = Tried(unsteered, base, settings)
    return tried


def best_settings(settings: Sequence[Setting], count: int) -> list[Setting]:
    """The `count` settings of largest gain, each of another atom; among equals the one whose other sign gains least, then the
    cheapest.

    On few prompts many atoms reach the same gain. One that moves the behaviour both ways is more than a disturbance.
    """
    signed = {(s.atom, s.coefficient > 0): s.gain for s in settings}

    def rank(setting: Setting) -> tuple[float, float, float]:
        other = signed.get((setting.atom, setting.coefficient < 0), 0.0)
        return (-setting.gain, other, setting.predicted_kl)

    best: dict[str, Setting] = {}
    for setting in sorted(settings, key=rank):
        best.setdefault(setting.atom, setting)
    return list(best.values())[:count]


def signed_within_range(harness: Harness, atom: str, coefficients: Sequence[float]) -> list[float]:
    """±coefficients, without those outside the atom's tested range."""
    low, high = harness.package.card(atom).tested_range
    return [c for magnitude in coefficients for c in (-magnitude, magnitude) if low <= c <= high]


def clipped_to_range(harness: Harness, atom: str, magnitude: float) -> list[float]:
    """±magnitude, or the end of the atom's tested range where that is nearer."""
    low, high = harness.package.card(atom).tested_range
    return [c for c in (max(-magnitude, low), min(magnitude, high)) if c]


def _finalists(harness: Harness, tried: Tried, config: EvaluateConfig) -> dict[tuple[str, float], float]:
    """(atom, coefficient) -> measured KL of the settings that are looked at more closely, the best first.

    Those within every limit come first; more degenerate answers than allowed are let pass as long as their number may still
    be chance (the low end of the 95% interval of their share).
    """
    limit = _degenerate_limit(tried, config)

    def low(setting: Setting) -> float:
        return wilson_interval(round(setting.degenerate * setting.n), setting.n)[0]

    possible = [s for s in tried.settings if s.gain > 0 and s.predicted_kl <= config.max_kl and low(s) <= limit]
    meter, found = harness.meter(tried.unsteered[: config.kl_prompts]), dict[tuple[str, float], float]()
    for setting in sorted(possible, key=lambda s: (s.degenerate > limit, -s.gain, s.predicted_kl)):
        if len(found) == config.finalists:
            break
        kl = harness.kl(meter, setting.mix)
        if kl <= config.max_kl:
            found[setting.atom, setting.coefficient] = kl
    return found


def _choose(
    harness: Harness, tried: Tried, kls: Mapping[tuple[str, float], float], config: EvaluateConfig
) -> Choice | None:
    """The best of the finalists, whose measured KL is `kls`."""
    limit = _degenerate_limit(tried, config)
    allowed = [s for s in tried.settings if s.gain > 0 and s.degenerate <= limit]
    if not allowed:
        return None
    best = min(allowed, key=lambda s: (-s.gain, s.predicted_kl))
    kl = kls[best.atom, best.coefficient]
    return Choice(**tried.shown(best), name=harness.package.card(best.atom).name, kl=kl)


def _degenerate_limit(tried: Tried, config: EvaluateConfig) -> float:
    return max(config.max_degenerate, degenerate_share(tried.unsteered))
