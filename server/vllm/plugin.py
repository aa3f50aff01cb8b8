"""READ FIRST: the entry point that vLLM calls in each of its processes before it loads a model.

    every process    ends when the process that started it has ended                 lifetime.py
                     the LoRA manager is ours, so that mixes become weights           worker.py
                     a mix may leave the prompt alone, which then serves all mixes   phase.py
                     load format "atomsteer" merges θ0 while weights are read         loader.py
    API server       engine arguments get what steering needs; settings are checked before anything is loaded
                     the routes and middleware come with the other entry point        host.py

Steering must not fail open: what is wrong raises here, and vLLM does not start. (vLLM logs a plugin that cannot be
imported and goes on without it, so this module imports nothing that could fail.)
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atoms.package import Package
    from server.config import ServeConfig

LOAD_FORMAT = "atomsteer"
_PLAIN_FORMATS = ("auto", "hf", "safetensors")
_WORKER = "server.vllm.worker.SteeringWorker"


def register() -> None:
    """Makes this process of vLLM steer with the package of the environment; does nothing where it names none.

    Raises AtomsteerError for settings that cannot work.
    """
    from server.vllm.settings import read_settings

    config = read_settings(os.environ)
    if config is None:
        return
    _require_endpoint(os.environ)
    _require_own_packages()
    from atoms.package import Package
    from server.vllm import phase, upstream
    from server.vllm.grammars import log_no_text
    from server.vllm.lifetime import follow_parent
    from server.vllm.worker import worker_manager

    follow_parent()
    package = Package.read(config.package)
    upstream.lora_runner.LRUCacheWorkerLoRAManager = worker_manager(package)
    phase.install()
    log_no_text()
    _register_loader(package)
    _wrap_engine_arguments(package, config)
    _drop_adapter_series()


def _require_endpoint(environment: Any) -> None:
    """vLLM loads routes of plugins only if they are named; without ours it would ignore `steering` and answer 200."""
    from atoms.errors import ConfigError
    from server.vllm.settings import PACKAGE_VARIABLE, PLUGIN_NAME, PLUGINS_VARIABLE

    if PLUGIN_NAME not in environment.get(PLUGINS_VARIABLE, "").split(","):
        raise ConfigError(
            f"{PACKAGE_VARIABLE} is set and {PLUGINS_VARIABLE} does not name {PLUGIN_NAME}, so requests could not be "
            f"steered; set {PLUGINS_VARIABLE}={PLUGIN_NAME}, or unset {PACKAGE_VARIABLE}"
        )


def _require_own_packages() -> None:
    """Our packages have common names: another distribution's must not have taken their place."""
    from importlib.util import find_spec
    from pathlib import Path

    from atoms.errors import ConfigError

    home = Path(__file__).parents[2]
    for name in ("atoms", "server", "offline", "clients"):
        spec = find_spec(name)
        if spec is None or spec.origin is None or Path(spec.origin).parents[1] != home:
            raise ConfigError(f"the package {name!r} comes from {spec.origin if spec else 'nowhere'} and not from atomsteer "
                              "(see its location on the path); give atomsteer an environment of its own")  # fmt: skip


def _register_loader(package: Package) -> None:
    from server.vllm import upstream
    from server.vllm.loader import checked, merge_stream

    class MergingLoader(upstream.DefaultModelLoader):
        """vLLM's loader of Hugging Face checkpoints, with the base checked and θ0 merged on the way."""

        def __init__(self, load_config: Any) -> None:
            load_config.load_format = "hf"
            super().__init__(load_config)

        def get_all_weights(self, model_config: Any, model: Any) -> Any:
            reference = package.manifest.base_model
            weights = checked(super().get_all_weights(model_config, model), _parameter_names(model_config.hf_config),
                              reference.weights, reference.id, _log().warning)  # fmt: skip
            return merge_stream(weights, package.base_adapter, model_config.dtype)

    upstream.register_model_loader(LOAD_FORMAT)(MergingLoader)


def _parameter_names(hf_config: Any) -> frozenset[str]:
    """The names that transformers gives the model's parameters: those that the package's fingerprint covers."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)
    return frozenset(name for name, _ in model.named_parameters())


def _wrap_engine_arguments(package: Package, config: ServeConfig) -> None:
    from server.vllm.upstream import EngineArgs

    create = EngineArgs.create_engine_config
    if getattr(create, "steers", False):
        return

    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        from server.vllm.compiled import compile_again
        from server.vllm.grammars import bound_work
        from server.vllm.lifetime import let_signals_end_a_start
        from server.vllm.scoring import LIKELIEST
        from server.vllm.settings import check

        check(package, config)
        let_signals_end_a_start()
        own_slots = self.max_loras > 1
        set_engine_arguments(self, package)
        bound_work(self, os.environ)
        if config.drift.share and self.max_logprobs != -1:  # clients are held to their own limit by the middleware
            self.max_logprobs = max(self.max_logprobs, LIKELIEST)
        engine_config = create(self, *args, **kwargs)
        if not own_slots:  # as many distinct mixes as sequences
            engine_config.lora_config.max_loras = engine_config.scheduler_config.max_num_seqs
            engine_config.lora_config.max_cpu_loras = engine_config.lora_config.max_loras
        compile_again(engine_config, [module.name for module in package.base_adapter.space.modules], os.environ)
        return engine_config

    create_engine_config.steers = True  # type: ignore[attr-defined]
    EngineArgs.create_engine_config = create_engine_config


def set_engine_arguments(arguments: Any, package: Package) -> None:
    """Sets what steering needs. Raises ConfigError for what cannot go with it."""
    from typing import get_args

    from atoms.errors import ConfigError
    from server.vllm.upstream import MaxLoRARanks, envs

    if envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING:
        raise ConfigError("VLLM_ALLOW_RUNTIME_LORA_UPDATING lets requests load adapters from paths, which cannot go with a "
                          "package; unset it")  # fmt: skip
    refuse_arguments(arguments)
    rank = 2 * max(module.rank for module in package.base_adapter.space.modules)
    ranks = [allowed for allowed in get_args(MaxLoRARanks) if allowed >= rank]
    if not ranks:
        raise ConfigError(
            f"a mix has rank {rank} and vLLM takes at most {max(get_args(MaxLoRARanks))}; train a smaller one"
        )
    arguments.load_format = LOAD_FORMAT
    arguments.worker_extension_cls = _WORKER
    arguments.enable_lora = True
    arguments.max_lora_rank = ranks[0]
    modules = package.base_adapter.space.modules
    arguments.lora_target_modules = sorted({module.name.rpartition(".")[2] for module in modules})


def refuse_arguments(arguments: Any) -> None:
    """Raises ConfigError for what a user may ask of vLLM and steering cannot go with."""
    from atoms.errors import ConfigError

    if arguments.load_format not in (*_PLAIN_FORMATS, LOAD_FORMAT):
        raise ConfigError(f"load format {arguments.load_format!r} cannot be steered: the base adapter is merged while "
                          f"a checkpoint is read; use one of {', '.join(_PLAIN_FORMATS)}")  # fmt: skip
    if arguments.speculative_config is not None:
        raise ConfigError(
            "speculative decoding and steering have not been tried together; leave --speculative-config out"
        )
    if arguments.worker_extension_cls not in ("", _WORKER):
        raise ConfigError(f"worker extension {arguments.worker_extension_cls!r} stands in the place of atomsteer's, of which "
                          "vLLM takes one; leave --worker-extension-cls out")  # fmt: skip
    if arguments.enable_sleep_mode:
        raise ConfigError("sleep mode throws the weights away at level 2, and the resident atoms with them; leave "
                          "--enable-sleep-mode out")  # fmt: skip
    if arguments.kv_transfer_config is not None:
        raise ConfigError("a KV connector may give a request what another mix or base adapter has computed: some keep it by "
                          "the tokens alone; leave --kv-transfer-config out, or give --kv-offloading-size")  # fmt: skip
    if arguments.kv_offloading_size is not None and arguments.kv_offloading_backend != "native":
        raise ConfigError(f"KV offloading backend {arguments.kv_offloading_backend!r} keeps what is computed by the tokens "
                          "alone, so that mixes would share it; give --kv-offloading-backend native")  # fmt: skip


def _drop_adapter_series() -> None:
    """vLLM's ``lora_requests_info`` grows by a series for every set of mixes in flight, without end."""
    from server.vllm.upstream import PrometheusStatLogger

    initialise = PrometheusStatLogger.__init__
    if getattr(initialise, "steers", False):
        return

    def without_adapters(self: Any, *args: Any, **kwargs: Any) -> None:
        initialise(self, *args, **kwargs)
        self.gauge_lora_info = None

    without_adapters.steers = True  # type: ignore[attr-defined]
    PrometheusStatLogger.__init__ = without_adapters


def _log() -> Any:
    import logging

    return logging.getLogger("atomsteer.vllm")
