"""What we assume of vLLM's internals. A failure here names what a new version has changed, before anything steers wrongly."""

from __future__ import annotations

import inspect
import re

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def upstream():
    from server.vllm import upstream

    return upstream


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_the_version_is_one_that_this_was_written_for() -> None:
    import importlib.metadata

    assert importlib.metadata.version("vllm").startswith("0.32.")


def test_the_model_runner_makes_its_manager_of_the_name_that_we_replace(upstream) -> None:
    source = inspect.getsource(upstream.lora_runner.LoRAModelRunnerMixin.load_lora_model)
    assert "self.lora_manager = LRUCacheWorkerLoRAManager(" in source
    assert "LoRAModelRunnerMixin" in inspect.getsource(__import__("vllm.v1.worker.gpu_model_runner", fromlist=["x"]))


def test_the_worker_manager_has_the_methods_that_we_override(upstream) -> None:
    manager = upstream.LRUCacheWorkerLoRAManager
    assert parameters(manager.create_lora_manager) == ["self", "model", "vllm_config"]
    assert parameters(manager.add_adapter) == ["self", "lora_request"]
    assert parameters(manager._load_adapter) == ["self", "lora_request"]
    source = inspect.getsource(manager)
    for attribute in (
        "self.max_num_seqs",
        "self.max_num_batched_tokens",
        "self.vocab_size",
        "self.lora_config",
        "self.device",
    ):
        assert attribute in source or attribute in inspect.getsource(manager.__mro__[1])
    assert "self._adapter_manager.add_adapter(lora)" in source
    assert "self._adapter_manager.activate_adapter(" in source


def test_the_model_manager_has_the_methods_that_we_override(upstream) -> None:
    manager = upstream.LRUCacheLoRAModelManager
    base = manager.__mro__[1]
    assert parameters(base.__init__) == ["self", "model", "max_num_seqs", "max_num_batched_tokens", "vocab_size",
                                         "lora_config", "device", "vllm_config"]  # fmt: skip
    assert parameters(base._create_lora_modules) == ["self"]
    assert parameters(base._add_adapter) == ["self", "lora"]
    assert parameters(base._get_lora_layer_weights) == ["self", "lora_model", "module_name"]
    assert parameters(base._set_adapter_mapping) == ["self", "mapping"]
    assert parameters(base.create_dummy_lora) == ["self", "lora_id", "rank", "embedding_modules"]
    assert parameters(manager.activate_adapter) == ["self", "lora_id"]
    assert parameters(base.remove_all_adapters) == ["self"]
    assert parameters(base.get_adapter) == ["self", "adapter_id"]
    assert parameters(base.remove_adapter) == ["self", "adapter_id"]
    assert "self.deactivate_adapter(adapter_id)" in inspect.getsource(base.remove_adapter)
    assert "self._last_slot_layout != slot_layout" in inspect.getsource(base.set_adapter_mapping), (
        "a mix that was dropped and comes back in another slot would go on with the old slot's rows"
    )


def test_the_model_manager_keeps_its_state_where_we_look(upstream) -> None:
    source = inspect.getsource(upstream.LRUCacheLoRAModelManager.__mro__[1])
    for name in ("_registered_adapters", "_active_adapters", "lora_index_to_id", "packed_modules_mapping", "modules"):
        assert f"self.{name}" in source
    assert "self._create_lora_modules()" in inspect.getsource(upstream.LRUCacheLoRAModelManager.__mro__[1].__init__)
    assert "module.set_lora(" in source and "module_lora.lora_a" in source


def test_fused_linears_say_what_they_fuse() -> None:
    from vllm.model_executor.layers.linear import LinearBase, MergedColumnParallelLinear, QKVParallelLinear
    from vllm.model_executor.models.utils import WeightsMapper

    assert {"input_size", "output_size"} <= set(parameters(LinearBase))
    for fused in (MergedColumnParallelLinear, QKVParallelLinear):
        assert "self.output_sizes = " in inspect.getsource(fused.__init__)
    renames = WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."}).get_rename_mapper()
    assert renames.map_name("model.layers.0.q_proj") == "language_model.model.layers.0.q_proj"


def test_linears_that_are_refused_are_there_by_the_names_that_we_look_for() -> None:
    from vllm.model_executor.layers.attention.mla_attention import MLAAttention
    from vllm.model_executor.models.llama4 import Llama4ForCausalLM

    assert {"name", "loaded_weight"} <= set(parameters(Llama4ForCausalLM.permute_qk_weight_for_rotary))
    assert "split_kv_b_proj(\n            self.kv_b_proj" in inspect.getsource(MLAAttention), "is it called again?"


def test_layers_of_other_ranks_have_stand_ins(upstream) -> None:
    from vllm.model_executor.models.utils import make_layers

    source = inspect.getsource(make_layers)
    assert "[PPMissingLayer() for _ in range(start_layer)]" in source
    assert "[PPMissingLayer() for _ in range(end_layer, num_hidden_layers)]" in source
    assert upstream.PPMissingLayer.__name__ == "PPMissingLayer"


def test_a_mapping_has_an_id_for_each_token(upstream) -> None:
    assert {"index_mapping", "prompt_mapping"} <= set(parameters(upstream.LoRAMapping))


def test_lora_weights_are_built_as_we_build_them(upstream) -> None:
    import torch

    a, b = torch.ones(2, 3), torch.ones(4, 2)
    one = upstream.LoRALayerWeights("m", 2, 2, a, b, scaling=1)
    packed = upstream.PackedLoRALayerWeights.pack([one, None])
    assert torch.equal(packed.lora_b[0], b) and packed.lora_b[1] is None and len(packed.lora_a) == 2
    model = upstream.LoRAModel(7, 2, {})
    assert model.id == 7 and model.get_lora("m") is None


def test_requests_are_told_apart_by_name_and_cached_by_name_and_path(upstream) -> None:
    from types import SimpleNamespace

    from vllm.v1.core.kv_cache_utils import _gen_lora_extra_hash_keys

    request = upstream.LoRARequest(lora_name="m-1", lora_int_id=70_000, lora_path="mix:{}")
    assert _gen_lora_extra_hash_keys(SimpleNamespace(lora_request=request)) == [("lora", "m-1", "mix:{}")]
    assert request == upstream.LoRARequest(lora_name="m-1", lora_int_id=70_001, lora_path="x"), (
        "names need not differ between API processes any more: see MixIdentities"
    )


def test_blocks_are_hashed_and_tokens_mapped_by_what_we_wrap(upstream) -> None:
    from vllm.v1.request import Request

    hash_keys = inspect.unwrap(upstream.kv_cache_utils.generate_block_hash_extra_keys)
    assert parameters(hash_keys) == ["request", "start_token_idx", "end_token_idx", "start_mm_idx"]
    hasher = inspect.getsource(upstream.kv_cache_utils.get_request_block_hasher)
    assert (
        "generate_block_hash_extra_keys(\n" in hasher
        and "request, start_token_idx, end_token_idx, curr_mm_idx" in hasher
    )
    assert "self.num_prompt_tokens" in inspect.getsource(Request.__init__)
    batch = inspect.getsource(upstream.InputBatch)
    for name in ("request_lora_mapping", "lora_id_to_lora_request", "num_prompt_tokens", "num_computed_tokens_cpu"):
        assert f"self.{name}" in batch, name
    assert "input_batch.make_lora_inputs(num_scheduled_tokens, num_sampled_tokens)" in inspect.getsource(
        upstream.lora_runner.LoRAModelRunnerMixin.set_active_loras
    )
    assert isinstance(inspect.getattr_static(upstream.VllmConfig, "use_v2_model_runner"), property)


def test_engine_arguments_have_what_we_set(upstream) -> None:
    from typing import get_args

    fields = inspect.signature(upstream.EngineArgs).parameters
    for name in (
        "enable_lora",
        "max_loras",
        "max_lora_rank",
        "lora_target_modules",
        "load_format",
        "speculative_config",
        "enable_sleep_mode",
        "kv_transfer_config",
        "kv_offloading_size",
        "kv_offloading_backend",
    ):
        assert name in fields
    assert fields["max_loras"].default == 1, "a user's own number can no longer be told from the default"
    assert {16, 32, 64} <= set(get_args(upstream.MaxLoRARanks))


def test_offloaded_blocks_are_kept_by_the_hashes_that_hold_the_mix() -> None:
    """Of the connectors those behind --kv-offloading-size, which is allowed: what others keep by the tokens mixes would share."""
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading import scheduler
    from vllm.v1.simple_kv_offload import manager

    chosen = inspect.getsource(VllmConfig._post_init_kv_transfer_config)
    native = chosen[chosen.index('backend == "native"') : chosen.index('backend == "lmcache"')]
    assert set(re.findall(r'"(\w+Connector)"', native)) == {"OffloadingConnector", "SimpleCPUOffloadConnector"}
    assert "key = make_offload_key(req_block_hash" in inspect.getsource(scheduler)
    assert "request.block_hashes[" in inspect.getsource(manager)


def test_the_loader_streams_weights_through_the_method_that_we_wrap(upstream) -> None:
    assert parameters(upstream.DefaultModelLoader.get_all_weights) == ["self", "model_config", "model"]
    source = inspect.getsource(upstream.DefaultModelLoader.load_weights)
    assert "model.load_weights(self.get_all_weights(model_config, model))" in source


def test_the_growing_series_is_dropped_by_the_attribute_that_we_clear(upstream) -> None:
    source = inspect.getsource(upstream.PrometheusStatLogger)
    assert "self.gauge_lora_info: Gauge | None = None" in source and "if self.gauge_lora_info is not None" in source


def test_the_engine_client_has_the_methods_that_we_wrap() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    assert "lora_request" in parameters(AsyncLLM.generate)
    assert parameters(AsyncLLM.shutdown)[:2] == ["self", "timeout"]
    assert parameters(AsyncLLM.add_lora) == ["self", "lora_request"]
    assert isinstance(inspect.getattr_static(AsyncLLM, "errored"), property)


def test_every_worker_can_be_asked_to_change_the_version(upstream) -> None:
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.core_client import AsyncMPClient, DPLBAsyncMPClient
    from vllm.v1.worker import worker_base
    from vllm.v1.worker.cpu_worker import CPUWorker

    from server.vllm.plugin import _WORKER
    from server.vllm.worker import SteeringWorker

    assert f"{SteeringWorker.__module__}.{SteeringWorker.__qualname__}" == _WORKER
    assert "worker_extension_cls" in inspect.signature(upstream.EngineArgs).parameters
    assert "worker_class.__bases__ + (" in inspect.getsource(worker_base.WorkerWrapperBase.init_worker)
    for name in (name for name in dir(SteeringWorker) if not name.startswith("_")):
        assert name.startswith("atomsteer_") and not hasattr(CPUWorker, name)
    assert parameters(EngineCore.collective_rpc)[:4] == ["self", "method", "timeout", "args"]
    for client in (AsyncMPClient, DPLBAsyncMPClient):
        assert "for engine in self.core_engines" in inspect.getsource(client.call_utility_all_async)


def test_the_engine_learns_that_a_request_is_over_before_it_is_asked_for_more() -> None:
    """What the workers let go of after a version's last request, no step may need: all goes through one queue, in order."""
    from vllm.v1.engine import core, core_client
    from vllm.v1.engine.async_llm import AsyncLLM

    generate = inspect.getsource(AsyncLLM.generate)
    assert (
        "except (asyncio.CancelledError, GeneratorExit):" in generate
        and "await self.abort(q.request_id, internal=True)" in generate
    )
    for send in (core_client.AsyncMPClient._send_input, core_client.AsyncMPClient._call_utility_async):
        assert "self._send_input_message(" in inspect.getsource(send)
    handled = inspect.getsource(core.EngineCoreProc._handle_client_request)
    assert "EngineCoreRequestType.ABORT" in handled and "EngineCoreRequestType.UTILITY" in handled


def test_handlers_ask_the_models_for_names_and_the_engine_for_tokens(upstream) -> None:
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
    from vllm.entrypoints.serve.engine.serving import BaseServing

    for handler in (OpenAIServingChat, OpenAIServingCompletion, OpenAIServingResponses):
        source = inspect.getsource(handler)
        assert "self.engine_client.generate(" in source and "self.models.model_name(" in source, handler
    assert "self.models.is_base_model(" in inspect.getsource(BaseServing._is_model_supported)
    assert parameters(OpenAIServingModels.is_base_model) == ["self", "model_name"]
    assert "base_model_paths=base_model_paths" in inspect.getsource(OpenAIServingModels.__init__)
    assert set(parameters(upstream.BaseModelPath)) >= {"name", "model_path"}


def test_a_start_waits_for_its_engines_where_interrupts_are_dropped(upstream) -> None:
    waiting = inspect.getsource(upstream.engine_utils.launch_core_engines)
    assert "with zmq_socket_ctx(" in waiting and waiting.index("zmq_socket_ctx(") < waiting.index(
        "wait_for_engine_startup"
    )
    from vllm.entrypoints.launchers.api_server import entry
    from vllm.utils.network_utils import zmq_socket_ctx

    assert "except KeyboardInterrupt:\n        logger" in inspect.getsource(zmq_socket_ctx), "lifetime.py is not needed"
    assert "signal.signal(signal.SIGTERM, _interrupt_init)" in inspect.getsource(entry.run_server)


def test_a_dead_engine_is_shut_down_where_the_server_ends() -> None:
    from vllm.entrypoints.launchers.api_server import entry

    source = inspect.getsource(entry.build_async_engine_client_from_engine_args)
    assert "finally:\n        if async_llm:\n            async_llm.shutdown(" in source


def test_adapters_from_the_paths_of_requests_are_refused_at_the_start(monkeypatch) -> None:
    from atoms.errors import ConfigError
    from server.vllm.plugin import set_engine_arguments

    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "True")
    with pytest.raises(ConfigError, match="unset it"):
        set_engine_arguments(None, None)


def test_a_worker_extension_in_the_place_of_ours_is_refused_at_the_start() -> None:
    from types import SimpleNamespace

    from atoms.errors import ConfigError
    from server.vllm.plugin import set_engine_arguments

    given = SimpleNamespace(load_format="auto", speculative_config=None, worker_extension_cls="theirs.Worker")
    with pytest.raises(ConfigError, match=r"leave --worker-extension-cls out"):
        set_engine_arguments(given, None)


def test_our_endpoint_is_one_that_vllm_accepts() -> None:
    from importlib.metadata import entry_points

    from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

    (entry,) = [entry for entry in entry_points(group="vllm.endpoint_plugins") if entry.name == "atomsteer"]
    assert isinstance(entry.load()(), EndpointPlugin)
    assert "atomsteer" in {entry.name for entry in entry_points(group="vllm.general_plugins")}


def test_cors_lies_around_what_we_add() -> None:
    """So that refusals have its headers, and preflights need no key."""
    from vllm.entrypoints.launchers import app
    from vllm.entrypoints.serve.middleware import register

    made = inspect.getsource(app.build_app)
    assert made.index("attach_endpoint_plugins(app") < made.index("init_entrypoints_middleware(args, app")
    assert "CORSMiddleware,\n        allow_origins=args.allowed_origins" in inspect.getsource(register)


def test_every_option_that_we_give_is_one_that_vllm_knows(tmp_path) -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from server.config import ServeConfig
    from server.vllm.serve import vllm_options

    known = {
        option for action in make_arg_parser(FlexibleArgumentParser())._actions for option in action.option_strings
    }
    assert set(vllm_options(ServeConfig(package=tmp_path), "base", None)) <= known


def test_the_address_and_its_guards_are_options_that_we_look_at() -> None:
    """Whether to warn of a server that is open to others."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    assert {"host", "port", "uds", "api_key"} <= vars(parsed).keys()


def test_compilation_is_turned_off_for_lora_the_way_that_we_undo(upstream) -> None:
    from vllm.platforms.cpu import CpuPlatform

    source = inspect.getsource(CpuPlatform.check_and_update_config)
    on, off = source.index('"dce": True'), source.index("if vllm_config.lora_config is not None:")
    assert on < off and "compilation_config.mode = CompilationMode.NONE" in source[off : off + 120]
    assert "additional_config" in inspect.getsource(upstream.VllmConfig.compute_hash), "a graph is no longer kept by it"


def test_layers_are_found_by_name_while_the_model_runs() -> None:
    from vllm.forward_context import create_forward_context

    assert "no_compile_layers=vllm_config.compilation_config.static_forward_context" in inspect.getsource(
        create_forward_context
    )
