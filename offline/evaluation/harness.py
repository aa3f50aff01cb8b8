"""The harness of `evaluate` and `sweep`: a package, an engine for free-running answers, and its model for likelihoods.

Engine and model share their weights (θ0 merged) and take turns: the model is used only while no answer is being made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

import torch

from atoms.engine import Engine
from atoms.mix import Mix
from atoms.package import Package
from atoms.steered import SteeredModel
from offline.calibrate import DriftMeter, within_logits
from offline.corpus import EncodedDocument, make_batches
from offline.evaluation.answers import Answer, Answerer, AnswerLog, Decoding, Question
from offline.evaluation.directions import Directions
from offline.gradients import label_logits, sum_losses
from offline.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Cell = TypeVar("Cell")
_BATCH_TOKENS = 2048
"""Padded tokens of a teacher-forced pass."""


class Harness:
    """Answers, drift and perplexity of a package's mixes. A context manager: `close()` takes the hooks off the model.

    `engine` must compose mixes with `directions`; `model` is the model it runs. `log` keeps answers over runs.
    """

    def __init__(
        self, engine: Engine, model: PreTrainedModel, directions: Directions, decoding: Decoding,
        log: AnswerLog | None = None,
    ) -> None:  # fmt: skip
        self.package: Package = directions.package
        self.directions = directions
        self.dtype = str(model.dtype).removeprefix("torch.")
        self.answerer = Answerer(engine, directions.digest, decoding, log, self.dtype)
        self._engine = engine
        self._steered = SteeredModel(model, self.package.base_adapter.space, 1)

    def __enter__(self) -> Harness:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._steered.close()

    def answer(
        self, stage: str, asked: Sequence[tuple[Cell, Mix]], prompts: Mapping[Cell, Sequence[str]], progress: Progress,
        samples: int = 1,
    ) -> dict[tuple[Cell, Mix], list[Answer]]:  # fmt: skip
        """Answers to the prompts of each (cell, mix) that is asked for, as one batch job.

        In the order of the prompts, once for each of the `samples` answers that a prompt is given.
        """
        questions = [
            Question(prompt, mix, n) for cell, mix in asked for n in range(samples) for prompt in prompts[cell]
        ]
        with progress.task(stage, len(questions), "answers") as bar:
            answers = iter(self.answerer.answer_questions(questions, bar.advance))
        return {(cell, mix): list(islice(answers, samples * len(prompts[cell]))) for cell, mix in asked}

    def meter(self, unsteered: Sequence[Answer]) -> DriftMeter:
        """Measures KL(unsteered ‖ steered) along `unsteered`: the unsteered model's own answers, teacher-forced.

        Holds a row of log-probabilities for each of their tokens.
        """
        if any(answer.mix for answer in unsteered):
            raise ValueError("drift is measured along unsteered answers")
        batches = make_batches(self._documents(unsteered), _BATCH_TOKENS, self.device)
        return DriftMeter(self._steered, self.package.base_adapter, self.package.composition, batches)

    def kl(self, meter: DriftMeter, mix: Mix) -> float:
        """Nats a token; 0 for the empty mix."""
        delta = self.directions.compose(mix)
        return 0.0 if delta is None else meter.kl_of(delta)

    @torch.inference_mode()
    def perplexity(self, answers: Sequence[Answer]) -> float:
        """exp of the mean negative log-likelihood a token of `answers` under the unsteered model, given their prompts."""
        total, tokens = 0.0, 0
        model, made = self._steered.model, make_batches(self._documents(answers), _BATCH_TOKENS, self.device)
        for batch in within_logits(made, model):
            total += float(sum_losses(label_logits(model, batch), batch).cpu().double().sum())
            tokens += len(batch.labels)
        return math.exp(total / tokens)

    @property
    def device(self) -> torch.device:
        return self._steered.model.device  # type: ignore[return-value]  # a module attribute to mypy

    def _documents(self, answers: Sequence[Answer]) -> list[EncodedDocument]:
        """Answers as documents. `token_ids` end with the end token, if the answer ended by itself, so none is empty."""
        encode = self._engine.encode_chat
        return [
            EncodedDocument(row, encode([{"role": "user", "content": answer.prompt}]), answer.token_ids)
            for row, answer in enumerate(answers)
        ]
