"""The cost model of docs/cost-model.md: its formulas at any size, and the dictionary's checked against measured points.

    python -m bench.cost_model [--documents 1000000] [--tokens 60] [--atoms 10000] [--components 6800] [--kept 500]
                               [--pass-rate 200] [--flops 1e11] [--row-seconds 1e-4] [--json FILE]

--pass-rate: tokens a second of one forward and backward pass; --flops: of large float32 products; --row-seconds: to code one
row; all of the machine in mind. The check learns two iterations at several sizes on made-up rows here, fits the last two to
the small ones, and shows measured over modelled seconds, of a larger one as well.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from offline.coherence import NULL_SETS
from offline.config import CalibrateConfig, CurvatureConfig, DictionaryConfig, SelectConfig, SteeringConfig
from offline.dictionary import learn_dictionary
from offline.plan import (
    BYTES_OF_CODES,
    DICTIONARY_PASSES,
    dictionary_bytes,
    dictionary_operations,
    made_up_rows,
    row_bytes,
)
from offline.progress import Progress

FITTED = ((1024, 32, 2000), (1024, 128, 2000), (2048, 128, 2000), (2048, 128, 6000), (2048, 512, 2000))
"""(rows, atoms, components) that the rates are fitted to."""
CHECKED = ((12_500, 2000, 6000),)
ITERATIONS = 2
WHITENING_OPERATIONS = 26 * 144
"""A component of a row: six passes of two products with a basis of 128 + 16 vectors, and one with it at the end."""
HELD_OUT = DictionaryConfig().held_out
SCALE_STEPS = 3
"""Trials until an atom costs 0.05 nats at ±1, at most eight."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=float, default=60.0)
    parser.add_argument("--atoms", type=int, default=10_000)
    parser.add_argument("--components", type=int, default=6_800)
    parser.add_argument("--kept", type=int, default=500)
    parser.add_argument("--pass-rate", type=float, default=200.0)
    parser.add_argument("--flops", type=float, default=1e11)
    parser.add_argument("--row-seconds", type=float, default=1e-4)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    points = [measure(*point) for point in FITTED + CHECKED]
    a_product, a_row = fit(points[: len(FITTED)])
    print(f"{ITERATIONS} alternations each; fitted to the first {len(FITTED)}: products {1e-9 / a_product:.1f} GFLOP/s, "
          f"{1e6 * a_row:.0f} µs a row and alternation")  # fmt: skip
    print(f"{'rows':>7}{'atoms':>7}{'dim':>6}{'measured s':>12}{'modelled s':>12}{'ratio':>7}")
    for point in points:
        point["modelled"] = a_product * point["operations"] + a_row * ITERATIONS * point["rows"]
        point["ratio"] = point["seconds"] / point["modelled"]
        print(f"{point['rows']:>7}{point['atoms']:>7}{point['dim']:>6}{point['seconds']:>12.2f}{point['modelled']:>12.2f}"
              f"{point['ratio']:>7.2f}")  # fmt: skip
    table = project(options)
    size = f"{options.documents:,} documents of {options.tokens:g} tokens"
    print(f"\n{size}, {options.atoms:,} atoms of {options.components:,} components")
    for name, value in table.items():
        print(f"  {name:<58}{value}")
    if options.json:
        rates = {"seconds an operation": a_product, "seconds a row": a_row}
        options.json.write_text(json.dumps({"points": points, "rates": rates, "table": table}, indent=1) + "\n")


def measure(rows: int, count: int, dim: int) -> dict[str, float]:
    """One point: CPU seconds of all threads, and the products' operations, of `ITERATIONS` alternations here."""
    with tempfile.TemporaryDirectory() as folder:
        store = made_up_rows(Path(folder), rows, dim, count)
        started = time.process_time()  # so that neighbours on the machine count less
        config = DictionaryConfig(atoms=count, iterations=ITERATIONS)
        learn_dictionary(store, range(rows), config, 0, Progress(quiet=True))
        seconds = time.process_time() - started
    operations = ITERATIONS * sum(dictionary_operations(rows, count, dim).values())
    return {"rows": rows, "atoms": count, "dim": dim, "seconds": seconds, "operations": operations}


def fit(points: Sequence[Mapping[str, float]]) -> tuple[float, float]:
    """(seconds an operation, seconds a row and alternation): least squares of the relative errors."""
    costs = torch.tensor([[p["operations"], ITERATIONS * p["rows"]] for p in points], dtype=torch.float64)
    seconds = torch.tensor([p["seconds"] for p in points], dtype=torch.float64)
    rates = torch.linalg.lstsq(costs / seconds[:, None], torch.ones(len(points), 1, dtype=torch.float64)).solution
    return float(rates[0]), float(rates[1])


def project(options: argparse.Namespace) -> Mapping[str, str]:
    """The model at the size asked for."""
    documents, count, dim = options.documents, options.atoms, options.components
    tokens = documents * options.tokens
    operations = dictionary_operations(documents, count, dim)
    path, curvature, calibration = SteeringConfig(), CurvatureConfig(), CalibrateConfig()
    steps = path.steps * path.documents  # passes over a document, which counts as one of the corpus though it is cut
    hours = {name: DICTIONARY_PASSES * value / options.flops / 3600 for name, value in operations.items()}
    hours["rows' codes"] = DICTIONARY_PASSES * documents * options.row_seconds / 3600
    sampled = curvature.factor_documents + curvature.eigenvalue_documents
    # forward passes over all prompts, at half of the cost of a forward and backward one
    passes_an_hour = 3600 * 2 * options.pass_rate / (calibration.prompts * calibration.continuation_tokens)
    compared = NULL_SETS * SelectConfig().top_documents
    return {
        "fine-tune, an epoch": _hours(tokens / options.pass_rate / 3600),
        "factors and eigenvalues": _hours(sampled * options.tokens / options.pass_rate / 3600),
        "gradients": _hours(tokens / options.pass_rate / 3600),
        "whitening": _hours(WHITENING_OPERATIONS * documents * dim / options.flops / 3600),
        "rows on disk": f"{documents * row_bytes(dim, 0) / 2**30:,.0f} GiB, and sketches",
        **{f"dictionary, {DICTIONARY_PASSES} alternations: {name}": _hours(value) for name, value in hours.items()},
        "dictionary in all, one seed": _hours(sum(hours.values())),
        "rows read for chance (selection), at most": f"{count * compared * row_bytes(dim, 0) / 2**30:,.0f} GiB",
        f"directions of {options.kept} atoms": _hours(options.kept * steps * options.tokens / options.pass_rate / 3600),
        "atoms, AᵀX and their copies in memory": f"{dictionary_bytes(count, dim) / 2**30:,.1f} GiB",
        "codes and lengths of all documents (selection)": f"{BYTES_OF_CODES * documents / 2**30:,.2f} GiB",
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
