"""The LoRA fine-tune that makes θ0. Same loss and masking as the gradients: mean cross-entropy over response tokens.

Deterministic for a seed, also across a kill and resume: the order of documents follows from the seed and the step, and a
checkpoint holds the adapter and both AdamW moments.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor

from atoms.adapter import Adapter
from atoms.errors import ConfigError
from atoms.storage import write_tensors
from offline.config import FinetuneConfig
from offline.corpus import EncodedDocument, collate, plan_batches
from offline.gradients import label_logits, lora_linear, mean_losses
from offline.lora import adapter_of, new_lora
from offline.progress import Progress
from offline.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def finetune(
    model: PreTrainedModel,
    documents: Sequence[EncodedDocument],
    config: FinetuneConfig,
    batch_tokens: int,
    seed: int,
    checkpoint: Path,
    progress: Progress,
    ranks: Ranks = ALONE,
) -> tuple[Adapter, list[float]]:
    """Trains a LoRA; returns it and the mean loss of every step (nats a token). Resumes from `checkpoint` if it exists.

    Ranks share the documents of every step and add up their gradients; the first keeps the checkpoint. Raises ConfigError if
    the loss is no number any more.
    """
    peft_model, space = new_lora(model, config, seed)
    parameters = {tensor.key: lora_linear(peft_model, tensor.key).weight for tensor in space.tensors}
    optimizer = torch.optim.AdamW(parameters.values(), lr=config.learning_rate, weight_decay=0.0)
    batches = plan_steps(documents, config, seed)
    losses = _restore(checkpoint, parameters, optimizer)
    ranks.wait()  # before the first rank writes another checkpoint
    device = next(iter(parameters.values())).device
    with progress.task(
        "fine-tune", sum(map(len, batches)), "documents", done=sum(map(len, batches[: len(losses)]))
    ) as task:
        for step in range(len(losses), len(batches)):
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * schedule(step, len(batches), config.warmup)
            losses.append(_train_step(peft_model, batches[step], optimizer, batch_tokens, device, ranks))
            if not math.isfinite(losses[-1]):  # before a checkpoint of it is kept
                raise ConfigError(
                    f"the fine-tune's loss is {losses[-1]} at step {step + 1} of {len(batches)}; lower --learning-rate (it is "
                    f"{config.learning_rate:g}), or compute with --dtype float32"
                )
            task.advance(len(batches[step]), f"loss {losses[-1]:.3f}")
            if ranks.first and (step + 1) % config.checkpoint_every == 0:
                _save(checkpoint, parameters, optimizer, losses)
    adapter = adapter_of(peft_model, space, config)
    peft_model.unload()  # takes the LoRA layers off again: the base model is as it was
    return adapter, losses


def plan_steps(documents: Sequence[EncodedDocument], config: FinetuneConfig, seed: int) -> list[list[EncodedDocument]]:
    """The documents of every step. Each epoch is a new shuffle; batches are formed among documents of similar length
    and then shuffled, so that little is padded."""
    size = config.batch_documents
    steps: list[list[EncodedDocument]] = []
    wanted = max(1, math.ceil(len(documents) * config.epochs / size))
    epoch = 0
    while len(steps) < wanted:
        rng = random.Random(f"{seed}-{epoch}")
        order = list(documents)
        rng.shuffle(order)
        window = size * 8
        pools = [sorted(order[i : i + window], key=len) for i in range(0, len(order), window)]
        batches = [pool[i : i + size] for pool in pools for i in range(0, len(pool), size)]
        rng.shuffle(batches)
        steps += batches
        epoch += 1
    return steps[:wanted]


def schedule(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up over the share `warmup`, then cosine decay to 0.1; a factor on the learning rate."""
    warm = max(1, round(steps * warmup))
    if step < warm:
        return (step + 1) / warm
    progress = (step - warm) / max(1, steps - warm)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def _train_step(
    model: PeftModel,
    documents: Sequence[EncodedDocument],
    optimizer: torch.optim.Optimizer,
    batch_tokens: int,
    device: torch.device,
    ranks: Ranks,
) -> float:
    """One update on the mean loss of `documents`, accumulated over batches that fit `batch_tokens`, and over ranks."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)  # what a rank without a document has to add
    total = torch.zeros((), dtype=torch.float64)
    for group in plan_batches(ranks.share(sorted(documents, key=len)), batch_tokens):
        batch = collate(group).to(device)
        loss = mean_losses(label_logits(model, batch), batch).sum() / len(documents)
        loss.backward()
        total += float(loss.detach())
    ranks.add(total, *(p.grad for p in parameters))
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    return float(total)


def _save(path: Path, parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer, losses: list[float]) -> None:
    tensors = {"losses": torch.tensor(losses, dtype=torch.float64)}
    for key, parameter in parameters.items():
        state = optimizer.state[parameter]
        tensors |= {
            f"{key}.weight": parameter,
            f"{key}.exp_avg": state["exp_avg"],
            f"{key}.exp_avg_sq": state["exp_avg_sq"],
        }
    write_tensors(path, tensors)


def _restore(path: Path, parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> list[float]:
    """Loads a checkpoint into parameters and optimizer; returns the losses of the steps done so far."""
    if not path.exists():
        return []
    tensors = load_file(path)
    losses = tensors["losses"].tolist()
    for key, parameter in parameters.items():
        with torch.no_grad():
            parameter.copy_(tensors[f"{key}.weight"])
        optimizer.state[parameter] = {
            "step": torch.tensor(float(len(losses))),
            "exp_avg": tensors[f"{key}.exp_avg"].to(parameter.device),
            "exp_avg_sq": tensors[f"{key}.exp_avg_sq"].to(parameter.device),
        }
    return losses
