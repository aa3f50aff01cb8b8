"""Attribution on the real package: a training document gets its stored code, and a document's batch does not matter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from atoms.errors import ConfigError, DataError, PackageError, WrongBaseError
from atoms.package import Package
from atoms.projection import RowWhitening
from offline.attribute import Attribution, Attributor
from offline.corpus import Document, parse_document, read_corpus
from offline.rows import RowStore


@pytest.fixture(scope="module")
def model(load_smol: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    return load_smol()


@pytest.fixture(scope="module")
def attributor(
    real_package: Package, model: PreTrainedModel, smol_tokenizer: PreTrainedTokenizerBase
) -> Iterator[Attributor]:
    with Attributor(real_package, model, smol_tokenizer) as ready:
        yield ready


@pytest.fixture(scope="module")
def documents(real_package: Package) -> Sequence[Document]:
    """The documents that the package was made from."""
    return read_corpus(real_package.path.with_name("data.jsonl")).documents


@pytest.fixture(scope="module")
def attributions(attributor: Attributor, documents: Sequence[Document]) -> list[Attribution]:
    return list(attributor.attribute(documents))


def chat(prompt: str, response: str, name: str = "new") -> Document:
    return parse_document({"id": name, "prompt": prompt, "response": response})


def test_a_training_document_gets_the_row_and_the_code_of_the_discovery(
    real_package: Package, attributions: list[Attribution]
) -> None:
    whitening = RowWhitening.from_tensors(real_package.projection_tensors)
    store = RowStore(real_package.path.with_name("package.work") / "rows", whitening)
    rows = store.whitened_rows(range(len(attributions)))
    for attribution, row in zip(attributions, rows, strict=True):
        assert torch.allclose(attribution.row, row, atol=1e-5), "the package's projection is not the discovery's"
    found = {a.document.id: {part.card.id: part.code for part in a.atoms if part.card} for a in attributions}
    stored = [
        (line["atom"], document) for line in real_package.evidence() for document in line["documents"]
    ]  # fmt: skip
    assert len(stored) > 10
    for atom, document in stored:
        assert found[document["id"]][atom] == pytest.approx(document["code"], abs=1e-4)


def test_a_batch_equals_one_at_a_time_in_order(
    attributor: Attributor, documents: Sequence[Document], attributions: list[Attribution]
) -> None:
    assert [a.document.id for a in attributions] == [d.id for d in documents]
    assert len({a.tokens for a in attributions}) > 5, "documents of one length would not be padded"
    for place in (0, 9, 20):
        (alone,) = attributor.attribute([documents[place]])
        together = attributions[place]
        assert float((alone.row - together.row).norm()) < 1e-2
        assert torch.allclose(alone.codes, together.codes, atol=1e-2)
        assert alone.loss == pytest.approx(together.loss, rel=1e-4)
        assert alone.unexplained == pytest.approx(together.unexplained, abs=1e-2)


def test_blocks_do_not_show(
    attributor: Attributor, documents: Sequence[Document], attributions: list[Attribution],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("offline.attribute._BLOCK_DOCUMENTS", 3)
    for got, expected in zip(attributor.attribute(iter(documents[:7])), attributions[:7], strict=True):
        assert got.document == expected.document
        assert float((got.row - expected.row).norm()) < 1e-2, "other batches may round otherwise, and no more"


def test_shares_and_the_unexplained_part_make_the_whole_row(
    attributor: Attributor, attributions: list[Attribution]
) -> None:
    for attribution in attributions:
        assert sum(part.share for part in attribution.atoms) + attribution.unexplained == pytest.approx(1, abs=1e-5)
        assert [abs(part.share) for part in attribution.atoms] == sorted(
            (abs(part.share) for part in attribution.atoms), reverse=True
        )
        residual = attribution.row - attribution.codes @ attributor.dictionary
        worst = float((attributor.dictionary @ residual).max())
        assert worst <= attributor.alpha + 1e-4, "a code is no minimiser: an atom explains more than α of the residual"


def test_a_document_that_is_an_atom_is_explained_by_it(
    attributor: Attributor, documents: Sequence[Document], attributions: list[Attribution],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """With x̃ itself and a direction at right angles as the dictionary, the lasso's code is 1 − α in closed form."""
    row = attributions[0].row
    other = attributions[1].row - (attributions[1].row @ row) * row
    monkeypatch.setattr(attributor, "dictionary", torch.stack([other / other.norm(), row]))
    monkeypatch.setattr(attributor, "cards", {})
    (got,) = attributor.attribute([documents[0]])
    assert [(part.index, part.card) for part in got.atoms] == [(1, None)]
    assert [got.atoms[0].code, got.atoms[0].share] == pytest.approx([1 - attributor.alpha] * 2, abs=1e-4)
    assert got.unexplained == pytest.approx(attributor.alpha, abs=1e-4)
    assert got.atoms[0].name == "dictionary atom 1"


def test_another_document_gets_another_code(attributor: Attributor) -> None:
    yes, listed = attributor.attribute(
        [chat("Is water wet?", "Yes."), chat("Name two fruits.", "- an apple\n- a pear\n- a fig")]
    )
    assert float(yes.row @ listed.row) < 0.9
    assert not torch.equal(yes.codes, listed.codes)


def test_a_long_prompt_is_cut_from_the_left_and_said(attributor: Attributor) -> None:
    prompt = "word " * 600 + "Is water wet?"
    (cut,) = attributor.attribute([chat(prompt, "Yes.")])
    assert cut.tokens == attributor.max_length
    assert cut.truncated > 100
    (whole,) = attributor.attribute([chat("Is water wet?", "Yes.")])
    assert whole.truncated == 0


def test_a_response_that_leaves_no_room_is_refused(attributor: Attributor) -> None:
    with pytest.raises(DataError, match=r"'long' has a response of \d+ tokens.*allow more with --max-length"):
        list(attributor.attribute([chat("Is water wet?", "yes " * 600, "long")]))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Is water wet?"},
        {"prompt": "Is water wet?", "response": " "},
        {"messages": [{"role": "user", "content": "Is water wet?"}]},
        {"messages": [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Why?"}]},
    ],
    ids=["only a prompt", "empty response", "one turn", "no response"],
)
def test_a_document_without_a_response_is_refused(row: dict) -> None:
    with pytest.raises(DataError, match="response|assistant turn"):
        parse_document(row)


def test_close_leaves_the_base_model_as_it_was(
    real_package: Package, load_smol: Callable[[], PreTrainedModel], smol_tokenizer: PreTrainedTokenizerBase
) -> None:
    model = load_smol()
    names = [name for name, _ in model.named_modules()]
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        before = model(input_ids=ids).logits
    with Attributor(real_package, model, smol_tokenizer) as attributor:
        list(attributor.attribute([chat("Is water wet?", "Yes.")]))
    with torch.inference_mode():
        assert torch.equal(model(input_ids=ids).logits, before)
    assert [name for name, _ in model.named_modules()] == names


def test_another_model_is_refused(
    real_package: Package, tiny_model: PreTrainedModel, smol_tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(WrongBaseError, match="another architecture"):
        Attributor(real_package, tiny_model, smol_tokenizer)


def test_a_merged_model_is_refused(
    real_package: Package, merged_smol: PreTrainedModel, smol_tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(WrongBaseError, match="other weights"):
        Attributor(real_package, merged_smol, smol_tokenizer)


def test_a_length_beyond_the_context_is_refused(
    tiny_package: Package, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(ConfigError, match="max_length is 4096; the model's context has 1024 tokens"):
        Attributor(tiny_package, tiny_model, tiny_tokenizer, max_length=4096)


def test_a_package_without_its_settings_is_refused(
    tiny_package: Package, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    bare = dataclasses.replace(tiny_package, manifest=tiny_package.manifest.model_copy(update={"record": {}}))
    with pytest.raises(PackageError, match="does not record how it was discovered"):
        Attributor(bare, tiny_model, tiny_tokenizer)
