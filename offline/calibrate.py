"""Strength in nats: scale every atom so that coefficient ±1 costs 0.05 nats a token, and measure how atoms interact.

KL(unsteered ‖ steered) is averaged over the tokens of the unsteered model's own continuations of neutral prompts. With
δz_j the change of the logits at coefficient 1,
    M_jk = mean over tokens of cov_p(δz_j, δz_k),      KL(mix) ≈ ½ cᵀMc for small c (for others: atoms/drift.py),
the exact Fisher inner products of the atoms, cross-matrix terms included. δz_j is the central difference
(z(+h) − z(−h)) / 2h with h below 1: logits saturate, and h = 1 was seen to understate the KL of small mixes by 20-30%.

All forwards run on the steered model (θ0 merged, deltas beside the weights): what is measured is what is served.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from atoms.adapter import Adapter, Composition, Delta, compose
from atoms.manifest import UNIT_NATS, Orientation
from atoms.model import encode_prompt, stop_token_ids
from atoms.projection import Projection
from atoms.space import Direction
from atoms.steered import SteeredModel
from atoms.storage import write_tensors
from offline.config import CalibrateConfig
from offline.corpus import Batch, EncodedDocument, collate, make_batches
from offline.gradients import label_logits, mean_losses
from offline.progress import Task

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

_SCALE_TOLERANCE = 0.05
_MAX_SCALE_TRIALS = 8
_CROSS_MATRIX = 6.0
"""KL over its block-diagonal estimate, which leaves the terms between matrices out: 4-18 on SmolLM2-135M, median 6.
Only the first guess depends on it; the scale is set by what is then measured."""
MEASURED_IN = torch.float32
"""dtype of the model that KL, M and orientation are measured on, whatever the gradients were computed in. In bfloat16
rounding alone moves the logits by as much as a small mix does (docs/discovery.md, "Precision")."""
_STEP = 0.25
"""h of the central difference."""
_DELTA_LOGITS_BYTES = 512 * 2**20
_KL_ROWS = 16
_LOGITS_BYTES = 256 * 2**20
"""Memory of one forward's float32 logits, two or three of which live at once: 256 labels at a vocabulary of 262,144."""


@dataclass(frozen=True)
class Calibrated:
    """A direction scaled so that its KL at ±1 averages 0.05 nats, and the measured curve {coefficient: nats a token}."""

    direction: Direction
    curve: Mapping[float, float]


class DriftMeter:
    """Measures KL and logit changes on fixed continuations, batch by batch. The unsteered log-probabilities are kept."""

    def __init__(
        self, steered: SteeredModel, base: Adapter, composition: Composition, batches: Sequence[Batch]
    ) -> None:
        self.steered, self.base, self.composition = steered, base, composition
        self.batches = within_logits(batches, steered.model)
        self.tokens = sum(len(batch.labels) for batch in self.batches)
        self._unsteered = [self._log_probs(batch, None) for batch in self.batches]

    def kl(self, direction: Direction, coefficient: float = 1.0) -> float:
        """KL(unsteered ‖ steered) at `coefficient`, nats a token."""
        return self.kl_of(self.delta(direction, coefficient))

    def kl_of(self, delta: Delta) -> float:
        """KL of an arbitrary delta on top of merged θ0, nats a token."""
        batches = zip(self.batches, self._unsteered, strict=True)
        return sum(kl_sum(base, self._log_probs(batch, delta)) for batch, base in batches) / self.tokens

    def drift_matrix(self, directions: Sequence[Direction], task: Task) -> Tensor:
        """M (J, J) float32 at coefficient 1. Token chunks bound the memory of the J logit changes."""
        count = len(directions)
        total = torch.zeros(count, count, dtype=torch.float64)
        for batch, base in zip(self.batches, self._unsteered, strict=True):
            most = max(1, _DELTA_LOGITS_BYTES // max(1, count * base.shape[1] * 4))
            for chunk in _split_batch(batch, most):
                for part in _split_labels(chunk, most):
                    total += self._chunk_gram(part, directions)
                task.advance(len(chunk.documents))
        return (total / self.tokens).float()

    def _chunk_gram(self, batch: Batch, directions: Sequence[Direction]) -> Tensor:
        p = self._log_probs(batch, None).exp()  # (n, V)
        changes = p.new_empty(len(directions), *p.shape)
        for row, direction in zip(changes, directions, strict=True):
            plus = self._log_probs(batch, self.delta(direction, _STEP))
            minus = self._log_probs(batch, self.delta(direction, -_STEP))
            change = (plus - minus) / (2 * _STEP)  # equals δz up to a constant a token, which the covariance removes
            change -= (p * change).sum(1, keepdim=True)
            row.copy_(change * p.sqrt())
        flat = changes.flatten(1)  # (J, n·V)
        return (flat @ flat.T).cpu().double()  # sums are kept on the CPU: not every device has float64

    def delta(self, direction: Direction, coefficient: float) -> Delta:
        return compose(self.base, {key: value * coefficient for key, value in direction.items()}, self.composition)

    @torch.inference_mode()
    def mean_loss(self, documents: Sequence[EncodedDocument], delta: Delta | None, batch_tokens: int) -> float:
        """Mean over `documents` of the mean response-token cross-entropy under `delta`, nats a token."""
        self.steered.set_slot(0, delta)
        batches = make_batches(documents, batch_tokens, self.batches[0].labels.device)
        total = 0.0
        for batch in within_logits(batches, self.steered.model):
            with self.steered.rows([0] * len(batch.documents)):
                total += float(mean_losses(label_logits(self.steered.model, batch), batch).sum())
        return total / len(documents)

    def close(self) -> None:
        """Takes the steering off the model."""
        self.steered.close()

    @torch.inference_mode()
    def _log_probs(self, batch: Batch, delta: Delta | None) -> Tensor:
        self.steered.set_slot(0, delta)
        with self.steered.rows([0] * len(batch.documents)):
            return torch.log_softmax(label_logits(self.steered.model, batch).float(), dim=-1)


def calibrate_atom(
    meter: DriftMeter, projection: Projection, direction: Direction, config: CalibrateConfig
) -> Calibrated:
    """Scales `direction` until the KL at ±1 averages 0.05 nats within 5%, or eight trials are over; the curve says what it is.

    Starts from the block-diagonal Fisher on the kept components times what such an estimate usually leaves out.
    """
    start = math.sqrt(2 * UNIT_NATS / max(_CROSS_MATRIX * fisher_norm(projection, direction), 1e-30))
    curve = {0.0: 0.0}

    def mean_kl(scale: float) -> float:
        curve.update({sign: meter.kl(direction, sign * scale) for sign in (1.0, -1.0)})
        return (curve[1.0] + curve[-1.0]) / 2

    scale, _ = solve_strength(mean_kl, UNIT_NATS, start, _SCALE_TOLERANCE, _MAX_SCALE_TRIALS)
    for coefficient in config.coefficients:
        if coefficient not in curve:
            curve[coefficient] = meter.kl(direction, coefficient * scale)
    return Calibrated({key: value * scale for key, value in direction.items()}, dict(sorted(curve.items())))


def solve_strength(
    kl: Callable[[float], float], target: float, start: float, tolerance: float, most: int
) -> tuple[float, float]:
    """(strength, its KL) of which `kl(strength)` is within the share `tolerance` of `target`; the last of `most` trials if none
    is: look at the KL.

    From `start`, goes by the square root of what is measured; once the target lies between two strengths, between them on a
    log-log scale.
    """
    strength = start
    below: tuple[float, float] | None = None  # the strongest strength known to cost too little, and its KL
    above: tuple[float, float] | None = None
    for trial in range(most):
        measured = kl(strength)
        if abs(measured / target - 1) <= tolerance or trial == most - 1:
            break
        if measured < target:
            below = (strength, max(measured, 1e-9))
        else:
            above = (strength, measured)
        if below and above:
            strength = _between(below, above, target)
        else:
            strength *= min(4.0, max(0.25, math.sqrt(target / max(measured, 1e-9))))
    return strength, measured


def _between(below: tuple[float, float], above: tuple[float, float], target: float) -> float:
    """The strength at which a power law through both points costs `target`, kept off the ends so that each step shrinks."""
    share = math.log(target / below[1]) / math.log(above[1] / below[1])
    return below[0] * (above[0] / below[0]) ** min(0.9, max(0.1, share))


def fisher_norm(projection: Projection, direction: Direction) -> float:
    """vᵀFv of a direction v under the block-diagonal Fisher of the kept components, Σ λ (Qᵀv)²."""
    bases = projection.bases.items()
    return sum(float((basis.eigenvalues * basis.rotate(direction[key]).square()).sum()) for key, basis in bases)


def orient(
    meter: DriftMeter, calibrated: Calibrated, documents: Sequence[EncodedDocument], batch_tokens: int
) -> tuple[Calibrated, Orientation] | None:
    """Checks that +1 lowers the loss on the atom's held-out documents; flips the atom if −1 does, drops it if neither.

    Returns the oriented atom and its evidence, or None if it is to be dropped.
    """
    unsteered = meter.mean_loss(documents, None, batch_tokens)
    plus = meter.mean_loss(documents, meter.delta(calibrated.direction, 1.0), batch_tokens)
    if plus < unsteered:
        return calibrated, _orientation(documents, unsteered, plus)
    minus = meter.mean_loss(documents, meter.delta(calibrated.direction, -1.0), batch_tokens)
    if minus >= unsteered:
        return None
    flipped = Calibrated(
        {key: -value for key, value in calibrated.direction.items()},
        dict(sorted((0.0 - c, kl) for c, kl in calibrated.curve.items())),
    )
    return flipped, _orientation(documents, unsteered, minus)


def write_calibrated(path: Path, oriented: tuple[Calibrated, Orientation] | None) -> None:
    """Keeps an oriented atom, or the fact that it was dropped. Raises StorageError."""
    if oriented is None:
        write_tensors(path, {"dropped": torch.ones(1)}, {"dropped": "true"})
        return
    calibrated, evidence = oriented
    metadata = {"curve": json.dumps(list(calibrated.curve.items())), "orientation": evidence.model_dump_json()}
    write_tensors(path, calibrated.direction, metadata)


def read_calibrated(path: Path) -> tuple[Calibrated, Orientation] | None:
    """What `write_calibrated` kept; None for a dropped atom."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        if "dropped" in metadata:
            return None
        direction = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    curve = {float(c): float(kl) for c, kl in json.loads(metadata["curve"])}
    return Calibrated(direction, curve), Orientation.model_validate_json(metadata["orientation"])


def continuations(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], tokens: int, seed: int
) -> list[EncodedDocument]:
    """The unsteered model's own sampled continuations (temperature 1) of `prompts`, as documents with them as responses."""
    from transformers import GenerationConfig

    stops = stop_token_ids(model, tokenizer)
    plain = GenerationConfig(do_sample=True, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=tokens,
                             eos_token_id=sorted(stops) or None, pad_token_id=next(iter(stops), 0))  # fmt: skip
    documents = []
    with _generation_config(model, plain):
        for row, prompt in enumerate(prompts):
            ids = encode_prompt(tokenizer, [{"role": "user", "content": prompt}])
            torch.manual_seed(seed * 1_000_003 + row)
            inputs = torch.tensor([ids], device=model.device)
            with torch.inference_mode():
                output = model.generate(inputs, attention_mask=torch.ones_like(inputs))  # type: ignore[operator]
            response = output[0, len(ids) :].tolist()
            end = next((i + 1 for i, token in enumerate(response) if token in stops), len(response))
            documents.append(EncodedDocument(row, tuple(ids), tuple(response[:end])))
    return documents


@contextmanager
def _generation_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """`config` in place of the model's own, whose penalties and cuts `generate` takes over whatever it is given."""
    own, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = own


def within_logits(batches: Sequence[Batch], model: Any) -> list[Batch]:
    """`batches`, those split whose logits at label positions would take more than 256 MiB in float32.

    A document is never split: it stands alone if it is longer.
    """
    most = _LOGITS_BYTES // (4 * int(model.config.get_text_config().vocab_size))
    return [part for batch in batches for part in _split_batch(batch, most)]


@torch.inference_mode()
def kl_sum(base: Tensor, moved: Tensor) -> float:
    """KL(base ‖ moved) summed over rows of log-probabilities (n, V), nats; a few rows at a time: V numbers a row are many."""
    rows = zip(base.split(_KL_ROWS), moved.split(_KL_ROWS), strict=True)
    return sum(float((ours.exp() * (ours - theirs)).sum()) for ours, theirs in rows)


def _orientation(documents: Sequence[EncodedDocument], unsteered: float, steered: float) -> Orientation:
    return Orientation(n_documents=len(documents), loss_unsteered=unsteered, loss_at_plus_one=steered)


def _split_batch(batch: Batch, max_labels: int) -> list[Batch]:
    """Splits a batch by documents so that no part has more than `max_labels` label positions (at least one document)."""
    if len(batch.labels) <= max_labels:
        return [batch]
    groups: list[list[EncodedDocument]] = [[]]
    size = 0
    for document in batch.documents:
        if groups[-1] and size + len(document.response_ids) > max_labels:
            groups.append([])
            size = 0
        groups[-1].append(document)
        size += len(document.response_ids)
    return [collate(group).to(batch.labels.device) for group in groups]


def _split_labels(batch: Batch, most: int) -> list[Batch]:
    """The same inputs with at most `most` label positions each: one forward pass for every part."""
    columns = zip(*(part.split(most) for part in (batch.label_rows, batch.label_columns, batch.labels)), strict=True)
    return [replace(batch, label_rows=rows, label_columns=places, labels=labels) for rows, places, labels in columns]
