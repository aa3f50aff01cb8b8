"""Settings of an evaluation: frozen, validated on construction, recorded with its results."""

from __future__ import annotations

from dataclasses import dataclass

from atoms.errors import ConfigError
from offline.config import require
from offline.evaluation.answers import Decoding
from offline.evaluation.results import Wanted


@dataclass(frozen=True, slots=True)
class EvaluateConfig:
    """What is tried, on how much, within which limits.

    Empty behaviours: all of the prompt file; empty atoms: all of the package. Coefficients are magnitudes, tried with both
    signs. Numbers of prompts are per goal; None: all there are. `max_kl` in nats a token. `max_degenerate` is a share of
    the answers, raised to that of the unsteered answers where those are worse. `shortlist`: atoms a goal that are screened
    again, on all development prompts, at least as many as the `candidates`, which are tried at every coefficient. `finalists`:
    settings a goal that are given `dev_samples` answers to each development prompt, from which the choice is made.
    """

    behaviours: tuple[str, ...] = ()
    wanted: tuple[Wanted, ...] = ("up", "down")
    atoms: tuple[str, ...] = ()
    coefficients: tuple[float, ...] = (1.0, 1.5, 2.0, 2.5, 3.0)
    screen_coefficient: float = 2.0
    screen_prompts: int = 6
    shortlist: int = 8
    candidates: int = 3
    finalists: int = 6
    dev_prompts: int | None = None
    dev_samples: int = 1
    heldout_prompts: int | None = None
    max_kl: float = 0.5
    max_degenerate: float = 0.05
    kl_prompts: int = 24
    random_controls: int = 1
    curve: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            "screen_prompts",
            "shortlist",
            "candidates",
            "finalists",
            "dev_prompts",
            "dev_samples",
            "heldout_prompts",
            "kl_prompts",
        ):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "at least 1")
        require(bool(self.coefficients), "coefficients", self.coefficients, "at least one number")
        for value in (*self.coefficients, self.screen_coefficient):
            require(
                0 < value < float("inf"), "coefficients", value, "magnitudes above 0; each is tried with both signs"
            )
        require(bool(self.wanted) and set(self.wanted) <= {"up", "down"}, "goals", self.wanted, "up, down or both")
        require(self.max_kl > 0, "max_kl", self.max_kl, "above 0 nats a token")
        require(0 <= self.max_degenerate <= 1, "max_degenerate", self.max_degenerate, "a share, 0 to 1")
        require(self.random_controls >= 0, "random_controls", self.random_controls, "at least 0")

    def check_decoding(self, decoding: Decoding) -> None:
        """Raises ConfigError if further answers to a prompt would all be the first one again."""
        if self.dev_samples > 1 and decoding.temperature == 0:
            raise ConfigError(
                f"dev_samples is {self.dev_samples}, but greedy answers to a prompt are all the same; "
                "give a temperature above 0 as well"
            )
