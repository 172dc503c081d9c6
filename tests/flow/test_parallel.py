from __future__ import annotations

from collections.abc import AsyncIterator

import anyio
import anyio.lowlevel
import pytest

from pipeline.flow.parallel import ordered_map


async def numbers(count: int) -> AsyncIterator[int]:
    for number in range(count):
        yield number


async def test_results_are_placed_in_the_order_of_the_items_whatever_finishes_first() -> None:
    placed: list[int] = []
    gates = [anyio.Event() for _ in range(4)]

    async def work(number: int) -> int:
        await gates[number].wait()
        return number

    async def place(number: int) -> None:
        placed.append(number)

    async with anyio.create_task_group() as tasks:

        async def run() -> None:
            await ordered_map(numbers(4), work, place, workers=4)

        tasks.start_soon(run)
        for number in (2, 1, 3):
            await anyio.wait_all_tasks_blocked()
            gates[number].set()
        await anyio.wait_all_tasks_blocked()
        assert placed == []
        gates[0].set()
    assert placed == [0, 1, 2, 3]


async def test_no_more_items_are_worked_on_than_there_are_workers() -> None:
    started: list[int] = []
    gate = anyio.Event()

    async def work(number: int) -> int:
        started.append(number)
        await gate.wait()
        return number

    async def place(number: int) -> None:
        pass

    async with anyio.create_task_group() as tasks:

        async def run() -> None:
            await ordered_map(numbers(50), work, place, workers=3)

        tasks.start_soon(run)
        await anyio.wait_all_tasks_blocked()
        assert started == [0, 1, 2]
        gate.set()
    assert started == list(range(50))


async def test_failing_work_ends_everything_with_its_error() -> None:
    async def work(number: int) -> int:
        if number == 2:
            raise ValueError("two")
        return number

    async def place(number: int) -> None:
        await anyio.lowlevel.checkpoint()

    with pytest.raises(ExceptionGroup) as caught:
        await ordered_map(numbers(100), work, place, workers=2)
    assert caught.group_contains(ValueError, match="two", depth=1)
