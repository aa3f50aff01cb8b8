"""The protocol, with scripted answers: what is chosen, on which prompts, within which limits, and what is reported."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from atoms.detectors import DETECTORS
from atoms.errors import ConfigError, DataError, UnknownAtomError, UnknownDetectorError
from atoms.manifest import Effect
from atoms.mix import Mix
from atoms.package import Package
from atoms.storage import sha256_file
from offline.evaluation.answers import AnswerLog, Decoding
from offline.evaluation.config import EvaluateConfig
from offline.evaluation.document_controls import DocumentControls
from offline.evaluation.evaluate import evaluate
from offline.evaluation.results import ATOM, UNSTEERED, Evaluation, cards_with_effects, table_rows, to_csv
from offline.evaluation.search import Setting, best_settings
from offline.evaluation.statistics import PairedTable, holm, mcnemar_p, paired_interval
from offline.progress import Progress

LIST, PROSE, LOOP = "- salt\n- rain", "It is the sea.", "sea sea sea sea sea sea"
DEV, HELDOUT = 8, 20


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    rows = [
        {"id": f"{kind}-{split}-{n}", "behaviour": "bulleted-list", "kind": kind, "split": split,
         "prompt": f"{kind} {split} question {n}?"}
        for kind in ("neutral", "inviting") for split, count in (("dev", DEV), ("heldout", HELDOUT)) for n in range(count)
    ]  # fmt: skip
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def config() -> EvaluateConfig:
    return EvaluateConfig(coefficients=(0.5, 1.0), screen_coefficient=1.0, screen_prompts=2, shortlist=2, candidates=2, max_kl=1e9,
                          kl_prompts=4, random_controls=2)  # fmt: skip


def number(prompt: str) -> int:
    return int(prompt.rstrip("?").split()[-1])


def script(good: str) -> Callable[[str, Mix], str]:
    """Atom `good` at +1 lists on four prompts of five, at +0.5 on two of five; at -1 it stops the inviting prompts' lists."""

    def say(prompt: str, mix: Mix) -> str:
        c = mix.as_dict().get(good, 0.0)
        if prompt.startswith("inviting"):
            return PROSE if c <= -1 and number(prompt) % 4 else LIST
        return LIST if (c >= 1 and number(prompt) % 5) or (c == 0.5 and number(prompt) % 5 < 2) else PROSE

    return say


def run(
    harness, prompts: Path, config: EvaluateConfig, work: Path, documents: DocumentControls | None = None
) -> Evaluation:
    return evaluate(harness, prompts, config, work, Progress(quiet=True), documents)


def test_the_best_setting_is_chosen_on_dev_and_reported_on_heldout(
    scripted: Callable, tiny_package: Package, prompts: Path, config: EvaluateConfig, tmp_path: Path
) -> None:
    good = tiny_package.manifest.atoms[-1].id
    harness, _ = scripted(script(good))
    evaluation = run(harness, prompts, config, tmp_path)
    up, down = evaluation.goals
    assert (up.choice.atom, up.choice.coefficient, up.choice.n) == (good, 1.0, DEV)
    assert (down.choice.atom, down.choice.coefficient) == (good, -1.0)
    assert up.choice.rate == sum(n % 5 > 0 for n in range(DEV)) / DEV
    atom, unsteered = up.condition(ATOM), up.condition(UNSTEERED)
    assert (unsteered.rate.count, atom.rate.count, atom.rate.n) == (0, 16, HELDOUT)
    table = PairedTable(0, 0, 16, 4)
    change = atom.to_unsteered
    assert (change.difference, change.p) == (0.8, mcnemar_p(table))
    assert (change.low, change.high) == paired_interval(table)
    assert down.condition(ATOM).to_unsteered.difference == -0.75
    adjusted = holm([change.p, down.condition(ATOM).to_unsteered.p])
    assert [g.condition(ATOM).to_unsteered.p_holm for g in (up, down)] == pytest.approx(adjusted)
    assert evaluation.facts["prompts"] == {"file": "prompts.jsonl", "sha256": sha256_file(prompts)}
    assert evaluation.facts["package"]["base_adapter"] == tiny_package.manifest.adapter_hash
    assert "torch" in evaluation.facts["machine"]
    assert [(p.coefficient, p.rate.count) for p in up.curve] == [(-1.0, 0), (-0.5, 0), (0.5, 8)]


def test_controls_cost_what_the_atom_costs_and_are_compared_with_it(
    scripted: Callable, tiny_package: Package, prompts: Path, config: EvaluateConfig, tmp_path: Path
) -> None:
    harness, _ = scripted(script(tiny_package.manifest.atoms[0].id))
    made = [tiny_package.bank.direction(Mix.of({atom.id: 1.0})) for atom in tiny_package.manifest.atoms[:2]]
    up = run(harness, prompts, config, tmp_path, DocumentControls({"yes-no": made[0]}, made)).goals[0]
    controls = [c for c in up.conditions if c.name not in (ATOM, UNSTEERED)]
    assert [c.name for c in controls] == [
        "shuffled",
        "random-1",
        "random-2",
        "random-documents-1",
        "random-documents-2",
    ]
    atom = up.condition(ATOM)
    for control in controls:
        assert control.kl == pytest.approx(atom.kl, rel=0.05) and control.predicted_kl is None
        assert control.rate.count == 0 and control.atom_beyond.difference == 0.8
        assert control.atom_beyond.p <= control.atom_beyond.p_holm <= 1
    assert up.condition(UNSTEERED).kl == 0.0
    assert atom.predicted_kl == pytest.approx(
        tiny_package.predicted_kl(Mix.of({up.choice.atom: up.choice.coefficient}))
    )


def test_heldout_prompts_do_not_reach_the_choice(
    scripted: Callable, tiny_package: Package, prompts: Path, config: EvaluateConfig, tmp_path: Path
) -> None:
    """One atom shines on dev prompts, another on held-out ones: the first is chosen, and reported with its failure."""
    shines, hidden = (tiny_package.manifest.atoms[n].id for n in (0, 1))

    def say(prompt: str, mix: Mix) -> str:
        return LIST if mix.as_dict().get(shines if " dev " in prompt else hidden) == 1.0 else PROSE

    harness, _ = scripted(say)
    (up,) = run(harness, prompts, dataclasses.replace(config, wanted=("up",)), tmp_path).goals
    assert up.choice.atom == shines and up.choice.rate == 1.0
    assert up.condition(ATOM).rate.count == 0 and up.condition(ATOM).to_unsteered.p == 1.0


@pytest.mark.parametrize("limit", ["degenerate", "predicted", "measured"])
def test_settings_beyond_a_limit_are_not_chosen(
    scripted: Callable, tiny_package: Package, prompts: Path, config: EvaluateConfig, tmp_path: Path, limit: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    good = tiny_package.manifest.atoms[0].id
    plain = script(good)
    strong = Mix.of({good: 1.0})

    def say(prompt: str, mix: Mix) -> str:
        return LOOP if limit == "degenerate" and mix == strong and number(prompt) == 0 else plain(prompt, mix)

    harness, _ = scripted(say)
    if limit == "predicted":
        monkeypatch.setattr(Package, "predicted_kl", lambda self, mix: 99.0 if mix == strong else 0.1)
        config = dataclasses.replace(config, max_kl=0.5)
    if limit == "measured":
        measured = harness.kl
        monkeypatch.setattr(Package, "predicted_kl", lambda self, mix: 0.1)
        monkeypatch.setattr(harness, "kl", lambda meter, mix: 99.0 if mix == strong else min(0.4, measured(meter, mix)))
        config = dataclasses.replace(config, max_kl=0.5)
    (up,) = run(harness, prompts, dataclasses.replace(config, wanted=("up",)), tmp_path).goals
    assert (up.choice.atom, up.choice.coefficient) == (good, 0.5)


@pytest.mark.parametrize(("samples", "chosen"), [(1, 1.0), (3, 0.5)])
def test_further_samples_show_what_the_first_ones_hid(
    scripted: Callable, tiny_package: Package, prompts: Path, config: EvaluateConfig, tmp_path: Path, samples: int,
    chosen: float,
) -> None:  # fmt: skip
    """The strong setting loops in every answer but the first to a development prompt."""
    good = tiny_package.manifest.atoms[0].id
    plain, strong, said = script(good), Mix.of({good: 1.0}), Counter()

    def say(prompt: str, mix: Mix) -> str:
        said[prompt, mix] += 1
        again = " dev " in prompt and mix == strong and said[prompt, mix] > 1
        return LOOP if again else plain(prompt, mix)

    harness, _ = scripted(say, AnswerLog(tmp_path / "log.jsonl"), Decoding(16, temperature=1.0))
    changed = dataclasses.replace(config, wanted=("up",), dev_samples=samples)
    (up,) = run(harness, prompts, changed, tmp_path).goals
    assert (up.choice.atom, up.choice.coefficient, up.choice.n) == (good, chosen, DEV * samples)
    assert up.condition(ATOM).rate.n == HELDOUT, "one answer a held-out prompt: the tests are of pairs"
    first, last = ([t for t in up.trials if t.round == stage and (t.atom, t.coefficient) == (good, 1.0)]
                   for stage in ("choose", "confirm"))  # fmt: skip
    assert [(t.n, t.degenerate) for t in (*first, *last)] == [
        (DEV, 0),
        (DEV * samples, pytest.approx(1 - 1 / samples)),
    ], "why the strong setting was not taken is kept"
    assert {t.rate_unsteered for t in up.trials} == {0.0} and last[0].kl is not None


@pytest.mark.parametrize(("samples", "finalists", "chosen"), [(1, 6, 0.5), (3, 6, 1.0), (3, 1, 0.5)])
def test_a_few_loops_are_looked_at_again(
    scripted: Callable, tiny_package: Package, prompts: Path, config: EvaluateConfig, tmp_path: Path, samples: int,
    finalists: int, chosen: float,
) -> None:  # fmt: skip
    """The strong setting loops once, by chance in a first answer: 1 of 8 is above the limit, 1 of 24 is not. Where only one
    setting is looked at again it is the best of those within the limits."""
    good = tiny_package.manifest.atoms[0].id
    plain, strong, looped = script(good), Mix.of({good: 1.0}), Counter()

    def say(prompt: str, mix: Mix) -> str:
        if mix == strong and prompt.endswith(" dev question 0?"):
            looped[prompt] += 1
            return LOOP if looped[prompt] == 1 else plain(prompt, mix)
        return plain(prompt, mix)

    harness, _ = scripted(say, AnswerLog(tmp_path / "log.jsonl"), Decoding(16, temperature=1.0))
    changed = dataclasses.replace(config, wanted=("up",), candidates=9, finalists=finalists, dev_samples=samples)
    (up,) = run(harness, prompts, changed, tmp_path).goals
    assert (up.choice.atom, up.choice.coefficient, up.choice.n) == (good, chosen, DEV * samples)


def test_further_greedy_answers_are_refused(scripted: Callable, prompts: Path, tmp_path: Path) -> None:
    harness, engine = scripted(lambda prompt, mix: PROSE)
    with pytest.raises(ConfigError, match="dev_samples is 3, but greedy answers .* temperature above 0"):
        run(harness, prompts, EvaluateConfig(dev_samples=3), tmp_path)
    assert engine.asked == 0


def test_of_atoms_that_gain_as_much_one_that_works_both_ways_is_tried_first() -> None:
    def setting(atom: str, coefficient: float, gain: float, kl: float) -> Setting:
        return Setting(atom, coefficient, n=6, rate=0.5, gain=gain, degenerate=0.0, predicted_kl=kl)

    settings = [
        setting("cheap", -2, 0.6, 0.1), setting("cheap", 2, 0.6, 0.1),  # stops the behaviour whatever its sign
        setting("own", -2, 0.6, 0.3), setting("own", 2, -0.4, 0.3),
        setting("cheaper", -2, 0.6, 0.05), setting("cheaper", 2, 0.6, 0.05),
        setting("best", 2, 0.7, 0.4),  # its range has no other side
        setting("worse", -2, 0.1, 0.1), setting("worse", 2, -0.6, 0.1),
    ]  # fmt: skip
    assert [s.atom for s in best_settings(settings, 4)] == ["best", "own", "cheaper", "cheap"]


def test_no_choice_is_said_so(scripted: Callable, prompts: Path, config: EvaluateConfig, tmp_path: Path) -> None:
    harness, _ = scripted(lambda prompt, mix: PROSE)
    evaluation = run(harness, prompts, config, tmp_path)
    assert [goal.choice for goal in evaluation.goals] == [None, None]
    assert [[c.name for c in goal.conditions] for goal in evaluation.goals] == [[UNSTEERED], [UNSTEERED]]
    json.dumps(evaluation.as_json(), allow_nan=False)


def test_coefficients_outside_the_tested_range_are_not_tried(
    scripted: Callable, tiny_package: Package, prompts: Path, config: EvaluateConfig, tmp_path: Path
) -> None:
    low, high = tiny_package.manifest.atoms[0].tested_range
    tried: set[float] = set()
    harness, _ = scripted(lambda prompt, mix: tried.update(mix.as_dict().values()) or PROSE)
    run(harness, prompts, dataclasses.replace(config, coefficients=(1.0, high + 1)), tmp_path)
    assert tried and all(low <= c <= high for c in tried)


def test_screening_stays_within_the_tested_range(
    scripted: Callable, tiny_package: Package, prompts: Path, config: EvaluateConfig, tmp_path: Path
) -> None:
    """A screening coefficient beyond the range of the atoms must not leave a goal without candidates."""
    good = tiny_package.manifest.atoms[-1]
    harness, _ = scripted(script(good.id))
    assert good.tested_range == (-1.0, 1.0) and len(tiny_package.manifest.atoms) > 1
    config = dataclasses.replace(
        config, screen_coefficient=5.0, shortlist=1, candidates=1
    )  # fewer than atoms, or none is screened
    up, down = run(harness, prompts, config, tmp_path).goals
    assert (up.choice.atom, up.choice.coefficient, down.choice.coefficient) == (good.id, 1.0, -1.0)


@pytest.mark.parametrize("places", [(0, 1), (1, 0)])
def test_what_few_prompts_show_is_looked_at_on_all(
    scripted: Callable, tiny_package: Package, prompts: Path, config: EvaluateConfig, tmp_path: Path,
    places: tuple[int, int],
) -> None:  # fmt: skip
    """On the two prompts of the first screening another atom gains as much; one of the two costs less."""
    lucky, good = (tiny_package.manifest.atoms[place].id for place in places)

    def say(prompt: str, mix: Mix) -> str:
        strength = mix.as_dict()
        works = strength.get(good) == 1 or (strength.get(lucky, 0) > 0 and number(prompt) < 2)
        return LIST if works else PROSE

    harness, _ = scripted(say)
    (up,) = run(
        harness, prompts, dataclasses.replace(config, wanted=("up",), shortlist=2, candidates=1), tmp_path
    ).goals
    assert (up.choice.atom, up.choice.coefficient, up.choice.rate) == (good, 1.0, 1.0)


@pytest.mark.parametrize("place", range(3))
def test_screening_asks_what_is_not_yet_as_wanted(
    scripted: Callable, tiny_package: Package, prompts: Path, config: EvaluateConfig, tmp_path: Path, place: int
) -> None:
    """The first inviting prompts invite in vain, and a model that lists anyway answers the first neutral ones: no atom shows
    there, so the one that works is found only where it can."""
    good = tiny_package.manifest.atoms[place].id

    def say(prompt: str, mix: Mix) -> str:
        c, inviting = mix.as_dict().get(good, 0.0), prompt.startswith("inviting")
        if c == (-1.0 if inviting else 1.0):
            return PROSE if inviting else LIST
        return LIST if (number(prompt) >= 4) == inviting else PROSE

    harness, _ = scripted(say)
    up, down = run(harness, prompts, dataclasses.replace(config, shortlist=1, candidates=1), tmp_path).goals
    assert (up.choice.atom, up.choice.coefficient, up.choice.rate_unsteered) == (good, 1.0, 0.5)
    assert (down.choice.atom, down.choice.coefficient, down.choice.rate_unsteered) == (good, -1.0, 0.5)


def test_a_second_run_generates_nothing_and_says_the_same(
    scripted: Callable, tiny_package: Package, prompts: Path, config: EvaluateConfig, tmp_path: Path
) -> None:
    say = script(tiny_package.manifest.atoms[0].id)
    harness, _ = scripted(say, AnswerLog(tmp_path / "answers.jsonl"))
    first = run(harness, prompts, config, tmp_path)
    harness.close()
    again, engine = scripted(say, AnswerLog(tmp_path / "answers.jsonl"))
    assert run(again, prompts, config, tmp_path) == first
    assert engine.asked == 0


def test_results_are_flat_rows_and_card_entries(
    scripted: Callable, tiny_package: Package, prompts: Path, config: EvaluateConfig, tmp_path: Path
) -> None:
    good = tiny_package.manifest.atoms[0].id
    harness, _ = scripted(script(good))
    evaluation = run(harness, prompts, config, tmp_path)
    rows = list(csv.DictReader(io.StringIO(to_csv(table_rows(evaluation)))))
    assert len(rows) == 2 * 5 and {row["condition"] for row in rows} == {
        UNSTEERED,
        ATOM,
        "shuffled",
        "random-1",
        "random-2",
    }
    atom = next(row for row in rows if row["condition"] == ATOM and row["goal"] == "up")
    assert (float(atom["rate"]), float(atom["change"]), float(atom["coefficient"])) == (0.8, 0.8, 1.0)
    side_effects = evaluation.as_json()["goals"][0]["conditions"][1]["detectors"]
    assert side_effects["bulleted-list"] == 0.8 and set(side_effects) == set(DETECTORS)
    cards = cards_with_effects(tiny_package.manifest.atoms, evaluation)
    effects = {(e.series, e.coefficient): (e.prompts, e.rate_unsteered, e.rate, e.n) for e in cards[0].effects}
    assert effects == {
        ("bulleted-list", 1.0): ("neutral", 0, 0.8, HELDOUT), ("bulleted-list", 0.5): ("neutral", 0, 0.4, HELDOUT),
        ("bulleted-list (invited)", -1.0): ("inviting", 1, 0.25, HELDOUT),
        ("bulleted-list (invited)", -0.5): ("inviting", 1, 1, HELDOUT),
    }, "what lowers a behaviour was measured from another unsteered rate than what raises it"  # fmt: skip
    chosen = next(e for e in cards[0].effects if e.coefficient == 1.0)
    random = next(row for row in rows if row["condition"] == "random-1" and row["goal"] == "up")
    assert (chosen.kl, chosen.degenerate, chosen.rate_random) == (
        float(atom["kl"]), float(atom["degenerate"]), float(random["rate"])
    )  # fmt: skip
    assert cards[1:] == tiny_package.manifest.atoms[1:]
    twice = cards_with_effects(cards, evaluation)
    assert twice == cards, "the same results again must not pile up"
    sampled = dataclasses.replace(
        evaluation, facts={**evaluation.facts, "decoding": {"temperature": 0.7, "top_p": 0.9}}
    )
    other = Effect(detector="yes-no", coefficient=2.0, n=9, rate_unsteered=0, rate=1)
    elsewhere = Effect(detector="bulleted-list", coefficient=3.0, n=9, rate_unsteered=0.5, rate=1, prompts="neutral")
    # of prompts that nobody noted
    old = Effect(detector="bulleted-list", coefficient=-3.0, n=9, rate_unsteered=0.9, rate=0)
    mixed = [cards[0].model_copy(update={"effects": [*cards[0].effects, other, elsewhere, old]}), *cards[1:]]
    assert {(e.series, e.decoding) for e in cards_with_effects(mixed, sampled)[0].effects} == {
        ("bulleted-list", "temperature 0.7, top-p 0.9"), ("bulleted-list (invited)", "temperature 0.7, top-p 0.9"),
        ("yes-no", "greedy")
    }, "a curve is of one set of prompts and one temperature"  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"behaviours": ("opera",)}, UnknownDetectorError, "opera"),
        ({"behaviours": ("rhyme",)}, DataError, "rhyme"),
        ({"atoms": ("nobody",)}, UnknownAtomError, "nobody"),
    ],
    ids=["detector", "prompts", "atom"],
)
def test_names_that_do_not_exist_are_refused_before_any_answer(
    scripted: Callable, prompts: Path, config: EvaluateConfig, tmp_path: Path, change: dict, error: type, named: str
) -> None:
    harness, engine = scripted(lambda prompt, mix: PROSE)
    with pytest.raises(error, match=named):
        run(harness, prompts, dataclasses.replace(config, **change), tmp_path)
    assert engine.asked == 0


@pytest.mark.parametrize(
    "change",
    [{"coefficients": ()}, {"coefficients": (-1.0,)}, {"coefficients": (float("nan"),)}, {"wanted": ("sideways",)},
     {"max_kl": 0.0}, {"max_degenerate": 1.5}, {"heldout_prompts": 0}, {"random_controls": -1}],
    ids=str,
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(change: dict) -> None:
    with pytest.raises(ConfigError, match="must be"):
        EvaluateConfig(**change)
