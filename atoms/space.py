"""LoRA space: which LoRA matrices exist, their shapes, and their order. The only owner of coordinate order.

Knows nothing of models, files or gradients. Everything that turns per-tensor data into one long vector, or back, asks
this module, so the order can never be derived twice.

Symbols
    r        rank of a module's adapter
    d_in     input features of the adapted linear,  d_out  its output features
    A        lora_A, (r, d_in)                      B      lora_B, (d_out, r)
    d        total number of coordinates, Σ r·(d_in + d_out)
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from atoms.errors import AdapterError

Direction = Mapping[str, Tensor]
"""One vector of LoRA space, kept per tensor: key (see `LoRATensor.key`) -> tensor of that shape."""


@dataclass(frozen=True, slots=True)
class LoRAModule:
    """One adapted linear. `name` is its module path in the base model; `scaling` is α/r (rsLoRA: α/√r).

    The scaling is rounded to float32: files hold α = scaling · r, and only then does α/r give it back exactly.
    """

    name: str
    d_in: int
    d_out: int
    rank: int
    scaling: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "scaling", struct.unpack("f", struct.pack("f", self.scaling))[0])

    @property
    def key_a(self) -> str:
        return f"{self.name}.lora_A"

    @property
    def key_b(self) -> str:
        return f"{self.name}.lora_B"


@dataclass(frozen=True, slots=True)
class LoRATensor:
    """One LoRA matrix: its key ``<module>.lora_A`` or ``<module>.lora_B`` and its shape (out features, in features)."""

    key: str
    module: LoRAModule
    shape: tuple[int, int]

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]


def natural_key(name: str) -> tuple[tuple[int, int | str], ...]:
    """Sort key in which ``layers.2`` comes before ``layers.10``."""
    return tuple((0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name) if part)


@dataclass(frozen=True)
class LoRASpace:
    """The ordered modules of one adapter. Build with `LoRASpace.of`, which sorts them; equal specs compare equal."""

    modules: tuple[LoRAModule, ...]

    @classmethod
    def of(cls, modules: Iterable[LoRAModule]) -> LoRASpace:
        """Sorts `modules` naturally by name. Raises AdapterError if there are none or if a name occurs twice."""
        ordered = tuple(sorted(modules, key=lambda module: natural_key(module.name)))
        if not ordered:
            raise AdapterError("the adapter has no LoRA modules; train one with target modules such as q_proj, v_proj")
        names = [module.name for module in ordered]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise AdapterError(f"module {twice!r} occurs twice in the adapter; each linear may be adapted once")
        return cls(ordered)

    @cached_property
    def tensors(self) -> tuple[LoRATensor, ...]:
        """All matrices in coordinate order: for every module A, then B."""
        return tuple(
            tensor
            for m in self.modules
            for tensor in (LoRATensor(m.key_a, m, (m.rank, m.d_in)), LoRATensor(m.key_b, m, (m.d_out, m.rank)))
        )

    @property
    def dim(self) -> int:
        """d, the number of coordinates."""
        return sum(tensor.numel for tensor in self.tensors)

    def check(self, tensors: Direction, what: str = "direction") -> None:
        """Raises AdapterError unless `tensors` has exactly this space's keys and shapes."""
        expected = {tensor.key: tensor.shape for tensor in self.tensors}
        missing, extra = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
        if missing or extra:
            raise AdapterError(
                f"the {what} does not fit the LoRA space: missing {sorted(missing)[:3]}, unexpected {sorted(extra)[:3]}"
            )
        for key, shape in expected.items():
            if tuple(tensors[key].shape) != shape:
                raise AdapterError(f"the {what} has {key} of shape {tuple(tensors[key].shape)}; it must be {shape}")

    def flatten(self, direction: Direction) -> Tensor:
        """(d,) vector of `direction` in coordinate order. Raises AdapterError if keys or shapes do not fit."""
        self.check(direction)
        return torch.cat([direction[tensor.key].reshape(-1) for tensor in self.tensors])

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """Inverse of `flatten`. Raises AdapterError if `vector` is not (d,)."""
        if tuple(vector.shape) != (self.dim,):
            raise AdapterError(f"the vector has shape {tuple(vector.shape)}; this LoRA space needs ({self.dim},)")
        parts = torch.split(vector, [tensor.numel for tensor in self.tensors])
        return {tensor.key: part.reshape(tensor.shape) for tensor, part in zip(self.tensors, parts, strict=True)}

    def to_json(self) -> list[dict[str, object]]:
        """JSON form, in order; `from_json` reads it back."""
        return [
            {"name": m.name, "d_in": m.d_in, "d_out": m.d_out, "rank": m.rank, "scaling": m.scaling}
            for m in self.modules
        ]

    @classmethod
    def from_json(cls, data: list[dict[str, object]]) -> LoRASpace:
        return cls.of(LoRAModule(**entry) for entry in data)  # type: ignore[arg-type]

    def hash_tensors(self, tensors: Direction) -> str:
        """sha256 hex over the space and the float32 little-endian bytes of `tensors` in coordinate order."""
        self.check(tensors)
        digest = hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode())
        for tensor in self.tensors:
            digest.update(tensors[tensor.key].detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
        return digest.hexdigest()
