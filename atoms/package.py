"""A package on disk: read and verify, write atomically, label, export. The only thing that passes between discovery and server.

PKG/manifest.json          identity, conventions, one card per atom, sha256 of every file (atoms/manifest.py)
PKG/base/                  θ0, a PEFT adapter
PKG/atoms/<id>/            one PEFT adapter an atom: the linear form at coefficient 1 on top of merged θ0
PKG/drift.safetensors      M (J, J) float32, kl_coefficients (P,), kl_curves (J, P)
PKG/projection.safetensors eigenbasis, kept components, λ, ε, mean row, dictionary (atoms/projection.py)
PKG/evidence.jsonl         optional: the documents behind each atom
PKG/report.html            the same for people

The report is outside the hashes: it shows what may change (aliases) or is never equal (timings), and is made again from the
rest whenever that changes (`offline.report.write_report`). No program reads it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from safetensors.torch import load, load_file
from torch import Tensor

from atoms.adapter import (
    CONFIG_FILE,
    Adapter,
    AtomBank,
    Composition,
    adapter_delta,
    compose,
    compose_on_raw_base,
    read_adapter,
    read_delta,
    split_linear,
    write_adapter,
)
from atoms.drift import DriftModel
from atoms.errors import (
    CoefficientError,
    ConfigError,
    MixError,
    PackageCorruptError,
    PackageError,
    UnknownAtomError,
    WrongBaseError,
)
from atoms.manifest import FORMAT_VERSION, AtomCard, Manifest
from atoms.mix import Mix
from atoms.space import Direction
from atoms.storage import new_directory, refuse_to_replace, sha256_file, write_bytes, write_json, write_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MANIFEST, DRIFT, PROJECTION, EVIDENCE, REPORT = (
    "manifest.json", "drift.safetensors", "projection.safetensors", "evidence.jsonl", "report.html",
)  # fmt: skip


@dataclass(frozen=True)
class Package:
    """A verified package. Tensors are read on first use and kept."""

    path: Path
    manifest: Manifest

    @classmethod
    def read(cls, path: Path) -> Package:
        """Reads and verifies every hash.

        Raises PackageError if `path` is no package or of another format version, PackageCorruptError if a file is
        missing, truncated, added or edited.
        """
        manifest = _read_manifest(Path(path))
        _verify_files(Path(path), manifest)
        return cls(Path(path), manifest)

    @cached_property
    def base_adapter(self) -> Adapter:
        """θ0. Raises PackageCorruptError if it is not the adapter that the manifest names."""
        adapter = read_adapter(self.path / "base")
        if adapter.content_hash() != self.manifest.adapter_hash:
            raise PackageCorruptError(
                f"{self.path}/base is not the adapter that the atoms were made on (hash {adapter.content_hash()[:12]}, "
                f"manifest {self.manifest.adapter_hash[:12]}); restore the package from its source"
            )
        return adapter

    @cached_property
    def bank(self) -> AtomBank:
        """All atoms' directions. Raises WrongBaseError for an atom whose adapter was made on another θ0."""
        base = self.base_adapter
        return AtomBank.of(base, {card.id: self._read_atom(card, base) for card in self.manifest.atoms})

    @cached_property
    def drift(self) -> Tensor:
        """M, (J, J) float32, in the manifest's order of atoms. Raises PackageCorruptError if a number is not finite."""
        matrix = load((self.path / DRIFT).read_bytes())["M"]
        if not torch.isfinite(matrix).all():
            raise PackageCorruptError(f"{self.path / DRIFT} has a number that is not finite; discover the atoms again")
        return matrix

    @cached_property
    def projection_tensors(self) -> dict[str, Tensor]:
        return load_file(self.path / PROJECTION)

    @cached_property
    def index(self) -> Mapping[str, int]:
        """Atom id -> row of `drift`."""
        return {card.id: row for row, card in enumerate(self.manifest.atoms)}

    @cached_property
    def _by_name(self) -> Mapping[str, AtomCard]:
        return {name: card for card in self.manifest.atoms for name in (card.id, card.alias) if name}

    @property
    def composition(self) -> Composition:
        return self.manifest.conventions.composition

    def card(self, name: str) -> AtomCard:
        """The atom of this id or alias. Raises UnknownAtomError, naming near misses."""
        if name in self._by_name:
            return self._by_name[name]
        known = [card.name for card in self.manifest.atoms]
        near = difflib.get_close_matches(name, list(self._by_name), n=3) or known[:8]
        raise UnknownAtomError(
            f"unknown atom {name!r}; package {self.manifest.name!r} has {len(known)} atoms, among them {', '.join(near)}",
            param=f"steering.atoms.{name}",
        )

    def mix(self, coefficients: Mapping[str, float]) -> Mix:
        """Resolves ids and aliases. Raises UnknownAtomError, CoefficientError, MixError if one atom is named twice."""
        resolved: dict[str, float] = {}
        for name, value in coefficients.items():
            atom = self.card(name).id
            if atom in resolved:
                raise MixError(f"atom {atom} is named twice ({name!r} is its alias); give it one coefficient",
                               param=f"steering.atoms.{name}")  # fmt: skip
            resolved[atom] = value
        return Mix.of(resolved)

    def digest(self, mix: Mix) -> str:
        return mix.digest(self.manifest.fingerprint, self.composition, self._content_hashes)

    @cached_property
    def _content_hashes(self) -> Mapping[str, str]:
        return {card.id: card.content_hash for card in self.manifest.atoms}

    @cached_property
    def drift_model(self) -> DriftModel:
        return DriftModel.of(self.drift, {card.id: card.kl_curve for card in self.manifest.atoms})

    def predicted_kl(self, mix: Mix) -> float:
        """Predicted KL(unsteered ‖ mix), nats a token (`atoms.drift`)."""
        return self.drift_model.kl(mix)

    def check_range(self, mix: Mix) -> None:
        """Raises CoefficientError for a coefficient outside its atom's tested range."""
        for atom, value in mix:
            card = self.card(atom)
            low, high = card.tested_range
            if not low <= value <= high:
                raise CoefficientError(
                    f"coefficient {value:g} of atom {card.name!r} lies outside its tested range {low:g} to {high:g}; "
                    "choose one within it, or allow out-of-range coefficients (on a server that takes an admin key)",
                    param=f"steering.atoms.{card.name}",
                )

    def check_base(self, model: PreTrainedModel) -> None:
        """Raises WrongBaseError unless `model` (unmerged) is the base model that the package was made for."""
        from atoms.model import config_hash, weights_fingerprint

        ref = self.manifest.base_model
        if config_hash(model) != ref.config_hash:
            raise WrongBaseError(
                f"package {self.manifest.name!r} was made for {ref.id!r}, and the given model has another architecture "
                f"(config hash {config_hash(model)[:12]}, package {ref.config_hash[:12]}); give the model {ref.id!r}"
            )
        if weights_fingerprint(model) != ref.weights:
            raise WrongBaseError(
                f"package {self.manifest.name!r} was made for {ref.id!r}; the given model has the same architecture but "
                f"other weights; give the model {ref.id!r}, unmerged and of the same revision"
            )

    def evidence(self) -> list[dict[str, Any]]:
        """Lines of evidence.jsonl; empty if the package was made without documents. Read and verified on every call.

        Raises PackageCorruptError if another version of the package, or none, lies at the path by now.
        """
        file, digest = self.path / EVIDENCE, self.manifest.files.get(EVIDENCE)
        if digest is None:
            return []
        data = file.read_bytes() if file.is_file() else b""
        if hashlib.sha256(data).hexdigest() != digest:
            raise PackageCorruptError(
                f"{file} is not the one of version {self.manifest.version} of the package; restore it"
            )
        return [json.loads(line) for line in data.splitlines()]  # of bytes: text has further ends of line, as U+2028

    def relabel(self, atom: str, alias: str | None) -> Package:
        """Gives an atom another alias (None removes it) and returns the package as it is now.

        Raises UnknownAtomError, PackageError if the alias is another atom's name or could be taken for a mix.
        """
        now = self._as_it_lies()
        target = now.card(self.card(atom).id)
        if alias is not None:
            _check_alias(alias, now._by_name.get(alias), target)
        return now.edit(target.id, alias=alias)

    def edit(self, atom: str, **fields: object) -> Package:
        """Sets fields of one card; see `update`. Further raises UnknownAtomError."""
        target = self.card(atom).id
        return self.update(lambda cards: [
            AtomCard.model_validate(card.model_dump() | fields) if card.id == target else card for card in cards
        ])  # fmt: skip

    def _as_it_lies(self) -> Package:
        """The package with the manifest that is on disk by now. Raises PackageCorruptError, PackageError if it was replaced."""
        current = _read_manifest(self.path)
        if current.files != self.manifest.files:
            raise PackageError(f"{self.path} was replaced by another version meanwhile; run the command again")
        return Package(self.path, current)

    def update(self, change: Callable[[Sequence[AtomCard]], list[AtomCard]]) -> Package:
        """Rewrites the manifest with what `change` makes of the cards as they lie on disk by now (labels, measured effects),
        atomically, and returns the package as it is then. Tensors are untouched.

        Raises PackageCorruptError, PackageError if another version of the package lies there by now.
        """
        now = self._as_it_lies()
        manifest = now.manifest.model_copy(update={"atoms": change(now.manifest.atoms)}).sealed()
        write_json(self.path / MANIFEST, manifest.model_dump(mode="json"))
        return Package(self.path, manifest)

    def export(self, mix: Mix, out: Path, *, onto: str = "raw", replace: bool = False) -> None:
        """Writes `mix` as one PEFT adapter, relative to the raw base (``raw``) or to the base with θ0 merged (``merged``).

        Raises MixError for an empty mix on merged θ0 (nothing to export), StorageError, ConfigError for a path in the package.
        """
        base, direction = self.base_adapter, self.bank.direction(mix) if mix else None
        if direction is None and onto == "merged":
            raise MixError("the mix is empty: on merged θ0 it adds nothing; export it onto the raw base to get θ0")
        if direction is None:
            delta = adapter_delta(base)
        elif onto == "merged":
            delta = compose(base, direction, self.composition)
        else:
            delta = compose_on_raw_base(base, direction, self.composition)
        refuse_inside(self.path, out)
        if replace:
            refuse_to_replace(out, CONFIG_FILE)
        with new_directory(out, replace=replace) as directory:
            write_adapter(directory, delta, base.targets, self.manifest.base_model.id)

    def _read_atom(self, card: AtomCard, base: Adapter) -> dict[str, Tensor]:
        delta = read_delta(self.path / "atoms" / card.id)
        if delta.keys() != {module.name for module in base.space.modules}:
            raise WrongBaseError(f"atom {card.id} adapts other modules than the base adapter; restore the package")
        for module in base.space.modules:
            factors = delta[module.name]
            a0, b0 = base.tensors[module.key_a], base.tensors[module.key_b]
            r = module.rank
            if not torch.equal(factors.lora_A[r:], a0) or not torch.equal(factors.lora_B[:, :r], b0):
                raise WrongBaseError(f"atom {card.id} was made on another base adapter ({module.name} differs)")
        direction = split_linear(base, delta)
        if base.space.hash_tensors(direction) != card.content_hash:
            raise PackageCorruptError(f"atom {card.id} is not the one that its card describes; restore the package")
        return direction


def atom_id(content_hash: str) -> str:
    return f"a-{content_hash[:8]}"


@dataclass(frozen=True)
class PackageContents:
    """All that goes into a package; `cards` and `directions` in one order. `files` are the optional texts by name."""

    manifest: Manifest
    base: Adapter
    directions: Mapping[str, Direction]
    drift: Mapping[str, Tensor]
    projection: Mapping[str, Tensor]
    texts: Mapping[str, str]


def write_package(path: Path, contents: PackageContents, *, replace: bool = False) -> Package:
    """Writes a package to a temporary directory, syncs it, renames it to `path`. Raises StorageError."""
    targets, model_id = contents.base.targets, contents.manifest.base_model.id
    if replace:
        refuse_to_replace(path, MANIFEST)
    with new_directory(path, replace=replace) as directory:
        write_adapter(directory / "base", adapter_delta(contents.base), targets, model_id)
        for atom, direction in contents.directions.items():
            write_adapter(directory / "atoms" / atom, compose(contents.base, direction, "linear"), targets, model_id)
        write_tensors(directory / DRIFT, contents.drift)
        write_tensors(directory / PROJECTION, contents.projection)
        for name, text in contents.texts.items():
            write_bytes(directory / name, text.encode())
        files = {name: sha256_file(directory / name) for name in _list_files(directory) if name != REPORT}
        manifest = contents.manifest.model_copy(update={"files": files}).sealed()
        write_json(directory / MANIFEST, manifest.model_dump(mode="json"))
    return Package(path, manifest)


def _read_manifest(path: Path) -> Manifest:
    file = path / MANIFEST
    if not file.is_file():
        raise PackageError(
            f"{path} is not an atomsteer package: it has no {MANIFEST}; make one with `atomsteer discover`"
        )
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(data, dict) and data.get("format_version") != FORMAT_VERSION:
            raise PackageError(
                f"{path} has package format {data.get('format_version')!r}; this version reads format {FORMAT_VERSION}"
            )
        manifest = Manifest.model_validate(data)
    except (ValidationError, ValueError) as error:
        raise PackageCorruptError(f"{file} cannot be read: {error}; restore the package from its source") from error
    if manifest.content_hash != manifest.compute_content_hash():
        raise PackageCorruptError(f"{file} was edited: its content hash does not match; restore it from its source")
    names = [name for card in manifest.atoms for name in {card.id, card.alias} if name]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise PackageCorruptError(f"{file} names two atoms {twice!r}; give one of them another alias there")
    return manifest


def refuse_inside(package: Path, out: Path) -> None:
    """Raises ConfigError if `out` is the package or lies in it, but for its report: a package holds what its manifest lists."""
    inside = out.resolve().is_relative_to(package.resolve())
    if inside and out.resolve() != (package / REPORT).resolve():
        raise ConfigError(
            f"{out} lies in the package {package}, which would be refused as damaged then; choose a path outside of it"
        )


def _verify_files(path: Path, manifest: Manifest) -> None:
    present = set(_list_files(path)) - {MANIFEST, REPORT}
    listed = {name: digest for name, digest in manifest.files.items() if name != REPORT}
    if missing := listed.keys() - present:
        raise PackageCorruptError(
            f"{path} lacks {sorted(missing)[0]} (and {len(missing) - 1} more files); copy it again"
        )
    if extra := present - listed.keys():
        raise PackageCorruptError(f"{path} has {sorted(extra)[0]}, which its manifest does not list; remove it")
    for name, expected in listed.items():
        if sha256_file(path / name) != expected:
            raise PackageCorruptError(
                f"{path / name} was truncated or edited: its sha256 is not the manifest's; copy it again"
            )


def _list_files(path: Path) -> list[str]:
    return sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())


def _check_alias(alias: str, owner: AtomCard | None, target: AtomCard) -> None:
    if owner is not None and owner is not target:
        raise PackageError(f"{alias!r} is already the name of atom {owner.id}; aliases are unique")
    allowed = alias.replace("-", "").replace("_", "").replace(".", "")
    if not allowed.isalnum() or not alias[0].isalnum() or len(alias) > 64:
        raise PackageError(
            f"alias {alias!r} must be 1-64 letters, digits, '-', '_' or '.', starting with a letter or digit"
        )
    if alias.startswith("a-"):
        raise PackageError(f"alias {alias!r} looks like an atom id; choose one that does not begin with 'a-'")
