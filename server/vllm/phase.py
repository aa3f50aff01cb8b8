"""Phase "decode" inside vLLM: a mix that steers no token before the prompt's last one.

    scheduler   blocks of the prompt that end before its last token are hashed as if there were no mix, so that every such
                request, and unsteered ones, share them; all later ones also carry where the steering began
    worker      those tokens get no adapter, in whatever chunks they come

Both know the phase from the name of the LoRA request. Only the first model runner says which tokens of a request a step
computes, so with vLLM's second one the phase is refused.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from server.vllm.identity import phase_of_name

PromptAndTokens = tuple[tuple[int, ...], tuple[int, ...], set[Any]]


def install() -> None:
    """Wraps what vLLM hashes blocks and maps tokens with, in this process. Idempotent."""
    from server.vllm import upstream

    hash_keys = upstream.kv_cache_utils.generate_block_hash_extra_keys
    if getattr(hash_keys, "steers", False):
        return

    @functools.wraps(hash_keys)
    def extra_keys(request: Any, start: int, end: int, start_mm_idx: int) -> tuple[tuple[Any, ...] | None, int]:
        keys, next_mm_idx = hash_keys(request, start, end, start_mm_idx)
        return keys_in_phase(request, end, keys), next_mm_idx

    extra_keys.steers = True  # type: ignore[attr-defined]
    upstream.kv_cache_utils.generate_block_hash_extra_keys = extra_keys
    upstream.block_pool.generate_block_hash_extra_keys = extra_keys
    make = upstream.InputBatch.make_lora_inputs

    def make_lora_inputs(
        self: Any, num_scheduled_tokens: np.ndarray, num_sampled_tokens: np.ndarray
    ) -> PromptAndTokens:
        prompts, tokens, requests = make(self, num_scheduled_tokens, num_sampled_tokens)
        return prompts, tokens_in_phase(self, num_scheduled_tokens, tokens), requests

    upstream.InputBatch.make_lora_inputs = make_lora_inputs


def keys_in_phase(request: Any, end: int, keys: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
    """The extra `keys` of a block of `request` that ends before token `end`."""
    lora = request.lora_request
    if lora is None or phase_of_name(lora.lora_name) == "all":
        return keys
    boundary = request.num_prompt_tokens - 1
    if end > boundary:
        return (*(keys or ()), ("steered_from", boundary))
    return tuple(key for key in keys or () if key[0] != "lora") or None


def tokens_in_phase(batch: Any, num_scheduled_tokens: np.ndarray, adapters: tuple[int, ...]) -> tuple[int, ...]:
    """`adapters`, an id for each token of a step, with 0 for those of prompts that are read unsteered."""
    decoding = [
        index
        for index, number in enumerate(batch.request_lora_mapping[: batch.num_reqs])
        if number > 0 and phase_of_name(batch.lora_id_to_lora_request[number].lora_name) == "decode"
    ]
    if not decoding:
        return adapters
    mapped = np.array(adapters)
    starts = np.cumsum(num_scheduled_tokens) - num_scheduled_tokens
    for index in decoding:
        unsteered = batch.num_prompt_tokens[index] - 1 - batch.num_computed_tokens_cpu[index]
        mapped[starts[index] : starts[index] + np.clip(unsteered, 0, num_scheduled_tokens[index])] = 0
    return tuple(mapped)
