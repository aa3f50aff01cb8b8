"""Attribution: which atoms a new document is made of, which training documents stand behind them, and what is left over.

    document ──► gradient at θ0 ──► whitened, centred row x̃ of unit length ──► sparse code a over the dictionary D

as in discovery, with the package's own basis, mean row and dictionary. With r = x̃ − Σ_j a_j d_j,
    1 = ‖x̃‖² = Σ_j a_j ⟨d_j, x̃⟩ + ⟨r, x̃⟩,
so the share of atom j is a_j ⟨d_j, x̃⟩, the unexplained share is ⟨r, x̃⟩, and all shares add up to 1. A share says how much
of what training on this document would change is what training on the atom's documents changed.

Needs a backward pass, hence no part of serving.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from atoms.errors import ConfigError
from atoms.manifest import AtomCard
from atoms.model import context_length
from atoms.package import Package
from atoms.projection import Projection, RowWhitening, sparse_codes
from offline.config import PASS_TOKENS
from offline.corpus import Document, EncodedDocument, encode_document, plan_batches
from offline.gradients import gradient_hooks
from offline.lora import frozen_lora
from offline.record import recorded_settings
from offline.rows import RowSink, batch_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_BLOCK_DOCUMENTS = 256
"""Documents are read, bucketed by length and answered in blocks of this size, so memory does not grow with their number."""


@dataclass(frozen=True)
class AtomShare:
    """One dictionary atom's part in a document. `card` is None for an atom that discovery did not keep."""

    index: int
    card: AtomCard | None
    code: float
    share: float

    @property
    def name(self) -> str:
        return self.card.name if self.card else f"dictionary atom {self.index}"


@dataclass(frozen=True)
class Attribution:
    """A document's atoms, largest share first, and its `unexplained` share; together 1.

    row x̃ (D,) and codes (K,) are float32; `loss` is the mean response-token cross-entropy at θ0 in nats a token;
    `truncated` counts the prompt tokens cut from the left.
    """

    document: Document
    tokens: int
    truncated: int
    loss: float
    atoms: tuple[AtomShare, ...]
    unexplained: float
    row: Tensor
    codes: Tensor


class Attributor:
    """The model with θ0 on it and the package's projection, ready for documents. A context manager; not thread-safe.

    `model` is the unmerged base model; `close()` takes θ0 off it again. `max_length` None is the one of the discovery, or the
    model's context if that is shorter. Raises WrongBaseError for another model, PackageError for a package whose projection
    cannot be used, ConfigError for a `max_length` beyond the model's context.
    """

    def __init__(
        self, package: Package, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *,
        max_length: int | None = None, batch_tokens: int = PASS_TOKENS,
    ) -> None:  # fmt: skip
        package.check_base(model)
        settings = recorded_settings(package)
        context = context_length(model)
        self.max_length = max_length or min(settings["max_length"], context)
        if self.max_length > context:
            raise ConfigError(
                f"max_length is {self.max_length}; the model's context has {context} tokens: choose at most that"
            )
        self.tokenizer, self.batch_tokens = tokenizer, batch_tokens
        self.alpha, self.nonnegative = settings["dictionary"]["alpha"], settings["dictionary"]["nonnegative"]
        tensors, space = package.projection_tensors, package.base_adapter.space
        self.projection = Projection.from_tensors(space, tensors)
        self.whitening, self.dictionary = RowWhitening.from_tensors(tensors), tensors["dictionary"]
        self.cards = dict(zip(tensors["dictionary_index"].tolist(), package.manifest.atoms, strict=True))
        self._model = frozen_lora(model, package.path / "base", space)

    def __enter__(self) -> Attributor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Takes θ0 off the model."""
        self._model.unload()

    def attribute(self, documents: Iterable[Document]) -> Iterator[Attribution]:
        """One attribution a document, in order. Raises DataError for a response that leaves no room for a prompt token."""
        stream = iter(documents)
        while block := list(islice(stream, _BLOCK_DOCUMENTS)):
            encoded = [encode_document(document, self.tokenizer, self.max_length) for document in block]
            rows, losses = self._rows([replace(tokens, row=place) for place, (tokens, _) in enumerate(encoded)])
            codes = sparse_codes(rows, self.dictionary, self.alpha, nonnegative=self.nonnegative)
            for document, (tokens, cut), row, code, loss in zip(block, encoded, rows, codes, losses, strict=True):
                atoms, unexplained = self._shares(row, code)
                yield Attribution(document, len(tokens), cut, float(loss), atoms, unexplained, row, code)

    def _rows(self, documents: Sequence[EncodedDocument]) -> tuple[Tensor, Tensor]:
        """x̃ (n, D) and mean losses (n,) of documents whose `row` is their place, in order."""
        sink = RowSink(self.projection)
        rows, losses = torch.zeros(len(documents), self.projection.dim), torch.zeros(len(documents))
        with gradient_hooks(self._model, self.projection.space, sink):
            for group in plan_batches(documents, self.batch_tokens):
                stored = batch_rows(self._model, sink, group)
                rows[stored["document"]], losses[stored["document"]] = stored["row"], stored["loss"]
        return self.whitening.apply(rows)[0], losses

    def _shares(self, row: Tensor, codes: Tensor) -> tuple[tuple[AtomShare, ...], float]:
        shares = codes * (self.dictionary @ row)
        used = sorted(codes.nonzero().flatten().tolist(), key=lambda j: -abs(float(shares[j])))
        atoms = tuple(AtomShare(j, self.cards.get(j), float(codes[j]), float(shares[j])) for j in used)
        return atoms, float((row - codes @ self.dictionary) @ row)
