"""A stage context for tests of single stages."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import anyio

from pipeline.events import Event
from pipeline.flow.buffers import Ledger
from pipeline.flow.facts import Facts
from pipeline.flow.items import Block
from pipeline.flow.meter import StageMeter
from pipeline.flow.stage import Layout, Progress, StageContext
from pipeline.units import MiB


class StillClock:
    """Time that stands still until the test moves it."""

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        """Seconds."""
        return self.time

    async def sleep(self, seconds: float) -> None:
        """Nobody waits here."""
        self.time += seconds


def make_context(
    name: str,
    *,
    disk_size: int,
    events: list[Event] | None = None,
    layout: Layout | None = None,
    reload: Callable[[int, int], AsyncIterator[Block]] | None = None,
    memory: int = 64 * MiB,
) -> StageContext:
    """A context with its own facts and ledger; events land in `events`."""
    return StageContext(
        name=name,
        emit=(events if events is not None else list[Event]()).append,
        facts=Facts(),
        progress=Progress(),
        meter=StageMeter(name),
        ledger=Ledger(memory),
        threads=anyio.CapacityLimiter(4),
        workers=4,
        clock=StillClock(),
        disk_size=disk_size,
        window=2 * MiB,
        layout=layout,
        reload=reload,
    )
