"""Controls: what they keep of the atom, that they cost what it costs, and the supervised one against a loop."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from atoms.errors import DataError
from atoms.mix import Mix
from atoms.package import Package
from offline.corpus import collate, encode_corpus, read_corpus
from offline.evaluation.answers import Answer
from offline.evaluation.controls import atom_row, control_direction, projection_of, random_row, shuffled_row
from offline.evaluation.supervised import read_labels, supervised_rows
from offline.gradients import FullGradients, gradient_hooks, label_logits, mean_losses
from offline.models import frozen_lora
from offline.progress import Progress


def test_a_random_row_is_a_unit_row_of_its_seed() -> None:
    row = random_row(5000, 3)
    assert float(row.norm()) == pytest.approx(1.0) and torch.equal(row, random_row(5000, 3))
    assert abs(float(row @ random_row(5000, 4))) < 0.06


def test_a_shuffled_row_keeps_sizes_and_loses_places(tiny_package: Package) -> None:
    row = atom_row(tiny_package, tiny_package.manifest.atoms[0].id)
    shuffled = shuffled_row(row, 0)
    assert torch.equal(row.sort().values, shuffled.sort().values)
    assert abs(float(row @ shuffled)) < 0.5 * float(row @ row)


def test_an_atoms_row_unprojects_to_the_atoms_direction(tiny_package: Package) -> None:
    """Up to the strength and the orientation, a control's way from row to direction is the atom's own."""
    projection = projection_of(tiny_package)
    for card in tiny_package.manifest.atoms:
        exponent = tiny_package.manifest.conventions.unprojection_exponent
        made = projection.unproject(atom_row(tiny_package, card.id), exponent)
        stored = tiny_package.bank.direction(Mix.of({card.id: 1.0}))
        ours, theirs = (torch.cat([d[key].flatten() for key in sorted(d)]) for d in (made, stored))
        assert abs(float(torch.cosine_similarity(ours, theirs, dim=0))) == pytest.approx(1.0, abs=1e-4)


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
    direction, kl = control_direction(tiny_package, projection, meter, row, sign, target)
    assert kl == pytest.approx(target, rel=0.05)
    mix = harness.directions.add("control", direction)
    assert harness.kl(meter, mix) == pytest.approx(kl, rel=1e-5)
    unit = projection.unproject(row, tiny_package.manifest.conventions.unprojection_exponent)
    assert sign * sum(float((direction[key] * unit[key]).sum()) for key in unit) > 0, "the sign was lost"


def test_the_supervised_row_is_the_mean_of_the_labelled_documents_gradients(
    tiny_package: Package, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, tiny_data: Path
) -> None:
    rows = supervised_rows(
        tiny_package, tiny_model, tiny_tokenizer, tiny_data, "task", {"yes-no": "yes-no", "other": "one-word"}, 99,
        Progress(quiet=True), batch_tokens=300,
    )  # fmt: skip
    labels = read_labels(tiny_data, "task")
    documents = encode_corpus(read_corpus(tiny_data), tiny_tokenizer, 512).documents
    peft = frozen_lora(tiny_model, tiny_package.path / "base", tiny_package.base_adapter.space)
    total: dict[str, torch.Tensor] = {}
    chosen = [document for document, label in zip(documents, labels, strict=True) if label == "yes-no"]
    for document in chosen:
        sink = FullGradients()
        with gradient_hooks(peft, tiny_package.base_adapter.space, sink):
            batch = collate([document])
            mean_losses(label_logits(peft, batch), batch).sum().backward()
        for key, value in sink.tensors.items():
            total[key] = total.get(key, 0) + value[0] / len(chosen)
    peft.unload()
    expected = projection_of(tiny_package).project(total) - tiny_package.projection_tensors["mean_row"]
    torch.testing.assert_close(rows["yes-no"], expected / expected.norm(), rtol=1e-3, atol=1e-5)
    assert abs(float(rows["yes-no"] @ rows["other"])) < 0.95


@pytest.mark.parametrize(("field", "label"), [("task", "opera"), ("genre", "yes-no")], ids=["label", "field"])
def test_labels_that_are_not_there_are_named(
    tiny_package: Package, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, tiny_data: Path,
    field: str, label: str,
) -> None:  # fmt: skip
    with pytest.raises(DataError, match="opera|genre"):
        supervised_rows(
            tiny_package, tiny_model, tiny_tokenizer, tiny_data, field, {"yes-no": label}, 9, Progress(quiet=True)
        )


def test_labels_are_in_the_order_of_the_documents(tmp_path: Path, tiny_data: Path) -> None:
    rows = [json.loads(line) for line in tiny_data.read_text().splitlines()]
    del rows[1]["task"]
    file = tmp_path / "some.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    labels = read_labels(file, "task")
    assert len(labels) == len(read_corpus(file).documents) and labels[1] is None and labels[0] == rows[0]["task"]
    assert dataclasses.is_dataclass(read_corpus(file))
