from __future__ import annotations

import threading

import anyio
import pytest
from anyio.lowlevel import checkpoint

from pipeline.errors import StageError
from pipeline.flow.buffers import Ledger, Pool, charged_slice


async def test_ledger_makes_the_next_one_wait_until_its_amount_fits() -> None:
    ledger = Ledger(10)
    first = await ledger.charge(8)
    got: list[int] = []

    async def take(amount: int) -> None:
        await ledger.charge(amount)
        got.append(amount)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(take, 4)
        await anyio.wait_all_tasks_blocked()
        tasks.start_soon(take, 1)  # would fit, but it is not its turn
        await anyio.wait_all_tasks_blocked()
        assert got == []
        first.shrink(6)
        await anyio.wait_all_tasks_blocked()
        assert got == [4]
        first.release()
    assert got == [4, 1]
    assert ledger.charged == 5
    assert ledger.peak == 10


async def test_ledger_refuses_what_it_will_never_have() -> None:
    with pytest.raises(StageError, match="more memory is needed at once"):
        await Ledger(10).charge(11)


async def test_cancelled_waiter_takes_nothing_and_lets_the_next_one_in() -> None:
    ledger = Ledger(10)
    await ledger.charge(6)
    got: list[int] = []

    async def take(amount: int, scope: anyio.CancelScope) -> None:
        with scope:
            await ledger.charge(amount)
            got.append(amount)

    async with anyio.create_task_group() as tasks:
        large, small = anyio.CancelScope(), anyio.CancelScope()
        tasks.start_soon(take, 9, large)
        await anyio.wait_all_tasks_blocked()
        tasks.start_soon(take, 4, small)
        await anyio.wait_all_tasks_blocked()
        large.cancel()
    assert got == [4]
    assert ledger.charged == 10


async def test_waiter_that_is_admitted_and_cancelled_in_the_same_turn_loses_no_byte() -> None:
    ledger = Ledger(10)
    first = await ledger.charge(10)
    scope = anyio.CancelScope()
    got: list[int] = []

    async def take() -> None:
        with scope:
            got.append((await ledger.charge(5)).amount)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(take)
        await anyio.wait_all_tasks_blocked()
        first.release()
        scope.cancel()
    assert ledger.charged == sum(got)


async def test_release_from_a_thread_wakes_the_waiter() -> None:
    ledger = Ledger(10)
    held = charged_slice(b"x" * 10, await ledger.charge(10))
    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ledger.charge, 10)
            await anyio.wait_all_tasks_blocked()
            thread = threading.Thread(target=held.release)
            thread.start()
            await anyio.to_thread.run_sync(thread.join)


async def test_shared_slices_give_the_buffer_back_when_the_last_one_goes() -> None:
    pool = Pool(4096, 1)
    lease = await pool.lease()
    lease.buffer[:4] = b"abcd"
    whole = lease.into_slice(4)
    left, right = whole.share(0, 2), whole.share(2, 4)
    whole.release()
    left.release()
    assert pool.in_use == 1
    assert bytes(right.view) == b"cd"
    assert right.view.readonly
    right.release()
    assert pool.in_use == 0


async def test_second_release_is_refused() -> None:
    pool = Pool(4096, 2)
    one = (await pool.lease()).into_slice(10)
    one.release()
    with pytest.raises(StageError, match="released twice"):
        one.release()


async def test_pool_never_has_more_buffers_out_than_it_may() -> None:
    pool = Pool(4096, 2)
    first, _ = await pool.lease(), await pool.lease()
    with anyio.move_on_after(0) as scope:
        await pool.lease()
    assert scope.cancelled_caught
    first.release()
    await checkpoint()
    await pool.lease()
    assert pool.in_use == 2


async def test_buffers_are_page_aligned() -> None:
    import numpy

    lease = await Pool(1 << 20, 1).lease()
    assert numpy.frombuffer(lease.buffer, numpy.uint8).__array_interface__["data"][0] % 4096 == 0


async def test_charge_shrinks_to_what_was_made() -> None:
    ledger = Ledger(100)
    made = charged_slice(b"x" * 30, await ledger.charge(100))
    assert ledger.charged == 30
    made.release()
    assert ledger.charged == 0
