"""θ0 merged while weights are read, against the embedded engine's merge."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from atoms.errors import WrongBaseError
from atoms.model import merge_adapter, weights_fingerprint
from atoms.package import Package
from server.vllm.loader import checked, merge_stream


@pytest.fixture
def checkpoint(tiny_model_dir) -> dict[str, torch.Tensor]:
    return load_file(tiny_model_dir / "model.safetensors")


def test_merged_weights_are_bit_equal_to_the_embedded_engines(
    checkpoint, tiny_model: PreTrainedModel, tiny_package: Package
) -> None:
    merged = dict(merge_stream(checkpoint.items(), tiny_package.base_adapter, torch.float32))
    before = {name: weight.clone() for name, weight in tiny_model.state_dict().items()}
    merge_adapter(tiny_model, tiny_package.base_adapter)
    after = tiny_model.state_dict()
    assert all(torch.equal(merged[name], after[name]) for name in checkpoint)
    changed = {name for name in checkpoint if not torch.equal(after[name], before[name])}
    assert changed == {f"{module.name}.weight" for module in tiny_package.base_adapter.space.modules}


def test_a_checkpoint_is_cast_to_the_models_dtype_before_it_is_merged(
    checkpoint, tiny_model: PreTrainedModel, tiny_package: Package
) -> None:
    """As transformers does when it loads one: the other order rounds once less, and gives other weights."""
    merged = dict(merge_stream(checkpoint.items(), tiny_package.base_adapter, torch.bfloat16))
    merge_adapter(tiny_model.to(torch.bfloat16), tiny_package.base_adapter)
    weights = tiny_model.state_dict()
    for module in tiny_package.base_adapter.space.modules:
        assert torch.equal(merged[f"{module.name}.weight"], weights[f"{module.name}.weight"])


def test_a_checkpoint_without_an_adapted_weight_is_refused(checkpoint, tiny_package: Package) -> None:
    name = f"{tiny_package.base_adapter.space.modules[0].name}.weight"
    del checkpoint[name]
    with pytest.raises(WrongBaseError, match=name):
        list(merge_stream(checkpoint.items(), tiny_package.base_adapter, torch.float32))


def test_a_checkpoint_with_other_names_is_refused_for_its_names(checkpoint, tiny_package: Package) -> None:
    """What cannot be compared may pass; what θ0 is merged into must be found."""
    renamed = {name.replace("self_attn.", "attention."): tensor for name, tensor in checkpoint.items()}
    expected = tiny_package.manifest.base_model.weights
    said: list[str] = []
    stream = checked(renamed.items(), frozenset(checkpoint), expected, "tiny", said.append)
    with pytest.raises(WrongBaseError, match=r"self_attn.*names its tensors otherwise than transformers"):
        list(merge_stream(stream, tiny_package.base_adapter, torch.float32))
    assert "other names" in said[0]


def test_a_weight_of_another_size_is_refused(checkpoint, tiny_package: Package) -> None:
    name = f"{tiny_package.base_adapter.space.modules[0].name}.weight"
    checkpoint[name] = checkpoint[name][:-1]
    with pytest.raises(WrongBaseError, match="has shape"):
        list(merge_stream(checkpoint.items(), tiny_package.base_adapter, torch.float32))


def test_the_stream_is_held_to_the_packages_fingerprint(checkpoint, tiny_model, tiny_package: Package) -> None:
    names = frozenset(name for name, _ in tiny_model.named_parameters())
    expected = tiny_package.manifest.base_model.weights
    assert expected == weights_fingerprint(tiny_model)
    said: list[str] = []
    assert dict(checked(checkpoint.items(), names, expected, "tiny", said.append)).keys() == checkpoint.keys()
    assert not said

    checkpoint["model.norm.weight"] = checkpoint["model.norm.weight"] + 1
    with pytest.raises(WrongBaseError, match="other weights"):
        list(checked(checkpoint.items(), names, expected, "tiny", said.append))


def test_other_names_cannot_be_compared_and_that_is_said(checkpoint, tiny_package: Package) -> None:
    said: list[str] = []
    expected = tiny_package.manifest.base_model.weights
    list(checked(checkpoint.items(), frozenset({"decoder.weight"}), expected, "tiny", said.append))
    assert "other names" in said[0]
