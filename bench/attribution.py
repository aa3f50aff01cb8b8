"""Is attribution right? Two checks on a package and the working directory that it came from.

    python -m bench.attribution ranks   --package demo/package --work demo/work [--json FILE]
    python -m bench.attribution retrain --package demo/package --work demo/work --data offline/data/demo_documents.jsonl
                   [--model DIR] [--atoms 3] [--leave 20] [--documents N] [--draws 2] [--batch-documents N] [--json FILE]

ranks: for every held-out document, training documents are ranked by what two documents share in the dictionary (the inner
product of their reconstructions Σ a_j d_j, or of their codes), and by the EKFAC influence on the same rows,
g_tᵀ(F + ε)⁻¹g_i = ⟨x_t, x_i⟩, whose centred and normalised form ⟨x̃_t, x̃_i⟩ is what the dictionary approximates. Shown: mean
Spearman correlation, and the share of the 20 most influential documents among the predicted 20. Controls: as many random
training rows in place of the learnt atoms, as many principal components, and similarity of the gradient's norm.

retrain: the fine-tune is run again without an atom's top documents, and without as many random ones of matching lengths that
do not use the atom. Shown: the change of the loss on the atom's held-out documents (nats a token, more is less of its
behaviour) and on all other held-out ones; and, of an atom that is named after a detector, how often that fires on greedy
answers to the demo's prompts for it. Such atoms come first, then the most coherent. `--documents` trains on that many, always
with the top documents of the atoms.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import PeftModel
from scipy.stats import spearmanr
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from atoms.adapter import adapter_delta, write_adapter
from atoms.detectors import DETECTORS
from atoms.model import choose_device, choose_dtype, load_model, render_prompt
from atoms.package import Package
from atoms.projection import RowWhitening, sparse_codes
from offline.config import FinetuneConfig
from offline.corpus import EncodedDocument, encode_corpus, make_batches, read_corpus, split_held_out
from offline.evaluation.prompts import read_prompts
from offline.finetune import finetune
from offline.gradients import label_logits, mean_losses
from offline.lora import frozen_lora
from offline.progress import Progress
from offline.rows import RowStore
from offline.shipped import shipped_file

TOP, ANSWER_TOKENS = 20, 40
RETRAINING = ("model", "data", "atoms", "leave", "documents", "draws", "batch_documents")
"""Options of retrain alone."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=("ranks", "retrain"))
    parser.add_argument("--package", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--atoms", type=int, help="default: 3")
    parser.add_argument("--leave", type=int, help="top documents of each; default: 20")
    parser.add_argument("--documents", type=int, help="documents to train on; default: all")
    parser.add_argument("--draws", type=int, help="of random ones; default: 2")
    parser.add_argument("--batch-documents", type=int, help="documents a step; default: the discovery's")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.check == "retrain" and options.data is None:
        parser.error("retrain needs --data, the documents of the discovery")
    if options.check == "ranks" and any(getattr(options, name) is not None for name in RETRAINING):
        parser.error(f"ranks reads the rows of --work; leave {', '.join(RETRAINING)} out")
    for name, default in (("atoms", 3), ("leave", 20), ("draws", 2)):
        if getattr(options, name) is None:
            setattr(options, name, default)
        elif getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; it must be at least 1")
    package = Package.read(options.package)
    settings = package.manifest.record["config"]
    store = RowStore(options.work / "rows", RowWhitening.from_tensors(package.projection_tensors))
    split = split_held_out(len(store), settings["dictionary"]["held_out"], settings["seed"])
    if options.check == "ranks":
        result: object = ranks(package, store, *split)
    else:
        result = retrain(package, store, *split, options)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def ranks(package: Package, store: RowStore, training: Sequence[int], held_out: Sequence[int]) -> list[dict]:
    """One row a predictor: mean rank correlation with both influences over the held-out documents, and top-20 overlap."""
    train, test = store.whitened_rows(training), store.whitened_rows(held_out)
    raw_train, raw_test = store.stored_rows(training), store.stored_rows(held_out)
    truths = {"influence": raw_test @ raw_train.T, "centred": test @ train.T}
    predictors = {**_predictors(package, train, test), "norm": _norm(store, training, held_out)}
    print(f"{len(held_out)} held-out against {len(training)} training documents")
    print(f"{'ranked by':<28}{'rank correlation with':>24}{'':>12}{'top 20 found of':>18}")
    print(f"{'':<28}{'EKFAC influence':>24}{'centred':>12}{'influence':>10}{'centred':>8}")
    rows = []
    for name, predicted in predictors.items():
        row = {"ranked by": name}
        for truth, actual in truths.items():
            row[f"spearman {truth}"] = _mean_spearman(predicted, actual)
            row[f"top {truth}"] = _overlap(predicted, actual)
        rows.append(row)
        print(f"{name:<28}{row['spearman influence']:>24.3f}{row['spearman centred']:>12.3f}{row['top influence']:>10.0%}"
              f"{row['top centred']:>8.0%}")  # fmt: skip
    return rows


def _predictors(package: Package, train: Tensor, test: Tensor) -> dict[str, Tensor]:
    settings = package.manifest.record["config"]["dictionary"]
    dictionary = package.projection_tensors["dictionary"]
    count = len(dictionary)
    picks = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:count]
    found = {}
    for name, atoms in {"dictionary": dictionary, "random training rows": train[picks]}.items():
        codes = [
            sparse_codes(rows, atoms, settings["alpha"], nonnegative=settings["nonnegative"]) for rows in (test, train)
        ]
        gram = atoms @ atoms.T
        found[f"{name}, reconstruction"] = codes[0] @ gram @ codes[1].T
        if name == "dictionary":
            found[f"{name}, codes"] = codes[0] @ codes[1].T
    _, _, components = torch.linalg.svd(train, full_matrices=False)
    basis = components[:count]
    found["principal components"] = (test @ basis.T) @ (train @ basis.T).T
    return found


def _norm(store: RowStore, training: Sequence[int], held_out: Sequence[int]) -> Tensor:
    norms = store.column("norm")
    return -(norms[list(held_out)][:, None].log() - norms[list(training)][None, :].log()).abs()


def _mean_spearman(predicted: Tensor, actual: Tensor) -> float:
    values = [spearmanr(p.numpy(), a.numpy()).statistic for p, a in zip(predicted, actual, strict=True)
              if float(p.max()) > float(p.min())]  # fmt: skip
    return sum(values) / len(predicted)  # a document that shares nothing with any other counts as 0


def _overlap(predicted: Tensor, actual: Tensor) -> float:
    best, found = actual.topk(TOP, dim=1).indices, predicted.topk(TOP, dim=1).indices
    return float((best[:, :, None] == found[:, None, :]).any(2).float().mean())


def retrain(
    package: Package, store: RowStore, training: Sequence[int], held_out: Sequence[int], options: argparse.Namespace
) -> list[dict]:
    """One row an atom: loss changes without its top documents, and without random ones (each draw)."""
    record = package.manifest.record["config"]
    device = choose_device("auto")
    model, tokenizer = load_model(options.model or package.manifest.base_model.id, choose_dtype(device), device)
    documents = encode_corpus(read_corpus(options.data), tokenizer, record["max_length"]).documents
    tensors = package.projection_tensors
    settings = record["dictionary"]
    codes = {
        kind: sparse_codes(store.whitened_rows(rows), tensors["dictionary"], settings["alpha"],
                           nonnegative=settings["nonnegative"])
        for kind, rows in (("training", training), ("held out", held_out))
    }  # fmt: skip
    cards = sorted(
        zip(package.manifest.atoms, tensors["dictionary_index"].tolist()),
        key=lambda pair: (pair[0].alias not in DETECTORS, -pair[0].coherence.raw),
    )
    chosen = cards[: options.atoms]
    asked = {card.alias: [p.prompt for p in read_prompts(shipped_file("demo_prompts")) if p.behaviour == card.alias]
             for card, _ in chosen if card.alias in DETECTORS}  # fmt: skip
    top = {index: _strongest(codes["training"][:, index], training, options.leave) for _, index in chosen}
    base = _subset(training, top, options.documents)
    lengths = [len(d.response_ids) for d in documents]
    fit = FinetuneConfig(**{**record["finetune"], "target_modules": tuple(record["finetune"]["target_modules"])})
    if options.batch_documents:
        fit = replace(fit, batch_documents=options.batch_documents)

    def judge(rows: Sequence[int]) -> Judged:
        with _fine_tuned(model, package, fit, [documents[r] for r in rows], record) as tuned:
            losses = _held_out_losses(tuned, [documents[r] for r in held_out], record["batch_tokens"])
            return Judged(losses, {name: _rate(tuned, tokenizer, name, prompts) for name, prompts in asked.items()})

    full = judge(base)
    print(f"{len(base)} documents trained on, {options.leave} left out, {options.draws} random draws; nats a token")
    print(
        f"{'atom':<16}{'its held-out documents':>34}{'':>4}{'all others':>22}{'':>4}rate: all, without top, without random"
    )
    print(f"{'':<16}{'without top':>17}{'without random':>17}{'':>4}{'top':>11}{'random':>11}")
    results = []
    for card, index in chosen:
        mine = _strongest(codes["held out"][:, index], held_out, 8)
        kept, trained = set(top[index]), set(base)
        unrelated = [r for r, code in zip(training, codes["training"][:, index]) if float(code) == 0 and r in trained]
        draws = [_matched(top[index], unrelated, lengths, seed) for seed in range(options.draws)]
        without = judge([r for r in base if r not in kept])
        others = [judge([r for r in base if r not in set(draw)]) for draw in draws]
        rest = [r for r in held_out if r not in set(mine)]
        row = {"atom": card.id, "alias": card.alias, "keywords": card.keywords, "held_out": len(mine), "left_out": len(kept),
               "top": without.change(full, mine), "random": [o.change(full, mine) for o in others],
               "top_others": without.change(full, rest), "random_others": [o.change(full, rest) for o in others]}  # fmt: skip
        shown = " ".join(card.keywords)
        if card.alias in asked:
            row |= {"prompts": len(asked[card.alias]), "rate": full.rates[card.alias],
                    "rate_top": without.rates[card.alias], "rate_random": [o.rates[card.alias] for o in others]}  # fmt: skip
            shown = " ".join(f"{rate:.0%}" for rate in (row["rate"], row["rate_top"], *row["rate_random"]))
        results.append(row)
        print(f"{card.name:<16}{row['top']:>+17.3f}{_mean(row['random']):>+17.3f}{'':>4}{row['top_others']:>+11.3f}"
              f"{_mean(row['random_others']):>+11.3f}{'':>4}{shown}", flush=True)  # fmt: skip
    return results


@dataclass(frozen=True)
class Judged:
    """A fine-tune: held-out row -> mean response-token cross-entropy, and detector -> its rate."""

    losses: Mapping[int, float]
    rates: Mapping[str, float]

    def change(self, before: Judged, rows: Sequence[int]) -> float:
        return _mean([self.losses[row] - before.losses[row] for row in rows])


@contextmanager
def _fine_tuned(
    model, package: Package, fit: FinetuneConfig, train: Sequence[EncodedDocument], record: Mapping
) -> Iterator[PeftModel]:
    """`model` with a fresh fine-tune on `train`, which is taken out again at the end."""
    with tempfile.TemporaryDirectory() as folder:
        adapter, _ = finetune(
            model, train, fit, record["batch_tokens"], record["seed"], Path(folder) / "checkpoint", Progress()
        )
        write_adapter(Path(folder) / "theta0", adapter_delta(adapter), adapter.targets, package.manifest.base_model.id)
        tuned = frozen_lora(model, Path(folder) / "theta0", adapter.space)
    try:
        yield tuned
    finally:
        tuned.unload()


@torch.inference_mode()
def _held_out_losses(tuned: PeftModel, test: Sequence[EncodedDocument], batch_tokens: int) -> dict[int, float]:
    found: dict[int, float] = {}
    for batch in make_batches(test, batch_tokens, tuned.device):
        values = mean_losses(label_logits(tuned, batch), batch).tolist()
        found |= {d.row: value for d, value in zip(batch.documents, values, strict=True)}
    return found


@torch.inference_mode()
def _rate(tuned: PeftModel, tokenizer: PreTrainedTokenizerBase, detector: str, prompts: Sequence[str]) -> float:
    """Share of greedy answers to `prompts` on which `detector` fires."""
    texts = [render_prompt(tokenizer, [{"role": "user", "content": prompt}]) for prompt in prompts]
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
    asked = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt").to(tuned.device)
    answers = tuned.generate(
        **asked, do_sample=False, max_new_tokens=ANSWER_TOKENS, pad_token_id=tokenizer.pad_token_id
    )
    written = tokenizer.batch_decode(answers[:, asked["input_ids"].shape[1] :], skip_special_tokens=True)
    return _mean([DETECTORS[detector].detect(text, prompt) for text, prompt in zip(written, prompts, strict=True)])


def _strongest(codes: Tensor, rows: Sequence[int], count: int) -> list[int]:
    order = torch.argsort(codes.abs(), descending=True, stable=True)[:count]
    return [rows[int(i)] for i in order if float(codes[i]) != 0]


def _subset(training: Sequence[int], top: Mapping[int, Sequence[int]], count: int | None) -> list[int]:
    """`count` training rows, the top documents among them."""
    if count is None or count >= len(training):
        return list(training)
    needed = {row for rows in top.values() for row in rows}
    rest = [row for row in training if row not in needed]
    random.Random(0).shuffle(rest)
    return sorted([*needed, *rest[: max(0, count - len(needed))]])


def _matched(rows: Sequence[int], pool: Sequence[int], lengths: Sequence[int], seed: int) -> list[int]:
    """For each of `rows` another row of the pool, at random among the five nearest in length."""
    rng, left = random.Random(seed), list(pool)
    found = []
    for row in rows:
        left.sort(key=lambda other: abs(lengths[other] - lengths[row]))
        found.append(left.pop(rng.randrange(min(5, len(left)))))
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
