"""The schema of `manifest.json`: what a package says about itself and about each atom.

Knows pydantic and no files. Aliases may change at any time and are outside every hash; all else is covered by
`Manifest.content_hash`, except timings, so equal runs give equal hashes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from atoms.adapter import Composition
from atoms.engine import decoding_name
from atoms.storage import canonical_hash

FORMAT_VERSION: Literal[1] = 1
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""Of a package's name and version."""
UNIT_NATS = 0.05
"""KL(unsteered ‖ steered) in nats a token, averaged over ±1, that defines coefficient 1."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _unsaid(default: object, description: str | None = None) -> Any:
    """A field that is written only where it is not `default`: the hashes of older packages, which lack it, must hold."""
    return Field(default=default, exclude_if=lambda value: value == default, description=description)


class BaseModelRef(_Frozen):
    """Which base model a package belongs to. `weights` is `atoms.model.weights_fingerprint` of the unmerged model."""

    id: str
    revision: str | None = None
    config_hash: str
    weights: str


class SteeringPath(_Frozen):
    """How directions were made of documents: gradient steps from θ0 on the first `tokens` tokens of the responses."""

    steps: int
    documents: int
    tokens: int
    reference_documents: int


class Conventions(_Frozen):
    """How the numbers in the package were made."""

    loss: str = "mean cross-entropy over response tokens"
    unprojection_exponent: float
    path: SteeringPath | None = _unsaid(
        None, "how atoms' directions were made of their documents; null: dictionary atoms, unprojected"
    )
    composition: Composition
    unit_nats: float = UNIT_NATS
    drift: str = "KL(unsteered || steered), nats a token, on the unsteered model's own continuations"


class Coherence(_Frozen):
    """Mean pairwise cosine of the gradients of an atom's top documents, sign-aligned; z against length-matched random sets."""

    raw: float
    raw_z: float
    whitened: float
    whitened_z: float
    raw_null: tuple[float, float] | None = _unsaid(
        None, "mean and standard deviation of raw over the random sets; null: not recorded"
    )


class Orientation(_Frozen):
    """Loss on the atom's held-out documents, nats a token, unsteered and at +1. It must fall: more of the behaviour."""

    n_documents: int
    loss_unsteered: float
    loss_at_plus_one: float


class Effect(_Frozen):
    """Detector rate over `n` prompts unsteered and at `coefficient`, as far as measured with the share of degenerate answers
    there, the KL (nats a token) and the rate under a random direction of that KL.

    `prompts`: neutral ones, or ones that invite the behaviour; None in older packages, which did not tell. `temperature` 0: of
    greedy answers.
    """

    detector: str
    coefficient: float
    n: int
    rate_unsteered: float
    rate: float
    prompts: Literal["neutral", "inviting"] | None = _unsaid(None)
    temperature: float = _unsaid(0.0)
    top_p: float = _unsaid(1.0)
    degenerate: float | None = _unsaid(None)
    kl: float | None = _unsaid(None)
    rate_random: float | None = _unsaid(None)

    def __str__(self) -> str:
        how = ["inviting prompts"] * self.invited + [self.decoding] * (self.temperature > 0)
        told = f" ({', '.join(how)})" if how else ""
        return f"{self.detector} {self.rate_unsteered:.0%} → {self.rate:.0%} at {self.coefficient:+g}{told}"

    @property
    def invited(self) -> bool:
        """Whether the prompts asked for the behaviour: a form that a prompt asks for is easily lost."""
        return self.prompts == "inviting"

    @property
    def series(self) -> str:
        """What one curve shows: rates of a detector on one kind of prompts."""
        return f"{self.detector} (invited)" if self.invited else self.detector

    @property
    def change(self) -> float:
        return self.rate - self.rate_unsteered

    @property
    def decoding(self) -> str:
        return decoding_name(self.temperature, self.top_p)


def described(n_documents: int, keywords: Sequence[str]) -> str:
    """The description of an atom that no model has described."""
    return f"{n_documents} documents marked by: {', '.join(keywords) or 'no single word'}"


class AtomCard(_Frozen):
    """One atom's identity and evidence."""

    id: str = Field(pattern=r"^a-[0-9a-f]{8}$")
    alias: str | None = None
    content_hash: str
    description: str
    described_by: str | None = _unsaid(None, "model that wrote the description; null: made of counts and keywords")
    keywords: list[str]
    coherence: Coherence
    stability: float | None = Field(
        description="|cosine| of its gradient with its match in a dictionary of another seed; null: not measured"
    )
    stability_halves: float | None = _unsaid(
        None,
        "|cosine| of its gradient with its matches in dictionaries of two halves of the documents, the smaller; "
        "null: not measured",
    )
    n_documents: int
    orientation: Orientation
    tested_range: tuple[float, float]
    sound_range: tuple[float, float] | None = Field(
        default=None, description="coefficients at which free-running answers stayed sound; null: not measured"
    )
    kl_curve: list[tuple[float, float]]
    effects: list[Effect] = []

    @property
    def name(self) -> str:
        """Alias if there is one, else the id."""
        return self.alias or self.id

    @property
    def without_prose(self) -> AtomCard:
        """The card with a description of counts and keywords: what a model wrote may quote documents."""
        plain = {"description": described(self.n_documents, self.keywords), "described_by": None}
        return self.model_copy(update=plain) if self.described_by else self

    @property
    def largest_effect(self) -> Effect | None:
        """Of those on neutral prompts if there are any."""
        return max(self.effects, key=lambda e: (not e.invited, abs(e.change)), default=None)


class Manifest(_Frozen):
    """`manifest.json`. `files` maps every other file of the package to its sha256, but for report.html (see Package)."""

    format_version: Literal[1] = FORMAT_VERSION
    name: str = Field(pattern=NAME_PATTERN)
    version: str = Field(pattern=NAME_PATTERN)
    base_model: BaseModelRef
    adapter_hash: str = Field(description="hash of θ0, the base adapter")
    conventions: Conventions
    atoms: list[AtomCard]
    files: dict[str, str]
    record: dict[str, Any] = Field(default={}, description="config, versions, seed, data hash; `timings` is not hashed")
    content_hash: str = ""

    @property
    def fingerprint(self) -> str:
        """What a mix's digest covers of the package besides its atoms: name, version, base and θ0."""
        return canonical_hash([self.name, self.version, self.base_model.weights, self.adapter_hash])

    def compute_content_hash(self) -> str:
        """sha256 of the canonical manifest without aliases, timings and the hash itself."""
        data = self.model_dump(mode="json", exclude={"content_hash"})
        data["record"].pop("timings", None)
        for atom in data["atoms"]:
            del atom["alias"]
        return canonical_hash(data)

    def sealed(self) -> Manifest:
        """A copy with the right `content_hash`."""
        return self.model_copy(update={"content_hash": self.compute_content_hash()})
