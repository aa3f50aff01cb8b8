"""The fine-tune: its plan, its schedule, and an exact resumption from any checkpoint."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from atoms.errors import ConfigError, ModelError
from offline import finetune as module
from offline.config import FinetuneConfig
from offline.corpus import encode_corpus, read_corpus
from offline.finetune import finetune, plan_steps, schedule
from offline.lora import new_lora
from offline.progress import Progress

QUIET = Progress(quiet=True)
CONFIG = FinetuneConfig(rank=4, epochs=1, batch_documents=8, learning_rate=0.02, checkpoint_every=2)


@pytest.fixture
def documents(tiny_tokenizer, tiny_data: Path):
    return encode_corpus(read_corpus(tiny_data), tiny_tokenizer, 512).documents


def train(model: PreTrainedModel, documents, checkpoint: Path, batch_tokens: int = 4096):
    return finetune(model, documents, CONFIG, batch_tokens, 0, checkpoint, QUIET)


def test_every_epoch_visits_every_document_once_in_another_order(documents) -> None:
    steps = plan_steps(documents, FinetuneConfig(epochs=2, batch_documents=8), 0)
    rows = [[d.row for d in step] for step in steps]
    flat = [row for step in rows for row in step]
    half = len(documents)
    assert sorted(flat[:half]) == sorted(flat[half:]) == list(range(half))
    assert flat[:half] != flat[half:]
    assert len(plan_steps(documents, FinetuneConfig(epochs=0.5, batch_documents=8), 0)) == 3


def test_the_schedule_warms_up_and_decays_to_a_tenth() -> None:
    factors = [schedule(step, 100, 0.1) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and max(factors) == factors[9] == pytest.approx(1.0)
    assert factors[9:] == sorted(factors[9:], reverse=True)
    assert factors[-1] == pytest.approx(0.1, abs=0.01)


def test_training_lowers_the_loss_and_takes_the_lora_off_again(
    tiny_model: PreTrainedModel, documents, tmp_path: Path
) -> None:
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    adapter, losses = train(tiny_model, documents, tmp_path / "checkpoint")
    assert losses[-1] < losses[0]
    assert all(adapter.tensors[m.key_b].any() for m in adapter.space.modules)
    after = tiny_model.state_dict()
    assert before.keys() == after.keys(), "LoRA layers are still on the model"
    assert all(torch.equal(before[name], after[name]) for name in before), "the base weights were trained"


def test_the_memory_bound_does_not_change_the_training(tiny_model: PreTrainedModel, documents, tmp_path: Path) -> None:
    _, whole = train(tiny_model, documents, tmp_path / "whole")
    _, parts = train(tiny_model, documents, tmp_path / "parts", batch_tokens=200)
    assert parts == pytest.approx(whole, rel=1e-3), "the gradient of a split step is not that of the mean loss"


def test_a_fine_tune_that_diverges_is_refused_and_can_be_run_again(
    tiny_model: PreTrainedModel, documents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, real, calls = tmp_path / "checkpoint", module._train_step, iter(range(100))
    with monkeypatch.context() as patched, pytest.raises(ConfigError, match=r"loss is nan at step 4 .*--learning-rate"):
        patched.setattr(module, "_train_step", lambda *args: real(*args) if next(calls) < 3 else float("nan"))
        train(copy.deepcopy(tiny_model), documents, checkpoint)
    _, losses = train(tiny_model, documents, checkpoint)
    assert all(map(math.isfinite, losses)), "a step that failed was kept"


@pytest.mark.parametrize("target", ["lm_head", "head"])
def test_the_output_embedding_is_no_target(tiny_model: PreTrainedModel, target: str) -> None:
    targets = ("q_proj", target)
    message = "lm_head makes the logits" if target == "lm_head" else "no linear named head"
    with pytest.raises(ModelError, match=message):
        new_lora(tiny_model, FinetuneConfig(target_modules=targets), 0)


def test_a_resumed_run_ends_at_the_same_weights(
    tiny_model: PreTrainedModel, documents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken, losses = train(tiny_model, documents, tmp_path / "unbroken")
    real, calls = module._train_step, iter(range(100))

    def stop_at_third(*arguments):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(module, "_train_step", stop_at_third)
    broken = type(tiny_model)(tiny_model.config)
    broken.load_state_dict(tiny_model.state_dict())
    with pytest.raises(KeyboardInterrupt):
        train(broken.requires_grad_(False), documents, tmp_path / "broken")
    monkeypatch.setattr(module, "_train_step", real)
    resumed, again = train(tiny_model, documents, tmp_path / "broken")
    assert again == losses
    for key, value in unbroken.tensors.items():
        assert torch.equal(resumed.tensors[key], value), (
            f"{key}: a moment, the step count or the order was not restored"
        )
