"""The rows' mean and leading components against a full singular value decomposition."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from atoms.errors import ConfigError
from atoms.storage import write_tensors
from offline.config import WhiteningConfig
from offline.progress import Progress
from offline.rows import RowStore, shard_path
from offline.whitening import common_direction, fit_whitening

DIM = 40
RIDGE = 0.05
"""10 / 200 documents: the least ridge for the rows of these tests."""
QUIET = Progress(quiet=True)


def stored(folder: Path, rows: Tensor, shard: int = 30) -> RowStore:
    for number, start in enumerate(range(0, len(rows), shard)):
        part = rows[start : start + shard]
        write_tensors(shard_path(folder, number), {"document": torch.arange(start, start + len(part)), "row": part})
    return RowStore(folder)


@pytest.fixture
def rows() -> Tensor:
    """200 rows around a mean with a few strong shared directions."""
    generator = torch.Generator().manual_seed(3)
    scale = torch.cat([torch.tensor([6.0, 4.0, 3.0, 2.0]), torch.full((DIM - 4,), 0.5)])
    rotation = torch.linalg.qr(torch.randn(DIM, DIM, generator=generator)).Q
    return torch.randn(200, DIM, generator=generator) * scale @ rotation.T + 2.0


def oracle(rows: Tensor, ridge: float) -> Tensor:
    """x̃ by a full decomposition in float64, every component scaled."""
    centred = torch.nn.functional.normalize((rows - rows.mean(0)).double(), dim=1)
    u, s, vh = torch.linalg.svd(centred, full_matrices=False)
    shares = s.square() / s.square().sum()
    return torch.nn.functional.normalize(u * s * (ridge / (shares + ridge)).sqrt() @ vh, dim=1).float()


def test_leading_components_are_whitened_as_a_full_decomposition_would(tmp_path: Path, rows: Tensor) -> None:
    store = stored(tmp_path, rows)
    whitening = fit_whitening(store, WhiteningConfig(ridge=RIDGE), QUIET)
    assert torch.allclose(whitening.mean, rows.mean(0), atol=1e-5)
    assert torch.allclose(whitening.components.T @ whitening.components, torch.eye(len(whitening.factors)), atol=1e-4)
    found = RowStore(tmp_path, whitening).whitened_rows(range(len(rows)))
    agreement = (found * oracle(rows, RIDGE)).sum(1)
    assert agreement.min() > 0.999, "rows differ from those of a full decomposition"


def test_few_components_whiten_only_the_strongest(tmp_path: Path, rows: Tensor) -> None:
    store = stored(tmp_path, rows)
    two = fit_whitening(store, WhiteningConfig(ridge=RIDGE, components=2), QUIET)
    all_of_them = fit_whitening(store, WhiteningConfig(ridge=RIDGE), QUIET)
    assert len(two.factors) == 2
    assert torch.allclose(two.factors, all_of_them.factors[:2], atol=1e-3)
    assert (two.components * all_of_them.components[:, :2]).sum(0).abs().min() > 0.999


def test_memory_does_not_decide_the_outcome(tmp_path: Path, rows: Tensor) -> None:
    """Shards of 7 or 200 documents give the same whitening: sums over shards are all that is kept."""
    small = fit_whitening(stored(tmp_path / "a", rows, 7), WhiteningConfig(), QUIET)
    whole = fit_whitening(stored(tmp_path / "b", rows, 200), WhiteningConfig(), QUIET)
    assert torch.allclose(small.factors, whole.factors, atol=1e-4)
    assert torch.allclose(small.apply(rows)[0], whole.apply(rows)[0], atol=1e-3)


def test_few_documents_raise_the_ridge_above_chance(tmp_path: Path, rows: Tensor) -> None:
    store = stored(tmp_path, rows)
    least, less = (fit_whitening(store, WhiteningConfig(ridge=ridge), QUIET) for ridge in (RIDGE, 0.001))
    assert torch.equal(least.factors, less.factors)


def test_without_a_ridge_rows_are_only_centred(tmp_path: Path, rows: Tensor) -> None:
    store = stored(tmp_path, rows)
    whitening = fit_whitening(store, WhiteningConfig(ridge=0), QUIET)
    expected = torch.nn.functional.normalize(rows - rows.mean(0), dim=1)
    assert torch.allclose(whitening.apply(rows)[0], expected, atol=1e-5)
    bare = fit_whitening(store, WhiteningConfig(centred=False, ridge=0), QUIET)
    assert torch.allclose(bare.apply(rows)[0], torch.nn.functional.normalize(rows, dim=1), atol=1e-6)


def test_rows_are_refused_before_their_whitening_is_known(tmp_path: Path, rows: Tensor) -> None:
    with pytest.raises(ValueError, match="not fitted"):
        stored(tmp_path, rows).whitened_rows([0])


def test_a_ridge_outside_its_limits_is_named() -> None:
    with pytest.raises(ConfigError, match=r"ridge is 1.5; it must be a share of the variance, 0 to 1"):
        WhiteningConfig(ridge=1.5)


def test_the_common_direction_is_what_the_rows_share(tmp_path: Path, rows: Tensor) -> None:
    parts = [("m.10.q.lora_A", slice(0, 10)), ("m.2.q.lora_A", slice(10, 20)), ("m.2.v.lora_B", slice(20, 30)),
             ("head.lora_A", slice(30, DIM))]  # fmt: skip
    store = stored(tmp_path, rows)
    found = common_direction(RowStore(tmp_path, fit_whitening(store, WhiteningConfig(), QUIET)), parts)
    mean = rows.double().mean(0)
    assert found["share"] == pytest.approx(float(mean.square().sum() / rows.double().square().sum(1).mean()), rel=1e-5)
    cosines = torch.cosine_similarity(rows.double(), mean[None])
    assert found["median_cosine"] == pytest.approx(float(cosines.median()), abs=1e-3)
    shares = mean.square() / mean.square().sum()
    assert [layer for layer, _ in found["by_layer"]] == ["2", "10", "none"], "layers by number, not by name"
    expected = [float(shares[part].sum()) for part in (slice(10, 30), slice(0, 10), slice(30, DIM))]
    assert [share for _, share in found["by_layer"]] == pytest.approx(expected, abs=1e-5)
    unfitted = fit_whitening(store, WhiteningConfig(centred=False, ridge=0.0), QUIET)
    assert common_direction(RowStore(tmp_path, unfitted), parts) == {}
