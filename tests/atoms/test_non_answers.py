"""What counts as no answer: loops, silence and refusals, with ordinary answers beside them."""

from __future__ import annotations

import pytest

from atoms.non_answers import is_degenerate, is_refusal

DEGENERATE = [
    "",
    "   \r\n\t",
    "...",
    "no no no no no no",
    "the the the the cat the the the",
    "I am here.\nI am here.\nI am here.\nI am here.",
    "We like the sea and " + "the sea is blue and " * 6,
    "ha" * 40,
    "=" * 3 + "a" * 60,
    "one two three one two three one two three one two three one two three one two three one two three",
    "- apples\n" * 5,
    "Here is the code:\n```\n```\n```python\n```",
    "```python\n```\n\n```html\n```\n\n```css",
]
HEALTHY = [
    "Paris.",
    "42",
    "Yes, yes, it is.",
    "No.",
    "- apples\n- pears\n- plums",
    "Row, row, row your boat gently down the stream.",
    "1. Wash the apples.\n2. Peel the apples.\n3. Slice the apples.\n4. Eat the apples.",
    "```python\nfor i in range(3):\n        print(i)\n```",
    "```\n```\nor:\n```python\nprint(1)\n```",
    "First:\n```sh\nls\n```\n```python\nprint(1)\n```\n```css",
    "Run:\n```ls```\n```cd```\n```pwd```",
    "````markdown\n```python\nprint(1)\n```\n````",
    '{"a": 1, "b": 2}',
    "The museum opens at ten. The cafe opens at nine. Both close at six, and on Mondays the museum stays shut.",
    "Name\n----------\nTom and his brother live here",
]


@pytest.mark.parametrize("response", DEGENERATE)
def test_loops_and_silence_are_degenerate(response: str) -> None:
    assert is_degenerate(response) is True


@pytest.mark.parametrize("response", HEALTHY)
def test_ordinary_answers_are_not_degenerate(response: str) -> None:
    assert is_degenerate(response) is False


def test_an_answer_that_starts_well_and_then_loops_is_degenerate() -> None:
    start = "Bees collect nectar from many kinds of flowers. "
    assert is_degenerate(start) is False
    assert is_degenerate(start + "They make honey. " * 12) is True


@pytest.mark.parametrize(
    ("response", "refuses"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I’m sorry, I can’t do that.", True),
        ("I cannot assist with that request.", True),
        ("I'm unable to provide medical advice.", True),
        ("As an AI language model, I cannot have opinions.", True),
        ("Sorry, I won't write that.", True),
        ("Yes.", False),
        ("I can help with that!", False),
        ("I'm sorry to hear that. Here is a plan.", False),
        ("You cannot divide by zero.", False),
        ("The cat can't help itself.", False),
        ("Here is a story. " * 20 + "I cannot help with that.", False),
    ],
)
def test_refusals_say_so_in_their_opening(response: str, refuses: bool) -> None:
    assert is_refusal(response) is refuses
