"""LoRA on a base model for discovery, trainable or frozen, by PEFT. Loading base models is `atoms.model`'s."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from atoms.adapter import Adapter
from atoms.errors import AdapterError, ModelError
from atoms.space import LoRAModule, LoRASpace, natural_key
from offline.config import FinetuneConfig
from offline.gradients import lora_linear

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_OF_THE_HEAD = (
    "{} makes the logits, which discovery computes at the responses' tokens alone, and may share its weights with the input "
    "embedding; leave it out of the adapter's target modules"
)


def new_lora(model: PreTrainedModel, config: FinetuneConfig, seed: int) -> tuple[PeftModel, LoRASpace]:
    """`model` with a fresh trainable LoRA in float32 (A random from `seed`, B zero), and its space.

    Raises ModelError if no linear of the model matches a target module, or one of them is the output embedding.
    """
    from peft import LoraConfig, get_peft_model

    _refuse_missing_targets(model, config.target_modules)
    head = _head_name(model)
    if any(_is_target(head, target) for target in config.target_modules):
        raise ModelError(_OF_THE_HEAD.format(head))
    torch.manual_seed(seed)
    peft_model = get_peft_model(
        model,
        LoraConfig(r=config.rank, lora_alpha=config.alpha,  # type: ignore[arg-type]
                   target_modules=list(config.target_modules), lora_dropout=0.0,
                   task_type="CAUSAL_LM"),
    )  # fmt: skip
    return peft_model, space_of(peft_model)


def frozen_lora(model: PreTrainedModel, adapter_dir: Path, space: LoRASpace) -> PeftModel:
    """`model` with the adapter in `adapter_dir` on it, all parameters frozen.

    Raises AdapterError if it does not fit, or adapts the output embedding.
    """
    from peft import PeftModel

    head = _head_name(model)
    if any(module.name == head for module in space.modules):
        raise AdapterError(f"{adapter_dir}: {_OF_THE_HEAD.format(head)}")
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


def _head_name(model: PreTrainedModel) -> str:
    """The module that makes logits, as `named_modules` calls it; empty if the model has none."""
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), "") if head is not None else ""


def _linear(adapters: nn.ModuleDict) -> nn.Linear:
    return cast(nn.Linear, adapters["default"])


def adapter_of(model: PeftModel, space: LoRASpace, config: FinetuneConfig) -> Adapter:
    """A copy of the current LoRA matrices."""
    tensors = {t.key: lora_linear(model, t.key).weight.detach().cpu().float().clone() for t in space.tensors}
    return Adapter(space, tensors, {"target_modules": list(config.target_modules)})


def _is_target(name: str, target: str) -> bool:
    """Whether PEFT adapts the module `name` for the target module `target`."""
    return name == target or name.endswith(f".{target}")


def _refuse_missing_targets(model: PreTrainedModel, targets: tuple[str, ...]) -> None:
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    leaves = sorted({name.rsplit(".", 1)[-1] for name in linears}, key=natural_key)
    missing = [t for t in targets if not any(_is_target(name, t) for name in linears)]
    if missing:
        raise ModelError(
            f"the model has no linear named {', '.join(missing)}; it has {', '.join(leaves)}: choose with --target-modules"
        )
