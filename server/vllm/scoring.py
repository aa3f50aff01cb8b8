"""An answer's drift from what vLLM tells of a prompt: the log-probabilities of its tokens and of the likeliest.

Prompt and answer are read as one prompt, once unsteered and once steered. Each reading gives the likeliest tokens alone,
of two lists that need not be the same, so the exact divergence is not known, and `coarse_kl` is at most it: it can only
stop an experiment too late, never without cause.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from server.experiments.drift import Answered
from server.vllm.identity import MixIdentity

LIKELIEST = 256
"""Tokens of a list, as far as ``--max-logprobs`` allows them; `server.vllm.plugin` raises that."""
_LEAST = 1e-9  # of the rest's probability, which comes as 1 minus a sum

Distribution = Mapping[int, float]
"""Token -> log-probability, nats, of the likeliest tokens and the one that came."""


async def measure_drift(engine: Any, answered: Answered, identity: MixIdentity) -> float:
    """See `server.experiments.drift.Score`. Raises what the engine raises."""
    from server.vllm.upstream import LoRARequest

    adapter = LoRARequest(lora_name=identity.name, lora_int_id=identity.number, lora_path=identity.path)
    longest = engine.model_config.max_model_len - 1  # vLLM generates one token at least
    tokens = [*answered.prompt, *answered.response][:longest]
    first = len(answered.prompt)
    unsteered = (await _read(engine, tokens, None))[first:]
    steered = (await _read(engine, tokens, adapter))[first:]
    return coarse_kl(unsteered, steered)


def coarse_kl(ours: Sequence[Distribution], theirs: Sequence[Distribution]) -> float:
    """A lower bound of the mean over tokens of KL(ours ‖ theirs), nats."""
    return sum(_bound(p, q) for p, q in zip(ours, theirs, strict=True)) / len(ours) if ours else 0.0


def _bound(p: Distribution, q: Distribution) -> float:
    """The larger of two, for one token. Both know the tokens of both lists exactly, and merging the others into one can
    only lose divergence. The first merges all others. The second keeps those of p's list, of which q gives at most
    what it gives the least likely of its own; the rest of q is then at most what is not shared."""
    shared = p.keys() & q.keys()
    known = sum(math.exp(p[token]) * (p[token] - q[token]) for token in shared)
    rest_p, rest_q = (max(_LEAST, 1 - sum(math.exp(d[token]) for token in shared)) for d in (p, q))
    own = [p[token] for token in p.keys() - shared]
    least = min(q.values())
    others = sum(math.exp(value) * (value - least) for value in own)
    tail = max(_LEAST, rest_p - sum(math.exp(value) for value in own))
    return max(0.0, known + rest_p * math.log(rest_p / rest_q), known + others + tail * math.log(tail / rest_q))


async def _read(engine: Any, tokens: Sequence[int], adapter: Any) -> list[Distribution]:
    """One for each token, the first one's empty."""
    from server.vllm.upstream import SamplingParams

    allowed = engine.model_config.max_logprobs
    likeliest = LIKELIEST if allowed == -1 else min(LIKELIEST, allowed)
    params = SamplingParams(
        max_tokens=1, temperature=0.0, prompt_logprobs=likeliest, detokenize=False, flat_logprobs=True
    )
    request_id = f"drift-{uuid.uuid4().hex}"
    found: Any = None
    async for output in engine.generate({"prompt_token_ids": list(tokens)}, params, request_id, lora_request=adapter):
        found = output.prompt_logprobs or found
    return [
        dict(zip(found.token_ids[start:end], found.logprobs[start:end], strict=True))
        for start, end in zip(found.start_indices, found.end_indices, strict=True)
    ]
