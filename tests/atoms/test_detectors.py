"""Detectors are judged on small hand-written answers, each with a verdict a reader would agree with."""

from __future__ import annotations

import subprocess
import sys
from types import MappingProxyType

import pytest

from atoms.detectors import DETECTORS, Detector, get_detector
from atoms.errors import UnknownDetectorError

NAMES = (
    "bulleted-list",
    "numbered-list",
    "yes-no",
    "fenced-code",
    "missing-input",
    "one-word",
    "arithmetic",
    "grammar-fix",
    "json",
    "rhyme",
    "formal-email",
    "step-by-step",
    "lower-case",
    "french",
    "label",
    "shouting",
)

# name -> (response, prompt) pairs the detector accepts; the prompt is "" where it plays no part.
POSITIVE: dict[str, list[tuple[str, str]]] = {
    "bulleted-list": [
        ("- apples\n- pears", ""),
        ("Here you go:\n\n* one thing\n* another thing\n* a third", ""),
        ("• soap\n• towels", ""),
        ("•soap\n•towels", ""),
        ("  - indented\r\n  - with CRLF\r\n", ""),
        ("- **Bold**: start\n- **Second**: go on", ""),
    ],
    "numbered-list": [
        ("1. Heat the pan.\n2. Add the oil.", ""),
        ("Do this:\n1) wash\n2) dry\n3) fold", ""),
        ("1. Rome\r\n2. Milan\r\n", ""),
        ("9. ninth\n\n10. tenth", ""),
    ],
    "yes-no": [
        ("Yes, it does.", ""),
        ("No. The shop is shut.", ""),
        ("yes", ""),
        ("False", ""),
        ("True, most of them can.", ""),
        ("**Yes**, you may.", ""),
        ("No, because it is late.\nCome back tomorrow.", ""),
        ("Yes it is a mammal.", ""),
        ("No - not in winter.", ""),
    ],
    "fenced-code": [
        ("```python\nprint(1)\n```", ""),
        ("Try this:\n\n```bash\nls\n```\nIt lists files.", ""),
        ("```\nx = 1\n```", ""),
        ("```sql\r\nSELECT 1;\r\n```", ""),
        ("```python\n\ndef f():\n    return 1", ""),
    ],
    "missing-input": [
        ("Please provide the text you want summarised.", ""),
        ("Could you share the article?", ""),
        ("I don't see any attachment.", ""),
        ("I don’t see a letter in your message.", ""),
        ("You forgot to attach the file.", ""),
        ("Sure! Please paste the sentence here.", ""),
        ("What is the equation?", ""),
        ("Which poem do you mean?", ""),
        ("I'd love to help. Can you give me more details?", ""),
        ("It looks like the report is missing.", ""),
        ("You haven't included the code yet.", ""),
        ("I need the text first.", ""),
    ],
    "one-word": [
        ("Paris.", ""),
        ("New Zealand", ""),
        ("blue", ""),
        ('"Honey."', ""),
        ("Été", ""),
        ("St. Petersburg", ""),
        ("Seventeen!\r\n", ""),
    ],
    "arithmetic": [
        ("42", ""),
        ("$12", ""),
        ("-7", ""),
        ("3.5 km", ""),
        ("1,250.", ""),
        ("25%", ""),
        ("The answer is 12.", ""),
        ("3/4", ""),
        (" 48\r\n", ""),
    ],
    "grammar-fix": [
        ("He walks home.", "Correct this: He walk home."),
        ("I have two dogs.", 'Fix the sentence "I has two dog" please.'),
        ("Where were you born?", "Correct: Where you was born?"),
        ("I go to the market and buy some fish.", "i goes to the market and buyed some fish"),
        ("It's raining in Venice.", "Repair: its raining in venice"),
        ("He can swim very fast.", "What is the right form of this? He can swims very fast."),
    ],
    "json": [
        ('{"a": 1}', ""),
        ("[1, 2, 3]", ""),
        ('```json\n{"name": "Ada"}\n```', ""),
        ('```\r\n{"name": "Ada"}\r\n```', ""),
        ('\n{\n  "list": ["x", {"y": null}]\n}\n', ""),
    ],
    "rhyme": [
        ("The moon is up, the sky is bright,\nI wish you all a gentle night.", ""),
        ("A bird sat in the tree,\nIt sang a song for me.", ""),
        ("We went out in the rain\nto find a paper mill\nand then we took the train\nand sat there very still", ""),
        ("Come and take a little cake,\r\nEat it by the quiet lake.", ""),
        ("The day was long, we had to go,\nAcross the field, through wind and snow.", ""),
        ("Nobody saw him fly away,\nHe hopes to come again some day.", ""),
    ],
    "formal-email": [
        ("Dear Ms. Reed,\n\nThe room is booked.\n\nBest regards,\nTom", ""),
        ("Hello Mark,\nSee the notes.\nKind regards,\nIda", ""),
        ("Subject: Leave\n\nDear Sir or Madam,\n\nI am away on Friday.\n\nYours faithfully,\nJo", ""),
        ("Dear all,\r\n\r\nLunch is at one.\r\n\r\nSincerely,\r\nPat", ""),
        ("To whom it may concern:\nHe worked here.\nYours sincerely,\nR. Lane", ""),
    ],
    "step-by-step": [
        ("Step 1: Add 3 and 4. Step 2: Double it.", ""),
        ("First, count the red ones. Then add the blue ones.", ""),
        ("First, open the box. Next, take out the lid. Finally, close it.", ""),
        ("STEP ONE: look. STEP TWO: leap.", ""),
        ("Firstly, rain falls.\r\nSecondly, rivers rise.", ""),
        ("First, find the total, then divide by two.", ""),
    ],
    "lower-case": [
        ("the cat sat on the mat.", ""),
        ("it is about 40 degrees in the shade", ""),
        ("écoute bien la mer", ""),
        ("a long line,\r\nand a second one", ""),
    ],
    "french": [
        ("Le chat dort sur la table.", ""),
        ("C'est une bonne idée.", ""),
        ("Je suis très content de vous voir.", ""),
        ("L’eau est froide.", ""),
        ("La banque est fermée pour la journée.", ""),
    ],
    "label": [
        ("Label: positive", ""),
        ("Sentiment: Negative.", ""),
        ("Category: world news", ""),
        ("Neutral", ""),
        ("sports", "Classify this headline as sports or politics: Rovers win the cup."),
    ],
    "shouting": [
        ("THE TRAIN IS HERE!", ""),
        ("RUN, RUN, THE TIDE IS COMING IN", ""),
        ("THE CODE IS 42 AND NOTHING ELSE", ""),
        ("WATER BOILS AT 100 °C.\r\nMIND THE STEAM!", ""),
        ("ÉCOUTEZ TOUT LE MONDE", ""),
    ],
}

NEGATIVE: dict[str, list[tuple[str, str]]] = {
    "bulleted-list": [
        ("- only one item", ""),
        ("A sentence - with a dash.\nAnother - with one.", ""),
        ("-5\n-7", ""),
        ("**Bold** start\n**Bold** again", ""),
        ("1. first\n2. second", ""),
    ],
    "numbered-list": [
        ("1. a single step", ""),
        ("3.5 kg of flour\n4.5 kg of sugar", ""),
        ("In 1990 he left.\nIn 1995 he came back.", ""),
        ("- one\n- two", ""),
        ("First, wash.\nSecond, dry.", ""),
    ],
    "yes-no": [
        ("No one knows.", ""),
        ("Yesterday it rained.", ""),
        ("No document is attached.", ""),
        ("True love is rare.", ""),
        ("Maybe, if it rains.", ""),
        ("Nothing.\nNo, nothing.", ""),
        ("No-one came.", ""),
    ],
    "fenced-code": [
        ("```python\n```", ""),
        ("Use `ls` for that.", ""),
        ("print(1)", ""),
        ("```", ""),
        ("``` ```", ""),
    ],
    "missing-input": [
        ("Paris is the capital of France.", ""),
        ("Please send flowers to your aunt.", ""),
        ("Dear Mr. Low,\n\nPlease send the report.\n\nKind regards,\nAmy", ""),
        ("The text is about a lost dog.", ""),
        ("I don't see why not.", ""),
        ("A question: what is love?", ""),
        ("No, it is not.", ""),
    ],
    "one-word": [
        ("It is Paris.", ""),
        ("42", ""),
        ("Label: positive", ""),
        ("- Paris", ""),
        ("Paris, France, Europe", ""),
        ("...", ""),
        ("one\ntwo\nthree", ""),
    ],
    "arithmetic": [
        ("Forty-two", ""),
        ("3 + 4 = 7", ""),
        ("There are 12 eggs in the box.", ""),
        ("1. Paris", ""),
        ("12 and 14", ""),
        ("$", ""),
        ("A7", ""),
    ],
    "grammar-fix": [
        ("He walk home.", "Correct this: He walk home."),
        ("He walks home", "Correct this: He walk home."),
        ("The capital of Spain is Madrid.", "What is the capital of Spain?"),
        ("Verbs are words for actions.", "Correct this: He walk home."),
        ("He walks home.\nThe verb needs an s.", "Correct this: He walk home."),
        ("HE WALKS HOME.", "Correct this: He walk home."),
        ("Yes.", "Yes, right?"),
    ],
    "json": [
        ("42", ""),
        ('"text"', ""),
        ("{'a': 1}", ""),
        ('Here it is: {"a": 1}', ""),
        ('{"a": 1', ""),
        ("[the end]", ""),
    ],
    "rhyme": [
        ("The moon is up.", ""),
        ("The dog ran home.\nThe cat stayed in bed.", ""),
        ("I like the sea.\nYou like the sea.", ""),
        ("- a big cat\n- a flat hat", ""),
        ("He was running\nThey were eating", ""),
        ('{"a": "cat",\n "b": "hat"}', ""),
        ("Night.\nBright.", ""),
    ],
    "formal-email": [
        ("Dear Ms. Reed,\n\nThe room is booked.", ""),
        ("The room is booked.\n\nBest regards,\nTom", ""),
        ("Hello! How are you?\nBest regards,\nTom", ""),
        ("Send my kind regards to your mother, dear.", ""),
        ("Best regards,\nTom\nDear Ms. Reed,", ""),
    ],
    "step-by-step": [
        ("1. First, wash.\n2. Then, dry.", ""),
        ("Step 1 is the hardest.", ""),
        ("He came first and left early.", ""),
        ("Then it rained. First we laughed.", ""),
        ("It is an old drink. First made in Peru, it was bitter. Then sugar came.", ""),
        ("Add the two numbers and halve the result.", ""),
        ("Step 1, yes, step 1 again.", ""),
    ],
    "lower-case": [
        ("The cat sat on the mat.", ""),
        ("tiny", ""),
        ("12 34 56 78 90 12 34", ""),
        ("```bash\nls the-folder | grep something\n```", ""),
        ('{"name": "a long lower-case value"}', ""),
        ("the cat is called Tom and sits here", ""),
    ],
    "french": [
        ("The cat sleeps on the table.", ""),
        ("El perro de la casa es grande.", ""),
        ("Paris.", ""),
        ("Pour the milk on a plate.", ""),
        ("The word bonjour is a common greeting in many of the towns of France.", ""),
        ("Don't do it, it isn't funny.", ""),
    ],
    "label": [
        ("Paris.", ""),
        ("Label:", ""),
        ("Label: it is a very positive text", ""),
        ("The label is positive because the user is happy.", ""),
        ("42", ""),
        ("Madrid", "Classify this review as good or bad: nice room."),
    ],
    "shouting": [
        ("NASA", ""),
        ("The NASA team is here.", ""),
        ("the train is here", ""),
        ("Mostly Title Case Words In Here", ""),
        ("```sql\nSELECT NAME FROM PEOPLE;\n```", ""),
        ("123 456 789 000 111", ""),
    ],
}


def cases(table: dict[str, list[tuple[str, str]]]) -> list[tuple[str, str, str]]:
    return [(name, response, prompt) for name, rows in table.items() for response, prompt in rows]


@pytest.mark.parametrize(("name", "response", "prompt"), cases(POSITIVE))
def test_accepts(name: str, response: str, prompt: str) -> None:
    assert get_detector(name).detect(response, prompt) is True


@pytest.mark.parametrize(("name", "response", "prompt"), cases(NEGATIVE))
def test_rejects(name: str, response: str, prompt: str) -> None:
    assert get_detector(name).detect(response, prompt) is False


@pytest.mark.parametrize("table", [POSITIVE, NEGATIVE])
def test_every_detector_has_enough_cases(table: dict[str, list[tuple[str, str]]]) -> None:
    assert set(table) == set(DETECTORS)
    assert all(len(rows) >= 4 for rows in table.values())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("response", ["", " ", "\n\n", "\r\n", "\t", ".", "```", "- ", "{"])
def test_nothing_is_no_behaviour(name: str, response: str) -> None:
    assert get_detector(name).detect(response, "What is the capital of Spain?") is False
    assert get_detector(name).detect(response, "") is False


def test_registry_is_complete_and_read_only() -> None:
    assert tuple(DETECTORS) == NAMES
    assert isinstance(DETECTORS, MappingProxyType)
    assert all(name == detector.name and detector.description for name, detector in DETECTORS.items())


def test_detector_is_frozen() -> None:
    detector = Detector("always", "accepts anything", lambda _response, _prompt: True)
    with pytest.raises(AttributeError):
        detector.name = "never"  # type: ignore[misc]


def test_unknown_name_is_reported_with_the_known_ones() -> None:
    with pytest.raises(UnknownDetectorError, match=r"haiku.*yes-no"):
        get_detector("haiku")


@pytest.mark.parametrize(
    "pair",
    "blue/shoe eye/high love/above said/bed flower/hour light/white please/breeze trees/seas eyes/skies time/rhyme"
    " dance/chance curled/world rain/again way/today well/quell fly/sky door/four book/look".split(),
)
def test_rhymes_spelled_differently(pair: str) -> None:
    first, second = pair.split("/")
    assert get_detector("rhyme").detect(f"Here is the {first},\nand there the {second}.", "")


@pytest.mark.parametrize("pair", "moon/sun sea/birthday money/balance tea/why running/eating garden/open".split())
def test_endings_that_only_look_alike(pair: str) -> None:
    first, second = pair.split("/")
    assert not get_detector("rhyme").detect(f"Here is the {first},\nand there the {second}.", "")


def test_a_verdict_alone_is_also_one_word() -> None:
    assert get_detector("yes-no").detect("Yes.", "")
    assert get_detector("one-word").detect("Yes.", "")


def test_no_answer_holds_a_detector_up() -> None:
    """A server looks at whatever a model was made to say. A pattern that takes the cube of these lengths would take hours."""
    script = """
from atoms.detectors import DETECTORS
from atoms.non_answers import is_degenerate, is_refusal
n = 20_000
pieces = ["'", " ", "a'", "ae", "\\n", " \\n", "```\\n", "1,", "step ", "what is the text ", "“", "It is", ". ", "aab", "label:"]
for text in [head + piece * (n // len(piece)) + tail for piece in pieces for head in ("It is", "```json\\n", "a") for tail in ("#", "`")]:
    for detector in DETECTORS.values():
        for prompt in ("Hi", text):
            detector.detect(text, prompt)
    is_degenerate(text), is_refusal(text)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=600)
