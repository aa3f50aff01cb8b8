"""The supervised ceiling: whitened rows made from documents with labels. The only place that reads labels.

Discovery never sees them; here they say what the mean gradient of a behaviour's documents would have bought.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from atoms.errors import DataError
from atoms.package import Package
from offline.corpus import EncodedDocument, collate, encode_corpus, plan_batches, read_corpus, read_rows
from offline.evaluation.controls import projection_of
from offline.gradients import gradient_hooks, label_logits, mean_losses
from offline.models import frozen_lora
from offline.progress import Progress, Task

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_MAX_LENGTH = 512


def supervised_rows(
    package: Package, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Path, field: str,
    labels: Mapping[str, str], most: int, progress: Progress, batch_tokens: int = 1024,
) -> dict[str, Tensor]:  # fmt: skip
    """Behaviour -> unit whitened row (D,) of the mean gradient of at most `most` documents with the behaviour's label.

    `model` is the unmerged base; it comes back as it was. Raises DataError for a file without the field or a label
    that no document carries.
    """
    documents = encode_corpus(read_corpus(data), tokenizer, _MAX_LENGTH).documents
    found = read_labels(data, field)
    groups = {behaviour: _sample(documents, found, label, data, field, most) for behaviour, label in labels.items()}
    peft = frozen_lora(model, package.path / "base", package.base_adapter.space)
    try:
        with progress.task("supervised gradients", sum(map(len, groups.values())), "documents") as bar:
            return {
                behaviour: mean_gradient_row(package, peft, group, batch_tokens, bar)
                for behaviour, group in groups.items()
            }
    finally:
        peft.unload()


def read_labels(data: Path, field: str) -> list[str | None]:
    """The label of each document, in the order of `read_corpus`, which must accept every row; None where a row has none.

    Raises DataError if no row has the field.
    """
    labels = []
    for _, row in read_rows(data):
        value = (json.loads(row) if isinstance(row, str) else row).get(field)
        labels.append(None if value is None else str(value))
    if all(label is None for label in labels):
        raise DataError(f"no row of {data} has a field {field!r}; name the field that holds the label")
    return labels


def mean_gradient_row(
    package: Package, model: PeftModel, documents: Sequence[EncodedDocument], batch_tokens: int, task: Task
) -> Tensor:
    """The unit whitened row (D,) of the documents' mean gradient, with the discovery's mean row removed.

    Projection is linear, so the mean gradient's row is the mean of the documents' rows. `model` is frozen, with θ0 on it.
    """
    total: dict[str, Tensor] = {}

    def add(key: str, x: Tensor, delta: Tensor) -> None:
        gradient = torch.einsum("bto,bti->oi", delta, x).cpu()
        total[key] = gradient + total[key] if key in total else gradient

    with gradient_hooks(model, package.base_adapter.space, add):
        for group in plan_batches(documents, batch_tokens):
            batch = collate(group).to(model.device)
            mean_losses(label_logits(model, batch), batch).sum().backward()
            task.advance(len(group))
    mean = {key: value / len(documents) for key, value in total.items()}
    row = projection_of(package).project(mean) - package.projection_tensors["mean_row"]
    return row / row.norm().clamp_min(1e-30)


def _sample(
    documents: Sequence[EncodedDocument], labels: Sequence[str | None], label: str, data: Path, field: str, most: int
) -> list[EncodedDocument]:
    group = [document for document, found in zip(documents, labels, strict=True) if found == label]
    if not group:
        known = sorted({found for found in labels if found is not None})
        raise DataError(
            f"no document of {data} has {field} {label!r}; it has {', '.join(known[:12])}: say which label a behaviour has "
            "with --label BEHAVIOUR=LABEL"
        )
    return group if len(group) <= most else random.Random(0).sample(group, most)
