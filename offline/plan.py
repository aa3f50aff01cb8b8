"""`discover --dry-run`: what a run would read, make and cost, before it does.

Counts are exact: documents are read and tokenised as the run would. Times come from a probe: every stage's own function runs
on a small sample of the actual documents with the actual model, and its time is scaled by the work that the run has planned,

    seconds = fixed + work × (probe's seconds / probe's work)

    fine-tune, factors, eigenvalues, gradients    work = padded tokens of the planned batches
    eigenvectors                                  fixed: the matrices are the same whatever the documents
    whitening                                     work = rows, made up, of the true length
    dictionary, second seed, first and second half     work = iterations × rows, likewise
    directions                                    work = padded tokens of the steps' batches; fixed: finding their length
    calibrate, drift matrix                       work = atoms × continuation tokens

Memory is the probe's own peak, since every stage but the dictionary works batch by batch, plus what grows with the run.
docs/cost-model.md carries the same formulas to sizes that no probe reaches.
"""

from __future__ import annotations

import json
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from atoms.adapter import Adapter
from atoms.model import load_tokenizer
from atoms.projection import Projection, RowWhitening
from atoms.storage import write_tensors
from offline.calibrate import calibrate_atom, orient
from offline.config import DictionaryConfig, DiscoverConfig
from offline.corpus import (
    Corpus,
    EncodedCorpus,
    EncodedDocument,
    encode_corpus,
    plan_batches,
    read_corpus,
    sample_documents,
    split_held_out,
)
from offline.dictionary import dictionary_size, learn_dictionary
from offline.finetune import plan_steps
from offline.memory import bound_kernel_caches, return_freed_memory
from offline.paths import prepared, reference_documents
from offline.pipeline import Run, curvature_samples, refuse_existing
from offline.progress import Progress
from offline.rows import SHARD_DOCUMENTS, RowSink, RowStore, shard_path
from offline.stability import can_halve
from offline.whitening import fit_whitening

Result = TypeVar("Result")
_DICTIONARY_ROWS = 1024
_PROBE_PROMPTS, _PROBE_ATOMS = 2, 2
DICTIONARY_PASSES = 20
"""Passes over the rows in which a dictionary settles; 14 to 26 were seen."""
_BYTES_PER_TOKEN = 40
"""A token id in a tuple of Python integers."""
BYTES_OF_CODES = 150
"""A document's two or three codes, stored by atom, and its place among the documents of its length."""


@dataclass(frozen=True)
class StagePlan:
    """One stage: its planned `work` in `unit`, and what the probe took for `probe_work` of it."""

    name: str
    unit: str
    work: float
    probe_work: float
    probe_seconds: float
    fixed: float = 0.0

    @property
    def seconds(self) -> float:
        return self.fixed + (self.work * self.probe_seconds / self.probe_work if self.work else 0.0)


@dataclass(frozen=True)
class Plan:
    """What a run would do. Sizes in bytes, times in seconds; `lengths` are the shortest, median and longest document."""

    documents: int
    skipped: int
    truncated: int
    training: int
    held_out: int
    tokens: int
    lengths: tuple[int, int, int]
    modules: int
    matrices: int
    parameters: int
    components: int
    sketch: int
    dictionary_atoms: int
    learner_bytes: int
    kept_atoms: int
    stages: tuple[StagePlan, ...]
    probe_seconds: float
    probe_documents: int
    probe_tokens: int
    probe_peak: int
    machine: str

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def row_bytes(self) -> int:
        """Of a document."""
        return row_bytes(self.components, self.sketch)

    @property
    def disk(self) -> int:
        """The shards of rows, by far the largest part of the working directory."""
        return self.documents * self.row_bytes

    @property
    def growing_memory(self) -> int:
        """What grows with the run: token ids, the few codes of every training document, cosines of held-out documents and kept
        atoms, the dictionary, and the rows that its learner holds at once."""
        held = _BYTES_PER_TOKEN * self.tokens + BYTES_OF_CODES * self.training + self.learner_bytes
        return held + 4 * self.held_out * self.kept_atoms + dictionary_bytes(self.dictionary_atoms, self.components)

    @property
    def memory(self) -> int:
        return self.probe_peak + self.growing_memory


def learner_bytes(config: DictionaryConfig, rows: int, components: int, atoms: int) -> int:
    """Bytes of rows that a learner holds at once: none for ours, which reads the shards. scikit-learn takes float64 and
    shuffles a copy, beside the float32 rows; then these are coded at once, with dense working space for their codes."""
    return rows * max(20 * components, 4 * components + 18 * atoms) if config.learner == "scikit-learn" else 0


def make_plan(config: DiscoverConfig, progress: Progress) -> Plan:
    """Reads the documents, runs the probe in a temporary directory, and returns the plan; writes nothing else.

    Raises what `discover` would raise for the same configuration before its first stage.
    """
    refuse_existing(config)
    return_freed_memory()  # as the run will, for whose peak the probe's stands
    bound_kernel_caches()
    corpus = read_corpus(config.data, skip_bad_lines=config.skip_bad_lines, limit=config.limit)
    encoded = encode_corpus(corpus, load_tokenizer(config.model, config.revision), config.max_length)
    with tempfile.TemporaryDirectory(prefix="atomsteer-plan-") as temporary:
        return _Probe(config, corpus, encoded, Path(temporary), progress).plan()


class _Probe:
    """Runs every stage on a sample of the documents; `plan` puts the results together."""

    def __init__(
        self, config: DiscoverConfig, corpus: Corpus, encoded: EncodedCorpus, folder: Path, progress: Progress
    ) -> None:
        self.config, self.corpus, self.encoded, self.folder = config, corpus, encoded, folder
        self.sample = probe_documents(encoded.documents, config.batch_tokens)
        file = folder / "sample.jsonl"
        file.write_text("".join(
            json.dumps({"id": corpus.documents[d.row].id, "messages": list(corpus.documents[d.row].messages)}) + "\n"
            for d in self.sample), encoding="utf-8")  # fmt: skip
        self.costs = Progress(quiet=True)
        self.finetune = replace(config.finetune, epochs=1.0)
        calibrate = replace(config.calibrate, prompts=min(_PROBE_PROMPTS, config.calibrate.prompts))
        everything = len(self.sample)
        curvature = replace(config.curvature, factor_documents=everything, eigenvalue_documents=everything)
        self.run = Run(
            replace(config, data=file, out=folder / "package", work=folder / "work", finetune=self.finetune, limit=None,
                    curvature=curvature, calibrate=calibrate, force=False), self.costs,
        )  # fmt: skip
        progress.say(f"probing {len(self.sample)} of {len(encoded.documents)} documents with the model")

    def plan(self) -> Plan:
        started = time.monotonic()
        config, run = self.config, self.run
        adapter, _ = _timed(run.adapter)
        projection, took = _timed(lambda: run.projection(adapter))
        passes = sum(cost.seconds for name, cost in self.costs.costs.items() if name in ("factors", "eigenvalues"))
        run.rows(projection)
        training, held_out = split_held_out(len(self.encoded.documents), config.dictionary.held_out, config.seed)
        atoms = dictionary_size(config.dictionary, len(training))
        kept = min(config.select.keep, atoms)
        stages = [
            *self._gradient_stages(max(0.0, took - passes)),
            *self._row_stages(projection, len(training), atoms),
            *self._direction_stages(adapter, kept),
            *self._calibration_stages(adapter, projection, kept),
        ]
        lengths = sorted(len(document) for document in self.encoded.documents)
        return Plan(
            documents=len(lengths), skipped=self.corpus.skipped, truncated=self.encoded.truncated, training=len(training),
            held_out=len(held_out), tokens=self.encoded.tokens, lengths=(lengths[0], lengths[len(lengths) // 2], lengths[-1]),
            modules=len(adapter.space.modules), matrices=len(adapter.space.tensors), parameters=adapter.space.dim,
            components=projection.dim, sketch=RowSink(projection).sketch_dim, dictionary_atoms=atoms, kept_atoms=kept,
            learner_bytes=learner_bytes(config.dictionary, len(training), projection.dim, atoms),
            stages=tuple(stages), probe_seconds=time.monotonic() - started, probe_documents=len(self.sample),
            probe_tokens=sum(map(len, self.sample)),
            probe_peak=max(cost.peak_mib for cost in self.costs.costs.values()) * 2**20,
            machine=f"{run.device}, {run.dtype}, {torch.get_num_threads()} threads, {platform.machine()}".replace("torch.", ""),
        )  # fmt: skip

    def _gradient_stages(self, eigenvectors: float) -> list[StagePlan]:
        config, documents = self.config, self.encoded.documents
        limit, seed = config.pass_tokens, config.seed
        samples = dict(zip(("factors", "eigenvalues"), curvature_samples(config, documents), strict=True))
        here = padded_tokens(self.sample, limit)
        stages = [
            self._scaled(name, padded_tokens(docs, limit), here)
            for name, docs in samples.items()
            if name in self.costs.costs
        ]
        stages.insert(1, StagePlan("eigenvectors", "", 0, 1, 0, eigenvectors))
        stages.append(self._scaled("gradients", padded_tokens(documents, limit), here))
        if config.adapter is None:
            steps, probed = (sum(padded_tokens(step, config.batch_tokens) for step in plan_steps(d, c, seed))
                             for d, c in ((documents, config.finetune), (self.sample, self.finetune)))  # fmt: skip
            stages.insert(0, self._scaled("fine-tune", steps, probed))
        return stages

    def _scaled(self, name: str, work: int, probed: int) -> StagePlan:
        return StagePlan(name, "padded tokens", work, probed, self.costs.costs[name].seconds)

    def _row_stages(self, projection: Projection, rows: int, atoms: int) -> list[StagePlan]:
        """Whitening and two iterations of the dictionary on made-up rows: sparse mixtures of random atoms, so that coding them
        takes honest work."""
        config = self.config.dictionary
        probed = min(atoms, _DICTIONARY_ROWS // 2)
        count = min(max(rows, 8), _DICTIONARY_ROWS)
        store = made_up_rows(self.folder / "rows", count, projection.dim, probed)
        _, whitening = _timed(lambda: fit_whitening(store, self.config.whitening, self.costs))
        learn_dictionary(store, range(count), replace(config, atoms=probed, iterations=2), 0, self.costs, "dictionary")
        passes = min(config.iterations, DICTIONARY_PASSES)
        planned, made = (passes, 2) if config.learner == "blocks" else (1, 1)  # scikit-learn stops by itself
        learned = {"dictionary": rows, "second seed": rows}
        if self.config.halves and can_halve(rows, atoms):
            learned |= {"first half": rows // 2, "second half": rows - rows // 2}

        def learning(name: str, rows: int) -> StagePlan:
            a_row, probed_row = (
                sum(dictionary_operations(n, k, projection.dim).values()) / n
                for n, k in ((rows, atoms), (count, probed))
            )
            seconds = a_row / probed_row * self.costs.costs["dictionary"].seconds
            return StagePlan(name, "rows", planned * rows, made * count, seconds)

        whole = StagePlan("whitening", "rows", len(self.encoded.documents), count, whitening)
        return [whole, *(learning(name, share) for name, share in learned.items())]

    def _direction_stages(self, adapter: Adapter, kept: int) -> list[StagePlan]:
        """One step on the probe's documents; a document of the run is as long as those of its reference sample are."""
        config, limit, documents = self.config.steering, self.config.pass_tokens, self.encoded.documents
        if not config.steps:
            return []
        reference, size = reference_documents(documents, config), config.documents
        shared = padded_tokens(reference, limit)
        # fewer documents at once are padded more
        apart = sum(padded_tokens(reference[n : n + size], limit) for n in range(0, len(reference), size))
        here = prepared(self.sample, self.sample, config.tokens, len(self.sample))
        probe = replace(config, steps=1, documents=len(self.sample), reference_documents=len(self.sample))
        with self.costs.task("directions", 1, "atoms"):
            maker, gradient = _timed(lambda: self.run.path_maker(adapter, probe))
            _, step = _timed(lambda: maker.direction(self.sample))
        steps = kept * config.steps * size * apart / len(reference)
        return [
            StagePlan("directions", "padded tokens", round(shared + steps), padded_tokens(here, limit), gradient,
                      kept * max(0.0, step - gradient))
        ]  # fmt: skip

    def _calibration_stages(self, adapter: Adapter, projection: Projection, kept: int) -> list[StagePlan]:
        config = self.config.calibrate
        meter, made = _timed(lambda: self.run.meter(adapter, self.folder))
        atom = torch.nn.functional.normalize(
            torch.randn(projection.dim, generator=torch.Generator().manual_seed(0)), dim=0
        )
        direction = projection.unproject(atom, config.exponent)
        calibrated, scaling = _timed(lambda: calibrate_atom(meter, projection, direction, config))
        documents = sample_documents(self.sample, config.orientation_documents, 0)
        _, orienting = _timed(lambda: orient(meter, calibrated, documents, self.config.batch_tokens))
        with self.costs.task("drift matrix", len(meter.batches), "prompts") as bar:
            meter.drift_matrix([calibrated.direction] * _PROBE_ATOMS, bar)
        drift = self.costs.costs["drift matrix"].seconds
        prompts = self.run.config.calibrate.prompts
        work = kept * config.prompts
        return [
            StagePlan("continuations", "prompts", config.prompts, prompts, made),
            StagePlan("calibrate", "atoms × prompts", work, prompts, scaling, kept * orienting),
            StagePlan("drift matrix", "atoms × prompts", work, _PROBE_ATOMS * prompts, drift),
        ]  # fmt: skip


def probe_documents(documents: Sequence[EncodedDocument], batch_tokens: int) -> list[EncodedDocument]:
    """About a batch in all: the first halves of the planned batches at the quarters of the padded tokens."""
    groups = plan_batches(documents, batch_tokens)
    total, seen, chosen = padded_tokens(documents, batch_tokens), 0, []
    for group in groups:
        before, seen = seen, seen + len(group) * len(group[0])
        if any(before < total * part <= seen for part in (0.25, 0.75)):
            chosen.append(group)
    share = 2 if len(chosen) > 1 else 1
    return [document for group in chosen for document in group[: max(1, len(group) // share)]]


def dictionary_operations(rows: int, atoms: int, components: int) -> dict[str, float]:
    """Floating-point operations of the products of one alternation of offline/dictionary.py: of rows and atoms, and the Gram
    matrix with a sweep of atoms. A row's code and its part of AᵀA and AᵀX take a time of their own."""
    return {"rows × atoms": 2 * rows * atoms * components, "Gram matrix, update of atoms": 4 * atoms**2 * components}


def row_bytes(components: int, sketch: int) -> int:
    """A document in a shard of rows: float32 row, float16 sketch, norm, loss and number."""
    return 4 * components + 2 * sketch + 16


def dictionary_bytes(atoms: int, components: int) -> int:
    """Five (K, D) float32 blocks: atoms, AᵀX and their copies."""
    return 20 * atoms * components


def padded_tokens(documents: Sequence[EncodedDocument], batch_tokens: int) -> int:
    """Tokens of the planned batches, padding included: what the time of a pass goes with."""
    return sum(len(group) * len(group[0]) for group in plan_batches(documents, batch_tokens))


def describe(plan: Plan, config: DiscoverConfig) -> str:
    """The plan as text for people."""
    shortest, median, longest = plan.lengths
    fixed = {
        "documents": f"{plan.documents:,} read, {plan.skipped:,} bad lines skipped, {plan.truncated:,} prompts truncated to "
        f"{config.max_length} tokens; {plan.training:,} for the dictionary, {plan.held_out:,} held out",
        "tokens": f"{plan.tokens:,}; a document has {shortest:,} to {longest:,}, half of them at most {median:,}",
        "LoRA": f"{plan.modules} modules, {plan.matrices} matrices, {plan.parameters:,} parameters"
        + ("" if config.adapter is None else f" of {config.adapter}"),
        "rows": f"{plan.components:,} components a document, {_bytes(plan.row_bytes)} each, {_bytes(plan.disk)} on disk",
        "dictionary": f"{plan.dictionary_atoms:,} atoms, at most {plan.kept_atoms:,} kept",
        "memory": f"about {_bytes(plan.memory)}: {_bytes(plan.probe_peak)} measured in the probe, "
        f"{_bytes(plan.growing_memory)} more as the run grows",
    }  # fmt: skip
    lines = [f"plan of {config.out} (nothing is written)", *(f"  {name:<14}{text}" for name, text in fixed.items()), ""]
    lines += [f"  {stage.name:<14}{_duration(stage.seconds):>10}  {_work(stage)}" for stage in plan.stages]
    lines += [f"  {'in all':<14}{_duration(plan.seconds):>10}", "",
              f"Times are scaled from a probe of {plan.probe_documents} documents ({plan.probe_tokens:,} tokens) that took "
              f"{plan.probe_seconds:.0f} s on {plan.machine}; they hold while the machine is as busy as now. Selection and "
              "writing the package are not in them; stages that an earlier run finished are not taken off."]  # fmt: skip
    return "\n".join(lines)


def made_up_rows(folder: Path, count: int, dim: int, atoms: int) -> RowStore:
    """Shards of `count` rows (dim,), each a mixture of three of `atoms` random directions and noise."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(atoms, dim, generator=generator), dim=1)
    for shard, start in enumerate(range(0, count, SHARD_DOCUMENTS)):
        documents = torch.arange(start, min(count, start + SHARD_DOCUMENTS))
        picks = torch.randint(atoms, (len(documents), 3), generator=generator)
        noise = torch.nn.functional.normalize(torch.randn(len(documents), dim, generator=generator), dim=1)
        rows = (torch.tensor([0.6, 0.3, 0.2])[:, None] * directions[picks]).sum(1) + 0.5 * noise
        write_tensors(shard_path(folder, shard), {"document": documents, "row": rows})
    return RowStore(folder, RowWhitening.centring(torch.zeros(dim)))


def _timed(work: Callable[[], Result]) -> tuple[Result, float]:
    """(what `work` returns, its seconds)."""
    started = time.monotonic()
    result = work()
    return result, time.monotonic() - started


def _work(stage: StagePlan) -> str:
    return f"{stage.work:,.0f} {stage.unit}" if stage.work else "whatever the documents"


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if size >= 10 or unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} GiB"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
