"""Discovery from documents to package. READ FIRST.

    documents ──► θ0 ──► eigenbasis ──► whitened rows ──► dictionary ──► selection ──► directions ──► calibration ──► package
                fine-tune  curvature     gradients                       coherence     steering       KL, drift matrix
                                                                                                      orientation

Every stage keeps its results in a folder of the working directory and is skipped, or continued where it stopped, when
nothing that it depends on has changed. Killing a run loses at most a few steps of the fine-tune, a shard of rows, an atom, or
a stage of seconds to minutes.

Up to the dictionary, ranks share the documents (offline/ranks.py). What the first alone makes, the others read from its file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from atoms.adapter import Adapter, adapter_delta, read_adapter, refuse_zero_b, write_adapter
from atoms.errors import ConfigError, DataError
from atoms.manifest import BaseModelRef
from atoms.model import (
    choose_device,
    choose_dtype,
    config_hash,
    context_length,
    load_model,
    merge_adapter,
    weights_fingerprint,
)
from atoms.package import MANIFEST, Package, write_package
from atoms.projection import Projection, RowWhitening
from atoms.space import Direction, LoRASpace
from atoms.steered import SteeredModel
from atoms.storage import new_directory, read_json, refuse_to_replace, write_json, write_tensors
from offline.build import DiscoveredAtom, Discovery, package_contents
from offline.calibrate import (
    MEASURED_IN,
    DriftMeter,
    calibrate_atom,
    continuations,
    orient,
    read_calibrated,
    write_calibrated,
)
from offline.config import DiscoverConfig, SteeringConfig
from offline.corpus import EncodedDocument, encode_corpus, make_batches, read_corpus, sample_documents, split_held_out
from offline.cpu_passes import quicken
from offline.curvature import (
    factors_from_tensors,
    factors_to_tensors,
    fit_eigenvalues,
    fit_factors,
    fit_projection,
    kronecker_eigenvalues,
)
from offline.dictionary import Dictionary, encode, learn_dictionary
from offline.finetune import finetune
from offline.keywords import keywords
from offline.lora import frozen_lora
from offline.memory import bound_kernel_caches, return_freed_memory
from offline.paths import PathMaker
from offline.progress import Progress
from offline.ranks import ALONE, Ranks
from offline.rows import RowStore, write_rows
from offline.select import Candidate, Sparsity, candidates, least_support, select
from offline.shipped import read_neutral_prompts
from offline.stability import can_halve, split_halves, stability
from offline.whitening import common_direction, fit_whitening
from offline.workspace import Workspace

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def discover(config: DiscoverConfig, progress: Progress, ranks: Ranks = ALONE) -> Package:
    """Runs every stage and writes the package at `config.out`. Raises AtomsteerError with value, limit and remedy.

    Every rank calls it with the same configuration, and returns when the package is there.
    """
    return_freed_memory()
    bound_kernel_caches()
    run = Run(config, progress, ranks)
    adapter = run.adapter()
    projection = run.projection(adapter)
    store = run.rows(projection)
    learned = run.dictionary(store)
    if ranks.first:  # what is left is measured on a few prompts, while the others wait
        run.workspace.ranks = ALONE
        chosen = run.select(store, learned)
        directions = run.directions(adapter, projection, store, learned, chosen)
        atoms, drift = run.calibrate(adapter, projection, store, learned, chosen, directions)
        run.package(adapter, projection, store, learned, chosen, atoms, drift)
    ranks.wait()
    return Package.read(config.out)


def refuse_existing(config: DiscoverConfig) -> None:
    """Raises DataError or StorageError if there is something at `config.out` that may not be replaced, ConfigError if what the
    run reads or keeps lies in it."""
    if config.out.exists() and not config.force:
        raise DataError(f"{config.out} exists already; choose another --out, or pass --force to replace it")
    refuse_to_replace(config.out, MANIFEST)
    for option, path in (("--data", config.data), ("--work", config.work_dir), ("--model", Path(config.model))):
        if path.resolve().is_relative_to(config.out.resolve()):
            raise ConfigError(
                f"{option} is {path}, which lies in --out {config.out} and would be replaced; choose another --out"
            )


@dataclass(frozen=True)
class Learned:
    """The dictionary, and what says whether its atoms are found again: the atoms of a second seed, and the |cosine| of each
    atom's gradient with its match in a dictionary of either random half of the documents, (2, K); None: not asked for, or fewer
    documents in a half than atoms."""

    dictionary: Dictionary
    second: Tensor
    halves: Tensor | None


@dataclass(frozen=True)
class Selection:
    """The chosen candidates, the sign of the codes that carries more weight and the documents of it that each is steered
    towards (row numbers), both by dictionary atom, every dictionary atom's stability across seeds, (K,), how sparse the codes
    are, and the fewest documents of a candidate."""

    chosen: list[Candidate]
    signs: dict[int, int]
    documents: dict[int, list[int]]
    stabilities: Tensor
    sparsity: Sparsity
    least_documents: int


class Run:
    """One discovery run: the model and documents, loaded when first needed, and the stages as methods, in order."""

    def __init__(self, config: DiscoverConfig, progress: Progress, ranks: Ranks = ALONE) -> None:
        refuse_existing(config)
        self.config, self.progress, self.ranks = config, progress, ranks
        self.device = choose_device(config.device)
        self.dtype = choose_dtype(self.device, config.dtype)
        self.corpus = read_corpus(config.data, skip_bad_lines=config.skip_bad_lines, limit=config.limit)
        self.workspace = Workspace(config.work_dir, ranks)
        self.encoded = encode_corpus(self.corpus, self.tokenizer, config.max_length)
        if (longest := max(map(len, self.encoded.documents))) > (context := context_length(self.model)):
            raise ConfigError(
                f"max_length is {config.max_length} and the longest document has {longest} tokens; the model's context has "
                f"{context}: give --max-length of at most that"
            )
        self.training, self.held_out = split_held_out(
            len(self.corpus.documents), config.dictionary.held_out, config.seed
        )
        self._peft_model: PeftModel | None = None
        self._report_corpus()

    @cached_property
    def _loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return self._load(self.dtype)

    def _load(self, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        self.progress.say(f"loading {self.config.model} ({dtype}, {self.device})".replace("torch.", ""))
        model, tokenizer = load_model(self.config.model, dtype, self.device, self.config.revision)
        return quicken(model), tokenizer

    @property
    def model(self) -> PreTrainedModel:
        return self._loaded[0]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._loaded[1]

    @cached_property
    def base_ref(self) -> BaseModelRef:
        return BaseModelRef(id=self.config.model, revision=self.config.revision, config_hash=config_hash(self.model),
                            weights=weights_fingerprint(self.model))  # fmt: skip

    def adapter(self) -> Adapter:
        """θ0: the given adapter, or a fresh fine-tune on the documents."""
        config, given = self.config, self.config.adapter
        base = self.base_ref  # of the untouched model
        inputs = dataclasses.asdict(config.finetune) if given is None else read_adapter(given).content_hash()
        folder = self.workspace.open(
            "adapter", base=[base.config_hash, base.weights], data=self.corpus.content_hash, tokens=self.encoded.token_hash,
            seed=config.seed, max_length=config.max_length, batch_tokens=config.batch_tokens, dtype=str(self.dtype),
            device=self.device.type, adapter=inputs,
        )  # fmt: skip
        self.adapter_dir = folder / "theta0"
        if self._missing(self.adapter_dir):
            adapter = read_adapter(given) if given else self._finetune(folder)
            if given:
                refuse_zero_b(adapter, given)
            if self.ranks.first:
                with new_directory(self.adapter_dir) as temporary:
                    write_adapter(temporary, adapter_delta(adapter), adapter.targets, config.model)
            self.ranks.wait()
        return read_adapter(self.adapter_dir)

    def projection(self, adapter: Adapter) -> Projection:
        """The EKFAC eigenbasis and the kept components, from labels sampled from the model."""
        config, space = self.config, adapter.space
        folder = self.workspace.open(
            "curvature", **dataclasses.asdict(config.curvature), pass_tokens=config.pass_tokens
        )
        file, factors_file = folder / "projection.safetensors", folder / "factors.safetensors"
        if self._missing(file):
            with_factors, with_eigenvalues = curvature_samples(config, self.encoded.documents)
            model, label_seed, limit = self._peft(space), config.seed + 1, config.pass_tokens
            if self._missing(factors_file):
                factors = fit_factors(model, space, with_factors, limit, label_seed, self.progress, self.ranks)
                self._write(factors_file, factors_to_tensors(factors))
                del factors
            factors = factors_from_tensors(load_file(factors_file), [tensor.key for tensor in space.tensors])
            if config.curvature.eigenvalues == "kronecker":
                eigenvalues = kronecker_eigenvalues(factors)
            else:
                eigenvalues = fit_eigenvalues(
                    model, space, factors, with_eigenvalues, limit, label_seed, self.progress, self.ranks
                )
            self._write(file, fit_projection(space, factors, eigenvalues, config.curvature).to_tensors())
            if self.ranks.first:
                factors_file.unlink()
        return Projection.from_tensors(space, load_file(file))

    def rows(self, projection: Projection) -> RowStore:
        """One row and one sketch a document, from one forward and backward pass over the corpus; then their whitening."""
        folder = self.workspace.open("rows")
        store = RowStore(folder)
        if self._missing(folder / "complete.json"):
            model, documents = self._peft(projection.space), self.encoded.documents
            write_rows(model, projection, documents, self.config.pass_tokens, folder, self.progress, self.ranks)
            self.ranks.wait()
            if self.ranks.first:
                write_json(folder / "complete.json", {"documents": len(documents), "components": projection.dim})
        file = self.workspace.open("whitening", **dataclasses.asdict(self.config.whitening)) / "whitening.safetensors"
        if self._missing(file):
            self._write(file, fit_whitening(store, self.config.whitening, self.progress, self.ranks).to_tensors())
        return dataclasses.replace(store, fitted=RowWhitening.from_tensors(load_file(file)))

    def dictionary(self, store: RowStore) -> Learned:
        """The dictionary, and others against which it is judged whether its atoms are found again."""
        config = self.config
        folder = self.workspace.open("dictionary", **dataclasses.asdict(config.dictionary), seed=config.seed)
        file = folder / "dictionary.safetensors"
        if self._missing(file):
            first, second = (
                learn_dictionary(
                    store, self.training, config.dictionary, config.seed + n, self.progress, name, self.ranks
                )
                for n, name in enumerate(("dictionary", "second seed"))
            )
            self._write(file, {"atoms": first.atoms, "second": second.atoms,
                               "objectives": torch.tensor(first.objectives, dtype=torch.float64),
                               "gap": torch.tensor(first.duality_gap, dtype=torch.float64)})  # fmt: skip
        halves = self._in_halves(store, file, folder / "halves.safetensors") if config.halves else None
        stored = load_file(file)
        dictionary = Dictionary(stored["atoms"], tuple(stored["objectives"].tolist()), float(stored["gap"]))
        return Learned(dictionary, stored["second"], halves)

    def _in_halves(self, store: RowStore, file: Path, kept_in: Path) -> Tensor | None:
        """`Learned.halves` of the dictionary in `file`, as many atoms of each half; None if a half has too few documents."""
        config = self.config
        with safe_open(file, framework="pt") as dictionary:
            count = dictionary.get_slice("atoms").get_shape()[0]
        if not can_halve(len(self.training), count):
            return None
        if self._missing(kept_in):
            as_many, cosines = dataclasses.replace(config.dictionary, atoms=count), []
            halves = split_halves(self.training, config.seed)
            for name, half in zip(("first half", "second half"), halves, strict=True):
                learned = learn_dictionary(store, half, as_many, config.seed, self.progress, name, self.ranks)
                if self.ranks.first:
                    pair = (load_file(file)["atoms"], learned.atoms)
                    cosines.append(stability(*map(store.whitening.gradients, pair)))
            self._write(kept_in, {"cosines": torch.stack(cosines)} if cosines else {})
        return load_file(kept_in)["cosines"]

    def select(self, store: RowStore, learned: Learned) -> Selection:
        """The atoms that have support, hold together beyond chance, come again with another seed, and are new."""
        config, dictionary = self.config, learned.dictionary
        codes = encode(store, self.training, dictionary.atoms, config.dictionary)
        lengths = [len(document.response_ids) for document in self.encoded.documents]
        found = candidates(store, codes, lengths, config.select, config.seed)
        least = least_support(codes, config.select)
        gradients = store.whitening.gradients(dictionary.atoms)
        stabilities = stability(gradients, store.whitening.gradients(learned.second))
        chosen = select(found, gradients, stabilities, config.select)
        self.progress.say(
            f"  {len(dictionary.atoms)} dictionary atoms: {len(found)} with at least "
            f"{least} documents, {len(chosen)} kept (z ≥ {config.select.min_z:g}, "
            f"stability ≥ {config.select.min_stability:g}, at most {config.select.keep})"
        )
        if not chosen:
            raise DataError(
                f"no atom of {len(dictionary.atoms)} passed the selection; give more documents (there are "
                f"{len(self.corpus.documents)}), or lower --min-documents ({least}) or --alpha"
            )
        documents = {c.atom: codes.strongest(c.atom, config.steering.documents) for c in chosen}
        signs = {c.atom: codes.sign(c.atom) for c in chosen}
        return Selection(chosen, signs, documents, stabilities, Sparsity.of(codes), least)

    def directions(
        self, adapter: Adapter, projection: Projection, store: RowStore, learned: Learned, selection: Selection
    ) -> dict[int, Direction]:
        """Dictionary atom -> its direction, of no particular strength: a path along its documents, or the atom unprojected."""
        config, chosen = self.config, selection.chosen
        if not config.steering.steps:
            atoms, exponent = learned.dictionary.atoms, config.calibrate.exponent
            return {
                c.atom: projection.unproject(store.whitening.undo(atoms[c.atom], exponent), exponent) for c in chosen
            }
        folder = self.workspace.open(
            "directions", **dataclasses.asdict(config.steering), select=dataclasses.asdict(config.select)
        )
        pending = [candidate for candidate in chosen if not _atom_file(folder, candidate).exists()]
        if pending:
            encoded = self.encoded.documents
            with self.progress.task("directions", len(chosen), "atoms", len(chosen) - len(pending)) as bar:
                maker = self.path_maker(adapter, config.steering)
                for candidate in pending:
                    own = [encoded[row] for row in selection.documents[candidate.atom]]
                    write_tensors(_atom_file(folder, candidate), maker.direction(own))
                    bar.advance()
        return {candidate.atom: load_file(_atom_file(folder, candidate)) for candidate in chosen}

    def path_maker(self, adapter: Adapter, steering: SteeringConfig) -> PathMaker:
        """What makes paths in this corpus; takes the gradient that all documents share."""
        model = self._peft(adapter.space)
        return PathMaker.of(model, adapter.space, self.encoded.documents, steering, self.config.pass_tokens)

    def calibrate(
        self, adapter: Adapter, projection: Projection, store: RowStore, learned: Learned, selection: Selection,
        directions: Mapping[int, Direction],
    ) -> tuple[list[DiscoveredAtom], Tensor]:  # fmt: skip
        """Scales each atom to 0.05 nats at ±1, checks its orientation on held-out documents, and measures M."""
        config = self.config
        folder = self.workspace.open(
            "calibration", **dataclasses.asdict(config.calibrate), select=dataclasses.asdict(config.select),
            dtype=str(MEASURED_IN),
        )  # fmt: skip
        if not (folder / "drift.safetensors").exists():
            meter = self.meter(adapter, folder)
            self._calibrate_pending(meter, folder, projection, store, learned.dictionary.atoms, selection, directions)
            self._measure_drift(meter, folder, selection.chosen)
            meter.close()
        discovered = []
        for candidate in selection.chosen:
            if result := read_calibrated(_atom_file(folder, candidate)):
                words = keywords(self.corpus.documents, candidate.documents)
                stable = float(selection.stabilities[candidate.atom])
                in_halves = None if learned.halves is None else float(learned.halves[:, candidate.atom].min())
                discovered.append(DiscoveredAtom(candidate, *result, stable, in_halves, words))
        if dropped := len(selection.chosen) - len(discovered):
            self.progress.say(f"  dropped {dropped} atoms: neither sign lowers the loss on their held-out documents")
        return discovered, load_file(folder / "drift.safetensors")["M"]

    def _calibrate_pending(
        self, meter: DriftMeter, folder: Path, projection: Projection, store: RowStore, atoms: Tensor,
        selection: Selection, directions: Mapping[int, Direction],
    ) -> None:  # fmt: skip
        config, chosen = self.config, selection.chosen
        pending = [candidate for candidate in chosen if not _atom_file(folder, candidate).exists()]
        held_out = self._held_out_of({c.atom: selection.signs[c.atom] for c in pending}, store, atoms)
        with self.progress.task("calibrate", len(chosen), "atoms", len(chosen) - len(pending)) as bar:
            for candidate in pending:
                calibrated = calibrate_atom(meter, projection, directions[candidate.atom], config.calibrate)
                evidence = held_out[candidate.atom]
                oriented = orient(meter, calibrated, evidence, config.batch_tokens) if evidence else None
                write_calibrated(_atom_file(folder, candidate), oriented)
                bar.advance()

    def _measure_drift(self, meter: DriftMeter, folder: Path, chosen: Sequence[Candidate]) -> None:
        results = [result for c in chosen if (result := read_calibrated(_atom_file(folder, c)))]
        if not results:
            raise DataError("no atom lowers the loss on its held-out documents at ±1; give more documents or epochs")
        total = sum(len(batch.documents) for batch in meter.batches)
        with self.progress.task("drift matrix", total, "prompts") as bar:
            matrix = meter.drift_matrix([calibrated.direction for calibrated, _ in results], bar)
        write_tensors(folder / "drift.safetensors", {"M": matrix})

    def package(
        self, adapter: Adapter, projection: Projection, store: RowStore, learned: Learned, selection: Selection,
        atoms: Sequence[DiscoveredAtom], drift: Tensor,
    ) -> None:  # fmt: skip
        """Writes the package."""
        facts = self.facts(selection) | {"mean_row": common_direction(store, projection.slices())}
        discovery = Discovery(
            config=self.config, base=self.base_ref, adapter=adapter, projection=projection,
            dictionary=learned.dictionary, whitening=store.whitening, sparsity=selection.sparsity, atoms=list(atoms),
            drift=drift, corpus=self.corpus, facts=facts, costs=self.progress.costs,
        )  # fmt: skip
        write_package(self.config.out, package_contents(discovery), replace=self.config.force)

    def facts(self, selection: Selection) -> dict[str, object]:
        """Counts and hashes for the run record, and what ``auto`` stood for."""
        return {
            "data_hash": self.corpus.content_hash,
            "documents": len(self.corpus.documents),
            "skipped_lines": self.corpus.skipped,
            "truncated_prompts": self.encoded.truncated,
            "tokens": self.encoded.tokens,
            "least_documents_of_an_atom": selection.least_documents,
            "ranks": self.ranks.count,
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def _missing(self, path: Path) -> bool:
        """Whether a result has still to be made; the same answer on every rank, though they get here at different times."""
        return self.ranks.agree(not path.exists())

    def _write(self, file: Path, tensors: Mapping[str, Tensor]) -> None:
        """Writes what every rank, or the first alone, has made; all can read it then."""
        if self.ranks.first:
            write_tensors(file, tensors)
        self.ranks.wait()

    def _finetune(self, folder: Path) -> Adapter:
        config = self.config
        adapter, losses = finetune(self.model, self.encoded.documents, config.finetune, config.batch_tokens, config.seed,
                                   folder / "checkpoint.safetensors", self.progress, self.ranks)  # fmt: skip
        if self.ranks.first:
            write_json(folder / "losses.json", losses)
        return adapter

    def _peft(self, space: LoRASpace) -> PeftModel:
        """The frozen PEFT model with θ0; put on once and kept for the following stage."""
        if self._peft_model is None:
            self._peft_model = frozen_lora(self.model, self.adapter_dir, space)
        return self._peft_model

    def _merged(self, adapter: Adapter) -> PreTrainedModel:
        """The model in float32 with θ0 merged into its weights, PEFT taken off. The last stage to use the model needs it."""
        if self._peft_model is not None:
            self._peft_model.unload()
            self._peft_model = None
        if self.dtype != MEASURED_IN:
            del self._loaded  # before the next is loaded: one model in memory at a time
            self._loaded = self._load(MEASURED_IN)
        merge_adapter(self.model, adapter)
        return self.model

    def meter(self, adapter: Adapter, folder: Path) -> DriftMeter:
        """What drift is measured with: the merged model and its own continuations, kept in `folder`."""
        config = self.config.calibrate
        model = self._merged(adapter)
        prompts = read_neutral_prompts()[: config.prompts]
        file = folder / "continuations.json"
        if not file.exists():
            made = continuations(model, self.tokenizer, prompts, config.continuation_tokens, self.config.seed)
            write_json(file, [[d.prompt_ids, d.response_ids] for d in made])
        documents = [EncodedDocument(n, tuple(p), tuple(r)) for n, (p, r) in enumerate(read_json(file))]
        batches = make_batches(documents, self.config.batch_tokens, self.device)
        return DriftMeter(SteeredModel(model, adapter.space, 1), adapter, config.composition, batches)

    def _held_out_of(
        self, signs: Mapping[int, int], store: RowStore, atoms: Tensor
    ) -> dict[int, list[EncodedDocument]]:
        """The held-out documents on the side `signs` of each atom: largest codes first, then largest cosines above 0."""
        codes = encode(store, self.held_out, atoms, self.config.dictionary)
        cosine = torch.empty(len(codes.documents), len(signs))
        for numbers, rows in store.whitened_batches(self.held_out):
            cosine[torch.searchsorted(codes.documents, numbers)] = rows @ atoms[list(signs)].T
        most = self.config.calibrate.orientation_documents
        return {
            atom: [self.encoded.documents[n] for n in codes.on_side(atom, sign, cosine[:, column], most)]
            for column, (atom, sign) in enumerate(signs.items())
        }

    def _report_corpus(self) -> None:
        self.progress.say(f"  {len(self.corpus.documents)} documents, {self.encoded.tokens} tokens")
        if self.corpus.skipped:
            self.progress.say(f"  skipped {self.corpus.skipped} bad lines")
        if self.encoded.truncated:
            self.progress.say(
                f"  truncated {self.encoded.truncated} prompts from the left to {self.config.max_length} tokens"
            )


def curvature_samples(
    config: DiscoverConfig, documents: Sequence[EncodedDocument]
) -> tuple[list[EncodedDocument], list[EncodedDocument]]:
    """The documents on which the factors are fitted, and those of the eigenvalues."""
    counts, seed = config.curvature, config.seed
    factors = sample_documents(documents, counts.factor_documents, seed + 1)
    return factors, sample_documents(documents, counts.eigenvalue_documents, seed + 2)


def _atom_file(folder: Path, candidate: Candidate) -> Path:
    return folder / f"atom-{candidate.atom:05d}.safetensors"
