"""From a package's path to an engine that serves it: read and verify, load the base model, check it, merge θ0."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from atoms.model import choose_device, choose_dtype, load_model, merge_adapter
from atoms.package import Package
from atoms.steered import PackedBank
from server.embedded.attention import group_heads
from server.embedded.engine import EmbeddedEngine
from server.embedded.packing import pack_linears

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger("atomsteer.server")


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How to load and run a package's model. `model` None is the one that the package names."""

    model: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    slots: int = 16
    max_model_len: int | None = None
    max_waiting: int = 256
    prefill_tokens_per_step: int = 512
    prefix_cache_tokens: int = 4096


@dataclass(frozen=True, slots=True)
class LoadedPackage:
    """A package and the engine that serves it. `vocabulary` is the number of token ids that the model knows."""

    package: Package
    engine: EmbeddedEngine
    vocabulary: int


def load_package(path: Path, options: EngineOptions) -> LoadedPackage:
    """Raises PackageError, ModelError, WrongBaseError, AdapterError, ConfigError; nothing runs then."""
    package = Package.read(path)
    bank, _ = package.bank, package.drift  # read and verified now, rather than at the first steered request
    model, tokenizer = load_served(package, options)
    engine = EmbeddedEngine(
        model,
        tokenizer,
        package.base_adapter.space,
        PackedBank(bank, package.composition, model.device, model.dtype).compose,
        slots=options.slots,
        max_model_len=options.max_model_len,
        max_waiting=options.max_waiting,
        prefill_tokens_per_step=options.prefill_tokens_per_step,
        prefix_cache_tokens=options.prefix_cache_tokens,
    )
    return LoadedPackage(package, engine, int(model.config.get_text_config().vocab_size))


def load_served(package: Package, options: EngineOptions) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """What a server runs: `load_base` with θ0 merged into the weights, which are then packed where that is possible.

    Nothing may read or change the weights of its linears any more.
    """
    model, tokenizer = load_base(package, options)
    merge_adapter(model, package.base_adapter)
    if packed := pack_linears(model):
        _log.info("packed the weights of %d linears", packed)
    group_heads(model)
    return model, tokenizer


def load_base(package: Package, options: EngineOptions) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The package's base model, checked, and its tokenizer. Raises as `load_package`."""
    device = choose_device(options.device)
    dtype = choose_dtype(device, options.dtype)
    reference = package.manifest.base_model
    revision = reference.revision if options.model is None else None
    _log.info("loading %s as %s on %s", options.model or reference.id, dtype, device)
    model, tokenizer = load_model(options.model or reference.id, dtype, device, revision)
    package.check_base(model)
    return model, tokenizer
