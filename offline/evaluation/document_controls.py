"""Controls made of documents, by the atoms' own recipe: of those with a behaviour's label, and of random ones.

The first say what labels would have bought, the second what the recipe does to whatever documents it is given. The only
place that reads labels: discovery never sees them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from atoms.errors import DataError
from atoms.package import Package
from atoms.space import Direction
from offline.config import SteeringConfig
from offline.corpus import EncodedDocument, encode_corpus, read_corpus, read_rows
from offline.evaluation.controls import projection_of
from offline.gradients import mean_gradient
from offline.models import frozen_lora
from offline.progress import Progress
from offline.steering import PathMaker

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_MAX_LENGTH = 512


@dataclass(frozen=True)
class DocumentControls:
    """Directions: of the documents with a behaviour's label, by behaviour, and of random documents, one a draw."""

    labelled: Mapping[str, Direction] = field(default_factory=dict)
    random: Sequence[Direction] = ()


def document_controls(
    package: Package, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Path, label_field: str,
    labels: Mapping[str, str], most: int, draws: int, progress: Progress, batch_tokens: int = 1024,
) -> DocumentControls:  # fmt: skip
    """Directions of at most `most` documents with each behaviour's label, and of `draws` groups of random documents as large
    as the ones that the package's atoms are made of. Made as the atoms are: a path of gradient steps, or the unprojected
    mean gradient.

    `model` is the unmerged base; it comes back as it was. Raises DataError for a file without the field or a label
    that no document carries.
    """
    documents = encode_corpus(read_corpus(data), tokenizer, _MAX_LENGTH).documents
    found = read_labels(data, label_field)
    labelled = [_sample(documents, found, label, data, label_field, most) for label in labels.values()]
    path = package.manifest.conventions.path
    config = SteeringConfig(**dict(path)) if path else None
    size = min(config.documents if config else most, len(documents))
    groups = [*labelled, *(random.Random(f"draw {n}").sample(documents, size) for n in range(draws))]
    space = package.base_adapter.space
    peft = frozen_lora(model, package.path / "base", space)
    try:
        with progress.task("directions of documents", len(groups), "groups") as bar:
            maker = config and PathMaker.of(peft, space, documents, config, batch_tokens)
            made = []
            for group in groups:
                made.append(maker.direction(group) if maker else unprojected_mean(package, peft, group, batch_tokens))
                bar.advance()
        return DocumentControls(dict(zip(labels, made[: len(labels)], strict=True)), made[len(labels) :])
    finally:
        peft.unload()


def read_labels(data: Path, label_field: str) -> list[str | None]:
    """The label of each document, in the order of `read_corpus`, which must accept every row; None where a row has none.

    Raises DataError if no row has the field.
    """
    labels = []
    for _, row in read_rows(data):
        value = (json.loads(row) if isinstance(row, str) else row).get(label_field)
        labels.append(None if value is None else str(value))
    if all(label is None for label in labels):
        raise DataError(f"no row of {data} has a field {label_field!r}; name the field that holds the label")
    return labels


def unprojected_mean(
    package: Package, model: PeftModel, documents: Sequence[EncodedDocument], batch_tokens: int
) -> Direction:
    """The documents' mean gradient without the discovery's mean row, unprojected as an atom is. `model` has θ0 on it.

    Projection is linear, so the mean gradient's row is the mean of the documents' rows.
    """
    projection = projection_of(package)
    row = projection.project(mean_gradient(model, package.base_adapter.space, documents, batch_tokens))
    row -= package.projection_tensors["mean_row"]
    return projection.unproject(row / row.norm().clamp_min(1e-30), package.manifest.conventions.unprojection_exponent)


def _sample(
    documents: Sequence[EncodedDocument],
    labels: Sequence[str | None],
    label: str,
    data: Path,
    label_field: str,
    most: int,
) -> list[EncodedDocument]:
    group = [document for document, found in zip(documents, labels, strict=True) if found == label]
    if not group:
        known = sorted({found for found in labels if found is not None})
        raise DataError(
            f"no document of {data} has {label_field} {label!r}; it has {', '.join(known[:12])}: say which label a behaviour "
            "has with --label BEHAVIOUR=LABEL"
        )
    return group if len(group) <= most else random.Random(0).sample(group, most)
