"""What bfloat16 rounding does to a discovery: rows, norms, losses, M, KL and orientation beside float32.

    python -m bench.precision --package demo/package [--data FILE] [--documents 24] [--prompts 4] [--atoms 4] [--json FILE]

Both dtypes see the same documents at the package's θ0, its basis, and its atoms on the same continuations.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from atoms.mix import Mix
from atoms.model import load_model, merge_adapter
from atoms.package import Package
from atoms.projection import Projection
from atoms.steered import SteeredModel
from offline.calibrate import DriftMeter, continuations
from offline.corpus import EncodedDocument, encode_corpus, make_batches, read_corpus
from offline.cpu_passes import quicken
from offline.lora import frozen_lora
from offline.progress import Progress
from offline.rows import RowStore, write_rows
from offline.shipped import read_neutral_prompts, shipped_file

QUIET = Progress(quiet=True)
CPU = torch.device("cpu")
COEFFICIENTS = (-3.0, -1.0, -0.5, 0.5, 1.0, 3.0)
LONGEST = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=shipped_file("demo_documents"))
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--atoms", type=int, default=4)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    package = Package.read(options.package)
    exact, half = (measure(package, options, dtype) for dtype in (torch.float32, torch.bfloat16))
    result = {
        "cosine of rows": quantiles(torch.cosine_similarity(half["rows"], exact["rows"])),
        "norm, ratio": quantiles(half["norms"] / exact["norms"]),
        "loss, difference in nats": quantiles(half["losses"] - exact["losses"]),
        "M, relative error": float((half["M"] - exact["M"]).norm() / exact["M"].norm()),
        "M, ratio of the diagonal": quantiles(half["M"].diagonal() / exact["M"].diagonal()),
        **{f"KL at {c:g}, ratio": quantiles(half["kl"][:, n] / exact["kl"][:, n]) for n, c in enumerate(COEFFICIENTS)},
    }
    for name, value in result.items():
        print(f"{name:<28}{value}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def measure(package: Package, options: argparse.Namespace, dtype: torch.dtype) -> dict[str, Tensor]:
    """rows (n, D), norms and losses (n,) of the documents; M (J, J) and KL (J, coefficients) of the first J atoms."""
    adapter = package.base_adapter
    model, tokenizer = load_model(package.manifest.base_model.id, dtype, CPU)
    quicken(model)
    encoded = encode_corpus(read_corpus(options.data), tokenizer, LONGEST * 4).documents
    short = [document for document in encoded if len(document) < LONGEST][: options.documents]
    peft_model = frozen_lora(model, package.path / "base", adapter.space)
    projection = Projection.from_tensors(adapter.space, package.projection_tensors)
    with tempfile.TemporaryDirectory() as folder:
        write_rows(peft_model, projection, [replace(d, row=n) for n, d in enumerate(short)], 512, Path(folder), QUIET)
        store = RowStore(Path(folder))
        rows, norms, losses = store.stored_rows(range(len(short))), store.column("norm"), store.column("loss")
    peft_model.unload()
    merge_adapter(model, adapter)
    batches = make_batches(texts(package, options), 512, CPU)
    meter = DriftMeter(SteeredModel(model, adapter.space, 1), adapter, "linear", batches)
    directions = [package.bank.direction(Mix.of({atom: 1.0})) for atom in package.bank.ids[: options.atoms]]
    with QUIET.task("drift matrix", options.prompts, "prompts") as bar:
        matrix = meter.drift_matrix(directions, bar)
    kl = torch.tensor([[meter.kl(direction, c) for c in COEFFICIENTS] for direction in directions])
    return {"rows": rows, "norms": norms, "losses": losses, "M": matrix, "kl": kl}


def texts(package: Package, options: argparse.Namespace) -> list[EncodedDocument]:
    """The float32 model's own continuations, for both."""
    model, tokenizer = load_model(package.manifest.base_model.id, torch.float32, CPU)
    merge_adapter(model, package.base_adapter)
    return continuations(model, tokenizer, read_neutral_prompts()[: options.prompts], 24, 0)


def quantiles(values: Tensor) -> dict[str, float]:
    points = torch.quantile(values.double(), torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    return {name: round(float(point), 4) for name, point in zip(("least", "median", "greatest"), points, strict=True)}


if __name__ == "__main__":
    main()
