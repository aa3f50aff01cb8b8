"""Discovery beside the plainest way of doing the same, both in one run: ratios as a table, and as JSON.

    python -m bench.discovery [gradients] [dictionary] [kronfluence] [memory] [scale] [--model DIR] [--data FILE]
        [--documents 48] [--rounds 2] [--dtype float32] [--batch-tokens 1024] [--rows 2000] [--rows-from WORK] [--atoms 200]
        [--kronfluence DIR] [--json FILE]

gradients    documents a second against autograd of one document at a time into a raw N×d matrix, and the cosines of the rows
dictionary   seconds against scikit-learn's MiniBatchDictionaryLearning, whole and until ours is as good, and the objectives on
             held-out rows: the rows of a discovery's working directory (--rows-from), or made-up ones
kronfluence  covariances and λ against kronfluence's, in its basis and with the same labels. It is no dependency (it asks for
             torchvision, which it does not use here): pip install --no-deps --target DIR kronfluence einops einconv opt-einsum
memory       peak anonymous memory of whole discoveries of 500, 1,000 and 2,000 documents against a fine-tuning batch
scale        a dictionary of 2,000 atoms over 12,500 and 50,000 made-up rows: seconds an iteration and peak anonymous memory

Without a part: gradients, dictionary and memory. Memory is the peak of RssAnon of a process of its own, so only on Linux.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atoms.machine import machine
from atoms.model import DTYPES, load_model
from atoms.projection import Projection, SparseCoder
from atoms.space import LoRASpace
from clients.options import quiet_libraries
from offline.config import (
    CurvatureConfig,
    DictionaryConfig,
    DiscoverConfig,
    FinetuneConfig,
    SelectConfig,
)
from offline.corpus import Batch, EncodedDocument, collate, encode_corpus, plan_batches, read_corpus, sample_documents
from offline.cpu_passes import quicken
from offline.curvature import (
    CovarianceSink,
    Eigenfactors,
    fit_eigenvalues,
    fit_factors,
    fit_projection,
    sample_labels,
    sampled_pass,
)
from offline.demo_model import prepare_demo_model
from offline.dictionary import learn_dictionary
from offline.finetune import finetune
from offline.gradients import lora_linear, sum_losses
from offline.lora import new_lora
from offline.pipeline import discover
from offline.plan import made_up_rows
from offline.progress import Progress
from offline.rows import RowStore, write_rows
from offline.shipped import shipped_file

QUIET = Progress(quiet=True)
ALPHA = 0.1
FEWER = (2, 3, 4, 6, 8, 12, 16, 24)
"""Iterations of the dictionary, tried in turn until it is as good as scikit-learn's."""
MEMORY_DOCUMENTS = (500, 1000, 2000)
FINETUNED = 160
"""Documents that the fine-tune of such a discovery takes: ten steps."""
SCALE_ROWS, SCALE_ATOMS, SCALE_DIM, SCALE_ITERATIONS = (12_500, 50_000), 2000, 6000, 2
SEED = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=" ".join(PARTS))
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path, default=shipped_file("demo_documents"))
    parser.add_argument("--documents", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the gradients' model")
    parser.add_argument("--batch-tokens", type=int, default=1024, help="in ours of the gradients")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--rows-from", type=Path)
    parser.add_argument("--atoms", type=int, default=200, help="of the dictionary")
    parser.add_argument("--kronfluence", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if unknown := set(options.parts) - PARTS.keys():
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    options.model = (options.model or prepare_demo_model(Path(".cache/models"))).resolve()
    quiet_libraries()
    result: dict[str, Any] = {"machine": machine("cpu"), "model": options.model.name}
    print(result["machine"])
    for part in options.parts or DEFAULT_PARTS:
        result[part] = PARTS[part](options)
        print(f"\n{part}\n" + table(result[part]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def measure_gradients(options: argparse.Namespace) -> list[dict[str, object]]:
    """Both ways over the same documents, in turns; and the products of the passes alone, at the speed of a large one, which no
    way can do without. Each runs the model as it would: ours quickened, as a discovery does, the other as it was loaded."""
    dtype = DTYPES[options.dtype]
    quick, space, documents = lora_model(options, dtype)
    quicken(quick.get_base_model())
    plain, _, _ = lora_model(options, dtype)
    projection = some_projection(quick, space, documents[:16])
    for tensor in space.tensors:
        lora_linear(plain, tensor.key).weight.requires_grad_(True)
    one_by_one(plain, space, documents[:1])  # starts threads and fills caches; ours has made its projection
    limit = options.batch_tokens
    rows: list[dict[str, object]] = []
    for turn in range(options.rounds):
        mine = documents[turn * options.documents : (turn + 1) * options.documents]
        with tempfile.TemporaryDirectory() as folder:
            renumbered = [replace(document, row=n) for n, document in enumerate(mine)]
            out = Path(folder)
            _, ours = timed(lambda d=renumbered, f=out: write_rows(quick, projection, d, limit, f, QUIET))
            found = RowStore(out).stored_rows(range(len(mine)))
        matrix, theirs = timed(lambda d=mine: one_by_one(plain, space, d))
        expected = torch.stack([projection.project(space.unflatten(gradient)) for gradient in matrix])
        rows.append({
            "turn": turn + 1, "dtype": options.dtype, "documents": len(mine), "tokens": sum(map(len, mine)),
            "ours documents/s": len(mine) / ours, "one by one documents/s": len(mine) / theirs, "ratio": theirs / ours,
            "products alone documents/s": len(mine) / (pass_operations(quick, mine) / product_rate(dtype)),
            "least cosine of rows": float(torch.cosine_similarity(found, expected).min()),
        })  # fmt: skip
        print(table(rows[-1:]), flush=True)
    return rows


def pass_operations(model, documents: Sequence[EncodedDocument]) -> float:
    """Operations of all products with the frozen weights, forward and backward: of every token, in the head of labels."""
    head = model.get_output_embeddings().weight.numel()
    linears = sum(
        module.weight.numel() for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and ".lora_" not in name
    )  # fmt: skip
    labels = sum(len(document.response_ids) for document in documents)
    return 4.0 * ((linears - head) * sum(map(len, documents)) + head * labels)


def product_rate(dtype: torch.dtype) -> float:
    """Operations a second of one large product by oneDNN: what this CPU has to give."""
    x, weight = torch.randn(1024, 1536, dtype=dtype), torch.randn(1536, 1536, dtype=dtype)
    multiply = torch.ops.mkldnn._linear_pointwise
    multiply(x, weight, None, "none", [], "")
    seconds = min(timed(lambda: multiply(x, weight, None, "none", [], ""))[1] for _ in range(20))
    return 2.0 * x.shape[0] * weight.numel() / seconds


def one_by_one(model, space: LoRASpace, documents: Sequence[EncodedDocument]) -> Tensor:
    """The raw gradients (N, d): a document's mean loss over its response, from logits of all positions, and autograd."""
    matrix = torch.empty(len(documents), space.dim)
    for n, document in enumerate(documents):
        ids = torch.tensor([document.prompt_ids + document.response_ids])
        labels = ids.clone()
        labels[:, : len(document.prompt_ids)] = -100
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
        matrix[n] = space.flatten({t.key: lora_linear(model, t.key).weight.grad for t in space.tensors})
    return matrix


def measure_dictionary(options: argparse.Namespace) -> list[dict[str, object]]:
    """scikit-learn's, ours, and ours with the fewest iterations that are at least as good on rows that none has seen; all
    are coded with the same coder."""
    with tempfile.TemporaryDirectory() as folder:
        store = (
            real_rows(options.rows_from)
            if options.rows_from
            else made_up_rows(Path(folder), options.rows, 6000, options.atoms)
        )
        everyone = torch.randperm(len(store), generator=torch.Generator().manual_seed(SEED))[: options.rows].tolist()
        training, unseen = everyone[len(everyone) // 7 :], store.whitened_rows(everyone[: len(everyone) // 7])

        def measured(**learner: Any) -> dict[str, Any]:
            config = DictionaryConfig(atoms=options.atoms, alpha=ALPHA, **learner)
            learned, seconds = timed(lambda: learn_dictionary(store, training, config, SEED, QUIET))
            coding = SparseCoder(learned.atoms).coding(unseen, ALPHA, nonnegative=True)
            iterations = len(learned.objectives) if config.learner == "blocks" else None  # scikit-learn does not tell
            return {"learner": config.learner, "iterations": iterations, "rows": len(training), "atoms": options.atoms,
                    "seconds": seconds, "objective": learned.objectives[-1],
                    "objective held out": float(coding.objective.double().mean())}  # fmt: skip

        theirs = measured(learner="scikit-learn")
        rows = [theirs, measured()]
        for iterations in FEWER:
            rows.append(measured(iterations=iterations))
            if rows[-1]["objective held out"] <= theirs["objective held out"]:
                break
        return [row | {"times as fast": theirs["seconds"] / row["seconds"]} for row in rows]


def real_rows(work: Path) -> RowStore:
    """The whitened rows of a discovery's working directory."""
    from safetensors.torch import load_file

    from atoms.projection import RowWhitening

    return RowStore(work / "rows", RowWhitening.from_tensors(load_file(work / "whitening" / "whitening.safetensors")))


def measure_kronfluence(options: argparse.Namespace) -> list[dict[str, object]]:
    """Relative Frobenius errors of our covariances and λ against kronfluence's: the worst and the median matrix."""
    if options.kronfluence:
        sys.path.append(str(options.kronfluence))
    try:
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments
        from kronfluence.task import Task
        from kronfluence.utils.dataset import DataLoaderKwargs
    except ImportError as error:
        sys.exit(f"{error}; see --help for how kronfluence is installed apart")
    model, space, documents = lora_model(options)
    model.requires_grad_(False)
    documents = [replace(document, row=n) for n, document in enumerate(documents[:12])]
    names = {tensor.key: f"base_model.model.{tensor.key}.default" for tensor in space.tensors}

    class SampledLabels(Task):
        """The summed cross-entropy of the labels that our own pass draws."""

        def compute_train_loss(self, batch: dict[str, Tensor], model, sample: bool = False) -> Tensor:
            one = batch_of(batch)
            logits = model(input_ids=one.input_ids, attention_mask=one.attention_mask, use_cache=False).logits
            at_labels = logits[one.label_rows, one.label_columns]
            return sum_losses(at_labels, one, sample_labels(at_labels.detach(), one, SEED)).sum()

        def compute_measurement(self, batch: dict[str, Tensor], model) -> Tensor:
            raise NotImplementedError("no scores are asked for")

        def get_influence_tracked_modules(self) -> list[str]:
            return list(names.values())

        def get_attention_mask(self, batch: dict[str, Tensor]) -> Tensor:
            return batch["attention_mask"]

    def batch_of(batch: dict[str, Tensor]) -> Batch:
        return collate([documents[int(n)] for n in batch["documents"]])

    def collate_for_theirs(group: Sequence[EncodedDocument]) -> dict[str, Tensor]:
        return {"documents": torch.tensor([d.row for d in group]), "attention_mask": collate(group).attention_mask}

    ours = CovarianceSink(space)
    sampled_pass(model, space, documents, 512, SEED, ours, QUIET, "covariances")
    with tempfile.TemporaryDirectory() as folder:
        wrapped = prepare_model(model, SampledLabels())
        analyzer = Analyzer("bench", wrapped, SampledLabels(), cpu=True, disable_tqdm=True, output_dir=folder)
        settings = {"dataset": documents, "per_device_batch_size": 4, "factor_args": FactorArguments(strategy="ekfac"),
                    "dataloader_kwargs": DataLoaderKwargs(collate_fn=collate_for_theirs)}  # fmt: skip
        analyzer.fit_covariance_matrices("bench", **settings)
        analyzer.perform_eigendecomposition("bench", factor_args=settings["factor_args"])
        analyzer.fit_lambda_matrices("bench", **settings)
        sums, basis = analyzer.load_covariance_matrices("bench"), analyzer.load_eigendecomposition("bench")
        theirs = analyzer.load_lambda_matrices("bench")["lambda_matrix"]
    factors = {
        key: Eigenfactors(basis["gradient_eigenvectors"][name].float(), basis["activation_eigenvectors"][name].float(),
                          basis["gradient_eigenvalues"][name], basis["activation_eigenvalues"][name])
        for key, name in names.items()
    }  # fmt: skip
    plain, same_space, _ = lora_model(options)
    plain.requires_grad_(False)
    fitted = fit_eigenvalues(plain, same_space, factors, documents, 512, SEED, QUIET)
    tokens = sum(len(document.response_ids) for document in documents)
    compared = {
        "activation covariance": [relative(ours.inp[k], sums["activation_covariance"][n]) for k, n in names.items()],
        "gradient covariance": [relative(ours.out[k], sums["gradient_covariance"][n]) for k, n in names.items()],
        "λ": [relative(fitted[k] * tokens, theirs[n]) for k, n in names.items()],
    }
    return [
        {"statistic": name, "matrices": len(errors), "median error": statistics.median(errors), "worst": max(errors)}
        for name, errors in compared.items()
    ]  # fmt: skip


def measure_memory(options: argparse.Namespace) -> list[dict[str, object]]:
    """Each row is a process of its own: two fine-tuning steps on the batch with the most padded tokens, then discoveries."""
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        data = repeated_documents(options, Path(folder), max(MEMORY_DOCUMENTS))
        runs: list[tuple[str, list[str]]] = [("a fine-tuning batch", ["batch", str(options.model), str(data)])]
        for count in MEMORY_DOCUMENTS:
            out = Path(folder) / f"package-{count}"
            runs.append((f"discovery of {count:,}", ["discover", str(options.model), str(data), str(count), str(out)]))
        for name, arguments in runs:
            output, peak, seconds = run_apart(arguments)
            rows.append({"process": name, "tokens": int(output), "seconds": seconds, "peak MiB": peak})
            rows[-1]["ratio to the batch"] = peak / rows[0]["peak MiB"]  # type: ignore[operator]
            print(table(rows[-1:]), flush=True)
    return rows


def child_batch(model: str, data: str) -> None:
    """A process that takes two fine-tuning steps on the batch of `data` that has the most padded tokens."""
    config = memory_config(Path(model), Path(data), None, Path("unused"))
    loaded, tokenizer = load_model(model, torch.float32, torch.device("cpu"))
    encoded = encode_corpus(read_corpus(Path(data)), tokenizer, config.max_length).documents
    group = max(plan_batches(encoded, config.batch_tokens), key=lambda group: len(group) * len(group[0]))
    settings = FinetuneConfig(epochs=2.0, batch_documents=len(group))
    with tempfile.TemporaryDirectory() as folder:
        finetune(loaded, group, settings, config.batch_tokens, 0, Path(folder) / "checkpoint", QUIET)
    print(sum(map(len, group)))


def child_discover(model: str, data: str, count: str, out: str) -> None:
    """A process that runs a whole discovery."""
    print(discover(memory_config(Path(model), Path(data), int(count), Path(out)), QUIET).manifest.record["tokens"])


def memory_config(model: Path, data: Path, limit: int | None, out: Path) -> DiscoverConfig:
    """Every stage, at the defaults of what decides on memory; less of what only takes time."""
    return DiscoverConfig(
        model=str(model), data=data, out=out, limit=limit, dtype="float32", device="cpu",
        finetune=FinetuneConfig(epochs=FINETUNED / (limit or FINETUNED)),
        curvature=CurvatureConfig(factor_documents=16, eigenvalue_documents=16),
        dictionary=DictionaryConfig(atoms=100, alpha=ALPHA),
        select=SelectConfig(keep=4, min_documents=2, min_z=-1e6, min_stability=0.0),
    )  # fmt: skip


def repeated_documents(options: argparse.Namespace, folder: Path, count: int) -> Path:
    """`count` documents: those of the data, in their order, as often as it takes."""
    whole = read_corpus(options.data).documents
    with (folder / "documents.jsonl").open("w", encoding="utf-8") as file:
        for n in range(count):
            document = whole[n % len(whole)]
            turns = [("user", document.prompt), ("assistant", document.response)]
            chat = [{"role": role, "content": content} for role, content in turns]
            file.write(json.dumps({"id": str(n), "messages": chat}) + "\n")
    return folder / "documents.jsonl"


def measure_scale(options: argparse.Namespace) -> list[dict[str, object]]:
    """A process for each number of rows, all made before, so that only the learning is measured."""
    rows: list[dict[str, object]] = []
    for count in SCALE_ROWS:
        with tempfile.TemporaryDirectory() as folder:
            made_up_rows(Path(folder), count, SCALE_DIM, SCALE_ATOMS)
            output, peak, _ = run_apart(["learn", folder, str(count)])
        seconds, value = json.loads(output)
        rows.append({"rows": count, "atoms": SCALE_ATOMS, "components": SCALE_DIM, "iterations": SCALE_ITERATIONS,
                     "CPU seconds an iteration": seconds / SCALE_ITERATIONS,
                     "objective": value, "peak MiB": peak})  # fmt: skip
        print(table(rows[-1:]), flush=True)
    return rows


def child_learn(folder: str, count: str) -> None:
    """A process that learns a few iterations; prints CPU seconds of all threads and the objective."""
    from atoms.projection import RowWhitening

    store = RowStore(Path(folder), RowWhitening.centring(torch.zeros(SCALE_DIM)))
    config = DictionaryConfig(atoms=SCALE_ATOMS, alpha=ALPHA, iterations=SCALE_ITERATIONS)
    started = time.process_time()
    learned = learn_dictionary(store, range(int(count)), config, SEED, QUIET)
    print(json.dumps([time.process_time() - started, learned.objectives[-1]]))


PARTS: dict[str, Callable[[argparse.Namespace], list[dict[str, object]]]] = {
    "gradients": measure_gradients,
    "dictionary": measure_dictionary,
    "memory": measure_memory,
    "kronfluence": measure_kronfluence,
    "scale": measure_scale,
}
DEFAULT_PARTS = ("gradients", "dictionary", "memory")
CHILDREN: dict[str, Callable[..., None]] = {"batch": child_batch, "discover": child_discover, "learn": child_learn}


def run_apart(arguments: Sequence[str]) -> tuple[str, float, float]:
    """(what a child of this file prints, peak of its anonymous memory in MiB, its wall seconds)."""
    started = time.monotonic()
    command = [sys.executable, "-m", "bench.discovery", "--child", *arguments]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = 0
    while child.poll() is None:
        peak = max(peak, anonymous_kib(child.pid))
        time.sleep(0.01)
    assert child.stdout is not None
    if child.returncode:
        sys.exit(f"the process {' '.join(arguments)} failed with status {child.returncode}")
    return child.stdout.read(), peak / 1024, time.monotonic() - started


def anonymous_kib(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1])
    except OSError:
        pass  # it has just ended
    return 0


def lora_model(
    options: argparse.Namespace, dtype: torch.dtype = torch.float32
) -> tuple[Any, LoRASpace, list[EncodedDocument]]:
    """(the model with a LoRA of random A and B in float32, its space, documents for all rounds)."""
    base, tokenizer = load_model(str(options.model), dtype, torch.device("cpu"))
    model, space = new_lora(base, FinetuneConfig(), SEED)
    generator = torch.Generator().manual_seed(SEED)
    for tensor in space.tensors:
        if tensor.key.endswith("lora_B"):  # zero, as new: then A would have no gradient
            weight = lora_linear(model, tensor.key).weight
            with torch.no_grad():
                weight.copy_(0.02 * torch.randn(weight.shape, generator=generator))
    encoded = encode_corpus(read_corpus(options.data), tokenizer, 512).documents
    return model.eval(), space, sample_documents(encoded, options.documents * options.rounds, SEED)


def some_projection(model, space: LoRASpace, documents: Sequence[EncodedDocument]) -> Projection:
    model.requires_grad_(False)
    factors = fit_factors(model, space, documents, 1024, SEED, QUIET)
    eigenvalues = fit_eigenvalues(model, space, factors, documents, 1024, SEED, QUIET)
    return fit_projection(space, factors, eigenvalues, CurvatureConfig())


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    started = time.monotonic()
    value = work()
    return value, time.monotonic() - started


def table(rows: Sequence[dict[str, object]]) -> str:
    """Rows as a Markdown table with the first row's columns."""

    def lines() -> Iterator[str]:
        yield "| " + " | ".join(rows[0]) + " |"
        yield "|" + " --- |" * len(rows[0])
        for row in rows:
            yield "| " + " | ".join(_cell(row.get(column, "")) for column in rows[0]) + " |"

    return "\n".join(lines())


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6f}" if 0.99 < abs(value) < 1 else f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        CHILDREN[sys.argv[2]](*sys.argv[3:])
    else:
        main()
