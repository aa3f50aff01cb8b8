"""θ0 merged into the weights while they are read, so that every shard, format and kernel of vLLM gets merged ones.

The stream carries a checkpoint's tensors under its own names, before vLLM splits, packs or quantises them. Merging
there gives exactly the weights of `atoms.model.merge_adapter`, and an unsteered request runs without any LoRA.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from atoms.adapter import Adapter
from atoms.errors import WrongBaseError
from atoms.model import sample_weight

Weights = Iterable[tuple[str, Tensor]]


def merge_stream(weights: Weights, adapter: Adapter, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yields `weights` (name, tensor), those that `adapter` adapts as `dtype` with s·B0·A0 added in float32.

    Raises WrongBaseError at the end if one of the adapter's modules has not come, or at once if its size differs.
    """
    modules = {f"{module.name}.weight": module for module in adapter.space.modules}
    for name, tensor in weights:
        module = modules.pop(name, None)
        if module is None:
            yield name, tensor
            continue
        if tuple(tensor.shape) != (module.d_out, module.d_in):
            raise WrongBaseError(
                f"{name} has shape {tuple(tensor.shape)}; the adapter needs ({module.d_out}, {module.d_in})"
            )
        a, b = adapter.tensors[module.key_a].float(), adapter.tensors[module.key_b].float()
        delta = (b @ a) * module.scaling
        yield name, (tensor.to(dtype).float() + delta.to(tensor.device)).to(dtype)
    if modules:
        raise WrongBaseError(
            f"the checkpoint has no {sorted(modules)[0]} ({len(modules)} of the adapter's modules are missing), so θ0 "
            "cannot be merged: it is quantised, or names its tensors otherwise than transformers; give the base model that the "
            "package was made for, unquantised, as transformers saves it"
        )


class Fingerprint:
    """`atoms.model.weights_fingerprint` of tensors that pass by."""

    def __init__(self, expected_names: frozenset[str]) -> None:
        self._expected = expected_names
        self._samples: dict[str, bytes] = {}

    def watch(self, weights: Weights) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            if name in self._expected:
                self._samples[name] = sample_weight(tensor)
            yield name, tensor

    def value(self) -> str | None:
        """None if the checkpoint names its tensors otherwise than the model, so that they cannot be compared."""
        if self._samples.keys() != self._expected:
            return None
        digest = hashlib.sha256()
        for name, sample in sorted(self._samples.items()):
            digest.update(name.encode() + sample)
        return digest.hexdigest()


def checked(weights: Weights, names: frozenset[str], expected: str, base: str, warn: Callable[[str], None]) -> Weights:
    """Yields `weights`. Raises WrongBaseError at the end if they are not those with fingerprint `expected`."""
    fingerprint = Fingerprint(names)
    yield from fingerprint.watch(weights)
    value = fingerprint.value()
    if value is None:
        warn(f"the checkpoint's tensors have other names than the model's, so they cannot be compared with {base!r}")
    elif value != expected:
        raise WrongBaseError(
            f"the package was made for {base!r}; the given model has the same architecture but other weights; give the "
            f"model {base!r}, unmerged and of the same revision"
        )
