"""Many items at once, results in order."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Generic, TypeVar, cast

import anyio
import anyio.to_thread

In = TypeVar("In")
Made = TypeVar("Made")


class _Slot(Generic[Made]):
    """The place of one result in the order of arrival."""

    __slots__ = ("done", "made")

    def __init__(self) -> None:
        self.done = anyio.Event()
        self.made: Made | None = None


async def ordered_map(
    items: AsyncIterator[In],
    work: Callable[[In], Awaitable[Made]],
    place: Callable[[Made], Awaitable[None]],
    *,
    workers: int,
) -> None:
    """Run `work` on up to `workers` items at once and `place` the results one by one, in the order of the items.

    How many results may wait for their turn is bounded by what the items hold (buffers, charges), not here: an
    item that holds nothing must not come in unbounded numbers.

    Cancellation: items and results that were under way are dropped; their buffers go with the run's pool.
    """
    room = anyio.Semaphore(workers)
    send, receive = anyio.create_memory_object_stream[_Slot[Made]](math.inf)

    async def fill(slot: _Slot[Made], item: In) -> None:
        try:
            slot.made = await work(item)
        finally:
            room.release()
        slot.done.set()

    async def dispatch() -> None:
        async for item in items:
            await room.acquire()
            slot: _Slot[Made] = _Slot()
            send.send_nowait(slot)
            tasks.start_soon(fill, slot, item)
        send.close()

    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(dispatch)
            async for slot in receive:
                await slot.done.wait()
                await place(cast(Any, slot.made))
                slot.made = None
    finally:
        send.close()
        receive.close()


async def in_thread(limiter: anyio.CapacityLimiter, call: Callable[[], Made]) -> Made:
    """Run `call` in a worker thread; returns or raises what it does.

    Cancellation: waits until the call is over (a thread never outlives the task that started it).
    """
    return await anyio.to_thread.run_sync(call, limiter=limiter)
