"""What each stage did with its time: working, waiting for input, for output, for a buffer."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

Wait = Literal["in", "out", "buffer"]


@dataclass(slots=True)
class StageMeter:
    """Counters of one stage, in seconds, bytes and items. Written on the event loop only.

    Attributes:
        working_s: thread or task seconds spent on items; may exceed the run's time when several threads work.
        parallelism: how many threads or tasks the stage may use at once.
    """

    name: str
    parallelism: int = 1
    working_s: float = 0.0
    waiting_in_s: float = 0.0
    waiting_out_s: float = 0.0
    waiting_buffer_s: float = 0.0
    items: int = 0
    guest_bytes: int = 0

    @contextmanager
    def waiting(self, kind: Wait) -> Iterator[None]:
        """Book the time inside as a wait of this kind."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - begun
            if kind == "in":
                self.waiting_in_s += spent
            elif kind == "out":
                self.waiting_out_s += spent
            else:
                self.waiting_buffer_s += spent

    @contextmanager
    def working(self) -> Iterator[None]:
        """Book the time inside as work."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.working_s += time.perf_counter() - begun


@dataclass(frozen=True, slots=True, kw_only=True)
class Bottleneck:
    """Which stage held the others up, and by how much."""

    stage: str
    busy: float
    sentence: str


def find_bottleneck(meters: Sequence[StageMeter], elapsed_s: float) -> Bottleneck:
    """Name the stage that was busy for the largest share of its capacity.

    Args:
        meters: one per stage, in chain order.
        elapsed_s: how long the items flowed.
    """
    if not meters or elapsed_s <= 0:
        return Bottleneck(stage="", busy=0.0, sentence="The run was too short to name a bottleneck.")
    shares = [(meter.working_s / (elapsed_s * max(1, meter.parallelism)), meter) for meter in meters]
    busy, slowest = max(shares, key=lambda share: share[0])
    busy = min(busy, 1.0)
    sentence = f"{slowest.name} was the bottleneck: busy {busy:.0%} of the time"
    held = max(meters, key=lambda meter: meter.waiting_out_s + meter.waiting_buffer_s)
    waited = (held.waiting_out_s + held.waiting_buffer_s) / elapsed_s
    if held is not slowest and waited >= 0.1:
        sentence += f", while {held.name} waited {min(waited, 1.0):.0%} of it for room"
    return Bottleneck(stage=slowest.name, busy=busy, sentence=sentence + ".")
