"""Both managers on vLLM's own fused linears, without an engine: every row's output against the composed weight delta.

The dense one is what GPUs run. vLLM's CPU kernels stand in for its GPU kernels here; they are right as long as no row of
a batch is unsteered, so those are looked at with the hook manager alone.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn

from atoms.errors import AdapterError, EngineError
from atoms.mix import Mix
from atoms.package import Package
from atoms.space import LoRASpace
from server.vllm.identity import encode_path

pytestmark = pytest.mark.filterwarnings("ignore")
HIDDEN, HEADS, KV_HEADS = 32, 4, 2  # of the tiny model


@pytest.fixture(scope="module")
def vllm_config() -> Iterator[object]:
    """A process group of one, and the configuration that vLLM's layers ask for."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import destroy_distributed_environment, destroy_model_parallel
    from vllm.distributed.parallel_state import ensure_model_parallel_initialized, init_distributed_environment

    config = VllmConfig()
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, "tcp://127.0.0.1:0", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        yield config
        destroy_model_parallel()
        destroy_distributed_environment()


@pytest.fixture
def model(vllm_config) -> nn.Module:
    """Two layers with vLLM's fused q, k and v, named as in its Llama."""
    from vllm.model_executor.layers.linear import QKVParallelLinear

    def attention(layer: int) -> nn.Module:
        block = nn.Module()
        block.self_attn = nn.Module()
        prefix = f"model.layers.{layer}.self_attn.qkv_proj"
        block.self_attn.qkv_proj = QKVParallelLinear(
            HIDDEN, HIDDEN // HEADS, HEADS, KV_HEADS, bias=False, prefix=prefix
        )
        nn.init.normal_(block.self_attn.qkv_proj.weight)
        block.self_attn.qkv_proj.quant_method.process_weights_after_loading(block.self_attn.qkv_proj)
        return block

    model = nn.Module()
    model.model = nn.Module()
    model.model.layers = nn.ModuleList(attention(layer) for layer in range(2))
    model.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    model.config = types.SimpleNamespace()
    return model


@pytest.fixture
def build(vllm_config, model: nn.Module, tiny_package: Package) -> Callable:
    def make(kind: type, package: Package = tiny_package):
        from vllm.config.lora import LoRAConfig

        lora = LoRAConfig(max_lora_rank=8, max_loras=4, lora_dtype=torch.float32, target_modules=["q_proj", "v_proj"])
        return kind(package, model=model, vllm_config=vllm_config, max_num_seqs=8, max_num_batched_tokens=64,
                    vocab_size=400, lora_config=lora, device=torch.device("cpu"))  # fmt: skip

    return make


@pytest.fixture
def mixes(tiny_package: Package) -> list[Mix]:
    ids = [card.id for card in tiny_package.manifest.atoms]
    return [Mix.of({ids[0]: 1.5}), Mix.of({ids[0]: -2.0, ids[1]: 0.5}), Mix.of({ids[-1]: 3.0})]


def activate(manager, package: Package, mixes: list[Mix]) -> list[int]:
    from server.vllm.residents import Resident
    from server.vllm.worker import MixAdapter

    numbers, version = [], Resident.of(package, manager.stack)
    for place, mix in enumerate(mixes):
        adapter = MixAdapter(100 + place, 8, mix, package.digest(mix), version)
        manager.add_adapter(adapter)
        manager.activate_adapter(adapter.id)
        numbers.append(adapter.id)
    return numbers


def forward(manager, model: nn.Module, layer: int, x: torch.Tensor, numbers: list[int]) -> torch.Tensor:
    from vllm.lora.layers import LoRAMapping

    manager.set_adapter_mapping(LoRAMapping(tuple(numbers), tuple(numbers), is_prefill=True))
    output = model.model.layers[layer].self_attn.qkv_proj(x)
    return output[0] if isinstance(output, tuple) else output


def expected(
    package: Package, plain: torch.Tensor, layer: int, x: torch.Tensor, mixes: list[Mix | None]
) -> torch.Tensor:
    columns = {"q_proj": slice(0, HIDDEN), "v_proj": slice(HIDDEN * 3 // 2, HIDDEN * 2)}
    result = plain.clone()
    for row, mix in enumerate(mixes):
        delta = package.bank.compose(mix, package.composition) or {} if mix else {}
        for name, factors in delta.items():
            if f"layers.{layer}." in name:
                result[row, columns[name.rpartition(".")[2]]] += factors.scaling * (
                    factors.lora_B @ (factors.lora_A @ x[row])
                )
    return result


@pytest.mark.parametrize("kind", ["DenseManager", "HookManager"])
def test_every_row_gets_its_own_mix(build, model, tiny_package, mixes, kind: str) -> None:
    from server.vllm import worker

    x = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(1))
    plain = [model.model.layers[layer].self_attn.qkv_proj(x)[0].clone() for layer in range(2)]
    manager = build(getattr(worker, kind))
    numbers = activate(manager, tiny_package, mixes)
    for layer in range(2):
        got = forward(manager, model, layer, x, [numbers[2], numbers[0], numbers[1]])
        want = expected(tiny_package, plain[layer], layer, x, [mixes[2], mixes[0], mixes[1]])
        assert not torch.allclose(want, plain[layer], atol=1e-3)
        assert torch.allclose(got, want, atol=1e-4)


def test_unsteered_rows_of_a_steered_batch_stay_bit_equal(build, model, tiny_package, mixes) -> None:
    from server.vllm.worker import HookManager

    x = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(2))
    plain = model.model.layers[0].self_attn.qkv_proj(x)[0].clone()
    manager = build(HookManager)
    numbers = activate(manager, tiny_package, mixes)
    got = forward(manager, model, 0, x, [0, numbers[1], 0, numbers[0]])
    assert torch.equal(got[[0, 2]], plain[[0, 2]])
    assert torch.allclose(got, expected(tiny_package, plain, 0, x, [None, mixes[1], None, mixes[0]]), atol=1e-4)
    assert torch.equal(forward(manager, model, 0, x, [0, 0, 0, 0]), plain)


@pytest.mark.parametrize("kind", ["DenseManager", "HookManager"])
def test_a_slot_that_is_taken_over_has_nothing_of_the_mix_before(build, model, tiny_package, mixes, kind: str) -> None:
    from server.vllm import worker

    x = torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(3))
    plain = model.model.layers[1].self_attn.qkv_proj(x)[0].clone()
    manager = build(getattr(worker, kind))
    numbers = activate(
        manager, tiny_package, [mixes[0], mixes[1], mixes[0], mixes[1], mixes[2]]
    )  # the fifth of four slots
    got = forward(manager, model, 1, x, [numbers[4]])
    assert torch.allclose(got, expected(tiny_package, plain, 1, x, [mixes[2]]), atol=1e-4)


@pytest.mark.parametrize("kind", ["DenseManager", "HookManager"])
def test_mixes_of_two_versions_in_one_batch(
    build, model, tiny_package, mixes, kind: str, another_version, tmp_path
) -> None:
    """The same coefficients; then the first version is let go of, and a mix of the second takes its slot."""
    from server.vllm import worker
    from server.vllm.residents import Resident

    second = another_version(tiny_package, tmp_path / "second", "2")
    x = torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(4))
    plain = model.model.layers[0].self_attn.qkv_proj(x)[0].clone()
    manager = build(getattr(worker, kind))
    versions = [Resident.of(package, manager.stack) for package in (tiny_package, second)]
    for number, (version, mix) in enumerate(
        zip((versions[0], versions[1], versions[1]), (mixes[1], mixes[1], mixes[0]), strict=True)
    ):
        manager.add_adapter(worker.MixAdapter(100 + number, 8, mix, version.package.digest(mix), version))
    for number in (100, 101):
        manager.activate_adapter(number)
    got = forward(manager, model, 0, x, [100, 101])
    want = [expected(package, plain, 0, x, [mixes[1]] * 2) for package in (tiny_package, second)]
    assert torch.allclose(got[0], want[0][0], atol=1e-4) and torch.allclose(got[1], want[1][1], atol=1e-4)
    assert not torch.allclose(want[0], want[1], atol=1e-2)
    manager.forget(versions[0])
    assert set(manager.list_adapters()) == {101, 102}
    manager.activate_adapter(102)
    got = forward(manager, model, 0, x, [102, 101])
    assert torch.allclose(got[0], expected(second, plain, 0, x, [mixes[0]] * 2)[0], atol=1e-4)
    assert torch.allclose(got[1], want[1][1], atol=1e-4)


def test_a_model_without_the_packages_modules_is_refused(build, model) -> None:
    from server.vllm.worker import HookManager

    model.model.layers = model.model.layers[:1]
    with pytest.raises(AdapterError, match=r"no linear for model\.layers\.1"):
        build(HookManager)


@pytest.mark.parametrize("kind", ["DenseManager", "HookManager"])
def test_a_package_of_linears_that_vllm_does_not_call_is_refused(build, tiny_package, kind: str) -> None:
    from server.vllm import worker

    modules = [
        replace(one, name=one.name.replace("v_proj", "kv_b_proj")) for one in tiny_package.base_adapter.space.modules
    ]
    base = replace(tiny_package.base_adapter, space=LoRASpace.of(modules))
    package = types.SimpleNamespace(base_adapter=base, composition=tiny_package.composition)
    with pytest.raises(AdapterError, match="kv_b_proj is absorbed"):
        build(getattr(worker, kind), package)


@pytest.fixture
def worker_with(build, tiny_package: Package) -> Callable:
    """A worker manager around a model manager, without vLLM's own set-up."""

    def make():
        from server.vllm.residents import Residents
        from server.vllm.worker import HookManager, worker_manager

        kind = worker_manager(tiny_package)
        made = kind.__new__(kind)
        made._adapter_manager = build(HookManager)
        made.lora_config = made._adapter_manager.lora_config
        made.versions = Residents(tiny_package.path, made._adapter_manager.stack)
        made.versions.add(tiny_package)
        return made

    return make


def request(name: str, number: int, path: str):
    from server.vllm.upstream import LoRARequest

    return LoRARequest(lora_name=name, lora_int_id=number, lora_path=path)


def test_a_worker_takes_mixes_and_checks_who_they_are(worker_with, tiny_package, mixes) -> None:
    worker = worker_with()
    digest = tiny_package.digest(mixes[0])
    assert worker.add_adapter(request(digest, 200, encode_path(mixes[0])))
    assert worker.add_adapter(request(f"{digest}@1", 200, encode_path(mixes[0]))), "the same mix of another process"
    other = tiny_package.digest(mixes[1])
    with pytest.raises(EngineError, match="belongs to mix"):
        worker.add_adapter(request(other, 200, encode_path(mixes[1])))
    with pytest.raises(EngineError, match="no version"):
        worker.add_adapter(request("m-0000000000000000", 201, encode_path(mixes[1])))
    with pytest.raises(EngineError, match="is no mix"):
        worker.add_adapter(request("theirs", 202, "some/directory"))


def test_a_batch_keeps_its_slots_when_more_mixes_come(worker_with, tiny_package, mixes) -> None:
    """Four slots, all taken; then a batch of three of those mixes and a new one, in whatever order a set has."""
    ids = [card.id for card in tiny_package.manifest.atoms]
    many = [*mixes, *(Mix.of({ids[0]: 0.25 * step}) for step in range(1, 8))]
    asked = [request(tiny_package.digest(mix), 300 + place, encode_path(mix)) for place, mix in enumerate(many)]
    worker = worker_with()
    worker._apply_adapters(set(asked[:4]))
    for new in asked[4:]:
        manager = worker._adapter_manager
        oldest, *kept = list(manager._active_adapters)
        slots = {number: manager.lora_index_to_id.index(number) for number in kept}
        worker._apply_adapters({one for one in asked if one.lora_int_id in kept} | {new})
        assert oldest not in manager._active_adapters
        assert {number: manager.lora_index_to_id.index(number) for number in kept} == slots


def test_an_id_in_a_slot_is_refused_for_another_mix(worker_with, tiny_package, mixes) -> None:
    worker = worker_with()
    worker._apply_adapters({request(tiny_package.digest(mixes[0]), 200, encode_path(mixes[0]))})
    with pytest.raises(EngineError, match="belongs to mix"):
        worker._apply_adapters({request(tiny_package.digest(mixes[1]), 200, encode_path(mixes[1]))})
