"""An atom's direction: where a few gradient steps on its own documents lead.

The dictionary says which documents belong together. Its atom, unprojected, is one linear step from θ0 for them; three things
keep their form out of that step, and are undone here:

    prompts     θ0 expects a list where one is asked for, so little of the gradient is about lists. Half of the documents
                get the prompts of others
    length      form is decided in the first tokens, which the mean over a long answer drowns. Only those carry the loss
    distance    what θ0 never does is far away, and off the components of large Fisher. Steps of one length, with the whole
                gradient made anew at each

    v ← v − η ĝ,    g = h − (⟨h, s⟩ / ‖s‖²) s,    h the mean gradient of the atom's documents at θ0 + v,
                                                  s that of a sample of all documents at θ0

so that what all documents share stays as it is: no step is with s, which would go on with the fine-tune, nor against it,
which would undo the fine-tune. (h − s goes against it: an atom's gradient holds a quarter of s, not the whole.) The first
step costs 0.02 nats a token on the sample; the strength of the sum is calibrated afterwards (offline/calibrate.py).
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from atoms.space import Direction, LoRASpace
from offline.calibrate import kl_sum, solve_strength
from offline.config import SteeringConfig
from offline.corpus import Batch, EncodedDocument, collate, sample_documents
from offline.gradients import label_logits, lora_linear, mean_gradient

if TYPE_CHECKING:
    from peft import PeftModel

_STEP_NATS = 0.02
_METER_DOCUMENTS = 8
_FIRST_LENGTH = 0.1
_SCALE_TRIALS = 8
_SCALE_TOLERANCE = 0.1


@dataclass(frozen=True)
class PathMaker:
    """Makes directions of groups of documents in one corpus. `model` is frozen, with θ0 on it.

    `shared` is the mean gradient of the `reference` documents at θ0, which are prepared as an atom's own are.
    """

    model: PeftModel
    space: LoRASpace
    pool: Sequence[EncodedDocument]
    config: SteeringConfig
    batch_tokens: int
    reference: Sequence[EncodedDocument]
    shared: Direction

    @classmethod
    def of(
        cls,
        model: PeftModel,
        space: LoRASpace,
        pool: Sequence[EncodedDocument],
        config: SteeringConfig,
        batch_tokens: int,
    ) -> PathMaker:
        """Takes the gradient of a sample of `pool`, all documents of the corpus."""
        reference = reference_documents(pool, config)
        shared = mean_gradient(model, space, reference, batch_tokens)
        return cls(model, space, pool, config, batch_tokens, reference, shared)

    def direction(self, documents: Sequence[EncodedDocument]) -> dict[str, Tensor]:
        """Σ of `config.steps` steps (see the module docstring), per LoRA matrix; +1 is towards `documents`."""
        count = max(self.config.documents, len(documents))
        given = prepared(documents, self.pool, self.config.tokens, count)
        total = {tensor.key: torch.zeros(tensor.shape) for tensor in self.space.tensors}
        length = 0.0
        for step in range(self.config.steps):
            with moved(self.model, self.space, total):
                gradient = mean_gradient(self.model, self.space, given, self.batch_tokens)
            unit = downhill(gradient, self.shared)
            if step == 0:
                length = self._first_length(unit)
            total = {key: total[key] + length * unit[key] for key in total}
        return total

    def _first_length(self, unit: Direction) -> float:
        """The length of a step along `unit` that costs 0.02 nats a token on the reference documents, within a tenth."""
        batch = collate(list(self.reference[:_METER_DOCUMENTS])).to(self.model.device)
        base = _log_probs(self.model, batch)

        def kl(length: float) -> float:
            with moved(self.model, self.space, {key: value * length for key, value in unit.items()}):
                return kl_sum(base, _log_probs(self.model, batch)) / len(base)

        return solve_strength(kl, _STEP_NATS, _FIRST_LENGTH, _SCALE_TOLERANCE, _SCALE_TRIALS)[0]


def reference_documents(pool: Sequence[EncodedDocument], config: SteeringConfig) -> list[EncodedDocument]:
    """The sample of all documents whose gradient stands for what they share, prepared as an atom's own are."""
    sample = sample_documents(pool, config.reference_documents, 0)
    return prepared(sample, pool, config.tokens, len(sample))


def downhill(gradient: Direction, shared: Direction) -> Direction:
    """The direction of length 1 in which `gradient` falls fastest of those at right angles to `shared`."""
    part = _dot(gradient, shared) / max(_dot(shared, shared), 1e-30)
    direction = {key: part * shared[key] - value for key, value in gradient.items()}
    norm = max(math.sqrt(_dot(direction, direction)), 1e-30)
    return {key: value / norm for key, value in direction.items()}


def prepared(
    documents: Sequence[EncodedDocument], pool: Sequence[EncodedDocument], tokens: int, count: int
) -> list[EncodedDocument]:
    """At most `count` documents with the first `tokens` of their responses, every other one with the prompt of a random one
    of `pool`. Fewer than `count` are taken twice, the second time the other way.

    Which prompt depends on the document's row alone. None becomes longer than the longest of `pool`.
    """
    longest, size = max(map(len, pool)), len(documents)
    made = []
    for place in range(min(count, 2 * size)):
        again, number = divmod(place, size)
        document, exchanged = documents[number], (number + again) % 2
        prompt = random.Random(document.row).choice(pool).prompt_ids if exchanged else document.prompt_ids
        response = document.response_ids[:tokens]
        made.append(EncodedDocument(document.row, prompt[-(longest - len(response)) :], response))
    return made


@contextmanager
def moved(model: PeftModel, space: LoRASpace, direction: Direction) -> Iterator[None]:
    """Within the block, the LoRA matrices of `model` are θ0 + `direction`."""
    weights = {tensor.key: lora_linear(model, tensor.key).weight for tensor in space.tensors}
    before = {key: weight.data for key, weight in weights.items()}
    try:
        for key, weight in weights.items():
            weight.data = before[key] + direction[key].to(weight.device, weight.dtype)
        yield
    finally:
        for key, weight in weights.items():
            weight.data = before[key]


@torch.inference_mode()
def _log_probs(model: PeftModel, batch: Batch) -> Tensor:
    return torch.log_softmax(label_logits(model, batch).float(), dim=-1)


def _dot(a: Direction, b: Direction) -> float:
    return sum(float((a[key] * b[key]).sum()) for key in a)
