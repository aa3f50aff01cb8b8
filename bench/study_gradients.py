"""Keeps the whole LoRA gradients of documents, so that a study can change everything behind them without another pass.

    python -m bench.study_gradients --model DIR --data FILE.jsonl --work DIR --target-modules q_proj,v_proj --rank 8
    python -m bench.study_gradients --model DIR --data FILE.jsonl --work DIR --adapter PKG/base

θ0 is --adapter, or a fine-tune of half an epoch on the same documents, kept in WORK/theta0. One forward and backward pass;
writes shards of unit gradients in half precision (documents × parameters: 0.9 MB a document at rank 8 on q and v of
SmolLM2-135M, 4.9 MB on all linears), their lengths and sketches, and, from labels sampled from the model, the eigenvectors
and the Fisher in them. Discovery itself never keeps whole gradients (offline/rows.py). Resumable; bench/study.py reads it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from atoms.adapter import adapter_delta, read_adapter, write_adapter
from atoms.model import choose_dtype, load_model
from atoms.space import LoRASpace
from atoms.storage import new_directory, sha256_file, write_json, write_tensors
from offline.config import FinetuneConfig
from offline.corpus import collate, encode_corpus, plan_batches, read_corpus, sample_documents
from offline.curvature import factors_from_tensors, factors_to_tensors, fit_eigenvalues, fit_factors
from offline.finetune import finetune
from offline.gradients import FullGradients, gradient_hooks, label_logits, mean_losses
from offline.lora import frozen_lora
from offline.progress import Progress
from offline.rows import Sketcher

SEED = 0
MODULES, RANK, EPOCHS = "q_proj,v_proj", 8, 0.5
BLOCK = 250
"""Documents a shard."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter", type=Path, help="θ0; default: fine-tune one")
    parser.add_argument("--target-modules", default=MODULES, help="of that fine-tune")
    parser.add_argument("--rank", type=int, default=RANK, help="of that fine-tune")
    parser.add_argument("--epochs", type=float, default=EPOCHS, help="of that fine-tune")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--factor-documents", type=int, default=96)
    parser.add_argument("--eigenvalue-documents", type=int, default=192)
    parser.add_argument("--dtype", default="auto", help="of the model; gradients are summed in float32")
    options = parser.parse_args()
    if options.adapter and (options.target_modules, options.rank, options.epochs) != (MODULES, RANK, EPOCHS):
        parser.error(
            "--target-modules, --rank and --epochs are of the fine-tune that --adapter takes the place of; leave it out"
        )
    progress = Progress()
    device = torch.device("cpu")
    base, tokenizer = load_model(options.model, choose_dtype(device, options.dtype), device, None)
    documents = encode_corpus(read_corpus(options.data, limit=options.limit), tokenizer, options.max_length).documents
    options.work.mkdir(parents=True, exist_ok=True)
    check_inputs(options)
    adapter = options.adapter or fine_tuned(base, documents, options, progress)
    space = read_adapter(adapter).space
    model = frozen_lora(base, adapter, space)
    if not (options.work / "eigenvalues.safetensors").exists():
        keep_curvature(model, space, documents, options, progress)
    keep_gradients(model, space, documents, options, progress)


def check_inputs(options: argparse.Namespace) -> None:
    """Ends the program if `options.work` holds gradients of other documents or settings; else notes what they are of."""
    inputs = {name: str(value) for name, value in vars(options).items() if name not in ("work", "data")}
    inputs["data"], file = sha256_file(options.data), options.work / "inputs.json"
    if not file.exists():
        write_json(file, inputs)
    elif (before := json.loads(file.read_text())) != inputs:
        changed = ", ".join(name for name, value in inputs.items() if before.get(name) != value)
        sys.exit(f"{options.work} is of another {changed}; give another --work")


def fine_tuned(base, documents, options: argparse.Namespace, progress: Progress) -> Path:
    """θ0 on the asked modules, at alpha = 2 × rank."""
    path = options.work / "theta0"
    if not path.exists():
        config = FinetuneConfig(rank=options.rank, alpha=2.0 * options.rank, epochs=options.epochs,
                                target_modules=tuple(options.target_modules.split(",")))  # fmt: skip
        checkpoint = options.work / "checkpoint.safetensors"
        adapter, _ = finetune(base, documents, config, options.batch_tokens, SEED, checkpoint, progress)
        with new_directory(path) as temporary:
            write_adapter(temporary, adapter_delta(adapter), adapter.targets, options.model)
    return path


def keep_curvature(model, space: LoRASpace, documents, options: argparse.Namespace, progress: Progress) -> None:
    """Eigenvectors with the covariances' own eigenvalues, and λ (o, i) a matrix from sampled labels."""
    tokens, seed, file = options.batch_tokens, SEED + 1, options.work / "factors.safetensors"
    if not file.exists():
        sample = sample_documents(documents, options.factor_documents, seed)
        fitted = fit_factors(model, space, sample, tokens, seed, progress)
        write_tensors(file, factors_to_tensors(fitted))
    factors = factors_from_tensors(load_file(file), [t.key for t in space.tensors])
    sample = sample_documents(documents, options.eigenvalue_documents, SEED + 2)
    fisher = fit_eigenvalues(model, space, factors, sample, tokens, seed, progress)
    write_tensors(options.work / "eigenvalues.safetensors", {key: value.float() for key, value in fisher.items()})


def keep_gradients(model, space: LoRASpace, documents, options: argparse.Namespace, progress: Progress) -> None:
    sink, sketchers = FullGradients(), {t.key: Sketcher(t.shape, t.key) for t in space.tensors}
    with gradient_hooks(model, space, sink), progress.task("gradients", len(documents), "documents") as bar:
        for start in range(0, len(documents), BLOCK):  # in corpus order, so that a part is a sample of the whole
            block = documents[start : start + BLOCK]
            path = options.work / f"gradients-{start:06d}.safetensors"
            if not path.exists():
                parts = [
                    one_batch(model, sink, sketchers, group) for group in plan_batches(block, options.batch_tokens)
                ]
                write_tensors(path, {key: torch.cat([part[key] for part in parts]) for key in parts[0]})
            bar.advance(len(block))


def one_batch(model, sink: FullGradients, sketchers: dict[str, Sketcher], group) -> dict[str, Tensor]:
    sink.tensors.clear()  # those of the last batch
    batch = collate(group)
    losses = mean_losses(label_logits(model, batch), batch)
    losses.sum().backward()
    flat = torch.cat([sink.tensors[key].flatten(1) for key in sketchers], dim=1)  # (b, d)
    norms = flat.norm(dim=1).clamp_min(1e-20)
    sketches = torch.cat([sketch(sink.tensors[key]) for key, sketch in sketchers.items()], dim=1)
    return {
        "document": torch.tensor([document.row for document in group]),
        "tokens": torch.tensor([len(document.response_ids) for document in group]),
        "gradient": (
            flat / norms[:, None] * 64
        ).half(),  # unit length; times 64 keeps small entries out of the subnormals
        "sketch": (sketches / norms[:, None]).half(),
        "norm": norms,
        "loss": losses.detach(),
    }


if __name__ == "__main__":
    main()
