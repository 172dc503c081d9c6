"""Retries: what is tried again, how long is waited, and when it is enough."""

from __future__ import annotations

import random
from collections.abc import Callable

import anyio
import anyio.lowlevel
import pytest

from pipeline.errors import StageError, StoreError
from pipeline.events import Event, RetryScheduled
from pipeline.flow.grace import with_grace
from pipeline.flow.retry import Retry, RetryPolicy
from tests.write.images import QuickClock


def busy(**more: object) -> StoreError:
    """A failure for the moment."""
    return StoreError("busy", temporary=True, **more)  # type: ignore[arg-type]


class Store:
    """Fails as often as told; each call takes a while."""

    def __init__(self, clock: QuickClock, *errors: Exception, takes_s: float = 0.0) -> None:
        self.clock = clock
        self.errors = list(errors)
        self.takes_s = takes_s
        self.calls = 0

    async def call(self) -> str:
        """One request."""
        self.calls += 1
        self.clock.time += self.takes_s
        if self.errors:
            raise self.errors.pop(0)
        return "done"


def make_retry(clock: QuickClock, events: list[Event], **policy: object) -> Retry:
    """With waits that can be foretold."""
    return Retry(
        RetryPolicy(**policy),  # type: ignore[arg-type]
        clock=clock,
        emit=events.append,
        stage="write.test",
        chance=random.Random(3),
    )


async def test_a_call_is_made_again_until_it_works_and_every_wait_is_told() -> None:
    clock, events = QuickClock(), list[Event]()
    store = Store(clock, busy(), busy(), busy())
    assert await make_retry(clock, events).call("put_part", store.call) == "done"
    assert store.calls == 4
    told = [event for event in events if isinstance(event, RetryScheduled)]
    assert [event.attempt for event in told] == [2, 3, 4]
    assert [event.wait_s for event in told] == clock.slept
    assert all(event.operation == "put_part" and event.reason == "busy" for event in told)


async def test_waits_grow_up_to_their_bound_and_are_spread() -> None:
    clock, events = QuickClock(), list[Event]()
    store = Store(clock, *[busy() for _ in range(200)])
    retry = make_retry(clock, events, attempts=201, deadline_s=1e9, first_wait_s=1.0, longest_wait_s=16.0)
    await retry.call("put_part", store.call)
    for attempt, waited in enumerate(clock.slept):
        assert 0 <= waited <= min(16.0, 2.0**attempt)
    assert max(clock.slept) > 14
    assert min(clock.slept[5:]) < 2, "full jitter: short waits stay possible"


@pytest.mark.parametrize("error", [StoreError("denied", status=403), StageError("a defect"), ValueError("x")])
async def test_what_is_not_temporary_is_not_tried_again(error: Exception) -> None:
    clock, events = QuickClock(), list[Event]()
    store = Store(clock, error)
    with pytest.raises(type(error)) as caught:
        await make_retry(clock, events).call("open", store.call)
    assert caught.value is error
    assert (store.calls, events) == (1, [])


async def test_attempts_are_counted() -> None:
    clock = QuickClock()
    store = Store(clock, *[busy() for _ in range(10)])
    with pytest.raises(StoreError, match="busy"):
        await make_retry(clock, [], attempts=3).call("open", store.call)
    assert store.calls == 3


async def test_a_dead_store_is_given_up_within_its_deadline_since_the_last_sign_of_life() -> None:
    clock = QuickClock()
    retry = make_retry(clock, [], attempts=10**6, deadline_s=100.0)
    await retry.call("open", Store(clock).call)
    begun = clock.now()
    store = Store(clock, *[busy() for _ in range(10**4)], takes_s=10.0)
    with pytest.raises(StoreError, match="busy"):
        await retry.call("put_part", store.call)
    assert 80 <= clock.now() - begun <= 110


async def test_a_sign_of_life_moves_the_deadline() -> None:
    clock = QuickClock()
    retry = make_retry(clock, [], attempts=100, deadline_s=20.0, longest_wait_s=1.0)
    store = Store(clock, *[busy() for _ in range(10)], takes_s=15.0)

    async def long_part() -> str:
        retry.alive()
        return await store.call()

    assert await retry.call("put_part", long_part) == "done"


async def test_what_the_store_asks_for_is_waited_at_least() -> None:
    clock = QuickClock()
    store = Store(clock, busy(retry_after_s=42.0))
    await make_retry(clock, []).call("put_part", store.call)
    assert clock.slept == [42.0]


async def test_a_wait_beyond_the_deadline_is_not_begun() -> None:
    clock = QuickClock()
    store = Store(clock, busy(retry_after_s=300.0))
    with pytest.raises(StoreError, match="busy"):
        await make_retry(clock, []).call("put_part", store.call)
    assert clock.slept == []


async def test_a_lost_connection_is_tried_again_at_once_but_only_the_first_time() -> None:
    clock = QuickClock()
    store = Store(clock, *[busy(retry_after_s=0.0) for _ in range(3)])
    await make_retry(clock, []).call("put_part", store.call)
    assert clock.slept[0] == 0
    assert all(waited > 0 for waited in clock.slept[1:])


async def test_refusals_of_a_busy_store_do_not_use_up_attempts() -> None:
    clock = QuickClock()
    store = Store(clock, *[busy(throttled=True) for _ in range(12)], busy(), busy(throttled=True), busy())
    retry = make_retry(clock, [], attempts=3, deadline_s=1000.0)
    assert await retry.call("put_part", store.call) == "done"
    assert store.calls == 16


async def test_a_store_that_refuses_everything_is_given_up_within_the_deadline() -> None:
    """It answers all the time, so it is alive; and nothing gets through."""
    clock = QuickClock()
    retry = make_retry(clock, [], attempts=3, deadline_s=100.0)
    store = Store(clock, *[busy(throttled=True) for _ in range(10**4)])

    async def answered() -> str:
        retry.alive()
        return await store.call()

    begun = clock.now()
    with pytest.raises(StoreError, match="busy"):
        await retry.call("put_part", answered)
    assert 80 <= clock.now() - begun <= 110


async def test_refusals_go_on_as_long_as_other_calls_get_through() -> None:
    clock = QuickClock()
    retry = make_retry(clock, [], attempts=3, deadline_s=30.0)
    store = Store(clock, *[busy(throttled=True) for _ in range(20)], takes_s=10.0)

    async def while_others_work() -> str:
        await retry.call("put_part", Store(clock).call)
        return await store.call()

    assert await retry.call("put_part", while_others_work) == "done"


# ---- grace ---------------------------------------------------------------------------------------------------------


async def cancelled_with_grace(call: Callable[[], object], grace_s: float) -> bool:
    """Cancel `with_grace(call)` when it has begun; whether the cancellation came out of it."""
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_cancel_soon, scope)
            await with_grace(call, grace_s)  # type: ignore[arg-type]
    return scope.cancelled_caught


async def _cancel_soon(scope: anyio.CancelScope) -> None:
    await anyio.lowlevel.checkpoint()
    await anyio.lowlevel.checkpoint()
    scope.cancel()


async def test_a_call_with_grace_comes_to_its_end_though_cancelled() -> None:
    ended = []

    async def call() -> None:
        for _ in range(20):
            await anyio.lowlevel.checkpoint()
        ended.append(True)

    assert await cancelled_with_grace(call, 5.0)
    assert ended == [True]


async def test_grace_is_bounded() -> None:
    with anyio.fail_after(5):
        assert await cancelled_with_grace(anyio.sleep_forever, 0.01)


async def test_without_cancellation_grace_changes_nothing() -> None:
    async def works() -> int:
        return 7

    async def fails() -> int:
        raise StoreError("denied")

    assert await with_grace(works, 1.0) == 7
    with pytest.raises(StoreError, match="denied"):
        await with_grace(fails, 1.0)
