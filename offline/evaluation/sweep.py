"""`atomsteer sweep`: the same prompts under many mixes, as one batch job; what every detector and meter says of each."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from atoms.detectors import get_detector
from atoms.errors import ConfigError
from atoms.mix import Mix, mix_text
from atoms.package import Package
from offline.evaluation.answers import Decoding
from offline.evaluation.harness import Harness
from offline.evaluation.measures import Form, Rate, outcomes
from offline.progress import Progress


@dataclass(frozen=True, slots=True)
class SweepRow:
    """One mix on all prompts. `mix` by atom name; KL in nats a token; perplexity under the unsteered model."""

    mix: Mapping[str, float]
    rates: Mapping[str, Rate]
    form: Form
    perplexity: float
    kl: float
    predicted_kl: float

    @property
    def label(self) -> str:
        return mix_text(self.mix)


def moving(rows: Sequence[SweepRow], most: int) -> list[str]:
    """The `most` detectors whose rates differ most over `rows`."""

    def span(name: str) -> float:
        shares = [row.rates[name].share for row in rows]
        return max(shares) - min(shares)

    return sorted(rows[0].rates, key=lambda name: -span(name))[:most]


def lines(package: Package, atoms: Sequence[str], coefficients: Sequence[float]) -> list[Mix]:
    """Each atom alone at each coefficient."""
    return [package.mix({atom: c}) for atom in atoms for c in coefficients]


def grid(package: Package, atoms: Sequence[str], coefficients: Sequence[float]) -> list[Mix]:
    """All atoms together, at every combination of coefficients."""
    return [package.mix(dict(zip(atoms, values, strict=True)))
            for values in itertools.product(coefficients, repeat=len(atoms))]  # fmt: skip


def sweep(
    harness: Harness, prompts: Sequence[str], mixes: Sequence[Mix], detectors: Sequence[str], kl_prompts: int,
    progress: Progress,
) -> list[SweepRow]:  # fmt: skip
    """One row a mix, the unsteered model first; equal mixes once.

    KL is measured along the unsteered answers to the first `kl_prompts` prompts. Raises UnknownDetectorError, and
    ConfigError if there is no prompt.
    """
    if not prompts:
        raise ConfigError("there is no prompt to sweep over; choose other --behaviours, --kind or --split")
    chosen = [get_detector(name) for name in detectors]
    distinct = list(dict.fromkeys([Mix(), *mixes]))
    answers = harness.answer("answers", [("", mix) for mix in distinct], {"": prompts}, progress)
    meter = harness.meter(answers["", Mix()][:kl_prompts])
    rows = []
    with progress.task("KL and perplexity", len(distinct), "mixes") as bar:
        for mix in distinct:
            texts = answers["", mix]
            rows.append(
                SweepRow(
                    mix={harness.package.card(atom).name: value for atom, value in mix},
                    rates={detector.name: Rate.of(outcomes(texts, detector)) for detector in chosen},
                    form=Form.of(texts),
                    perplexity=harness.perplexity(texts),
                    kl=harness.kl(meter, mix),
                    predicted_kl=harness.package.predicted_kl(mix),
                )
            )
            bar.advance()
    return rows


def table_rows(rows: Sequence[SweepRow], decoding: Decoding) -> list[dict[str, Any]]:
    """Flat rows with the same keys: the mix, a column an atom, the measures, the decoding, and three columns a detector."""
    atoms = list(dict.fromkeys(atom for row in rows for atom in row.mix))
    return [
        {
            "mix": row.label,
            **{f"c:{atom}": row.mix.get(atom, 0.0) for atom in atoms},
            "n": next(iter(row.rates.values())).n,
            "kl": row.kl, "predicted_kl": row.predicted_kl, "perplexity": row.perplexity, **dataclasses.asdict(row.form),
            **dataclasses.asdict(decoding),
            **{column: value for name, rate in row.rates.items()
               for column, value in ((name, rate.share), (f"{name}_low", rate.low), (f"{name}_high", rate.high))},
        }
        for row in rows
    ]  # fmt: skip


def to_parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Flat rows as the bytes of a Parquet file."""
    import io

    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), buffer)
    return buffer.getvalue()
