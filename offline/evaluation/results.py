"""What an evaluation finds, as frozen values, and its JSON, its table of rows, and its entries in a package's cards."""

from __future__ import annotations

import csv
import dataclasses
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from atoms.manifest import AtomCard, Effect
from offline.evaluation.measures import Form, Rate
from offline.evaluation.statistics import PairedTable, holm, mcnemar_p, paired_interval

Wanted = Literal["up", "down"]
Round = Literal["choose", "confirm"]
"""The rounds of the search that try settings on all development prompts (offline/evaluation/search.py)."""
ATOM, UNSTEERED = "atom", "unsteered"
RANDOM, SHUFFLED, RANDOM_DOCUMENTS, SUPERVISED = "random", "shuffled", "random-documents", "supervised"
"""Kinds of conditions; the last four are the controls (offline/evaluation/controls.py)."""


@dataclass(frozen=True, slots=True)
class Goal:
    """Raise a behaviour on neutral prompts (up), or lower it on inviting ones (down)."""

    behaviour: str
    wanted: Wanted

    @property
    def kind(self) -> Literal["neutral", "inviting"]:
        return "neutral" if self.wanted == "up" else "inviting"

    @property
    def sign(self) -> int:
        return 1 if self.wanted == "up" else -1

    def __str__(self) -> str:
        return f"{self.behaviour} {self.wanted}"


@dataclass(frozen=True, slots=True)
class Shown:
    """What one atom at one coefficient did on a goal's development prompts.

    `n` answers, of which `rate` showed the behaviour and `degenerate` were none; `rate_unsteered` is of as many unsteered
    ones. KL in nats a token.
    """

    atom: str
    coefficient: float
    n: int
    rate_unsteered: float
    rate: float
    degenerate: float
    predicted_kl: float


@dataclass(frozen=True, slots=True)
class Trial(Shown):
    """A setting that was tried in one round of the search; `kl` is None where it was not measured."""

    round: Round
    kl: float | None


@dataclass(frozen=True, slots=True)
class Choice(Shown):
    """The setting chosen for a goal. `name` is the atom's."""

    name: str
    kl: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """A paired difference of rates with its 95% interval (Newcombe), and McNemar's exact p, alone and Holm-adjusted."""

    difference: float
    low: float
    high: float
    p: float
    p_holm: float = 1.0

    @classmethod
    def of(cls, before: Sequence[bool], after: Sequence[bool]) -> Comparison:
        table = PairedTable.of(before, after)
        return cls(table.difference, *paired_interval(table), mcnemar_p(table))


@dataclass(frozen=True, slots=True)
class Condition:
    """One way of answering a goal's held-out prompts: unsteered, the atom, or a control of the same KL.

    `detectors` are the shares on which every detector fires, for what else changes. `to_unsteered` is this minus unsteered;
    `atom_beyond` is the atom minus this control.
    """

    name: str
    rate: Rate
    form: Form
    perplexity: float
    kl: float
    predicted_kl: float | None
    detectors: Mapping[str, float] = field(default_factory=dict)
    to_unsteered: Comparison | None = None
    atom_beyond: Comparison | None = None

    @property
    def kind(self) -> str:
        """The name without the number of a draw."""
        return re.sub(r"-\d+$", "", self.name)

    @property
    def is_control(self) -> bool:
        return is_control(self.name)


def is_control(name: str) -> bool:
    """Whether the condition of this name is a control."""
    return name not in (ATOM, UNSTEERED)


def drawn(kind: str, number: int) -> str:
    """The name of the condition of draw `number`, from 1, of a random control."""
    return f"{kind}-{number}"


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """The chosen atom at another coefficient, on the same held-out prompts."""

    coefficient: float
    rate: Rate
    degenerate: float
    predicted_kl: float


@dataclass(frozen=True, slots=True)
class GoalResult:
    """`choice` None: no setting moved the behaviour as wanted within the limits; then only unsteered is reported.

    `trials`: what the choice was made from.
    """

    goal: Goal
    choice: Choice | None
    conditions: tuple[Condition, ...]
    curve: tuple[CurvePoint, ...] = ()
    trials: tuple[Trial, ...] = ()

    def condition(self, name: str) -> Condition | None:
        return next((c for c in self.conditions if c.name == name), None)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All goals, with the facts that make the run repeatable: package, prompts by hash, settings, versions."""

    facts: Mapping[str, Any]
    goals: tuple[GoalResult, ...]

    def as_json(self) -> dict[str, Any]:
        return {**self.facts, "goals": [dataclasses.asdict(goal) for goal in self.goals]}


def adjust(goals: Sequence[GoalResult]) -> tuple[GoalResult, ...]:
    """Holm's correction over all goals: one family of the atoms' effects, another of atoms against controls."""
    effects = _holm_by_place(goals, lambda c: c.to_unsteered if c.name == ATOM else None)
    beyond = _holm_by_place(goals, lambda c: c.atom_beyond)
    return tuple(
        dataclasses.replace(goal, conditions=tuple(
            dataclasses.replace(c, to_unsteered=effects.get((g, n), c.to_unsteered),
                                atom_beyond=beyond.get((g, n), c.atom_beyond))
            for n, c in enumerate(goal.conditions)))
        for g, goal in enumerate(goals)
    )  # fmt: skip


def _holm_by_place(
    goals: Sequence[GoalResult], pick: Callable[[Condition], Comparison | None]
) -> dict[tuple[int, int], Comparison]:
    """The comparisons that `pick` finds, by (goal, condition), adjusted together."""
    places = {(g, n): picked for g, goal in enumerate(goals) for n, c in enumerate(goal.conditions)
              if (picked := pick(c)) is not None}  # fmt: skip
    adjusted = holm([comparison.p for comparison in places.values()])
    return {place: dataclasses.replace(c, p_holm=p) for (place, c), p in zip(places.items(), adjusted, strict=True)}


def table_rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    """One flat row a goal and condition, for CSV and people."""
    rows = []
    for result in evaluation.goals:
        for c in result.conditions:
            row: dict[str, Any] = {
                "behaviour": result.goal.behaviour, "goal": result.goal.wanted, "prompts": result.goal.kind,
                "condition": c.name, "atom": result.choice.name if result.choice and c.name == ATOM else None,
                "coefficient": result.choice.coefficient if result.choice and c.name == ATOM else None,
                "n": c.rate.n, "count": c.rate.count, "rate": c.rate.share, "rate_low": c.rate.low, "rate_high": c.rate.high,
                "kl": c.kl, "predicted_kl": c.predicted_kl, "perplexity": c.perplexity, **dataclasses.asdict(c.form),
                **evaluation.facts["decoding"],
            }  # fmt: skip
            for prefix, comparison in (("change", c.to_unsteered), ("atom_beyond", c.atom_beyond)):
                values = dataclasses.asdict(comparison) if comparison else {}
                row[prefix] = values.get("difference")
                row |= {f"{prefix}_{key}": values.get(key) for key in ("low", "high", "p", "p_holm")}
            rows.append(row)
    return rows


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as CSV text; None is an empty field."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def cards_with_effects(cards: Sequence[AtomCard], evaluation: Evaluation) -> list[AtomCard]:
    """Cards in which the held-out results replace all that stood there of the same detector on the same kind of prompts: these
    rates make one curve, of one set of prompts and one decoding."""
    decoding = {key: evaluation.facts["decoding"][key] for key in ("temperature", "top_p")}
    measured: dict[str, list[Effect]] = {}
    for result in evaluation.goals:
        unsteered, atom = result.condition(UNSTEERED), result.condition(ATOM)
        if result.choice is None or unsteered is None or atom is None:
            continue
        random, chosen = result.condition(drawn(RANDOM, 1)), result.choice.coefficient
        common = {"detector": result.goal.behaviour, "prompts": result.goal.kind, "n": unsteered.rate.n,
                  "rate_unsteered": unsteered.rate.share, **decoding}  # fmt: skip
        side = [Effect(coefficient=point.coefficient, rate=point.rate.share, degenerate=point.degenerate, **common)
                for point in result.curve if point.coefficient * chosen > 0]  # fmt: skip
        best = Effect(coefficient=chosen, rate=atom.rate.share, degenerate=atom.form.degenerate, kl=atom.kl,
                      rate_random=random.rate.share if random else None, **common)  # fmt: skip
        measured.setdefault(result.choice.atom, []).extend(sorted([*side, best], key=lambda effect: effect.coefficient))
    return [card.model_copy(update={"effects": _merged(card.effects, measured.get(card.id, []))}) for card in cards]


def _merged(old: Sequence[Effect], new: Sequence[Effect]) -> list[Effect]:
    """`new` in place of what is of the same series, and of older effects of its detectors, which may be of either."""
    series, detectors = {effect.series for effect in new}, {effect.detector for effect in new}
    kept = [e for e in old if e.series not in series and not (e.prompts is None and e.detector in detectors)]
    return [*kept, *new]
