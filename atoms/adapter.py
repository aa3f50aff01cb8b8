"""Weights: the base adapter θ0, the bank of atoms, and what a mix of atoms adds to a linear.

Knows PEFT's file format, but neither PEFT nor a model. Symbols as in `atoms.space`; further

    (A0, B0)   the base adapter θ0           (a_j, b_j)   atom j, the same shapes
    c          coefficients of a mix         a = Σ c_j a_j,  b = Σ c_j b_j
    s          the module's LoRA scaling     ΔW  what the mix adds to the weight with θ0 merged, (d_out, d_in)

    composition "linear"      ΔW = s (B0 a + b A0)         = s [B0, b] [a; A0]        exactly additive in c
    composition "parameter"   ΔW = s (B0 a + b A0 + b a)   = s [B0 + b, b] [a; A0]    moves the parameters to θ0 + Σ c_j v_j

Both have rank 2r, and both are relative to merged θ0.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from atoms.errors import AdapterError
from atoms.mix import Mix
from atoms.space import Direction, LoRAModule, LoRASpace
from atoms.storage import write_json, write_tensors

Composition = Literal["linear", "parameter"]
PEFT_PREFIX = "base_model.model."
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

_REFUSED = {
    "use_dora": "DoRA rescales the weights by their norm, which a weight delta cannot express",
    "modules_to_save": "fully trained modules are not part of the LoRA space",
    "lora_bias": "LoRA biases are not part of the LoRA space",
    "use_qalora": "QA-LoRA pools the inputs",
    "use_bdlora": "block-diagonal LoRA has another shape of matrices",
    "alora_invocation_tokens": "an activated LoRA is on for a part of the sequence only",
    "trainable_token_indices": "trained token embeddings are not part of the LoRA space",
    "target_parameters": "LoRA on bare parameters has no linear to hook",
    "layer_replication": "replicated layers are not in the base model",
    "fan_in_fan_out": "Conv1D weights are stored transposed",
    "arrow_config": "Arrow routes between adapters",
}
_TARGET_KEYS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: its space, its float32 matrices, and the PEFT settings that name its target modules."""

    space: LoRASpace
    tensors: Mapping[str, Tensor]
    targets: Mapping[str, object]

    def content_hash(self) -> str:
        return self.space.hash_tensors(self.tensors)


@dataclass(frozen=True)
class Factors:
    """A low-rank weight delta of one linear: ΔW = scaling · lora_B @ lora_A, with (R, d_in) and (d_out, R)."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float


Delta = Mapping[str, Factors]
"""Module name -> what is added to that linear's weight."""


@dataclass(frozen=True)
class AtomBank:
    """All atoms of a package on top of one base adapter, stacked: a[module] (J, r, d_in), b[module] (J, d_out, r)."""

    base: Adapter
    ids: tuple[str, ...]
    a: Mapping[str, Tensor]
    b: Mapping[str, Tensor]

    @classmethod
    def of(cls, base: Adapter, atoms: Mapping[str, Direction]) -> AtomBank:
        """Stacks `atoms` (id -> direction, in order). Raises AdapterError if one does not fit the base's space."""
        for atom, direction in atoms.items():
            base.space.check(direction, f"atom {atom}")
        modules = base.space.modules
        stack = {
            key: torch.stack([direction[key].float() for direction in atoms.values()])
            if atoms
            else base.tensors[key].new_zeros((0, *base.tensors[key].shape))
            for module in modules
            for key in (module.key_a, module.key_b)
        }
        return cls(
            base,
            tuple(atoms),
            {module.name: stack[module.key_a] for module in modules},
            {module.name: stack[module.key_b] for module in modules},
        )

    def direction(self, mix: Mix) -> dict[str, Tensor]:
        """Σ c_j v_j per tensor. Raises KeyError for an id outside the bank: resolve names first."""
        index = {atom: row for row, atom in enumerate(self.ids)}
        rows = [index[atom] for atom, _ in mix]
        result: dict[str, Tensor] = {}
        for module in self.base.space.modules:
            a, b = self.a[module.name], self.b[module.name]
            c = a.new_tensor([value for _, value in mix])
            result[module.key_a] = torch.tensordot(c, a[rows], dims=1)  # (r, d_in)
            result[module.key_b] = torch.tensordot(c, b[rows], dims=1)  # (d_out, r)
        return result

    def compose(self, mix: Mix, composition: Composition) -> Delta | None:
        """ΔW of `mix` relative to merged θ0, or None for the empty mix (which must cost and change nothing)."""
        return compose(self.base, self.direction(mix), composition) if mix else None


def compose(base: Adapter, direction: Direction, composition: Composition) -> Delta:
    """ΔW of moving from θ0 along `direction`, relative to merged θ0; rank 2r. Formulas in the module docstring."""
    delta = {}
    for module in base.space.modules:
        a0, b0 = base.tensors[module.key_a], base.tensors[module.key_b]
        a, b = direction[module.key_a], direction[module.key_b]
        left = b0 if composition == "linear" else b0 + b
        delta[module.name] = Factors(torch.cat([a, a0]), torch.cat([left, b], dim=1), module.scaling)
    return delta


def compose_on_raw_base(base: Adapter, direction: Direction, composition: Composition) -> Delta:
    """ΔW of θ0 and `direction` together, relative to the raw base model (θ0 not merged).

    linear: s [B0, b] [A0 + a; A0], rank 2r; parameter: s (B0 + b)(A0 + a), rank r.
    """
    delta = {}
    for module in base.space.modules:
        a0, b0 = base.tensors[module.key_a], base.tensors[module.key_b]
        a, b = direction[module.key_a], direction[module.key_b]
        if composition == "linear":
            delta[module.name] = Factors(torch.cat([a0 + a, a0]), torch.cat([b0, b], dim=1), module.scaling)
        else:
            delta[module.name] = Factors(a0 + a, b0 + b, module.scaling)
    return delta


def split_linear(base: Adapter, delta: Delta) -> dict[str, Tensor]:
    """The direction (a, b) of a delta in the linear form [B0, b] [a; A0]. Raises AdapterError for another rank."""
    direction = {}
    for module in base.space.modules:
        factors, r = delta[module.name], module.rank
        if factors.lora_A.shape[0] != 2 * r:
            raise AdapterError(f"{module.name} has rank {factors.lora_A.shape[0]}; an atom on this base has {2 * r}")
        direction[module.key_a], direction[module.key_b] = factors.lora_A[:r], factors.lora_B[:, r:]
    return direction


def read_adapter(path: Path) -> Adapter:
    """Reads a PEFT LoRA directory.

    Raises AdapterError if files are missing or broken, or if the adapter is of a kind that a weight delta cannot
    express (DoRA, modules_to_save, biases, quantisation-aware variants …), by name, or has a number that is not finite.
    """
    config, tensors = _read_files(path)
    _refuse_unsupported(config, path)
    pairs = _pair_matrices(tensors, path)
    _require_finite(tensors, path)
    modules = [
        LoRAModule(name, a.shape[1], b.shape[0], a.shape[0], _scaling(config, name, a.shape[0]))
        for name, (a, b) in pairs.items()
    ]
    space = LoRASpace.of(modules)
    weights = {key: t for m in modules for key, t in zip((m.key_a, m.key_b), pairs[m.name], strict=True)}
    return Adapter(space, weights, {key: config[key] for key in _TARGET_KEYS if config.get(key) is not None})


def refuse_zero_b(adapter: Adapter, path: Path) -> None:
    """Raises AdapterError if a module has B = 0: the gradient of its A is then zero and half its directions are lost."""
    zero = [module.name for module in adapter.space.modules if not adapter.tensors[module.key_b].any()]
    if zero:
        raise AdapterError(
            f"{path}: lora_B is all zero in {len(zero)} of {len(adapter.space.modules)} modules (first: {zero[0]}), so the "
            "gradient of lora_A vanishes there; train the adapter first, or leave --adapter out to fine-tune one"
        )


def read_delta(path: Path) -> Delta:
    """Reads any supported PEFT LoRA directory as a weight delta. Raises AdapterError."""
    adapter = read_adapter(path)
    return {
        module.name: Factors(adapter.tensors[module.key_a], adapter.tensors[module.key_b], module.scaling)
        for module in adapter.space.modules
    }


def write_adapter(path: Path, delta: Delta, targets: Mapping[str, object], base_model: str) -> None:
    """Writes `delta` as a PEFT directory that stock PEFT and vLLM load. Raises StorageError.

    lora_alpha is scaling · rank, so PEFT's α/r gives the scaling back; modules that differ get patterns.
    """
    ranks = {name: factors.lora_A.shape[0] for name, factors in delta.items()}
    alphas = {name: factors.scaling * ranks[name] for name, factors in delta.items()}
    r, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "bias": "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != r},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        **targets,
    }
    tensors = {}
    for name, factors in delta.items():
        tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"] = factors.lora_A
        tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = factors.lora_B
    write_json(path / CONFIG_FILE, config)
    write_tensors(path / WEIGHTS_FILE, tensors, {"format": "pt"})


def adapter_delta(adapter: Adapter) -> Delta:
    """The adapter's own weight delta, s B0 A0."""
    return {
        module.name: Factors(adapter.tensors[module.key_a], adapter.tensors[module.key_b], module.scaling)
        for module in adapter.space.modules
    }


def _read_files(path: Path) -> tuple[dict[str, object], dict[str, Tensor]]:
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (path / name).is_file():
            raise AdapterError(f"{path} has no {name}; give the directory of a PEFT LoRA adapter in safetensors form")
    try:
        config = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"{CONFIG_FILE} holds no JSON object")
        data = (path / WEIGHTS_FILE).read_bytes()  # a file that is mapped and overwritten meanwhile ends the process
        return config, load(data)
    except (ValueError, SafetensorError) as error:
        raise AdapterError(
            f"{path} cannot be read: {error}; the adapter is truncated or edited, copy it again"
        ) from error


def _require_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """One NaN that an engine computes with may stay in its caches, and so in other requests' answers."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{path}: {name} has a number that is not finite; make it again")


def _refuse_unsupported(config: Mapping[str, object], path: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{path} is a {config.get('peft_type')} adapter; only LORA adapters are supported")
    if config.get("bias", "none") != "none":
        raise AdapterError(f"{path} trains biases (bias={config['bias']!r}); only bias='none' is supported")
    if str(config.get("init_lora_weights", True)).lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise AdapterError(
            f"{path} was made with init_lora_weights={config['init_lora_weights']!r}, which changes the base weights; "
            "convert it to a plain LoRA on the original base first"
        )
    for key, reason in _REFUSED.items():
        if config.get(key):
            raise AdapterError(f"{path} uses {key}={config[key]!r}: {reason}; train a plain LoRA adapter instead")


def _pair_matrices(tensors: Mapping[str, Tensor], path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Module name -> (A, B) in float32. Raises AdapterError for keys other than lora_A / lora_B weights."""
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(rf"{re.escape(PEFT_PREFIX)}(.+)\.lora_(A|B)\.weight", key)
        if not match or tensor.ndim != 2:
            raise AdapterError(
                f"{path} holds {key} of shape {tuple(tensor.shape)}, which is no lora_A or lora_B of a linear; "
                "DoRA, embeddings, biases and convolutions are not supported"
            )
        halves.setdefault(match[1], {})[match[2]] = tensor.float()
    for name, pair in halves.items():
        if pair.keys() != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
            raise AdapterError(f"{path}: module {name} lacks a matching lora_A and lora_B; the file is incomplete")
    return {name: (pair["A"], pair["B"]) for name, pair in halves.items()}


def _scaling(config: Mapping[str, object], name: str, rank: int) -> float:
    """α/r, or α/√r for rsLoRA, with PEFT's own matching of alpha_pattern (a regular expression on the path's end)."""
    patterns: Mapping[str, float] = config.get("alpha_pattern") or {}  # type: ignore[assignment]
    pattern = next((p for p in patterns if re.match(rf"(.*\.)?({p})$", name)), None)
    alpha = float(patterns[pattern] if pattern is not None else config.get("lora_alpha", rank))  # type: ignore[arg-type]
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)
