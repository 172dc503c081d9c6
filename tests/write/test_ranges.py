"""The driver of targets that take writes at any offset: how far they are durable."""

from __future__ import annotations

from typing import Any, cast

import anyio
import anyio.lowlevel

from pipeline.flow.buffers import Pool
from pipeline.flow.pacing import RateLimit
from pipeline.flow.stage import Start
from pipeline.units import KiB, MiB
from stages.write.ranges import RangeDriver
from tests.write.images import QuickClock, make_context, mixed


class Noting:
    """A journal that remembers in which order it was told."""

    def __init__(self, seen: list[object]) -> None:
        self.start = Start()
        self.guest_bytes = 0
        self.mark = 0
        self._seen = seen

    def note_mark(self, position: int) -> None:
        self.mark = position
        self._seen.append(position)


async def test_only_what_was_written_before_the_target_was_flushed_is_noted_as_durable() -> None:
    """What is written during the flush may be lost with the power: a resume must not count on it."""
    seen: list[object] = []
    journal: Any = Noting(seen)

    async def make_durable() -> bool:
        await anyio.lowlevel.checkpoint()
        driver._position += 4 * MiB
        seen.append("flushed")
        driver._writing.clear()
        return seen.count("flushed") < 3

    context = make_context(mixed(30 * MiB), clock=QuickClock())
    driver = RangeDriver(
        cast(Any, None),
        context,
        staging=Pool(64 * KiB, 2),
        in_flight=2,
        limit=RateLimit(context.clock, None),
        journal=journal,
        make_durable=make_durable,
    )
    driver._position = 10 * MiB
    driver._writing = {1: 6 * MiB}  # still under way: nothing from here on is there
    with anyio.fail_after(5):
        await driver._mark(journal, make_durable)
    assert seen == ["flushed", 6 * MiB, "flushed", 14 * MiB, "flushed"], "the third flush was refused"
