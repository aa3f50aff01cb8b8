"""Engines for the tests: the real small model where equality of text matters, a tiny random one for scheduling."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from atoms.adapter import Delta, Factors
from atoms.errors import UnknownAtomError
from atoms.mix import Mix
from atoms.space import LoRAModule, LoRASpace
from server.embedded.engine import EmbeddedEngine

MakeEngine = Callable[..., EmbeddedEngine]


def space_of(model: PreTrainedModel, rank: int = 4) -> LoRASpace:
    linears = [(name, module) for name, module in model.named_modules() if name.endswith(("q_proj", "v_proj"))]
    return LoRASpace.of(
        LoRAModule(name, linear.in_features, linear.out_features, rank, 2.0) for name, linear in linears
    )


def random_compose(space: LoRASpace, scale: float = 0.2) -> Callable[[Mix], Delta | None]:
    """A different random delta for every mix. The atom ``broken`` cannot be composed."""

    def compose(mix: Mix) -> Delta | None:
        if not mix:
            return None
        if "broken" in mix.as_dict():
            raise UnknownAtomError("no atom is called 'broken'")
        generator = torch.Generator().manual_seed(sum(steps for _, steps in mix.steps))
        return {
            module.name: Factors(
                torch.randn(module.rank, module.d_in, generator=generator) / module.d_in**0.5,
                torch.randn(module.d_out, module.rank, generator=generator) * scale,
                module.scaling,
            )
            for module in space.modules
        }

    return compose


@pytest.fixture(scope="session")
def tiny() -> PreTrainedModel:
    """A random two-layer Llama with the real tokenizer's vocabulary: a step takes about a millisecond."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.4, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def compose_for() -> Callable[[PreTrainedModel], Callable[[Mix], Delta | None]]:
    """The deltas that `make_engine`'s engines use for a model."""
    return lambda model: random_compose(space_of(model))


@pytest.fixture
def make_engine(smol_tokenizer: PreTrainedTokenizerBase) -> Iterator[MakeEngine]:
    """Makes engines on a model and closes them after the test."""
    engines: list[EmbeddedEngine] = []

    def make(model: PreTrainedModel, **options: object) -> EmbeddedEngine:
        space = space_of(model)
        compose = options.pop("compose", None) or random_compose(space)
        engines.append(EmbeddedEngine(model, smol_tokenizer, space, compose, **options))  # type: ignore[arg-type]
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()
