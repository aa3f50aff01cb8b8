"""Quickened passes: the same outputs and gradients as the model's own, on families that differ in their attention."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from atoms.model import config_hash
from offline import cpu_passes
from offline.cpu_passes import quicken

SIZES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama, shared key heads": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2, biases": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "gemma3, sliding windows": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"])
    ),
}


@dataclass
class Passes:
    logits: Tensor
    gradient: Tensor


def passes_of(model: PreTrainedModel) -> Passes:
    """Logits of two sequences of 48 tokens, and the gradient of a loss on some positions with respect to the embeddings."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 300, (2, 48), generator=generator)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, use_cache=False).logits.float()
    logits[:, 20:, :].log_softmax(-1)[..., 7].sum().backward()
    assert embedded.grad is not None
    return Passes(logits.detach(), embedded.grad.float())


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(0)
    return request.param().eval().requires_grad_(False)


def test_outputs_and_gradients_are_those_of_the_model_itself(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, before = passes_of(model), config_hash(model)
    quicken(model)
    assert config_hash(model) == before
    used = []
    attention = cpu_passes._ProductAttention.apply
    monkeypatch.setattr(cpu_passes._ProductAttention, "apply", lambda *args: used.append(1) or attention(*args))
    found = passes_of(model)
    assert len(used) == 2, "a layer's attention was not replaced"
    assert error(found.logits, expected.logits) < 1e-5
    assert error(found.gradient, expected.gradient) < 1e-5


def test_in_bfloat16_the_gradient_is_as_near_to_float32_as_the_models_own(model: PreTrainedModel) -> None:
    exact, half = passes_of(model), copy.deepcopy(model).bfloat16()
    own = error(passes_of(half).gradient, exact.gradient)
    assert error(passes_of(quicken(half)).gradient, exact.gradient) < 1.2 * own


def test_a_padding_mask_is_kept(model: PreTrainedModel) -> None:
    ids = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :10] = 0  # on the left, where causality does not hide it
    expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    found = quicken(model)(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert error(found[0, 10:], expected[0, 10:]) < 1e-5
    assert error(found[1], expected[1]) < 1e-5


def test_weights_changed_afterwards_count(model: PreTrainedModel) -> None:
    quicken(model)
    before = passes_of(model).logits
    linear = next(module for name, module in model.named_modules() if name.endswith("gate_proj"))
    with torch.no_grad():
        linear.weight.mul_(1.5)
    assert error(passes_of(model).logits, before) > 1e-3


def test_generation_is_that_of_the_model_itself(model: PreTrainedModel) -> None:
    ids = torch.randint(3, 300, (1, 40), generator=torch.Generator().manual_seed(2))
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(quicken(model).generate(ids, max_new_tokens=8, do_sample=False), expected)


def test_a_trained_linear_gets_its_gradient() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval().requires_grad_(False)
    quicken(model)
    head = model.get_output_embeddings()
    head.weight.requires_grad_(True)
    model(input_ids=torch.arange(3, 51)[None], use_cache=False).logits.sum().backward()
    assert head.weight.grad is not None and head.weight.grad.norm() > 0
