"""Puts a finished discovery together as the contents of a package: cards, tensors, evidence, report."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from atoms.adapter import Adapter
from atoms.manifest import AtomCard, BaseModelRef, Conventions, Manifest, Orientation, SteeringPath, described
from atoms.package import EVIDENCE, REPORT, PackageContents, atom_id
from atoms.projection import Projection, RowWhitening
from offline.calibrate import Calibrated
from offline.config import DiscoverConfig
from offline.corpus import Corpus
from offline.dictionary import Dictionary
from offline.progress import StageCost
from offline.record import run_record
from offline.report import render_report
from offline.select import Candidate, Sparsity


@dataclass(frozen=True)
class DiscoveredAtom:
    """A kept atom: its statistics, its calibrated direction with the KL curve, and its held-out evidence."""

    candidate: Candidate
    calibrated: Calibrated
    orientation: Orientation
    stability: float
    stability_halves: float | None
    keywords: list[str]


@dataclass(frozen=True)
class Discovery:
    """Everything that a package is made from. `drift` (J, J) is in the order of `atoms`."""

    config: DiscoverConfig
    base: BaseModelRef
    adapter: Adapter
    projection: Projection
    dictionary: Dictionary
    whitening: RowWhitening
    sparsity: Sparsity
    atoms: Sequence[DiscoveredAtom]
    drift: Tensor
    corpus: Corpus
    facts: Mapping[str, Any]
    costs: Mapping[str, StageCost]


def package_contents(discovery: Discovery) -> PackageContents:
    """Cards, tensors and texts of the package. Evidence and exemplars are left out with `include_documents` off."""
    space = discovery.adapter.space
    hashes = [space.hash_tensors(atom.calibrated.direction) for atom in discovery.atoms]
    cards = [_card(atom, content_hash) for atom, content_hash in zip(discovery.atoms, hashes, strict=True)]
    manifest = _manifest(discovery, cards)
    evidence = _evidence(discovery, cards) if discovery.config.include_documents else None
    projection = _projection_tensors(discovery)
    texts = {REPORT: render_report(manifest, evidence or [], projection, discovery.drift)}
    if evidence is not None:
        texts[EVIDENCE] = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in evidence)
    return PackageContents(
        manifest=manifest,
        base=discovery.adapter,
        directions={card.id: atom.calibrated.direction for card, atom in zip(cards, discovery.atoms, strict=True)},
        drift=_drift_tensors(discovery),
        projection=projection,
        texts=texts,
    )


def _manifest(discovery: Discovery, cards: list[AtomCard]) -> Manifest:
    config = discovery.config
    facts = {
        **discovery.facts,
        "dictionary_atoms": len(discovery.dictionary.atoms),
        "dictionary_objective": discovery.dictionary.objectives[-1],
        "duality_gap": discovery.dictionary.duality_gap,
    }
    return Manifest(
        name=config.package_name,
        version=config.version,
        base_model=discovery.base,
        adapter_hash=discovery.adapter.content_hash(),
        conventions=Conventions(
            unprojection_exponent=config.calibrate.exponent,
            path=SteeringPath(**dataclasses.asdict(config.steering)) if config.steering.steps else None,
            composition=config.calibrate.composition,
        ),
        atoms=cards,
        files={},
        record=run_record(config, facts, discovery.costs),
    )


def _card(atom: DiscoveredAtom, content_hash: str) -> AtomCard:
    coefficients = list(atom.calibrated.curve)
    return AtomCard(
        id=atom_id(content_hash),
        content_hash=content_hash,
        description=described(atom.candidate.n_documents, atom.keywords),
        keywords=atom.keywords,
        coherence=atom.candidate.coherence,
        stability=atom.stability,
        stability_halves=atom.stability_halves,
        n_documents=atom.candidate.n_documents,
        orientation=atom.orientation,
        tested_range=(min(coefficients), max(coefficients)),
        kl_curve=list(atom.calibrated.curve.items()),
    )


def _projection_tensors(discovery: Discovery) -> dict[str, Tensor]:
    return {
        **discovery.projection.to_tensors(),
        **discovery.whitening.to_tensors(),
        "dictionary": discovery.dictionary.atoms,
        "dictionary_index": torch.tensor([atom.candidate.atom for atom in discovery.atoms]),
        "documents_per_atom": discovery.sparsity.documents_per_atom,
        "codes_per_document": discovery.sparsity.codes_per_document,
    }


def _drift_tensors(discovery: Discovery) -> dict[str, Tensor]:
    curves = [atom.calibrated.curve for atom in discovery.atoms]
    coefficients = sorted({c for curve in curves for c in curve})
    return {
        "M": discovery.drift,
        "kl_coefficients": torch.tensor(coefficients),
        "kl_curves": torch.tensor([[curve.get(c, float("nan")) for c in coefficients] for curve in curves]),
    }


def _evidence(discovery: Discovery, cards: Sequence[AtomCard]) -> list[dict[str, Any]]:
    documents = discovery.corpus.documents
    return [
        {
            "atom": card.id,
            "documents": [
                {"id": documents[row].id, "code": round(code, 6), "prompt": documents[row].prompt,
                 "response": documents[row].response}
                for row, code in zip(atom.candidate.documents, atom.candidate.codes, strict=True)
            ],
        }
        for card, atom in zip(cards, discovery.atoms, strict=True)
    ]  # fmt: skip
