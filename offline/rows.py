"""Rows of all documents: made inside the backward hooks, kept in memory-mapped shards, read back in blocks.

Neither N×d nor b×d ever exists: a hook turns one matrix's gradient of a batch into its k preconditioned components and a small
sketch, and drops it. Per document are stored

    row     (D,)   x, float32: (Λ+ε)^{-1/2} Qᵀ g, neither centred nor whitened across matrices
    sketch  (S,)   of the raw unit gradient, float16: G R per matrix, R random (d, 8)/√8 on the longer side, so that inner
                   products of sketches estimate cosines of raw gradients without bias (Johnson & Lindenstrauss 1984)
    norm, loss     ‖g‖ and the mean cross-entropy (nats a token)

Shards hold whole batches in a planned order, so a resumed run writes the same bytes.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor

from atoms.projection import Projection, RowWhitening
from atoms.space import LoRASpace
from atoms.storage import write_tensors
from offline.corpus import EncodedDocument, collate, plan_batches
from offline.gradients import gradient_hooks, label_logits, mean_losses
from offline.progress import Progress
from offline.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from peft import PeftModel

SKETCH_COLUMNS = 8
SHARD_DOCUMENTS = 128
BATCH_DOCUMENTS = 1024
"""Rows that are read together: enough that what is done once a batch costs little beside the product with all atoms."""


def write_rows(
    model: PeftModel,
    projection: Projection,
    documents: Sequence[EncodedDocument],
    batch_tokens: int,
    directory: Path,
    progress: Progress,
    ranks: Ranks = ALONE,
) -> None:
    """One forward and backward pass a batch over all documents; shards that exist already are kept. Every rank writes its
    share of the shards, which hold the same documents whatever the number of ranks."""
    shards = dict(ranks.share(list(enumerate(plan_shards(documents, batch_tokens)))))
    pending = {n: shard for n, shard in shards.items() if not shard_path(directory, n).exists()}
    sink = RowSink(projection)
    total, left = (sum(len(group) for shard in part.values() for group in shard) for part in (shards, pending))
    with (
        gradient_hooks(model, projection.space, sink),
        progress.task("gradients", total, "documents", total - left) as bar,
    ):
        for number, shard in pending.items():
            parts = []
            for group in shard:
                parts.append(batch_rows(model, sink, group))
                bar.advance(len(group))
            merged = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
            write_tensors(shard_path(directory, number), merged)


def plan_shards(documents: Sequence[EncodedDocument], batch_tokens: int) -> list[list[tuple[EncodedDocument, ...]]]:
    """Batches grouped into shards of at least `SHARD_DOCUMENTS` documents (the last may be smaller)."""
    shards: list[list[tuple[EncodedDocument, ...]]] = [[]]
    for group in plan_batches(documents, batch_tokens):
        if sum(map(len, shards[-1])) >= SHARD_DOCUMENTS:
            shards.append([])
        shards[-1].append(group)
    return shards


def shard_path(directory: Path, number: int) -> Path:
    return directory / f"rows-{number:05d}.safetensors"


class RowSink:
    """Collects rows (b, D), sketches (b, S) and squared norms (b,) of one batch, matrix by matrix."""

    def __init__(self, projection: Projection) -> None:
        self.projection = projection
        self._slices = dict(projection.slices())
        self._sketchers = {key: Sketcher(shape, key) for key, shape in _shapes(projection.space).items()}
        self._columns, self.sketch_dim = {}, 0
        for key, sketcher in self._sketchers.items():
            self._columns[key] = slice(self.sketch_dim, self.sketch_dim + sketcher.size)
            self.sketch_dim += sketcher.size

    def start(self, size: int) -> None:
        """Prepares for a batch of `size` documents."""
        self.rows = torch.zeros(size, self.projection.dim)
        self.sketches = torch.zeros(size, self.sketch_dim)
        self.squared_norms = torch.zeros(size)

    def __call__(self, key: str, x: Tensor, delta: Tensor) -> None:
        gradient = torch.einsum("bto,bti->boi", delta, x).cpu()
        self.rows[:, self._slices[key]] = self.projection.bases[key].project(gradient)
        self.sketches[:, self._columns[key]] = self._sketchers[key](gradient)
        self.squared_norms += gradient.square().sum((1, 2))


class Sketcher:
    """Random projection of the longer side of gradients (b, o, i) to 8 dimensions; seeded by the matrix's key alone."""

    def __init__(self, shape: tuple[int, int], key: str) -> None:
        self._right = shape[1] >= shape[0]
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        self._random = torch.randn(max(shape), SKETCH_COLUMNS, generator=generator) / SKETCH_COLUMNS**0.5
        self.size = min(shape) * SKETCH_COLUMNS

    def __call__(self, gradient: Tensor) -> Tensor:
        product = gradient @ self._random if self._right else gradient.transpose(1, 2) @ self._random
        return product.flatten(1)  # (b, min(o, i)·8)


@dataclass(frozen=True)
class RowStore:
    """Reads the shards of a directory. Documents are addressed by their row number in the corpus.

    Rows as stored are x; whitened ones x̃ are there once their whitening is `fitted` (offline/whitening.py).
    """

    directory: Path
    fitted: RowWhitening | None = None

    @cached_property
    def shards(self) -> list[Path]:
        return sorted(self.directory.glob("rows-*.safetensors"))

    @cached_property
    def _places(self) -> Tensor:
        """(shard, position) of every document, (N, 2) int32."""
        numbers = [_load(path, "document") for path in self.shards]
        places = torch.empty(sum(map(len, numbers)), 2, dtype=torch.int32)
        for n, documents in enumerate(numbers):
            places[documents, 0] = n
            places[documents, 1] = torch.arange(len(documents), dtype=torch.int32)
        return places

    def __len__(self) -> int:
        return len(self._places)

    def column(self, name: str) -> Tensor:
        """A per-document value (``norm`` or ``loss``), (N,) in corpus order."""
        documents = torch.cat([_load(path, "document") for path in self.shards])
        values = torch.cat([_load(path, name) for path in self.shards])
        return values[torch.argsort(documents)]

    @property
    def width(self) -> int:
        """D, the length of a row."""
        with safe_open(self.shards[0], framework="pt") as file:
            return file.get_slice("row").get_shape()[1]

    def stored_shards(self, ranks: Ranks = ALONE) -> Iterator[Tensor]:
        """Rows x (n, D) as stored, shard by shard of this rank's share."""
        for path in ranks.share(self.shards):
            yield _load(path, "row")

    def stored_batches(self, documents: Sequence[int], ranks: Ranks = ALONE) -> Iterator[tuple[Tensor, Tensor]]:
        """(document numbers (n,), x (n, D) as stored) of those `documents` that are in this rank's share of the shards, at most
        `BATCH_DOCUMENTS` at a time. The rows lie in one buffer, which the next batch overwrites."""
        wanted = torch.tensor(sorted(documents))
        buffer = torch.empty(BATCH_DOCUMENTS, self.width)
        numbers = torch.empty(BATCH_DOCUMENTS, dtype=torch.int64)
        filled = 0
        for path in ranks.share(self.shards):
            document, row = self._mapped(path)
            keep = torch.isin(document, wanted).nonzero().flatten()
            while len(keep):
                part, keep = keep[: BATCH_DOCUMENTS - filled], keep[BATCH_DOCUMENTS - filled :]
                end = filled + len(part)
                torch.index_select(row, 0, part, out=buffer[filled:end])
                numbers[filled:end] = document[part]
                filled = end
                if filled == BATCH_DOCUMENTS:
                    yield numbers.clone(), buffer
                    filled = 0
        if filled:
            yield numbers[:filled], buffer[:filled]

    def _mapped(self, path: Path) -> tuple[Tensor, Tensor]:
        """(document numbers (n,), x (n, D)) of a shard, mapped once for all passes. Its pages are those of the file, which the
        system takes back when it needs memory."""
        if path not in self._maps:
            self._maps[path] = _load(path, "document").clone(), _load(path, "row")
        return self._maps[path]

    @cached_property
    def _maps(self) -> dict[Path, tuple[Tensor, Tensor]]:
        return {}

    def whitened_batches(self, documents: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """(document numbers (n,), x̃ (n, D)) of `documents`, in parts, in the order of the shards."""
        for numbers, rows in self.stored_batches(documents):
            yield numbers, self.whitening.apply(rows)[0]

    def scales(self, documents: Sequence[int], ranks: Ranks = ALONE) -> Tensor:
        """s (N,) with x̃ = s W (x − μ) for those `documents` that are in this rank's share of the shards; 0 for all others."""
        scales = torch.zeros(len(self))
        for numbers, rows in self.stored_batches(documents, ranks):
            scales[numbers] = self.whitening.scales(rows)
        return scales

    def whitened_rows(self, documents: Sequence[int]) -> Tensor:
        """x̃ (n, D) of `documents`, in that order."""
        return self.whitening.apply(self.stored_rows(documents))[0]

    def stored_rows(self, documents: Sequence[int]) -> Tensor:
        """x (n, D) of `documents` as stored, whose inner products are EKFAC influences on the kept components."""
        return self._gather("row", documents)

    def sketches(self, documents: Sequence[int]) -> Tensor:
        """Sketches (n, S) of raw unit gradients of `documents`, float32."""
        return self._gather("sketch", documents).float()

    @property
    def whitening(self) -> RowWhitening:
        """Raises ValueError before it is fitted."""
        if self.fitted is None:
            raise ValueError("the rows' whitening is not fitted yet")
        return self.fitted

    def _gather(self, name: str, documents: Sequence[int]) -> Tensor:
        places = self._places[torch.as_tensor(documents, dtype=torch.int64)]
        result: Tensor | None = None
        for shard in places[:, 0].unique().tolist():
            wanted = places[:, 0] == shard
            values = _load(self.shards[shard], name)[places[wanted, 1]]
            if result is None:
                result = values.new_zeros((len(documents), *values.shape[1:]))
            result[wanted] = values
        if result is None:
            raise ValueError("no documents were asked for")
        return result


def batch_rows(model: PeftModel, sink: RowSink, group: Sequence[EncodedDocument]) -> dict[str, Tensor]:
    """One backward pass: what is stored of each document (see the module docstring). `sink` must be hooked to `model`."""
    batch = collate(group).to(model.device)
    sink.start(len(group))
    losses = mean_losses(label_logits(model, batch), batch)
    losses.sum().backward()  # documents do not share tokens, so each gets the gradient of its own mean loss
    norms = sink.squared_norms.sqrt()
    return {
        "document": torch.tensor([document.row for document in group]),
        "row": sink.rows,
        "sketch": (sink.sketches / norms.clamp_min(1e-20)[:, None]).half(),
        "norm": norms,
        "loss": losses.detach().cpu(),
    }


def _shapes(space: LoRASpace) -> dict[str, tuple[int, int]]:
    return {tensor.key: tensor.shape for tensor in space.tensors}


def _load(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)
