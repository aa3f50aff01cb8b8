"""Rates and concurrency of keys, and when a refused request may come back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from httpx import AsyncClient

from atoms.errors import ConfigError
from server.auth import Caller
from server.config import ServeConfig
from server.context import Traffic
from server.embedded.scripted import ScriptedEngine
from server.errors import QuotaError
from server.keys import create_key
from server.limits import Quota
from server.quotas import Account, Quotas

CHAT = {"model": "demo", "messages": [{"role": "user", "content": "hello"}]}
PATH = "/v1/chat/completions"


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_minutes_requests_at_once_then_one_every_so_often(clock: Clock) -> None:
    account = Account("a", Quota(requests_per_minute=6), clock)
    for _ in range(6):
        account.begin()
    with pytest.raises(QuotaError, match="6 requests a minute") as refused:
        account.begin()
    assert refused.value.retry_after == pytest.approx(10)
    clock.now += 10
    account.begin()
    with pytest.raises(QuotaError):
        account.begin()


def test_tokens_are_taken_afterwards_and_the_debt_is_paid_by_waiting(clock: Clock) -> None:
    account = Account("a", Quota(tokens_per_minute=60), clock)
    account.begin()
    account.spend(150)
    assert account.headers()["x-ratelimit-remaining-tokens"] == "0"
    with pytest.raises(QuotaError) as refused:
        account.begin()
    assert refused.value.retry_after == pytest.approx(91)
    clock.now += 90.5
    with pytest.raises(QuotaError):
        account.begin()
    clock.now += 1
    account.begin()


@pytest.mark.parametrize("answer", [1, 30, 500])
def test_over_an_hour_no_key_gets_more_than_its_rate(clock: Clock, answer: int) -> None:
    account, spent = Account("a", Quota(tokens_per_minute=100), clock), 0
    for _ in range(7200):
        try:
            account.begin()
        except QuotaError:
            pass
        else:
            account.spend(answer)
            spent += answer
        clock.now += 0.5
    assert 60 * 100 <= spent <= 61 * 100 + answer


def test_a_refused_request_costs_nothing(clock: Clock) -> None:
    account = Account("a", Quota(requests_per_minute=5, max_concurrent_requests=1), clock)
    account.begin()
    for _ in range(10):
        with pytest.raises(QuotaError, match="at once"):
            account.begin()
    account.end()
    assert account.headers()["x-ratelimit-remaining-requests"] == "4"
    account.begin()


def test_headers_say_when_buckets_are_full(clock: Clock) -> None:
    account = Account("a", Quota(requests_per_minute=60, tokens_per_minute=600), clock)
    account.begin()
    account.spend(15)
    assert account.headers() == {
        "x-ratelimit-limit-requests": "60", "x-ratelimit-remaining-requests": "59", "x-ratelimit-reset-requests": "1.000s",
        "x-ratelimit-limit-tokens": "600", "x-ratelimit-remaining-tokens": "585", "x-ratelimit-reset-tokens": "1.500s",
    }  # fmt: skip
    assert Account("a", Quota(), clock).headers() == {}


def test_a_key_keeps_its_account_until_its_quota_changes(clock: Clock) -> None:
    quotas = Quotas(Quota(requests_per_minute=2), clock)
    assert quotas.account(Caller("a")) is quotas.account(Caller("a")) is not quotas.account(Caller("b"))
    assert quotas.account(Caller("a", quota=Quota(requests_per_minute=3))).quota.requests_per_minute == 3


def test_a_client_and_an_admin_of_one_name_have_accounts_of_their_own(clock: Clock) -> None:
    """Else each of their requests would begin the other's quota anew."""
    quotas = Quotas(Quota(requests_per_minute=1), clock)
    client, admin = Caller("shop"), Caller("shop", admin=True, quota=Quota(requests_per_minute=600))
    quotas.account(client).begin()
    quotas.account(admin).begin()
    with pytest.raises(QuotaError):
        quotas.account(client).begin()


@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_quotas_that_cannot_be(value: object) -> None:
    with pytest.raises(ConfigError, match="tokens_per_minute"):
        Quota(tokens_per_minute=value)  # type: ignore[arg-type]


async def test_a_key_beyond_its_rate_gets_429_and_others_go_on(
    client_of: Callable[..., AsyncClient], config: ServeConfig, tmp_path: Path
) -> None:
    file = tmp_path / "keys.json"
    small, large = create_key(file, "small", Quota(requests_per_minute=2)), create_key(file, "large")
    async with client_of(replace(config, api_key_file=file, quota=Quota(requests_per_minute=100))) as client:

        async def ask(key: str):
            return await client.post(PATH, json=CHAT, headers={"Authorization": f"Bearer {key}"})

        answers = [await ask(small) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["1", "0", "0"]
        refused = answers[2]
        assert 20 <= int(refused.headers["Retry-After"]) <= 30 and refused.headers["X-Request-Id"]
        assert refused.json()["error"] | {"message": ""} == {
            "message": "", "type": "rate_limit_error", "param": None, "code": "rate_limit_exceeded",
        }  # fmt: skip
        assert "'small'" in refused.json()["error"]["message"] and small not in refused.text
        assert (await ask(large)).headers["x-ratelimit-limit-requests"] == "100"
        models = await client.get("/v1/models", headers={"Authorization": f"Bearer {small}"})
        assert models.status_code == 200 and "x-ratelimit-limit-requests" not in models.headers
        preview = await client.post("/v1/steering/preview", json={}, headers={"Authorization": f"Bearer {small}"})
        assert preview.status_code == 200, "only what may generate is held to the quota"
        assert 'atomsteer_rate_limited_total{limit="requests"} 1.0' in (await client.get("/metrics")).text


@pytest.mark.parametrize("stream", [False, True])
async def test_prompt_and_answer_are_counted_in_tokens(
    client_of: Callable[..., AsyncClient], config: ServeConfig, stream: bool
) -> None:
    async with client_of(replace(config, quota=Quota(tokens_per_minute=8))) as client:
        first = await client.post(PATH, json=CHAT | {"stream": stream})  # 2 tokens in, 3 out
        second = await client.post(PATH, json=CHAT | {"stream": stream})
        third = await client.post(PATH, json=CHAT)
    assert [first.status_code, second.status_code, third.status_code] == [200, 200, 429]
    remaining = "5" if stream else "3"  # a stream's headers leave with its first token
    assert first.headers["x-ratelimit-remaining-tokens"] == remaining
    assert int(third.headers["Retry-After"]) == pytest.approx(20, abs=4)


async def test_concurrent_requests_of_one_key_are_bounded_and_counted_down(
    client_of: Callable[..., AsyncClient], config: ServeConfig, engine: ScriptedEngine
) -> None:
    engine.delay = 0.05
    async with client_of(replace(config, quota=Quota(max_concurrent_requests=2))) as client:
        answers = await asyncio.gather(*(client.post(PATH, json=CHAT) for _ in range(5)))
        assert sorted(answer.status_code for answer in answers) == [200, 200, 429, 429, 429]
        assert (await client.post(PATH, json=CHAT)).status_code == 200
        bad = [await client.post(PATH, content=b"{", headers={"Content-Type": "application/json"}) for _ in range(4)]
        assert {answer.status_code for answer in bad} == {400}
        assert (await client.post(PATH, json=CHAT)).status_code == 200, "a refused request kept its place"


@pytest.mark.parametrize(("ends", "generating", "expected"), [(0, 10, 5), (30, 14, 4), (60, 4, 1), (1, 1004, 120)])
def test_the_wait_is_the_queue_over_the_recent_rate(clock: Clock, ends: int, generating: int, expected: int) -> None:
    """`ends` answers within the last 12 s, 4 slots."""
    traffic = Traffic(slots=4, clock=clock)
    traffic.ended()
    clock.now += 100
    traffic.generating = generating
    for _ in range(ends):
        traffic.ended()
    clock.now += 12
    assert traffic.retry_after() == expected


async def test_a_full_queue_says_when_to_come_back(
    client_of: Callable[..., AsyncClient], engine: ScriptedEngine
) -> None:
    engine.slots, engine.max_waiting, engine.delay = 1, 1, 0.3
    async with client_of() as client:
        answers = await asyncio.gather(*(client.post(PATH, json=CHAT) for _ in range(6)))
        refused = [answer for answer in answers if answer.status_code == 429]
        assert len(refused) >= 3
        assert all(answer.json()["error"]["code"] == "engine_overloaded" for answer in refused)
        assert all(1 <= int(answer.headers["Retry-After"]) <= 120 for answer in refused)
