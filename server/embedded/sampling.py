"""From logits to a token: penalties, filters, drawing and log-probabilities, each row by itself.

Knows tensors and `SamplingParams`; nothing of models, text or batches. Order of the stages, as in vLLM: grammar, logit
bias, repetition, frequency and presence penalty, temperature, min_p, top_k, top_p, draw.

Symbols
    V   size of the vocabulary (the logits' last dimension)      n   rows of a batch
    u   one uniform number in [0, 1) per draw

A row draws by inverting its cumulative distribution at one uniform number from its own CPU generator, so that a seed
gives the same tokens on every device and in any company.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from atoms.engine import SamplingParams
from atoms.errors import EngineError


class TokenMatcher(Protocol):
    """Follows one sequence through a grammar. Both methods raise GrammarError where that grows beyond its bounds."""

    @property
    def complete(self) -> bool:
        """Whether nothing may follow any more."""
        ...

    def allowed(self, size: int) -> Tensor:
        """(size,) bool on the CPU: the tokens that may come next."""
        ...

    def accept(self, token: int) -> None:
        """Goes on by `token`, one of those allowed."""
        ...


_GREEDY_BELOW = 1e-5
"""A temperature below this draws as 0 does: dividing by it leaves only the most likely token, and 1e-46 is 0 in float32."""
_TOP_P_PROBES = (256, 16_384)
"""top_p is tried on this many most likely tokens: the first nearly always suffice, and sorting V tokens is slow."""


def keep_allowed(logits: Tensor, allowed: Tensor) -> Tensor:
    """Logits (V,) with all tokens removed (-inf) but those of `allowed` (V,) bool."""
    return logits.masked_fill(~allowed.to(logits.device), -math.inf)


def add_bias(logits: Tensor, token_ids: Tensor, bias: Tensor) -> Tensor:
    """Logits (V,) with `bias` (k,) added at `token_ids` (k,)."""
    return logits.index_add(0, token_ids, bias)


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits (V,) of the tokens in `seen` (V,) bool divided by `penalty` where positive, else multiplied by it."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def penalize_counts(logits: Tensor, counts: Tensor, presence: float, frequency: float) -> Tensor:
    """OpenAI's definition: logits - presence·[counts > 0] - frequency·counts; `counts` (V,) of generated tokens."""
    return logits - presence * (counts > 0) - frequency * counts


def keep_min_p(logits: Tensor, min_p: float) -> Tensor:
    """Logits (V,) with those removed (-inf) whose probability is below `min_p` times the largest."""
    return logits.masked_fill(logits < logits.max() + math.log(min_p), -math.inf)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Logits (V,) with all but the `k` largest removed (-inf)."""
    return _keep(logits, logits.topk(min(k, logits.shape[0])).indices)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Logits (V,) reduced to the smallest set of most likely tokens whose probabilities sum to at least `p`."""
    probabilities = logits.softmax(-1)
    for size in (*_TOP_P_PROBES, logits.shape[0]):
        values, indices = probabilities.topk(min(size, logits.shape[0]))
        if values.sum() >= p:
            break
    before = values.cumsum(-1) - values  # mass of the tokens ahead of each
    count = max(1, int((before < p).sum()))
    return _keep(logits, indices[:count])


def draw(logits: Tensor, u: float) -> int:
    """The token at which the cumulative softmax of `logits` (V,) passes `u`."""
    probabilities = logits.softmax(-1)
    if probabilities.device.type == "mps":  # which has no float64
        probabilities = probabilities.cpu()
    cumulative = probabilities.double().cumsum(-1)
    index = torch.searchsorted(cumulative, cumulative[-1:] * u, right=True)
    return min(int(index), logits.shape[0] - 1)


def _keep(logits: Tensor, token_ids: Tensor) -> Tensor:
    kept = torch.full_like(logits, -math.inf)
    kept[token_ids] = logits[token_ids]
    return kept


class TokenSampler:
    """Draws one sequence's tokens: its parameters, its generator and what it has generated so far.

    Not thread-safe. Tensors of size V are only made if a penalty needs them. `matcher` follows the grammar of `params`.
    """

    def __init__(
        self, params: SamplingParams, prompt_token_ids: Sequence[int], matcher: TokenMatcher | None = None
    ) -> None:
        self.params = params
        self._matcher = matcher
        self._prompt = prompt_token_ids
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed % 2**63)
        self._counts: Tensor | None = None  # (V,) times each token was generated
        self._seen: Tensor | None = None  # (V,) whether each token is in the prompt or was generated
        self._bias: tuple[Tensor, Tensor] | None = None

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the next token is the argmax of the raw logits."""
        p = self.params
        changed = self._matcher or self._penalizes_counts or p.repetition_penalty != 1 or p.logit_bias
        return self._is_greedy and not changed

    @property
    def _is_greedy(self) -> bool:
        return self.params.temperature < _GREEDY_BELOW

    @property
    def complete(self) -> bool:
        """Whether the answer matches its grammar and can only end."""
        return self._matcher is not None and self._matcher.complete

    def sample(self, logits: Tensor) -> int:
        """The next token from raw fp32 logits (V,). Raises EngineError for a biased token outside the vocabulary,
        GrammarError."""
        p = self.params
        if self._matcher is not None:
            logits = keep_allowed(logits, self._matcher.allowed(logits.shape[0]))
        logits = self._penalize(logits)
        if self._is_greedy:
            return int(logits.argmax())
        logits = (logits - logits.max()) / p.temperature
        if p.min_p > 0:
            logits = keep_min_p(logits, p.min_p)
        if p.top_k > 0:
            logits = keep_top_k(logits, p.top_k)
        if p.top_p < 1:
            logits = keep_top_p(logits, p.top_p)
        return draw(logits, float(torch.rand((), generator=self._generator, dtype=torch.float64)))

    def record(self, token: int) -> None:
        """Takes note of a generated token for the following ones. Raises GrammarError."""
        if self._matcher is not None:
            self._matcher.accept(token)
        if self._counts is not None:
            self._counts[token] += 1
        if self._seen is not None:
            self._seen[token] = True

    @property
    def _penalizes_counts(self) -> bool:
        return self.params.presence_penalty != 0 or self.params.frequency_penalty != 0

    def _penalize(self, logits: Tensor) -> Tensor:
        p = self.params
        if p.logit_bias:
            logits = add_bias(logits, *self._bias_of(logits))
        if p.repetition_penalty != 1:
            if self._seen is None:
                self._seen = torch.zeros_like(logits, dtype=torch.bool)
                self._seen[torch.tensor(self._prompt, device=logits.device)] = True
            logits = penalize_repetition(logits, self._seen, p.repetition_penalty)
        if self._penalizes_counts:
            if self._counts is None:
                self._counts = torch.zeros_like(logits)
            logits = penalize_counts(logits, self._counts, p.presence_penalty, p.frequency_penalty)
        return logits

    def _bias_of(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        if self._bias is None:
            ids, values = zip(*self.params.logit_bias, strict=True)
            outside = [token for token in ids if not 0 <= token < logits.shape[0]]
            if outside:
                raise EngineError(
                    f"logit_bias names token {outside[0]}; this model's tokens are 0 to {logits.shape[0] - 1}"
                )
            self._bias = (torch.tensor(ids, device=logits.device), logits.new_tensor(values))
        return self._bias


def sample_rows(logits: Tensor, samplers: Sequence[TokenSampler]) -> list[int | Exception]:
    """One token per row of raw logits (n, V) of any floating dtype; an exception in its place where only that row failed.

    Rows are computed in fp32. Greedy ones need no copy for that: their argmax is the same.
    """
    best = logits.max(-1)  # one pass serves the finiteness check (max propagates NaN) and all greedy rows
    peaks, tokens = best.values.tolist(), best.indices.tolist()
    result: list[int | Exception] = []
    for row, (sampler, peak, token) in enumerate(zip(samplers, peaks, tokens, strict=True)):
        try:
            if not math.isfinite(peak):
                raise EngineError(f"the model gave {peak} logits; the mix is too strong, or the dtype overflows")
            drawn = token if sampler.is_plain_greedy else sampler.sample(logits[row].float())
            sampler.record(drawn)
            result.append(drawn)
        except Exception as error:  # whatever fails here concerns this row alone
            result.append(error)
    return result


def token_logprobs(logits: Tensor, token: int, top: int) -> tuple[float, list[tuple[int, float]]]:
    """log softmax of raw fp32 logits (V,), in nats: that of `token`, and the `top` most likely (token, log-probability)."""
    logprobs = logits.log_softmax(-1)
    best = logprobs.topk(min(top, logits.shape[0]))
    return float(logprobs[token]), list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
