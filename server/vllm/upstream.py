"""Every name that we take from vLLM, in one place; `tests/vllm/test_contract.py` checks what we assume of each.

Written for and tested with 0.32. Only modules that run inside vLLM import this one.
"""

from __future__ import annotations

import vllm.envs as envs
import vllm.v1.core.block_pool as block_pool
import vllm.v1.core.kv_cache_utils as kv_cache_utils
import vllm.v1.engine.utils as engine_utils
import vllm.v1.worker.lora_model_runner_mixin as lora_runner
from vllm.config import ModelConfig, VllmConfig
from vllm.config.compilation import CompilationMode
from vllm.config.lora import MaxLoRARanks
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.forward_context import get_forward_context
from vllm.lora.layers import LoRAMapping
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights, PackedLoRALayerWeights
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.sampling_params import SamplingParams
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.worker.gpu_input_batch import InputBatch

__all__ = [
    "BaseModelPath",
    "CompilationMode",
    "DefaultModelLoader",
    "EngineArgs",
    "InputBatch",
    "LRUCacheLoRAModelManager",
    "LRUCacheWorkerLoRAManager",
    "LoRALayerWeights",
    "LoRAMapping",
    "LoRAModel",
    "LoRARequest",
    "MaxLoRARanks",
    "ModelConfig",
    "PPMissingLayer",
    "PackedLoRALayerWeights",
    "PrometheusStatLogger",
    "SamplingParams",
    "VllmConfig",
    "block_pool",
    "engine_utils",
    "envs",
    "get_forward_context",
    "kv_cache_utils",
    "lora_runner",
    "register_model_loader",
]
