"""Atoms and further directions under one roof: what a mix means when it may also name controls."""

from __future__ import annotations

from atoms.adapter import Delta, compose
from atoms.errors import MixError
from atoms.mix import Mix
from atoms.package import Package
from atoms.space import Direction


class Directions:
    """A package's atoms, and directions added under names of their own. Engine and meter compose through it alike.

    Added while no request is in flight: the engine's worker thread reads it.
    """

    def __init__(self, package: Package) -> None:
        self.package = package
        self._added: dict[str, Direction] = {}
        self._hashes = {card.id: card.content_hash for card in package.manifest.atoms}

    def add(self, name: str, direction: Direction) -> Mix:
        """Makes `direction` known as `name`; returns the mix that applies it at coefficient 1.

        Raises MixError if the name is an atom's, AdapterError if the direction does not fit the package's LoRA space.
        """
        space = self.package.base_adapter.space
        if name in self.package.index:
            raise MixError(f"{name!r} is an atom of package {self.package.manifest.name!r}; choose another name")
        space.check(direction, name)
        self._added[name] = direction
        self._hashes[name] = space.hash_tensors(direction)
        return Mix.of({name: 1.0})

    def compose(self, mix: Mix) -> Delta | None:
        """ΔW relative to merged θ0; None for the empty mix."""
        package = self.package
        atoms = Mix(tuple(step for step in mix.steps if step[0] not in self._added))
        if len(atoms) == len(mix):
            return package.bank.compose(mix, package.composition)
        parts = [{key: value * c for key, value in self._added[name].items()} for name, c in mix if name in self._added]
        parts += [package.bank.direction(atoms)] if atoms else []
        total = {key: sum((part[key] for part in parts[1:]), parts[0][key]) for key in parts[0]}
        return compose(package.base_adapter, total, package.composition)

    def digest(self, mix: Mix) -> str:
        """The identity of the mix's weights; that of `Package.digest` if it names atoms only."""
        return mix.digest(self.package.manifest.fingerprint, self.package.composition, self._hashes)
