"""Predicted against measured KL of random signed mixes, on prompts that the calibration never saw.

    python -m bench.drift --package demo/package [--mixes 200] [--json FILE] [--plot FILE.png]

Mixes have 1-8 atoms within their tested ranges, random signs and proportions, scaled so that the prediction lies
log-uniformly in 0.02 … 0.5 nats a token; beside it stands the quadratic one, ½ cᵀMc. KL(unsteered ‖ mix) is measured
on sampled continuations of the last neutral prompts, in both compositions (--compositions). A prediction counts as good
within a factor of 1.5. With --matrix-prompts N, M is measured again on the first N neutral prompts: how many does a
calibration need?
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from atoms.adapter import Composition
from atoms.drift import DriftModel
from atoms.mix import Mix
from atoms.model import choose_device, load_model, merge_adapter
from atoms.package import Package
from atoms.steered import SteeredModel
from offline.calibrate import MEASURED_IN, DriftMeter, continuations
from offline.corpus import make_batches
from offline.progress import Progress
from offline.shipped import read_neutral_prompts

NATS = (0.02, 0.5)
MOST_ATOMS = 8
FACTOR = 1.5
COMPOSITIONS: tuple[Composition, ...] = ("linear", "parameter")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, required=True)
    parser.add_argument("--mixes", type=int, default=200)
    parser.add_argument("--prompts", type=int, default=8, help="neutral prompts, from the end of the set")
    parser.add_argument("--matrix-prompts", type=int, help="neutral prompts for a new M, from the start of the set")
    parser.add_argument("--tokens", type=int, default=24, help="tokens continued from each")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--compositions", nargs="+", choices=COMPOSITIONS, default=COMPOSITIONS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="a scatter of predicted and measured (needs matplotlib)")
    options = parser.parse_args()
    package = Package.read(options.package)
    rows = list(measure(package, options, Progress()))
    for composition in options.compositions:
        for prediction in ("predicted", "quadratic"):
            print(f"{composition:<10} {prediction:<10} {summary(rows, composition, prediction)}")
    if options.plot:
        scatter(rows, options.compositions[0], options.plot)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def measure(package: Package, options: argparse.Namespace, progress: Progress) -> Iterator[dict]:
    """One row a mix: its coefficients, its prediction, and the measured KL in both compositions, nats a token."""
    used = options.matrix_prompts or int(package.manifest.record["config"]["calibrate"]["prompts"])
    prompts = read_neutral_prompts()
    if used + options.prompts > len(prompts):
        raise SystemExit(f"M is of {used} of the {len(prompts)} neutral prompts; ask for fewer --prompts")
    loaded = load_merged(package)
    curves = {card.id: card.kl_curve for card in package.manifest.atoms}
    matrix = package.drift
    if options.matrix_prompts:
        matrix = measured_matrix(package, make_meter(package, loaded, prompts[:used], options), progress)
    model, quadratic = DriftModel.of(matrix, curves), DriftModel.of(matrix, dict.fromkeys(curves, ()))
    meter = make_meter(package, loaded, prompts[-options.prompts :], options)
    with progress.task("drift of mixes", options.mixes, "mixes") as bar:
        for mix in random_mixes(package, model, options.mixes, options.seed):
            row = {"atoms": mix.as_dict(), "predicted": model.kl(mix), "quadratic": quadratic.kl(mix)}
            for composition in options.compositions:
                row[composition] = meter.kl_of(package.bank.compose(mix, composition))
            yield row
            bar.advance()


def load_merged(package: Package) -> tuple:
    """The base model with θ0 merged, and its tokenizer."""
    device = choose_device()
    model, tokenizer = load_model(package.manifest.base_model.id, MEASURED_IN, device)
    merge_adapter(model, package.base_adapter)
    return model, tokenizer


def measured_matrix(package: Package, meter: DriftMeter, progress: Progress) -> Tensor:
    """M (J, J) on the meter's continuations, in the package's order of atoms."""
    directions = [package.bank.direction(Mix.of({card.id: 1.0})) for card in package.manifest.atoms]
    with progress.task("drift matrix", sum(len(b.documents) for b in meter.batches), "prompts") as bar:
        drift = meter.drift_matrix(directions, bar)
    meter.close()
    return drift


def make_meter(package: Package, loaded: tuple, prompts: list[str], options: argparse.Namespace) -> DriftMeter:
    """Measures on the unsteered model's own continuations of `prompts`."""
    model, tokenizer = loaded
    made = continuations(model, tokenizer, prompts, options.tokens, options.seed)
    steered = SteeredModel(model, package.base_adapter.space, 1)
    return DriftMeter(steered, package.base_adapter, "linear", make_batches(made, 1024, model.device))


def random_mixes(package: Package, model: DriftModel, count: int, seed: int) -> Iterator[Mix]:
    """Mixes within the atoms' tested ranges; those that would leave them are drawn again."""
    generator = torch.Generator().manual_seed(seed)
    ids, made = list(package.bank.ids), 0
    ranges = {card.id: card.tested_range for card in package.manifest.atoms}
    while made < count:
        size = 1 + int(torch.randint(min(MOST_ATOMS, len(ids)), (), generator=generator))
        chosen = torch.randperm(len(ids), generator=generator)[:size].tolist()
        raw = Mix.of({ids[i]: v for i, v in zip(chosen, torch.randn(size, generator=generator).tolist(), strict=True)})
        span = math.log(NATS[1] / NATS[0])
        target = NATS[0] * math.exp(span * float(torch.rand((), generator=generator)))
        factor = 1.0
        for _ in range(8):  # √KL is all but linear in the factor
            factor *= math.sqrt(target / max(model.kl(raw.scaled(factor)), 1e-9))
        mix = raw.scaled(factor)
        within = all(ranges[atom][0] <= c <= ranges[atom][1] for atom, c in mix)
        if within and 0.99 * NATS[0] <= model.kl(mix) <= 1.01 * NATS[1]:
            made += 1
            yield mix


def summary(rows: list[dict], composition: str, prediction: str) -> str:
    """Share within the factor, and the spread of measured over predicted."""
    ratios = torch.tensor([row[composition] / max(row[prediction], 1e-9) for row in rows], dtype=torch.float64)
    good = float(((ratios < FACTOR) & (ratios > 1 / FACTOR)).double().mean())
    low, middle, high = torch.quantile(ratios, ratios.new_tensor([0.05, 0.5, 0.95])).tolist()
    return f"{good:.0%} of {len(rows)} within {FACTOR}; measured / predicted 5%, 50%, 95%: {low:.2f}, {middle:.2f}, {high:.2f}"


def scatter(rows: list[dict], composition: str, path: Path) -> None:
    """Measured against predicted KL on logarithmic axes, with the band of a factor of 1.5; one colour a number of atoms."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 5), layout="constrained")
    axes = figure.subplots()
    ends = (NATS[0] / 2, NATS[1] * 2)
    axes.fill_between(
        ends, [e / FACTOR for e in ends], [e * FACTOR for e in ends], color="0.9", label=f"within {FACTOR}"
    )
    axes.plot(ends, ends, color="0.5", linewidth=1)
    points = axes.scatter([row["predicted"] for row in rows], [row[composition] for row in rows], s=14, cmap="viridis",
                          c=[len(row["atoms"]) for row in rows])  # fmt: skip
    figure.colorbar(points, label="atoms in the mix")
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="predicted KL, nats a token",
             ylabel="measured KL, nats a token", title=f"{len(rows)} random mixes, composition {composition!r}")  # fmt: skip
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
