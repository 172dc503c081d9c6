"""The pace of sending: against the user's limit, and against stores that bear less than we could send."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from pipeline.errors import PlanError
from pipeline.events import Event, SendRateLowered
from pipeline.flow.pacing import BURST_S, Pacer, RateLimit
from pipeline.units import KiB, MiB, Size


class WorldClock:
    """Time that many tasks share: it moves on to the next sleeper when all of them sleep."""

    def __init__(self) -> None:
        self.time = 0.0
        self._sleepers: list[tuple[float, int, anyio.Event]] = []
        self._count = itertools.count()

    def now(self) -> float:
        """Seconds."""
        return self.time

    async def sleep(self, seconds: float) -> None:
        """Until the world's time has come there."""
        event = anyio.Event()
        heapq.heappush(self._sleepers, (self.time + seconds, next(self._count), event))
        await event.wait()

    async def run_until(self, end: float) -> None:
        """Move the world on."""
        while True:
            for _ in range(10):
                await checkpoint()
            if not self._sleepers or self._sleepers[0][0] > end:
                self.time = end
                return
            self.time, _, event = heapq.heappop(self._sleepers)
            event.set()


@asynccontextmanager
async def world(*tasks: Callable[[], Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
    """Run these until the end of the block."""
    async with anyio.create_task_group() as group:
        for task in tasks:
            group.start_soon(task)
        yield
        group.cancel_scope.cancel()


# ---- the user's limit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [100 * KiB, 10 * MiB, 200 * MiB])
@pytest.mark.parametrize("senders", [1, 8])
async def test_bytes_go_out_at_the_limit_and_never_in_a_burst(rate: int, senders: int) -> None:
    clock = WorldClock()
    limit = RateLimit(clock, rate)
    sent: list[tuple[float, int]] = []

    async def send() -> None:
        while True:
            count = limit.bite
            await limit.wait(count)
            sent.append((clock.now(), count))

    async with world(*[send] * senders):
        await clock.run_until(30.0)
    assert sum(count for _, count in sent) == pytest.approx(30 * rate, rel=0.01, abs=2 * limit.bite)
    for second in range(30):
        within = sum(count for when, count in sent if second <= when < second + 1)
        assert within <= rate * (1 + BURST_S) + 2 * limit.bite


async def test_without_a_limit_nobody_waits() -> None:
    clock = WorldClock()
    limit = RateLimit(clock, None)
    for _ in range(100):
        await limit.wait(MiB)
    assert clock.now() == 0


async def test_a_pause_is_not_made_up_for_afterwards() -> None:
    clock = WorldClock()
    limit = RateLimit(clock, MiB)
    sent = 0

    async def send() -> None:
        nonlocal sent
        while True:
            await limit.wait(64 * KiB)
            sent += 64 * KiB

    async with world(send):
        await clock.run_until(10.0)
        before = sent
        limit.pause(5.0)
        await clock.run_until(20.0)
    assert sent - before == pytest.approx(5 * MiB, rel=0.05)


@pytest.mark.parametrize("rate", [0, 1023])
def test_a_limit_that_lets_nothing_through_is_refused(rate: int) -> None:
    with pytest.raises(PlanError, match="less than 1 KiB"):
        RateLimit(WorldClock(), Size(rate))


# ---- the store's limit ---------------------------------------------------------------------------------------------


@dataclass
class BusyStore:
    """Takes parts up to a rate, with a burst; refuses others at once, as a loaded store does.

    Attributes:
        at_once: more requests than this are refused, whatever the rate.
    """

    clock: WorldClock
    rate: float
    burst_s: float = 1.0
    at_once: int = 1000
    retry_after_s: float | None = None
    accepted: list[tuple[float, int]] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    under_way: int = 0
    _bucket: float = 0.0
    _filled_at: float = 0.0

    def __post_init__(self) -> None:
        self._bucket = self.rate * self.burst_s

    def admits(self, count: int) -> bool:
        """Look at a request of `count` bytes."""
        now = self.clock.now()
        self._bucket = min(
            self.rate * max(self.burst_s, count / self.rate), self._bucket + (now - self._filled_at) * self.rate
        )
        self._filled_at = now
        if self._bucket < count or self.under_way >= self.at_once:
            self.refused.append(now)
            return False
        self._bucket -= count
        return True

    def taken_between(self, begin: float, end: float) -> float:
        """Bytes a second."""
        return sum(count for when, count in self.accepted if begin <= when < end) / (end - begin)


async def send_parts(pacer: Pacer, store: BusyStore, *, part: int, line: float, seed: int) -> None:
    """One part after the other, as a driver and its retries do; `line` is what one connection carries."""
    chance = random.Random(seed)
    clock = store.clock
    while True:
        attempt = 0
        while True:
            async with pacer.request(part) as begun:
                with pacer.flight() as flight:
                    is_admitted = store.admits(part)
                    store.under_way += is_admitted
                    for sent in range(0, part, pacer.bite):
                        await pacer.wait(min(pacer.bite, part - sent), flight)
                        await clock.sleep(min(pacer.bite, part - sent) / line)
                        if not is_admitted:
                            break
                    store.under_way -= is_admitted
                    if is_admitted:
                        store.accepted.append((clock.now(), part))
                        pacer.taken(part, flight)
                        break
                    pacer.refused(begun, part, store.retry_after_s)
            attempt += 1
            await clock.sleep(max(store.retry_after_s or 0, chance.uniform(0, min(20.0, 0.5 * 2**attempt))))
        await checkpoint()


@pytest.mark.parametrize("retry_after_s", [None, 1.0])
@pytest.mark.parametrize("rate", [10 * MiB, 40 * MiB, 150 * MiB])
async def test_it_settles_within_a_tenth_of_what_the_store_takes(rate: int, retry_after_s: float | None) -> None:
    clock = WorldClock()
    events: list[Event] = []
    store = BusyStore(clock, rate, retry_after_s=retry_after_s)
    pacer = Pacer(clock, requests=8, emit=events.append, stage="write.s3")

    def sender(seed: int) -> Callable[[], Coroutine[Any, Any, None]]:
        return lambda: send_parts(pacer, store, part=8 * MiB, line=60 * MiB, seed=seed)

    async with world(*[sender(seed) for seed in range(8)]):
        await clock.run_until(70.0)
    settled = store.taken_between(30, 70)
    # A store that wants a second of quiet after each refusal gets it, and loses that second.
    assert settled >= (0.9 if retry_after_s is None else 0.85) * rate
    assert len([when for when in store.refused if when > 30]) < 20, "refusals stay rare"
    assert any(isinstance(event, SendRateLowered) for event in events)


async def send_streamed(pacer: Pacer, clock: WorldClock, length: int, *, line: float, refused: bool = False) -> None:
    """A part that is sent while it is made, as `Paced` does; refused when all of it is there."""
    begun = clock.now()
    with pacer.flight() as flight:
        left = length
        while left:
            bite = min(pacer.bite, left)
            await pacer.wait(bite, flight)
            await clock.sleep(bite / line)
            left -= bite
        if refused:
            pacer.refused(begun, length)
        else:
            pacer.taken(length, flight)


@pytest.mark.parametrize("refusals", [1, 2])
async def test_one_refusal_of_a_part_of_hundreds_of_mib_does_not_slow_the_run_for_minutes(refusals: int) -> None:
    """Small parts were acknowledged long ago; since then a long one was on its way, and went well."""
    clock = WorldClock()
    line = 100 * MiB
    pacer = Pacer(clock, requests=8)

    async def send() -> None:
        for _ in range(5):
            await send_streamed(pacer, clock, 20 * MiB, line=line)
        for _ in range(refusals):
            await send_streamed(pacer, clock, 2000 * MiB, line=line, refused=True)
        for _ in range(8):
            await send_streamed(pacer, clock, 500 * MiB, line=line)
        ended.append(clock.now())

    ended: list[float] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(send)
        await clock.run_until(1000.0)
        assert pacer.bytes_per_s is not None
        assert pacer.bytes_per_s > line
        tasks.cancel_scope.cancel()
    undisturbed = (5 * 20 + refusals * 2000 + 8 * 500) * MiB / line
    assert ended[0] < 1.1 * undisturbed


async def test_in_parts_that_take_long_most_of_what_the_store_takes_is_used() -> None:
    """It admits a part only when it could take all of it at once: what waits for that is lost, not what we measure."""
    clock = WorldClock()
    store = BusyStore(clock, 40 * MiB)
    pacer = Pacer(clock, requests=8)

    def sender(seed: int) -> Callable[[], Coroutine[Any, Any, None]]:
        return lambda: send_parts(pacer, store, part=400 * MiB, line=60 * MiB, seed=seed)

    async with world(*[sender(seed) for seed in range(8)]):
        await clock.run_until(400.0)
    assert store.taken_between(100, 400) >= 0.72 * store.rate


async def test_a_store_that_takes_more_again_gets_more() -> None:
    clock = WorldClock()
    store = BusyStore(clock, 10 * MiB)
    pacer = Pacer(clock, requests=8)

    def sender(seed: int) -> Callable[[], Coroutine[Any, Any, None]]:
        return lambda: send_parts(pacer, store, part=8 * MiB, line=60 * MiB, seed=seed)

    async with world(*[sender(seed) for seed in range(8)]):
        await clock.run_until(60.0)
        store.rate = 100 * MiB
        await clock.run_until(120.0)
    assert store.taken_between(30, 60) < 11 * MiB
    assert store.taken_between(100, 120) >= 80 * MiB


async def test_a_store_that_bears_few_requests_gets_few() -> None:
    clock = WorldClock()
    store = BusyStore(clock, 10_000 * MiB, at_once=3)
    pacer = Pacer(clock, requests=8)

    def sender(seed: int) -> Callable[[], Coroutine[Any, Any, None]]:
        return lambda: send_parts(pacer, store, part=8 * MiB, line=60 * MiB, seed=seed)

    async with world(*[sender(seed) for seed in range(8)]):
        await clock.run_until(60.0)
    assert store.taken_between(20, 60) >= 60 * MiB, "a third of what three connections carry, at the least"
    assert len([when for when in store.refused if when > 20]) < 60


async def test_many_refusals_of_one_moment_cut_once() -> None:
    clock = WorldClock()
    events: list[Event] = []
    pacer = Pacer(clock, requests=8, emit=events.append)
    await pacer.wait(MiB)
    clock.time = 2.0
    for _ in range(8):
        pacer.taken(8 * MiB)
    for _ in range(8):
        pacer.refused(1.0, 8 * MiB)
    assert len(events) == 1
    assert pacer.bytes_per_s == pytest.approx(0.9 * 1.5 * 32 * MiB)
    assert pacer.requests == 6


async def test_nobody_sends_while_the_store_asked_for_quiet() -> None:
    clock = WorldClock()
    pacer = Pacer(clock, requests=2)
    sent: list[float] = []

    async def send() -> None:
        while True:
            await pacer.wait(MiB)
            sent.append(clock.now())
            await clock.sleep(0.1)

    async with world(send, send):
        await clock.run_until(2.0)
        pacer.refused(2.0, MiB, 7.0)
        await clock.run_until(20.0)
    assert not [when for when in sent if 2.1 < when < 9.0]
    assert [when for when in sent if when >= 9.0]


async def test_the_user_s_limit_holds_whatever_the_store_takes() -> None:
    clock = WorldClock()
    store = BusyStore(clock, 40 * MiB, burst_s=2.0)
    pacer = Pacer(clock, requests=8, limit=5 * MiB)

    def sender(seed: int) -> Callable[[], Coroutine[Any, Any, None]]:
        return lambda: send_parts(pacer, store, part=8 * MiB, line=60 * MiB, seed=seed)

    async with world(*[sender(seed) for seed in range(8)]):
        await clock.run_until(60.0)
    assert store.refused == []
    assert store.taken_between(10, 60) == pytest.approx(5 * MiB, rel=0.15)
