"""`atomsteer evaluate`: choose on development prompts, report on held-out ones. READ FIRST.

A goal is a behaviour to raise on neutral prompts or to lower on inviting ones. For all goals together:

    1 choose    an atom and a coefficient, on development prompts (offline/evaluation/search.py)
    2 control   directions that cost the same measured KL, along the unsteered answers to the held-out prompts
    3 report    unsteered, atom and controls on the held-out prompts, which nothing was chosen on

Answers are kept in a log, control directions in files, so a stopped run goes on where it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atoms.detectors import DETECTORS, get_detector
from atoms.errors import DataError
from atoms.machine import machine
from atoms.mix import Mix
from atoms.storage import recipe_file, sha256_file
from offline.evaluation.answers import Answer
from offline.evaluation.config import EvaluateConfig
from offline.evaluation.controls import EQUAL_KL, kept_control, projection_of, row_controls
from offline.evaluation.document_controls import DocumentControls
from offline.evaluation.harness import Harness
from offline.evaluation.measures import Form, Rate, degenerate_share, outcomes, rate
from offline.evaluation.prompts import EvaluationPrompt, choose_prompts, read_prompts
from offline.evaluation.results import (
    ATOM,
    UNSTEERED,
    Choice,
    Comparison,
    Condition,
    CurvePoint,
    Evaluation,
    Goal,
    GoalResult,
    adjust,
    is_control,
)
from offline.evaluation.search import Prompts, Search, choose_settings, signed_within_range
from offline.progress import Progress
from offline.record import jsonable, versions


@dataclasses.dataclass(frozen=True)
class Contender:
    """What answers a goal's held-out prompts besides the unsteered model, and its measured KL in nats a token."""

    mix: Mix
    kl: float


def evaluate(
    harness: Harness, prompts_file: Path, config: EvaluateConfig, work: Path, progress: Progress,
    documents: DocumentControls | None = None,
) -> Evaluation:  # fmt: skip
    """Runs or resumes an evaluation whose files lie in `work`.

    `documents`: directions of labelled and of random documents, for the controls made of them. Raises UnknownAtomError,
    UnknownDetectorError and DataError for names that do not exist and prompts that are missing, and ConfigError for more than
    one greedy answer a prompt.
    """
    config.check_decoding(harness.answerer.decoding)
    prompts, package = read_prompts(prompts_file), harness.package
    goals = goals_of(prompts, config)
    dev = {goal: _texts(prompts, goal, "dev", config.dev_prompts) for goal in goals}
    heldout = {goal: _texts(prompts, goal, "heldout", config.heldout_prompts) for goal in goals}
    atoms = [package.card(name).id for name in config.atoms] or [card.id for card in package.manifest.atoms]
    searches = choose_settings(harness, dev, atoms, config, progress)
    contenders = _contenders(harness, searches, heldout, config, work, progress, documents or DocumentControls())
    results = _report(harness, searches, contenders, heldout, config, progress)
    return Evaluation(_facts(harness, prompts_file, config), adjust(results))


def goals_of(prompts: Sequence[EvaluationPrompt], config: EvaluateConfig) -> list[Goal]:
    """Every behaviour up and down, as configured. Raises UnknownDetectorError for a behaviour that nothing detects."""
    behaviours = config.behaviours or tuple(dict.fromkeys(row.behaviour for row in prompts))
    return [Goal(get_detector(behaviour).name, wanted) for behaviour in behaviours for wanted in config.wanted]


def _texts(prompts: Sequence[EvaluationPrompt], goal: Goal, split: str, most: int | None) -> list[str]:
    texts = [row.prompt for row in choose_prompts(prompts, goal.behaviour, goal.kind, split, most)]
    if not texts:
        raise DataError(
            f"there is no {goal.kind} {split} prompt of {goal.behaviour!r}; give a prompt file that has some, or choose "
            "other --behaviours"
        )
    return texts


def _facts(harness: Harness, prompts_file: Path, config: EvaluateConfig) -> dict[str, Any]:
    manifest = harness.package.manifest
    return {
        "package": {"name": manifest.name, "version": manifest.version, "content_hash": manifest.content_hash,
                    "base_model": Path(manifest.base_model.id).name, "base_adapter": manifest.adapter_hash,
                    "composition": harness.package.composition},
        "prompts": {"file": prompts_file.name, "sha256": sha256_file(prompts_file)},
        "config": jsonable(dataclasses.asdict(config)),
        "decoding": dataclasses.asdict(harness.answerer.decoding),
        "dtype": harness.dtype,
        "machine": machine(harness.device.type),
        "versions": versions(),
    }  # fmt: skip


def _contenders(
    harness: Harness, searches: Mapping[Goal, Search], heldout: Prompts, config: EvaluateConfig, work: Path,
    progress: Progress, documents: DocumentControls,
) -> dict[Goal, dict[str, Contender]]:  # fmt: skip
    """Condition -> mix and KL of each goal: the chosen atom, and controls that cost as much along the same answers."""
    chosen = {goal: search.choice for goal, search in searches.items() if search.choice}
    unsteered = harness.answer("held-out, unsteered", [(goal, Mix()) for goal in chosen], heldout, progress)
    contenders, projection = {}, projection_of(harness.package)
    with progress.task("controls", len(chosen), "goals") as bar:
        for goal, choice in chosen.items():
            along = unsteered[goal, Mix()][: config.kl_prompts]
            meter, atom = harness.meter(along), Mix.of({choice.atom: choice.coefficient})
            target = harness.kl(meter, atom)
            contenders[goal] = {ATOM: Contender(atom, target)}
            of_rows = row_controls(harness.package, projection, choice.atom, config.random_controls, config.seed)
            for control in (*of_rows, *documents.of(goal)):
                made_of = harness.package.base_adapter.space.hash_tensors(control.direction)
                recipe = [
                    harness.directions.digest(atom),
                    [a.text for a in along],
                    goal.wanted,
                    made_of,
                    control.sign,
                    harness.dtype,
                ]
                file = recipe_file(work / "controls", control.name, recipe)
                direction, kl = kept_control(file, projection, meter, control, target)
                if abs(kl / target - 1) > EQUAL_KL:
                    progress.say(
                        f"  {control.name} for {goal} is left out: it costs {kl:.3g} nats at best, the atom {target:.3g}"
                    )
                    continue
                mix = harness.directions.add(f"{control.name} for {goal}", direction)
                contenders[goal][control.name] = Contender(mix, kl)
            bar.advance()
    return contenders


def _report(
    harness: Harness, searches: Mapping[Goal, Search], contenders: Mapping[Goal, Mapping[str, Contender]],
    heldout: Prompts, config: EvaluateConfig, progress: Progress,
) -> list[GoalResult]:  # fmt: skip
    curves = {goal: _curve(harness, searches[goal].choice, config) for goal in heldout}
    asked = [
        (goal, mix) for goal in heldout
        for mix in (Mix(), *(c.mix for c in contenders.get(goal, {}).values()), *curves[goal].values())
    ]  # fmt: skip
    answers = harness.answer("held-out", asked, heldout, progress)
    results = []
    with progress.task("perplexity", len(heldout), "goals") as bar:
        for goal in heldout:
            given = {UNSTEERED: Contender(Mix(), 0.0), **contenders.get(goal, {})}
            conditions = _conditions(harness, goal, given, {name: answers[goal, c.mix] for name, c in given.items()})
            points = [_point(harness, goal, c, mix, answers[goal, mix]) for c, mix in curves[goal].items()]
            search = searches[goal]
            results.append(GoalResult(goal, search.choice, conditions, tuple(points), search.trials))
            bar.advance()
    return results


def _curve(harness: Harness, choice: Choice | None, config: EvaluateConfig) -> dict[float, Mix]:
    """Coefficient -> mix of the chosen atom at every other coefficient that was allowed."""
    if choice is None or not config.curve:
        return {}
    coefficients = signed_within_range(harness, choice.atom, config.coefficients)
    mixes = {c: Mix.of({choice.atom: c}) for c in sorted(coefficients) if c != choice.coefficient}
    return {c: mix for c, mix in mixes.items() if harness.package.predicted_kl(mix) <= config.max_kl}


def _conditions(
    harness: Harness, goal: Goal, given: Mapping[str, Contender], answers: Mapping[str, Sequence[Answer]]
) -> tuple[Condition, ...]:
    detector = get_detector(goal.behaviour)
    fired = {name: outcomes(texts, detector) for name, texts in answers.items()}
    conditions = []
    for name, contender in given.items():
        control = is_control(name)
        conditions.append(
            Condition(
                name=name,
                rate=Rate.of(fired[name]),
                form=Form.of(answers[name]),
                perplexity=harness.perplexity(answers[name]),
                kl=contender.kl,
                predicted_kl=None if control else harness.package.predicted_kl(contender.mix),
                detectors={other: rate(answers[name], detect) for other, detect in DETECTORS.items()},
                to_unsteered=None if name == UNSTEERED else Comparison.of(fired[UNSTEERED], fired[name]),
                atom_beyond=Comparison.of(fired[name], fired[ATOM]) if control else None,
            )
        )
    return tuple(conditions)


def _point(harness: Harness, goal: Goal, coefficient: float, mix: Mix, answers: Sequence[Answer]) -> CurvePoint:
    shown = Rate.of(outcomes(answers, get_detector(goal.behaviour)))
    return CurvePoint(coefficient, shown, degenerate_share(answers), harness.package.predicted_kl(mix))
