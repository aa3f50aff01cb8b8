"""In every worker: LoRA request -> mix -> weights, composed from the resident atoms. No request has anything written or read.

Two managers stand in for vLLM's own. `DenseManager` composes factors into vLLM's slots and leaves the rest, slicing for
tensor parallelism included, to vLLM. `HookManager` has slots and a batched layer of its own, for CPUs: vLLM's LoRA kernels
there are slow, and give an unsteered row in a steered batch another row's adapter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from atoms.adapter import AtomBank, Delta
from atoms.errors import AdapterError, EngineError
from atoms.mix import Mix
from atoms.package import Package
from server.vllm.compiled import hook
from server.vllm.identity import decode_path, digest_of_name, is_mix
from server.vllm.modules import refuse_modules, require_modules
from server.vllm.residents import Resident, Residents
from server.vllm.slots import FusedPart, MixSlots, SlotBank, SlottedLinear
from server.vllm.upstream import (
    LoRALayerWeights,
    LoRAMapping,
    LoRAModel,
    LoRARequest,
    LRUCacheLoRAModelManager,
    LRUCacheWorkerLoRAManager,
    PackedLoRALayerWeights,
    PPMissingLayer,
    VllmConfig,
)


class MixAdapter(LoRAModel):
    """What a worker keeps of a mix: its id, digest, coefficients and version. Weights are composed when it gets a slot."""

    def __init__(self, number: int, rank: int, mix: Mix, digest: str, version: Resident[Any]) -> None:
        super().__init__(number, rank, {})
        self.mix = mix
        self.digest = digest
        self.version = version


def worker_manager(package: Package) -> type[LRUCacheWorkerLoRAManager]:
    """The class that vLLM's model runner is to make its LoRA manager of."""

    class SteeringWorkerManager(LRUCacheWorkerLoRAManager):
        """Takes mixes of `package` and of what comes in its place, and nothing else."""

        versions: Residents[Any]

        def create_lora_manager(self, model: nn.Module, vllm_config: VllmConfig) -> Any:
            build = HookManager if self.device.type == "cpu" else DenseManager
            manager = build(
                package,
                model=model,
                max_num_seqs=self.max_num_seqs,
                max_num_batched_tokens=self.max_num_batched_tokens,
                vocab_size=self.vocab_size,
                lora_config=self.lora_config,
                device=self.device,
                vllm_config=vllm_config,
            )
            self._adapter_manager = manager
            self.versions = Residents(package.path, manager.stack)
            self.versions.add(package)
            return manager.model

        def keep_versions(self, content_hashes: Collection[str]) -> None:
            """Lets go of all other versions and their mixes. No request may use one of them any more."""
            for version in self.versions.keep(content_hashes):
                self._adapter_manager.forget(version)

        def _apply_adapters(self, lora_requests: set[LoRARequest]) -> None:
            """Called in each step with the mixes of its batch. Those that are in slots are marked as in use before others
            come, which may then take none of theirs."""
            for lora_request in lora_requests:
                self._check_identity(lora_request)
            new = {
                lora_request
                for lora_request in lora_requests
                if not self._adapter_manager.use(lora_request.lora_int_id)
            }
            super()._apply_adapters(new)

        def add_adapter(self, lora_request: LoRARequest) -> bool:
            self._check_identity(lora_request)
            return super().add_adapter(lora_request)

        def _check_identity(self, lora_request: LoRARequest) -> None:
            resident = self._adapter_manager.get_adapter(lora_request.lora_int_id)
            if isinstance(resident, MixAdapter) and resident.digest != digest_of_name(lora_request.lora_name):
                raise EngineError(
                    f"id {lora_request.lora_int_id} belongs to mix {resident.digest} and came with "
                    f"{lora_request.lora_name}; two API processes share a range of ids"
                )

        def _load_adapter(self, lora_request: LoRARequest) -> LoRAModel:
            if not is_mix(lora_request.lora_path):
                raise EngineError(f"adapter {lora_request.lora_name!r} is no mix: this server steers with package "
                                  f"{package.manifest.name!r} and takes no other LoRA adapters")  # fmt: skip
            mix = decode_path(lora_request.lora_path)
            version = self.versions.find(mix, lora_request.lora_name)
            if version is None:
                raise EngineError(
                    f"mix {lora_request.lora_name} is of no version of package {package.manifest.name!r} that this worker "
                    "has; the API server has another one: restart both"
                )
            digest = digest_of_name(lora_request.lora_name)
            return MixAdapter(lora_request.lora_int_id, self.lora_config.max_lora_rank, mix, digest, version)

    return SteeringWorkerManager


class SteeringWorker:
    """What an API server calls in every worker to change the package's version: see `server.vllm.residents`. vLLM makes
    it a base of its worker class, by its name."""

    model_runner: Any

    def atomsteer_prepare(self, content_hash: str) -> None:
        self.model_runner.lora_manager.versions.prepare(content_hash)

    def atomsteer_prepared(self, content_hash: str) -> str | None:
        prepared: str | None = self.model_runner.lora_manager.versions.prepared(content_hash)
        return prepared

    def atomsteer_keep(self, content_hashes: list[str]) -> None:
        self.model_runner.lora_manager.keep_versions(content_hashes)


class _MixManager(LRUCacheLoRAModelManager, ABC):
    """What both managers share. All versions have the base adapter and the composition of `package`, the first one."""

    def __init__(self, package: Package, *, model: nn.Module, vllm_config: VllmConfig, **options: Any) -> None:
        self._base, self._composition = package.base_adapter, package.composition
        self._renames = getattr(model, "hf_to_vllm_mapper", None)
        self._layers = vllm_config.compilation_config.static_forward_context
        super().__init__(model=model, vllm_config=vllm_config, **options)

    def _add_adapter(self, lora: LoRAModel) -> None:
        if isinstance(lora, MixAdapter):
            self._registered_adapters[lora.id] = lora
        else:
            super()._add_adapter(lora)

    def use(self, lora_id: int) -> bool:
        """Whether `lora_id` is in a slot; it will then be among the last to lose it."""
        if lora_id not in self._active_adapters:
            return False
        self._registered_adapters.touch(lora_id)
        self._active_adapters.touch(lora_id)
        return True

    @abstractmethod
    def stack(self, bank: AtomBank) -> Any:
        """The atoms of a version in the form that mixes are composed from here. Any thread may call it."""

    def forget(self, version: Resident[Any]) -> None:
        """Drops the mixes of `version`, in slots and out of them."""
        for number, adapter in self.list_adapters().items():
            if isinstance(adapter, MixAdapter) and adapter.version is version:
                self.remove_adapter(number)

    def _module_names(self) -> dict[str, str]:
        """vLLM's name -> the package's, of every adapted linear. Raises AdapterError for one that cannot be steered."""
        names = {}
        refuse_modules((module.name for module in self._base.space.modules), self.model)
        for module in self._base.space.modules:
            renamed = self._renames.get_rename_mapper().map_name(module.name) if self._renames else module.name
            names[renamed or module.name] = module.name
        return names

    def _parts_of(self, name: str) -> list[str]:
        """The adapter-visible linears that vLLM's module `name` computes, in the order of its output."""
        prefix, _, last = name.rpartition(".")
        parts = self.packed_modules_mapping.get(last, [last])
        return [f"{prefix}.{part}" if prefix else part for part in parts]


class DenseManager(_MixManager):
    """Composes a mix's factors on the worker's device into vLLM's own slots."""

    def _create_lora_modules(self) -> None:
        super()._create_lora_modules()
        self._names = self._module_names()
        self._device_base = replace(self._base, tensors=self._moved(self._base.tensors))
        self._delta: Delta = {}
        found = {self._names[part] for name in self.modules for part in self._parts_of(name) if part in self._names}
        require_modules(self._names, found, self.model, PPMissingLayer)

    def stack(self, bank: AtomBank) -> AtomBank:
        return replace(bank, base=self._device_base, a=self._moved(bank.a), b=self._moved(bank.b))

    def _moved(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: tensor.to(self.device) for key, tensor in tensors.items()}

    def activate_adapter(self, lora_id: int) -> bool:
        adapter = self._registered_adapters[lora_id]
        if not isinstance(adapter, MixAdapter) or lora_id in self._active_adapters:
            return super().activate_adapter(lora_id)
        self._delta = adapter.version.atoms.compose(adapter.mix, self._composition) or {}
        try:
            return super().activate_adapter(lora_id)
        finally:
            self._delta = {}

    def _get_lora_layer_weights(self, lora_model: LoRAModel, module_name: str) -> LoRALayerWeights | None:
        if not isinstance(lora_model, MixAdapter):
            return super()._get_lora_layer_weights(lora_model, module_name)
        parts = [self._factors(part) for part in self._parts_of(module_name)]
        if not any(parts):
            return None
        if len(parts) == 1:
            return parts[0]
        return PackedLoRALayerWeights.pack(parts)

    def _factors(self, name: str) -> LoRALayerWeights | None:
        """A and s·B of one linear in the dtype of the slots, None where the package does not adapt it."""
        factors = self._delta.get(self._names.get(name, ""))
        if factors is None:
            return None
        dtype, rank = self.lora_config.lora_dtype, factors.lora_A.shape[0]
        b = (factors.lora_B * factors.scaling).to(dtype)
        return LoRALayerWeights(name, rank, rank, factors.lora_A.to(dtype), b, scaling=1)


class HookManager(_MixManager):
    """Hooks on vLLM's linears that add the steering of every row; see `server.vllm.slots`."""

    def _create_lora_modules(self) -> None:
        names = self._module_names()
        by_name = {module.name: module for module in self._base.space.modules}
        self._slots = MixSlots(self.lora_slots)
        self._linears: list[_SteeredLinear] = []
        self._mapped = False
        found: set[str] = set()
        for name, module in self.model.named_modules():
            fused = self._parts_of(name)
            parts = [
                FusedPart(by_name[names[part]], columns)
                for part, columns in zip(fused, _output_columns(module, len(fused)), strict=False)
                if part in names
            ]
            if parts:
                _check_sizes(name, module, parts)
                found |= {part.module.name for part in parts}
                linear = SlottedLinear(self._base, parts, self._composition, module.params_dtype, self.lora_slots)
                self._slots.linears.append(linear)
                self._linears.append(_SteeredLinear(linear, self._slots))
                module.register_forward_hook(hook(self._linears[-1], name, self._layers))
        require_modules(names, found, self.model, PPMissingLayer)

    def stack(self, bank: AtomBank) -> SlotBank:
        return self._slots.stack(bank)

    def forget(self, version: Resident[Any]) -> None:
        super().forget(version)
        self._slots.forget(version.atoms)

    def _add_adapter(self, lora: LoRAModel) -> None:
        self._registered_adapters[lora.id] = lora  # of vLLM's own, for warm-up, too: they have no weights

    def create_dummy_lora(self, lora_id: int, rank: int, embedding_modules: dict[str, str] | None = None) -> LoRAModel:
        return LoRAModel(lora_id, rank, {})

    def activate_adapter(self, lora_id: int) -> bool:
        activated = super().activate_adapter(lora_id)
        if activated:
            adapter, slot = self._registered_adapters[lora_id], self.lora_index_to_id.index(lora_id)
            if isinstance(adapter, MixAdapter):
                self._slots.set(slot, adapter.mix, adapter.version.atoms)
            else:
                self._slots.clear(slot)
        return activated

    def _set_adapter_mapping(self, mapping: LoRAMapping) -> None:
        slots = {lora_id: slot for slot, lora_id in enumerate(self.lora_index_to_id) if lora_id is not None}
        self._mapped = True
        self._slots.select([slots[lora_id] if lora_id > 0 else -1 for lora_id in mapping.index_mapping])

    def remove_all_adapters(self) -> None:
        """vLLM calls this after each pass that warms the model up, when the steering must have been reached."""
        if self._mapped and not all(linear.reached for linear in self._linears):
            raise EngineError("the model ran and left linears unsteered: its compiled graph is not ours; remove vLLM's compile "
                              "cache, or give --enforce-eager")  # fmt: skip
        super().remove_all_adapters()
        self._slots.rows = None


class _SteeredLinear:
    """One linear's steering by the rows that are selected. `reached` says whether the model has ever run it."""

    def __init__(self, linear: SlottedLinear, slots: MixSlots) -> None:
        self._linear, self._slots = linear, slots
        self.reached = False

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """See `server.vllm.compiled.SteeredLinear`."""
        self.reached = True
        if self._slots.rows is not None:
            self._linear.add(x.flatten(0, -2), y.view(-1, y.shape[-1]), self._slots.rows)


def _output_columns(module: Any, parts: int) -> Iterator[slice]:
    """The columns of each of the `parts` linears that `module` fuses; nothing for what is no linear of vLLM. What it
    fuses of its own accord (q, k and v of a checkpoint that has them as one) is one linear."""
    if not hasattr(module, "output_size") or not hasattr(module, "input_size"):
        return
    start = 0
    for size in module.output_sizes if parts > 1 else [module.output_size]:
        yield slice(start, start + size)
        start += size


def _check_sizes(name: str, module: Any, parts: list[FusedPart]) -> None:
    if getattr(module, "tp_size", 1) > 1:
        raise AdapterError("steering on CPUs does not split linears over processes; start vLLM with "
                           "--tensor-parallel-size 1 and add replicas")  # fmt: skip
    for part in parts:
        if (part.module.d_in, part.module.d_out) != (module.input_size, part.columns.stop - part.columns.start):
            raise AdapterError(f"{name} has other sizes than {part.module.name} of the package")
