"""Controls made of documents, by the atoms' own recipe: of those with a behaviour's label, and of random ones.

The first say what labels would have bought, the second what the recipe does to whatever documents it is given. The only
place that reads labels: discovery never sees them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file

from atoms.errors import DataError
from atoms.package import PROJECTION, Package
from atoms.projection import RowWhitening
from atoms.space import Direction
from atoms.storage import recipe_file, sha256_file, write_tensors
from offline.config import PASS_TOKENS, SteeringConfig
from offline.corpus import EncodedDocument, encode_corpus, read_corpus, read_rows
from offline.evaluation.controls import Control, projection_of
from offline.evaluation.results import RANDOM_DOCUMENTS, SUPERVISED, Goal, drawn
from offline.gradients import mean_gradient
from offline.lora import frozen_lora
from offline.paths import PathMaker
from offline.progress import Progress
from offline.record import recorded_settings

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class DocumentGroups:
    """What the controls are made of: at most `most` documents of `data` with each behaviour's label, and `draws` groups of
    random ones, as many as an atom's direction is made of."""

    data: Path
    label_field: str
    labels: Mapping[str, str]
    most: int
    draws: int = 1
    seed: int = 0


@dataclass(frozen=True)
class DocumentControls:
    """Directions: of the documents with a behaviour's label, by behaviour, and of random documents, one a draw."""

    labelled: Mapping[str, Direction] = field(default_factory=dict)
    random: Sequence[Direction] = ()

    def of(self, goal: Goal) -> list[Control]:
        """Random documents', and towards the labelled documents of the goal's behaviour or away from them."""
        controls = [Control(drawn(RANDOM_DOCUMENTS, n), direction) for n, direction in enumerate(self.random, 1)]
        if goal.behaviour in self.labelled:
            controls.append(Control(SUPERVISED, self.labelled[goal.behaviour], float(goal.sign)))
        return controls


Loaded = tuple["PreTrainedModel", "PreTrainedTokenizerBase"]


def document_controls(
    package: Package, groups: DocumentGroups, load: Callable[[], Loaded], folder: Path, progress: Progress
) -> DocumentControls:
    """The groups' directions, made as the package's atoms are: a path of gradient steps, or the unprojected mean gradient.

    Kept in `folder`, each in a file of its own; `load` gives the unmerged base and its tokenizer, and is called only if one is
    missing. Raises DataError for a file without the field, a label that no document carries or a response longer than the
    discovery took, PackageError for a package that does not record how long that is.
    """
    labelled, random_files = _files(package, groups, folder)
    if not all(file.exists() for file in (*labelled.values(), *random_files)):
        _make(package, groups, load(), labelled, random_files, progress)
    return DocumentControls(
        {behaviour: load_file(file) for behaviour, file in labelled.items()}, [load_file(file) for file in random_files]
    )


def _files(package: Package, groups: DocumentGroups, folder: Path) -> tuple[dict[str, Path], list[Path]]:
    """A file for each behaviour and each draw, named after all that decides its direction."""
    manifest = package.manifest
    common = [manifest.base_model.weights, manifest.adapter_hash, manifest.files[PROJECTION],
              manifest.conventions.model_dump(), recorded_settings(package)["max_length"], sha256_file(groups.data),
              groups.most, groups.seed]  # fmt: skip

    labelled = {behaviour: recipe_file(folder, "labelled", [*common, groups.label_field, label])
                for behaviour, label in groups.labels.items()}  # fmt: skip
    return labelled, [recipe_file(folder, "random", [*common, n]) for n in range(groups.draws)]


def _make(
    package: Package, groups: DocumentGroups, loaded: Loaded, labelled: Mapping[str, Path], random_files: Sequence[Path],
    progress: Progress,
) -> None:  # fmt: skip
    """Makes and writes the directions whose files are missing."""
    model, tokenizer = loaded
    max_length = recorded_settings(package)["max_length"]
    documents = encode_corpus(read_corpus(groups.data), tokenizer, max_length).documents
    path = package.manifest.conventions.path
    config = SteeringConfig(**dict(path)) if path else None
    size = min(config.documents if config else groups.most, len(documents))
    found = read_labels(groups.data, groups.label_field)
    wanted = {
        file: sample_labelled(documents, found, groups, groups.labels[behaviour])
        for behaviour, file in labelled.items()
    }
    wanted |= {file: random.Random(f"{groups.seed} {n}").sample(documents, size) for n, file in enumerate(random_files)}
    missing = {file: members for file, members in wanted.items() if not file.exists()}
    peft = frozen_lora(model, package.path / "base", package.base_adapter.space)
    try:
        with progress.task("directions of documents", len(missing), "groups") as bar:
            maker = config and PathMaker.of(peft, package.base_adapter.space, documents, config, PASS_TOKENS)
            for file, members in missing.items():
                write_tensors(file, maker.direction(members) if maker else unprojected_mean(package, peft, members))
                bar.advance()
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


def unprojected_mean(package: Package, model: PeftModel, documents: Sequence[EncodedDocument]) -> Direction:
    """The documents' mean gradient, whitened as rows are and unprojected as an atom is. `model` has θ0 on it.

    Projection is linear, so the mean gradient's row is the mean of the documents' rows.
    """
    projection, whitening = projection_of(package), RowWhitening.from_tensors(package.projection_tensors)
    exponent = package.manifest.conventions.unprojection_exponent
    row = projection.project(mean_gradient(model, package.base_adapter.space, documents, PASS_TOKENS))
    whitened = whitening.apply(row[None])[0][0]
    return projection.unproject(whitening.undo(whitened, exponent), exponent)


def sample_labelled(
    documents: Sequence[EncodedDocument], labels: Sequence[str | None], groups: DocumentGroups, label: str
) -> list[EncodedDocument]:
    """At most `groups.most` random documents that carry `label`, of `labels` one a document. Raises DataError if none does."""
    carriers = [document for document, found in zip(documents, labels, strict=True) if found == label]
    if not carriers:
        known = sorted({found for found in labels if found is not None})
        raise DataError(
            f"no document of {groups.data} has {groups.label_field} {label!r}; it has {', '.join(known[:12])}: say which "
            "label a behaviour has with --label BEHAVIOUR=LABEL"
        )
    return carriers if len(carriers) <= groups.most else random.Random(groups.seed).sample(carriers, groups.most)
