"""The supervised ceiling: directions made from documents with labels. The only place that reads labels.

Discovery never sees them; here they say what the atoms' own recipe would have made of a behaviour's documents.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
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


def supervised_directions(
    package: Package, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Path, field: str,
    labels: Mapping[str, str], most: int, progress: Progress, batch_tokens: int = 1024,
) -> dict[str, Direction]:  # fmt: skip
    """Behaviour -> direction of at most `most` documents with the behaviour's label, made as the package's atoms are: a path
    of gradient steps, or their unprojected mean gradient.

    `model` is the unmerged base; it comes back as it was. Raises DataError for a file without the field or a label
    that no document carries.
    """
    documents = encode_corpus(read_corpus(data), tokenizer, _MAX_LENGTH).documents
    found = read_labels(data, field)
    groups = {behaviour: _sample(documents, found, label, data, field, most) for behaviour, label in labels.items()}
    space = package.base_adapter.space
    peft = frozen_lora(model, package.path / "base", space)
    try:
        with progress.task("supervised directions", len(groups), "behaviours") as bar:
            path = package.manifest.conventions.path
            maker = path and PathMaker.of(peft, space, documents, SteeringConfig(**dict(path)), batch_tokens)
            made = {}
            for behaviour, group in groups.items():
                made[behaviour] = (
                    maker.direction(group) if maker else unprojected_mean(package, peft, group, batch_tokens)
                )
                bar.advance()
            return made
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
