"""The cost model of docs/cost-model.md: its formulas at any size, and the dictionary's checked against measured small points.

    python bench/cost_model.py [--documents 1000000] [--tokens 60] [--atoms 10000] [--components 6800] [--kept 500]
                               [--pass-rate 200] [--flops 1e11] [--json FILE]

--pass-rate: tokens a second of one forward and backward pass; --flops: of large float32 products, both of the machine in
mind. The check learns two iterations at several sizes on made-up rows here, and shows measured over modelled seconds at the
rate of operations of the median point: a constant ratio is what the model needs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import atoms.projection
from offline.config import CalibrateConfig, CurvatureConfig, DictionaryConfig, SteeringConfig
from offline.dictionary import learn_dictionary
from offline.plan import DICTIONARY_PASSES, made_up_rows
from offline.progress import Progress

POINTS = (
    (1024, 32, 2000), (1024, 128, 2000), (2048, 128, 2000), (2048, 128, 6000), (2048, 512, 2000), (12_500, 2000, 6000),
)  # fmt: skip
"""(rows, atoms, components)."""
WHITENING_OPERATIONS = 26 * 144
"""A component of a row: six passes of two products with a basis of 128 + 16 vectors, and one with it at the end."""
HELD_OUT = DictionaryConfig().held_out
SCALE_STEPS = 3
"""Trials until an atom costs 0.05 nats at ±1, at most five."""
USED = 3
"""Atoms in a row's code (2-3 at α = 0.1)."""


def iteration_operations(rows: int, count: int, dim: int, small: float) -> dict[str, float]:
    """Floating-point operations of one alternation of offline/dictionary.py; `small`: those of the linear systems of a row's
    working set.

    One product of rows and atoms; codes are sparse, so the Gram matrix, AᵀA and AᵀX cost USED atoms a row; the Gram matrix
    itself, and the products of a sweep of atoms.
    """
    return {
        "rows × atoms": 2 * rows * count * dim,
        "sparse codes": rows * (small + 2 * USED * (3 * count + dim)),
        "Gram matrix, update of atoms": 2 * 2 * count**2 * dim,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=float, default=60.0)
    parser.add_argument("--atoms", type=int, default=10_000)
    parser.add_argument("--components", type=int, default=6_800)
    parser.add_argument("--kept", type=int, default=500)
    parser.add_argument("--pass-rate", type=float, default=200.0)
    parser.add_argument("--flops", type=float, default=1e11)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    points = [measure(*point) for point in POINTS]
    rate = statistics.median_low(point["operations"] / point["seconds"] for point in points)
    print(f"two alternations each, at {rate / 1e9:.1f} GFLOP/s")
    print(f"{'rows':>6}{'atoms':>7}{'dim':>6}{'codes/row':>11}{'measured s':>12}{'modelled s':>12}{'ratio':>7}")
    for point in points:
        point["ratio"] = point["seconds"] * rate / point["operations"]
        print(f"{point['rows']:>6}{point['atoms']:>7}{point['dim']:>6}{point['small']:>11.2g}{point['seconds']:>12.2f}"
              f"{point['operations'] / rate:>12.2f}{point['ratio']:>7.2f}")  # fmt: skip
    table = project(options, max(point["small"] for point in points))
    size = f"{options.documents:,} documents of {options.tokens:g} tokens"
    print(f"\n{size}, {options.atoms:,} atoms of {options.components:,} components")
    for name, value in table.items():
        print(f"  {name:<52}{value}")
    if options.json:
        options.json.write_text(json.dumps({"points": points, "table": table}, indent=1) + "\n")


def measure(rows: int, count: int, dim: int) -> dict[str, float]:
    """One point: seconds and modelled operations of two alternations here."""
    small = 0
    signs = atoms.projection._signs  # once a system, and once before

    def counted(values, *arguments):
        nonlocal small
        n, s = values.shape
        small += n * (2 * s**3 // 3 + 4 * s**2)
        return signs(values, *arguments)

    with tempfile.TemporaryDirectory() as folder:
        store = made_up_rows(Path(folder), rows, dim, count)
        atoms.projection._signs = counted
        started = time.process_time()  # of all threads, so that neighbours on the machine count less
        learn_dictionary(store, range(rows), DictionaryConfig(atoms=count, iterations=2), 0, Progress(quiet=True))
        seconds = time.process_time() - started
        atoms.projection._signs = signs
    a_row = small / (2 * rows)
    operations = 2 * sum(iteration_operations(rows, count, dim, a_row).values())
    return {"rows": rows, "atoms": count, "dim": dim, "small": a_row, "seconds": seconds, "operations": operations}


def project(options: argparse.Namespace, small: float) -> Mapping[str, str]:
    """The model at the size asked for."""
    documents, count, dim = options.documents, options.atoms, options.components
    tokens = documents * options.tokens
    operations = iteration_operations(documents, count, dim, small)
    path, curvature, calibration = SteeringConfig(), CurvatureConfig(), CalibrateConfig()
    steps = path.steps * path.documents  # passes over a document, which counts as one of the corpus though it is cut
    hours = {name: DICTIONARY_PASSES * value / options.flops / 3600 for name, value in operations.items()}
    sampled = curvature.factor_documents + curvature.eigenvalue_documents
    # forward passes over all prompts, at half of the cost of a forward and backward one
    passes_an_hour = 3600 * 2 * options.pass_rate / (calibration.prompts * calibration.continuation_tokens)
    return {
        "fine-tune, an epoch": _hours(tokens / options.pass_rate / 3600),
        "factors and eigenvalues": _hours(sampled * options.tokens / options.pass_rate / 3600),
        "gradients": _hours(tokens / options.pass_rate / 3600),
        "whitening": _hours(WHITENING_OPERATIONS * documents * dim / options.flops / 3600),
        "rows on disk": f"{documents * (4 * dim + 16) / 2**30:,.0f} GiB, and sketches",
        **{f"dictionary, {DICTIONARY_PASSES} alternations: {name}": _hours(value) for name, value in hours.items()},
        "dictionary in all, one seed": _hours(sum(hours.values())),
        f"directions of {options.kept} atoms": _hours(options.kept * steps * options.tokens / options.pass_rate / 3600),
        "atoms, AᵀX and their copies in memory": f"{20 * count * dim / 2**30:,.1f} GiB",
        "codes and lengths of all documents (selection)": f"{150 * documents / 2**30:,.2f} GiB",
        f"cosines of held-out documents, {options.kept} atoms": f"{4 * HELD_OUT * documents * options.kept / 2**30:,.2f} GiB",
        f"calibration of {options.kept} atoms": _hours(
            options.kept * (2 * SCALE_STEPS + len(calibration.coefficients) - 2) / passes_an_hour
        ),
        f"drift matrix of {options.kept} atoms": _hours((2 * options.kept + 1) / passes_an_hour),
    }


def _hours(value: float) -> str:
    return f"{value:,.1f} h" if value < 48 else f"{value / 24:,.1f} days"


if __name__ == "__main__":
    main()
