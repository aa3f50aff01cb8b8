"""How far answers drift in fact: the KL of a share of an experiment's responses, measured beside serving.

    a response ends  ->  offer()     one of each arm's 1 / share, if the minute's tokens allow     request path
                     ->  score       the engine reads prompt and answer again, steered and not     background
                     ->  Recorder    the outcome `measured_kl` of the response

Measured and predicted KL are one quantity: KL(unsteered ‖ steered), nats a token. The predicted one (atoms/drift.py) rests on
texts that the unsteered model wrote for calibration; the measured one is averaged over the tokens of the answer that was
given. Knows no engine: a host says how to score.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context
from dataclasses import dataclass, field
from typing import Protocol

from atoms.errors import EngineStoppedError
from atoms.mix import Mix
from server.experiments.assignment import fnv1a32
from server.experiments.recording import Recorder
from server.limits import DriftBudget
from server.quotas import Bucket
from server.steering import ResolvedSteering

_log = logging.getLogger("atomsteer.experiments")
_MOST_WAITING = 8
"""Answers that wait to be scored; their tokens are kept in memory."""


@dataclass(frozen=True, slots=True)
class Answered:
    """What an engine scores: the tokens of a prompt and of the answer to it, and the mix that steered all of them."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    mix: Mix
    digest: str


Score = Callable[[Answered], Awaitable[float]]
"""The mean over the answer's tokens of KL(unsteered ‖ steered), in nats. May take its time: requests come first."""


class Meter(Protocol):
    """Where measurements are counted (`server.metrics.SteeringMetrics`)."""

    def drift_measured(self, steering: ResolvedSteering, kl: float) -> None: ...

    def drift_skipped(self) -> None: ...


@dataclass
class DriftSampler:
    """Chooses the responses that are measured, and has them measured one after the other.

    Of every ⌈1 / share⌉ responses of an arm one is drawn, by a hash, so that no rhythm of the traffic is met. One that
    would cost more tokens than the budget has left, or comes while too many wait, is skipped. Used from one event loop.
    """

    recorder: Recorder
    budget: DriftBudget
    meter: Meter
    clock: Callable[[], float] = time.monotonic
    _seen: Counter[tuple[int, str]] = field(default_factory=Counter)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._tokens = Bucket(self.budget.tokens_per_minute, self.clock)
        self._turn = asyncio.Lock()

    def offer(
        self,
        steering: ResolvedSteering,
        response_id: str,
        prompt: Sequence[int],
        response: Sequence[int],
        score: Score,
    ) -> None:
        """A response has ended. Returns at once; what is drawn is scored by a task of the running loop."""
        if steering.assignment is None or not prompt or not response or not self._draws(steering):
            return
        if not steering.mix:  # unsteered is what drift is counted from: there is nothing to read
            return self._store(steering, response_id, 0.0)
        cost = 2 * (len(prompt) + len(response))
        if len(self._tasks) >= _MOST_WAITING or self._tokens.level < cost:
            return self.meter.drift_skipped()
        self._tokens.take(cost)
        answered = Answered(tuple(prompt), tuple(response), steering.mix, steering.digest)
        work = self._measure(steering, response_id, answered, score)
        task = asyncio.get_running_loop().create_task(work, context=Context())  # nothing of the request clings to it
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _draws(self, steering: ResolvedSteering) -> bool:
        assert steering.assignment is not None
        if self.budget.share == 0:
            return False
        arm = (steering.assignment.experiment_id, steering.assignment.arm)
        length = math.ceil(1 / self.budget.share)
        block, place = divmod(self._seen[arm], length)
        self._seen[arm] += 1
        return place == fnv1a32(f"{arm}{block}") % length

    async def _measure(self, steering: ResolvedSteering, response_id: str, answered: Answered, score: Score) -> None:
        try:
            async with self._turn:
                kl = await score(answered)
        except EngineStoppedError:
            return self.meter.drift_skipped()
        except Exception:
            _log.exception("the drift of response %s could not be measured", response_id)
            return self.meter.drift_skipped()
        self._store(steering, response_id, kl)

    def _store(self, steering: ResolvedSteering, response_id: str, kl: float) -> None:
        assert steering.assignment is not None
        self.recorder.measured(steering.assignment, response_id, kl)
        self.meter.drift_measured(steering, kl)
