"""Settings of a discovery run: frozen, validated on construction, recorded with the package.

Each stage gets its own part, and a stage's results are reused when its part and all that it depends on are unchanged.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from atoms.adapter import Composition
from atoms.errors import ConfigError
from atoms.manifest import NAME_PATTERN
from offline.shipped import read_neutral_prompts

PASS_TOKENS = 512
"""Padded tokens of a batch in passes that take gradients of a frozen model, unless a run says otherwise."""


@dataclass(frozen=True, slots=True)
class FinetuneConfig:
    """The LoRA fine-tune that makes θ0 when no adapter is given. `epochs` may be a fraction."""

    rank: int = 8
    alpha: float = 16.0
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    epochs: float = 1.0
    learning_rate: float = 1e-3
    warmup: float = 0.1
    batch_documents: int = 16
    checkpoint_every: int = 4

    def __post_init__(self) -> None:
        require(self.rank >= 1, "rank", self.rank, "at least 1")
        require(0 < self.alpha < math.inf, "lora_alpha", self.alpha, "above 0, or no step would move the model")
        require(bool(self.target_modules), "target_modules", self.target_modules, "at least one module name")
        require(0 < self.epochs <= 100, "epochs", self.epochs, "above 0 and at most 100")
        require(0 < self.learning_rate <= 1, "learning_rate", self.learning_rate, "above 0 and at most 1")
        require(self.batch_documents >= 1, "batch_documents", self.batch_documents, "at least 1")


@dataclass(frozen=True, slots=True)
class CurvatureConfig:
    """The EKFAC eigenbasis. Factors and λ are fitted on samples of the documents, with labels sampled from the model.

    `eigenvalues`: the Fisher in the eigenbasis, or the products of the two covariances' eigenvalues (K-FAC), which need
    no second pass. `absolute_damping`: ε is `damping` itself, not relative to the mean λ of its matrix.
    """

    factor_documents: int = 96
    eigenvalue_documents: int = 192
    components: int = 50
    damping: float = 0.1
    absolute_damping: bool = False
    eigenvalues: Literal["fisher", "kronecker"] = "fisher"

    def __post_init__(self) -> None:
        require(self.factor_documents >= 1, "factor_documents", self.factor_documents, "at least 1")
        require(self.eigenvalue_documents >= 1, "eigenvalue_documents", self.eigenvalue_documents, "at least 1")
        require(self.components >= 1, "components", self.components, "at least 1")
        require(self.damping > 0, "damping", self.damping, "above 0")
        require(self.eigenvalues in ("fisher", "kronecker"), "eigenvalues", self.eigenvalues, "fisher or kronecker")


@dataclass(frozen=True, slots=True)
class WhiteningConfig:
    """How rows are standardised before the dictionary (offline/whitening.py).

    `centred`: the mean row is removed. `ridge`: principal components that carry more than this share of the rows' variance
    are whitened, at least 10 times the mean share of a document; 0 leaves all as they are. `components`: the most that are
    looked at.
    """

    centred: bool = True
    ridge: float = 0.01
    components: int = 128

    def __post_init__(self) -> None:
        require(0 <= self.ridge <= 1, "ridge", self.ridge, "a share of the variance, 0 to 1")
        require(self.components >= 1, "components", self.components, "at least 1")


@dataclass(frozen=True, slots=True)
class DictionaryConfig:
    """Sparse dictionary learning. `atoms` None chooses one atom per 16 documents, within 8 … 500.

    `learner`: our own, or scikit-learn's MiniBatchDictionaryLearning as a baseline, which holds all rows in memory.
    """

    atoms: int | None = None
    alpha: float = 0.1
    nonnegative: bool = True
    iterations: int = 40
    held_out: float = 0.15
    learner: Literal["blocks", "scikit-learn"] = "blocks"

    def __post_init__(self) -> None:
        require(self.atoms is None or self.atoms >= 1, "atoms", self.atoms, "at least 1")
        require(0 < self.alpha < 1, "alpha", self.alpha, "between 0 and 1 (rows have unit length)")
        require(self.iterations >= 1, "iterations", self.iterations, "at least 1")
        require(0 < self.held_out <= 0.5, "held_out", self.held_out, "above 0 and at most 0.5")
        require(self.learner in ("blocks", "scikit-learn"), "learner", self.learner, "blocks or scikit-learn")


@dataclass(frozen=True, slots=True)
class SelectConfig:
    """Which dictionary atoms go on to calibration: supported, coherent against chance, stable across seeds, distinct.

    `min_documents` None: half as many as the dictionary's atoms have on average, at least 6. Of two atoms whose gradients have
    a cosine above `max_cosine` the better is kept. `distinct`: an atom ranks by its coherence times its stability times how far
    it is from those that rank before it; off: by its coherence alone.
    `sign_aligned`: a document with a negative code counts with its gradient reversed.
    """

    keep: int = 48
    min_documents: int | None = None
    min_z: float = 3.0
    max_cosine: float = 0.8
    distinct: bool = True
    min_stability: float = 0.5
    top_documents: int = 20
    sign_aligned: bool = True

    def __post_init__(self) -> None:
        require(self.keep >= 1, "keep", self.keep, "at least 1")
        require(
            self.min_documents is None or self.min_documents >= 2, "min_documents", self.min_documents, "at least 2"
        )


@dataclass(frozen=True, slots=True)
class SteeringConfig:
    """How an atom's direction is made of its strongest `documents` (offline/paths.py).

    `steps`: gradient steps from θ0, 0 for the unprojected atom. `tokens`: of each response, those that carry the loss.
    """

    steps: int = 4
    documents: int = 32
    tokens: int = 12
    reference_documents: int = 192

    def __post_init__(self) -> None:
        require(0 <= self.steps <= 100, "steps", self.steps, "within 0 and 100")
        require(self.documents >= 1, "documents", self.documents, "at least 1")
        require(self.tokens >= 1, "tokens", self.tokens, "at least 1")
        require(self.reference_documents >= 1, "reference_documents", self.reference_documents, "at least 1")


@dataclass(frozen=True, slots=True)
class CalibrateConfig:
    """Unprojection exponent p, composition, and the neutral continuations on which KL is measured."""

    exponent: float = 0.5
    composition: Composition = "linear"
    prompts: int = 16
    continuation_tokens: int = 24
    coefficients: tuple[float, ...] = (-3.0, -2.0, -1.0, 1.0, 2.0, 3.0)
    orientation_documents: int = 6

    def __post_init__(self) -> None:
        require(-0.5 <= self.exponent <= 0.5, "exponent", self.exponent, "within -0.5 and 0.5")
        require(self.composition in ("linear", "parameter"), "composition", self.composition, "linear or parameter")
        most = len(read_neutral_prompts())
        require(1 <= self.prompts <= most, "prompts", self.prompts, f"1 to {most}, the neutral prompts that there are")
        require(self.continuation_tokens >= 1, "continuation_tokens", self.continuation_tokens, "at least 1")
        require({-1.0, 1.0} <= set(self.coefficients) and all(map(math.isfinite, self.coefficients)), "coefficients",
                self.coefficients, "a list of finite numbers with -1 and 1")  # fmt: skip


RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "default": {},
    "paper": {
        "curvature": {"eigenvalues": "kronecker", "damping": 1e-6, "absolute_damping": True},
        "whitening": {"centred": False, "ridge": 0.0},
        "dictionary": {"learner": "scikit-learn", "nonnegative": False},
        "select": {
            "min_documents": 6,
            "min_z": -1e6,
            "max_cosine": 1.0,
            "distinct": False,
            "min_stability": 0.0,
            "sign_aligned": False,
        },
        "steering": {"steps": 0},
    },
}
"""Settings that differ from the defaults, by part. "paper" makes the choices of the published pipeline (arXiv 2603.14665),
as far as they change the outcome: its sum loss does not, because rows are normalised without removing a mean."""


def recipe_settings(name: str, part: str) -> dict[str, Any]:
    """The settings of recipe `name` for one part of the configuration. Raises ConfigError for an unknown recipe."""
    require(name in RECIPES, "recipe", name, " or ".join(RECIPES))
    return RECIPES[name].get(part, {})


@dataclass(frozen=True, slots=True)
class DiscoverConfig:
    """Everything that `discover` needs. `data` is a file of documents; `out` the package to write. `halves`: whether two
    dictionaries of half of the documents each are learned, to say of every atom whether it is found again."""

    model: str
    data: Path
    out: Path
    adapter: Path | None = None
    revision: str | None = None
    work: Path | None = None
    name: str | None = None
    version: str = "1"
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    max_length: int = 512
    batch_tokens: int = 2 * PASS_TOKENS
    skip_bad_lines: bool = False
    limit: int | None = None
    include_documents: bool = True
    halves: bool = True
    force: bool = False
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    curvature: CurvatureConfig = field(default_factory=CurvatureConfig)
    whitening: WhiteningConfig = field(default_factory=WhiteningConfig)
    dictionary: DictionaryConfig = field(default_factory=DictionaryConfig)
    select: SelectConfig = field(default_factory=SelectConfig)
    steering: SteeringConfig = field(default_factory=SteeringConfig)
    calibrate: CalibrateConfig = field(default_factory=CalibrateConfig)

    def __post_init__(self) -> None:
        require(self.out.name not in ("", ".."), "out", str(self.out), "the path of a new directory, with a name")
        require(self.max_length >= 16, "max_length", self.max_length, "at least 16 tokens")
        require(self.batch_tokens >= 64, "batch_tokens", self.batch_tokens, "at least 64")
        require(self.limit is None or self.limit >= 1, "limit", self.limit, "at least 1")
        for what, text in (("name" if self.name else "the package's name, from --out,", self.package_name),
                           ("version", self.version)):  # fmt: skip
            require(bool(re.fullmatch(NAME_PATTERN, text)), what, text,
                    "1-64 letters, digits, '.', '_' or '-', starting with a letter or digit")  # fmt: skip

    @property
    def package_name(self) -> str:
        return self.name or self.out.name

    @property
    def pass_tokens(self) -> int:
        """Padded tokens of a batch in passes that take gradients. Half of what the fine-tune takes: they come on top of what
        the run has made so far, and are as fast (docs/discovery.md)."""
        return self.batch_tokens // 2

    @property
    def work_dir(self) -> Path:
        """Where stages keep their results, so that a run can resume."""
        return self.work or self.out.with_name(self.out.name + ".work")


def require(condition: bool, name: str, value: object, limit: str) -> None:
    """Raises ConfigError, naming the setting, its value and the limit, unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{name} is {value!r}; it must be {limit}")
