"""What `label --from-detectors` writes: measured effects, sound ranges, and names made of them."""

from __future__ import annotations

from collections.abc import Callable

from atoms.manifest import Effect
from atoms.mix import Mix
from atoms.package import Package
from offline.evaluation.cards import cards_with_measured, measure_atoms

LIST, PROSE, LOOP = "- salt\n- rain", "It is the sea.", "sea sea sea sea sea sea"
PROMPTS = [f"question {n}?" for n in range(4)]


def test_atoms_are_named_by_what_they_raise_and_stronger_evidence_stays(
    scripted: Callable, tiny_package: Package
) -> None:
    lists, nothing = (tiny_package.manifest.atoms[n].id for n in (0, 1))

    def say(prompt: str, mix: Mix) -> str:
        c = mix.as_dict().get(lists, 0.0)
        return LIST if c == 1 else LOOP if c == -1 else PROSE

    harness, _ = scripted(say)
    measured = measure_atoms(tiny_package, harness.answerer, PROMPTS, (-1.0, 1.0))
    assert measured[lists].sound_range == (0.0, 1.0) and measured[nothing].sound_range == (-1.0, 1.0)
    common = {"coefficient": 2.0, "n": 104, "rate_unsteered": 0.0, "rate": 0.6, "prompts": "neutral"}
    held_out, few = Effect(detector="bulleted-list", **common), Effect(detector="yes-no", **(common | {"n": 2}))
    invited = Effect(detector="yes-no", **(common | {"prompts": "inviting"}))
    before = [
        card.model_copy(update={"effects": [held_out, few, invited], "alias": "old"})
        for card in tiny_package.manifest.atoms
    ]
    cards = {card.id: card for card in cards_with_measured(before, measured)}
    assert (cards[lists].alias, cards[nothing].alias) == ("bulleted-list", None)
    kept = [effect for effect in cards[lists].effects if effect.detector == "bulleted-list"]
    assert kept == [held_out], "four answers replaced a hundred"
    shown = [effect for effect in cards[lists].effects if effect.detector == "yes-no"]
    assert invited in shown and few not in shown and len(shown) == 3
