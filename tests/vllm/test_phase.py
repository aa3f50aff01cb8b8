"""Which blocks requests share, on vLLM's own hashing, and which tokens of a step are steered."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from server.vllm import phase
from server.vllm.upstream import InputBatch, LoRARequest, block_pool, kv_cache_utils

pytestmark = pytest.mark.filterwarnings("ignore")
BLOCK = 4
DECODE = LoRARequest(lora_name="m-1-decode@0", lora_int_id=70_000, lora_path="mix:{}")
OTHER = LoRARequest(lora_name="m-2-decode", lora_int_id=70_001, lora_path="mix:{}")
WHOLE = LoRARequest(lora_name="m-1", lora_int_id=70_002, lora_path="mix:{}")


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """`phase.install`, undone after the test."""
    for owner, name in (
        (kv_cache_utils, "generate_block_hash_extra_keys"),
        (block_pool, "generate_block_hash_extra_keys"),
        (InputBatch, "make_lora_inputs"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    phase.install()


def hashes(lora: LoRARequest | None, prompt: int, tokens: int = 16, salt: str | None = None) -> list[bytes]:
    """Of the full blocks of a request whose tokens are 0, 1, 2, …"""
    from vllm.utils.hashing import sha256

    kv_cache_utils.init_none_hash(sha256)
    request = SimpleNamespace(
        lora_request=lora, num_prompt_tokens=prompt, num_tokens=tokens, all_token_ids=list(range(tokens)), mm_features=[],
        block_hashes=[], cache_salt=salt, prompt_embeds=None,
    )  # fmt: skip
    return kv_cache_utils.get_request_block_hasher(BLOCK, sha256)(request)


def shared(one: list[bytes], other: list[bytes]) -> int:
    return next((place for place, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


@pytest.mark.parametrize(("prompt", "blocks"), [(1, 0), (4, 0), (5, 1), (8, 1), (9, 2), (12, 2), (16, 3), (17, 4)])
def test_blocks_before_the_last_token_of_the_prompt_are_the_unsteered_ones(prompt: int, blocks: int) -> None:
    plain = hashes(None, prompt)
    assert shared(hashes(DECODE, prompt), plain) == blocks == shared(hashes(DECODE, prompt), hashes(OTHER, prompt))
    assert shared(hashes(WHOLE, prompt), plain) == 0


def test_answers_are_shared_only_where_the_steering_began_at_the_same_token() -> None:
    assert hashes(DECODE, 9) == hashes(DECODE, 9)
    assert shared(hashes(DECODE, 9), hashes(DECODE, 10)) == 2


def test_a_cache_salt_stays_in_force() -> None:
    assert shared(hashes(DECODE, 9, salt="a"), hashes(DECODE, 9)) == 0
    assert shared(hashes(DECODE, 9, salt="a"), hashes(None, 9, salt="a")) == 2


def batch(*rows: tuple[LoRARequest | None, int, int]) -> SimpleNamespace:
    """Rows of (adapter, prompt tokens, computed tokens)."""
    return SimpleNamespace(
        num_reqs=len(rows),
        request_lora_mapping=np.array([lora.lora_int_id if lora else 0 for lora, _, _ in rows]),
        lora_id_to_lora_request={lora.lora_int_id: lora for lora, _, _ in rows if lora},
        num_prompt_tokens=np.array([prompt for _, prompt, _ in rows]),
        num_computed_tokens_cpu=np.array([computed for _, _, computed in rows]),
    )


@pytest.mark.parametrize(
    ("prompt", "computed", "scheduled", "unsteered"),
    [(6, 0, 6, 5), (6, 0, 3, 3), (6, 3, 3, 2), (6, 5, 1, 0), (6, 9, 1, 0), (1, 0, 1, 0), (6, 0, 8, 5)],
    ids=["whole", "first chunk", "last chunk", "last token", "answer", "one token", "prompt and answer again"],
)
def test_tokens_before_the_last_of_the_prompt_get_no_adapter(
    prompt: int, computed: int, scheduled: int, unsteered: int
) -> None:
    numbers = np.array([2, scheduled, 1])
    adapters = (WHOLE.lora_int_id,) * 2 + (DECODE.lora_int_id,) * scheduled + (0,)
    mapped = phase.tokens_in_phase(batch((WHOLE, 9, 0), (DECODE, prompt, computed), (None, 3, 3)), numbers, adapters)
    kept = scheduled - unsteered
    assert mapped == (*adapters[:2], *(0,) * unsteered, *(DECODE.lora_int_id,) * kept, 0)


def test_a_step_without_the_phase_is_left_as_it_is() -> None:
    adapters = (WHOLE.lora_int_id, WHOLE.lora_int_id, 0)
    assert phase.tokens_in_phase(batch((WHOLE, 9, 0), (None, 1, 0)), np.array([2, 1]), adapters) is adapters
