"""The same request under several mixes, side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openai.types import Model

from atomsteer_client.steering import Echo, SteeredChatCompletion, SteeringLike


@dataclass(frozen=True)
class Compared:
    """One answer of a comparison. `mix` is what was asked for; None where the request was explicitly unsteered."""

    mix: SteeringLike | None
    answer: SteeredChatCompletion

    @property
    def text(self) -> str:
        return self.answer.choices[0].message.content or ""

    @property
    def steering(self) -> Echo:
        return self.answer.steering


def requests(
    prompt: str | Sequence[Any], mixes: Iterable[SteeringLike], seed: int, options: dict[str, Any]
) -> list[tuple[SteeringLike | None, dict[str, Any]]]:
    """Each mix with the arguments of its call, the unsteered one first. All have the same seed. Raises TypeError."""
    if out_of_place := sorted({"stream", "steering", "messages"} & options.keys()):
        raise TypeError(
            f"compare takes no {', '.join(out_of_place)}: it waits for whole answers to prompt under each of mixes"
        )
    if isinstance(mixes, Mapping | str):
        raise TypeError(f"mixes is {mixes!r}; it must be a list of mixes, such as [{{'bulleted-list': 2}}]")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    asked: list[SteeringLike | None] = [None, *mixes]
    return [(mix, {**options, "messages": messages, "seed": seed, "steering": mix or {}}) for mix in asked]


def served_model(models: Iterable[Model]) -> str:
    """The model of a server that serves one; presets, which are listed below it, do not count."""
    names = [model.id for model in models if getattr(model, "parent", None) is None]
    if len(names) != 1:
        raise ValueError(f"the server serves {len(names)} models ({', '.join(names)}); say which with model=")
    return names[0]
