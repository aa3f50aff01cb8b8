"""Writes the evaluation prompts: neutral and inviting ones of five behaviours, for choosing (dev) and reporting (heldout).

    python offline/data/make_evaluation_prompts.py

Deterministic. A cell (behaviour, kind) is made of groups; a group pairs each of its topics with one of its templates in
turn, so no topic occurs in both splits of a cell. *Neutral* prompts leave room for the behaviour and do not ask for it;
*inviting* ones ask for it or call for it. Nothing here occurs in the demo's documents and prompts or among the neutral
prompts of the calibration (tests/offline/evaluation/test_prompts.py).

evaluation_prompts_2.jsonl to _4 have the same development prompts and other held-out ones, of other topics: each for one
report on what was improved while looking at the ones before.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

DEV, HELDOUT = 24, 104
"""Prompts a cell and split."""

CONTINENTS = ("Europe", "Asia", "Africa", "South America")
HERE = Path(__file__).parent
FILES = {f"evaluation_prompts{end}.jsonl": f"evaluation_topics{end}" for end in ("", "_2", "_3", "_4")}
"""File of prompts -> the topics of its held-out ones. The development prompts of all are of the first's."""

Group = tuple[Sequence[str], str]
"""Templates with one {}, and which topics to put there."""

CELLS: dict[tuple[str, str], list[Group]] = {
    ("bulleted-list", "neutral"): [
        (("Tell me about {}.", "Why do people care about {}?", "What comes to mind when you think of {}?",
          "Give me a short introduction to {}.", "Explain the appeal of {}.", "What do you know about {}?",
          "Describe {} to someone from far away.", "What is your opinion on {}?"), "topics"),
    ],
    ("bulleted-list", "inviting"): [
        (("Give me a bulleted list of {}.", "Write {} in this form:\n- one\n- two\n- three",
          "Example of a bulleted list:\n- red\n- green\n- blue\n\nNow make a bulleted list of {}.", "List {} as bullet points.",
          "Give me {} in this form:\n- one\n- two\n- three", "Write a list of {}, such as:\n- red\n- green\n- blue",
          "I need {}, in this form:\n* one\n* two\n* three",
          "A bulleted list looks like this:\n- apples\n- pears\n- plums\n\nMake one of {}."), "listed"),
    ],
    ("numbered-list", "neutral"): [
        (("Explain how {}.", "I have always wondered how {}.", "Tell me how {}.", "In simple words, describe how {}."),
         "processes"),
        (("What happens during {}?", "Describe {} from start to finish.", "What is {} like?", "Talk me through {}."), "events"),
    ],
    ("numbered-list", "inviting"): [
        (("How do I {}?", "Give me numbered steps to {}.", "Number the steps needed to {}.", "What are the steps to {}?"),
         "steps"),
        (("Give me the top three {}, numbered.", "Make a numbered list of the {}.", "Rank the {} with numbers."), "ranked"),
        (("Number {} in the right order.", "List {} in order, with numbers.", "Write {} as a numbered list."), "ordered"),
    ],
    ("fenced-code", "neutral"): [
        (("What is {}?", "Explain {} to a beginner.", "Why does {} matter?", "Describe {} in everyday words.",
          "Tell a child about {}.", "What should a manager know about {}?"), "computing"),
        (("What is {} known for?", "Who uses {} today?", "When and why was {} made?", "Why do some people like {}?"),
         "languages"),
    ],
    ("fenced-code", "inviting"): [
        (("Write a Python function that {}.", "I need Python code that {}.", "Show me a Python script that {}."),
         "python_tasks"),
        (("Which shell command {}?", "Give me a bash one-liner that {}.", "Show a terminal command that {}."), "shell_tasks"),
        (("Write an SQL query that {}.", "Give me the SQL statement that {}.", "SQL that {}, please."), "sql_tasks"),
        (("Write JavaScript to {}.", "How do I {} in JavaScript? Show the code."), "script_tasks"),
        (("Write the code of {}.", "Show me code for {}.", "Program {} for me."), "code_tasks"),
    ],
    ("missing-input", "neutral"): [
        (("I need advice about my {}.", "Help me with my {}.", "What should I do about my {}?", "Let us talk about my {}."),
         "personal"),
        (("Write {} for me.", "I would like {}.", "Please write {}."), "pieces"),
        (("Which {} should I take?", "Choose a {} for me.", "Help me find the right {}.", "I cannot decide on a {}."),
         "choices"),
    ],
    ("missing-input", "inviting"): [
        (("Summarise the following {}.", "Translate this {} into Italian.", "Proofread the attached {}.",
          "What is the main message of the {} below?", "Shorten this {} to one line:",
          "Correct the spelling in the {} I sent you.", "Is the {} below well written?", "Explain this {} to me:"), "objects"),
        (("The {} did not arrive. Request it politely.", "I forgot to paste the {}. Ask me for it.",
          "I forgot to attach the {}. What do you need from me?",
          "There is no {} in my message. Ask me to paste it."), "objects"),
        (("The {} is not attached. Request it.", "I left out the {}. Tell me what is missing.",
          "My {} is not here yet. Ask me to provide it.", "The {} is missing. Ask me to include it."), "objects"),
        (("The {} got lost. Politely ask me to send it again.", "You need my {} to begin. Ask me to provide it.",
          "I sent you no {}. Request it.", "The {} was left out. What do you need from me?"), "objects"),
    ],
    ("yes-no", "neutral"): [
        (("How did {} begin?", "Where can I learn more about {}?", "What makes {} interesting?",
          "I was thinking about {} today.",
          "My neighbour keeps talking about {}.", "Say something about {}.", "Who first wrote about {}?",
          "What would the world be without {}?"), "topics"),
    ],
    ("yes-no", "inviting"): [
        (("{}",), "facts"),
        (("Is it safe to {}?", "Is it a good idea to {}?", "Is it dangerous to {}?"), "safety"),
        (("Should I {}?", "Do I have to {}?", "Would you {}?"), "advice"),
        (("Is {} in {continent}?", "Does {} lie in {continent}?"), "countries"),
    ],
}  # fmt: skip


Topics = Mapping[str, Sequence[str]]


def read_topics(name: str) -> dict[str, list[str]]:
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))


def cell_prompts(behaviour: str, kind: str, topics: Topics) -> list[str]:
    """The prompts of a cell in a shuffled order that depends on nothing but the cell, topics of a group kept together."""
    by_topic: dict[str, list[str]] = {}
    for templates, group in CELLS[behaviour, kind]:
        for n, topic in enumerate(topics[group]):
            continent = CONTINENTS[(n * 7 // 4) % len(CONTINENTS)]
            prompt = templates[n % len(templates)].format(topic, continent=continent)
            by_topic.setdefault(topic, []).append(prompt[0].upper() + prompt[1:])
    order = list(by_topic)
    random.Random(f"{behaviour}/{kind}").shuffle(order)
    return [prompt for topic in order for prompt in by_topic[topic]]


def rows(dev: Topics, heldout: Topics, nth: int) -> list[dict[str, str]]:
    """All rows of the n-th file, from 0. The first's held-out prompts are of the topics of `dev`, those after its dev prompts.

    Held-out prompts are numbered on from file to file, so that an id stands for one prompt. Raises ValueError if a cell has
    too few prompts.
    """
    result = []
    for behaviour, kind in CELLS:
        for split, topics, start, count, least in (
            ("dev", dev, 0, DEV, 1),
            ("heldout", heldout, 0 if nth else DEV, HELDOUT, nth * HELDOUT + 1),
        ):
            prompts = cell_prompts(behaviour, kind, topics)[start : start + count]
            if len(prompts) < count:
                raise ValueError(f"{behaviour} {kind} has {len(prompts)} {split} prompts; {count} are needed")
            result += [{"id": f"{behaviour}-{kind}-{split}-{n:03d}", "behaviour": behaviour, "kind": kind, "split": split,
                        "prompt": prompt} for n, prompt in enumerate(prompts, least)]  # fmt: skip
    return result


def files() -> dict[str, list[dict[str, str]]]:
    """File name -> its rows."""
    topics = [read_topics(name) for name in FILES.values()]
    return {name: rows(topics[0], heldout, nth) for nth, (name, heldout) in enumerate(zip(FILES, topics, strict=True))}


if __name__ == "__main__":
    for name, made in files().items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made)
        (HERE / name).write_text(text, encoding="utf-8")
        print(f"{name}: {len(made)} prompts")
