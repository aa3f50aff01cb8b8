"""Controls: what they keep of the atom, that they cost what it costs, and the supervised one against a loop."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from atoms.errors import DataError
from atoms.mix import Mix
from atoms.package import Package
from atoms.projection import RowWhitening
from offline.config import PASS_TOKENS, DiscoverConfig, SteeringConfig
from offline.corpus import EncodedDocument, collate, encode_corpus, read_corpus
from offline.evaluation.answers import Answer
from offline.evaluation.controls import Control, atom_row, control_direction, projection_of, random_row, shuffled_row
from offline.evaluation.document_controls import DocumentGroups, document_controls, read_labels
from offline.gradients import FullGradients, gradient_hooks, label_logits, mean_losses
from offline.lora import frozen_lora
from offline.paths import PathMaker
from offline.pipeline import discover
from offline.progress import Progress

QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def unprojected(tiny_config: Callable[..., DiscoverConfig], tmp_path_factory: pytest.TempPathFactory) -> Package:
    """A package of unprojected dictionary atoms."""
    config = tiny_config(tmp_path_factory.mktemp("unprojected") / "package", steering=SteeringConfig(steps=0))
    return discover(config, Progress(quiet=True))


def test_a_random_row_is_a_unit_row_of_its_seed() -> None:
    row = random_row(5000, 3)
    assert float(row.norm()) == pytest.approx(1.0) and torch.equal(row, random_row(5000, 3))
    assert abs(float(row @ random_row(5000, 4))) < 0.06


def test_a_shuffled_row_keeps_sizes_and_loses_places(tiny_package: Package) -> None:
    row = atom_row(tiny_package, projection_of(tiny_package), tiny_package.manifest.atoms[0].id)
    shuffled = shuffled_row(row, 0)
    assert torch.equal(row.sort().values, shuffled.sort().values)
    assert abs(float(row @ shuffled)) < 0.5 * float(row @ row)


def test_an_unprojected_atoms_row_is_its_dictionary_atoms(unprojected: Package) -> None:
    """Up to the strength and the orientation, a control's way from row to direction is the atom's own."""
    projection, tensors = projection_of(unprojected), unprojected.projection_tensors
    whitening, exponent = RowWhitening.from_tensors(tensors), unprojected.manifest.conventions.unprojection_exponent
    for card, number in zip(unprojected.manifest.atoms, tensors["dictionary_index"], strict=True):
        expected = whitening.undo(tensors["dictionary"][number], exponent)
        cosine = torch.cosine_similarity(atom_row(unprojected, projection, card.id), expected, dim=0)
        assert abs(float(cosine)) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("target", [0.02, 0.2])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_control_costs_the_target(
    scripted: Callable, tiny_package: Package, tiny_tokenizer: PreTrainedTokenizerFast, target: float, sign: float
) -> None:
    harness, _ = scripted(lambda prompt, mix: "")
    ids = tuple(tiny_tokenizer("It rains in spring and in autumn.", add_special_tokens=False)["input_ids"])
    meter = harness.meter([Answer("When does it rain?", Mix(), "", ids, "stop")])
    projection = projection_of(tiny_package)
    row = random_row(projection.dim, 0)
    unit = projection.unproject(row, tiny_package.manifest.conventions.unprojection_exponent)
    direction, kl = control_direction(projection, meter, Control("random-1", unit, sign), target)
    assert kl == pytest.approx(target, rel=0.05)
    mix = harness.directions.add("control", direction)
    assert harness.kl(meter, mix) == pytest.approx(kl, rel=1e-5)
    assert sign * sum(float((direction[key] * unit[key]).sum()) for key in unit) > 0, "the sign was lost"


def labelled(tiny_data: Path, tokenizer: PreTrainedTokenizerFast, label: str) -> list[EncodedDocument]:
    documents, labels = encode_corpus(read_corpus(tiny_data), tokenizer, 512).documents, read_labels(tiny_data, "task")
    return [document for document, found in zip(documents, labels, strict=True) if found == label]


@pytest.mark.parametrize("exponent", [0.5, -0.5])
def test_beside_unprojected_atoms_the_supervised_direction_is_the_mean_gradient(
    unprojected: Package, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, tiny_data: Path,
    tmp_path: Path, exponent: float,
) -> None:  # fmt: skip
    """At p = ½ itself, at −½ the natural step: whitened twice, by what all rows share, too."""
    conventions = unprojected.manifest.conventions.model_copy(update={"unprojection_exponent": exponent})
    manifest = unprojected.manifest.model_copy(update={"conventions": conventions})
    unprojected = dataclasses.replace(unprojected, manifest=manifest)
    groups = DocumentGroups(tiny_data, "task", {"yes-no": "yes-no", "other": "one-word"}, 99, 0)
    loaded = (tiny_model, tiny_tokenizer)
    directions = document_controls(unprojected, groups, lambda: loaded, tmp_path, QUIET).labelled
    space, projection = unprojected.base_adapter.space, projection_of(unprojected)
    peft = frozen_lora(tiny_model, unprojected.path / "base", space)
    total: dict[str, torch.Tensor] = {}
    chosen = labelled(tiny_data, tiny_tokenizer, "yes-no")
    for document in chosen:
        sink = FullGradients()
        with gradient_hooks(peft, space, sink):
            batch = collate([document])
            mean_losses(label_logits(peft, batch), batch).sum().backward()
        for key, value in sink.tensors.items():
            total[key] = total.get(key, 0) + value[0] / len(chosen)
    peft.unload()
    expected = projection.project(total) - unprojected.projection_tensors["mean_row"]
    if exponent == -0.5:
        whitening = RowWhitening.from_tensors(unprojected.projection_tensors)
        expected = whitening.scale(expected, whitening.factors.square())
    made = [
        torch.nn.functional.normalize(projection.row_of(directions[name], exponent), dim=0)
        for name in ("yes-no", "other")
    ]
    torch.testing.assert_close(made[0], expected / expected.norm(), rtol=1e-3, atol=1e-4)
    assert abs(float(made[0] @ made[1])) < 0.95


def test_beside_paths_the_directions_of_documents_are_paths(
    tiny_package: Package, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, tiny_data: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    groups = DocumentGroups(tiny_data, "task", {"yes-no": "yes-no"}, 99, draws=2, seed=7)
    made = document_controls(tiny_package, groups, lambda: (tiny_model, tiny_tokenizer), tmp_path, QUIET)
    space = tiny_package.base_adapter.space
    path = tiny_package.manifest.conventions.path
    assert path is not None
    peft = frozen_lora(tiny_model, tiny_package.path / "base", space)
    pool = encode_corpus(read_corpus(tiny_data), tiny_tokenizer, 512).documents
    maker = PathMaker.of(peft, space, pool, SteeringConfig(**dict(path)), PASS_TOKENS)
    drawn = [random.Random(f"7 {n}").sample(pool, maker.config.documents) for n in range(2)]
    expected = [maker.direction(group) for group in (labelled(tiny_data, tiny_tokenizer, "yes-no"), *drawn)]
    peft.unload()
    for found, wanted in zip((made.labelled["yes-no"], *made.random), expected, strict=True):
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6)
    assert set(map(len, drawn)) == {maker.config.documents}


def test_only_the_directions_that_are_missing_are_made(
    tiny_package: Package, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, tiny_data: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    loads = []

    def load() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
        loads.append(1)
        return tiny_model, tiny_tokenizer

    def make(labels: dict[str, str], draws: int, seed: int = 0) -> set[Path]:
        groups = DocumentGroups(tiny_data, "task", labels, 4, draws, seed)
        document_controls(tiny_package, groups, load, tmp_path, QUIET)
        return set(tmp_path.iterdir())

    first = make({"yes-no": "yes-no"}, 1)
    times = {file: file.stat().st_mtime_ns for file in first}
    more = make({"yes-no": "yes-no", "one-word": "one-word"}, 2)
    assert (len(first), len(more), len(loads)) == (2, 4, 2)
    assert {file: file.stat().st_mtime_ns for file in first} == times, "a direction was made again"
    assert make({"one-word": "one-word"}, 1) == more and len(loads) == 2, "nothing was missing"
    assert len(make({"yes-no": "yes-no"}, 1, seed=1)) == 6, "another seed draws other documents"


@pytest.mark.parametrize(("field", "label"), [("task", "opera"), ("genre", "yes-no")], ids=["label", "field"])
def test_labels_that_are_not_there_are_named(
    tiny_package: Package, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, tiny_data: Path,
    tmp_path: Path, field: str, label: str,
) -> None:  # fmt: skip
    with pytest.raises(DataError, match="opera|genre"):
        groups = DocumentGroups(tiny_data, field, {"yes-no": label}, 9)
        document_controls(tiny_package, groups, lambda: (tiny_model, tiny_tokenizer), tmp_path, QUIET)


def test_documents_are_as_long_as_the_discovery_took_them(
    tiny_package: Package, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, tiny_data: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("offline.evaluation.document_controls.recorded_settings", lambda _: {"max_length": 2})
    groups = DocumentGroups(tiny_data, "task", {"yes-no": "yes-no"}, 9)
    with pytest.raises(DataError, match="at most 1 fit"):
        document_controls(tiny_package, groups, lambda: (tiny_model, tiny_tokenizer), tmp_path, QUIET)


def test_labels_are_in_the_order_of_the_documents(tmp_path: Path, tiny_data: Path) -> None:
    rows = [json.loads(line) for line in tiny_data.read_text().splitlines()]
    del rows[1]["task"]
    file = tmp_path / "some.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    labels = read_labels(file, "task")
    assert len(labels) == len(read_corpus(file).documents) and labels[1] is None and labels[0] == rows[0]["task"]
    assert dataclasses.is_dataclass(read_corpus(file))
