"""Cross-entropy in parts against torch's own on the whole."""

from __future__ import annotations

import pytest
import torch

from offline import losses
from offline.losses import cross_entropy


@pytest.fixture(params=[1, 64, 10**9], ids=["a row a part", "two rows a part", "one part"])
def part(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_PART", request.param)


@pytest.mark.usefixtures("part")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_are_those_of_torch(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values, labels, weights = (20 * torch.randn(7, 31)).to(dtype), torch.randint(31, (7,)), torch.randn(7)
    labels[0], labels[1] = 0, 30
    ours, plain = (values.clone().requires_grad_() for _ in range(2))
    found = cross_entropy(ours, labels)
    wanted = torch.nn.functional.cross_entropy(plain.float(), labels, reduction="none")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    for losses_ in (found, wanted):
        (losses_ @ weights).backward()
    assert ours.grad is not None and plain.grad is not None and ours.grad.dtype == dtype
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)


def test_a_certain_prediction_costs_nothing_and_an_impossible_one_what_it_says() -> None:
    logits = torch.tensor([[100.0, 0.0], [0.0, 100.0]], requires_grad=True)
    found = cross_entropy(logits, torch.tensor([0, 0]))
    assert found.tolist() == [0.0, 100.0]
    found.sum().backward()
    assert logits.grad is not None and logits.grad.flatten().tolist() == pytest.approx([0, 0, -1, 1])
