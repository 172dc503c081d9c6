"""How fast bytes may go: a rate that the user set, and the rate that a store can bear, found by listening to it.

A store that answers "slow down" is obeyed by the whole run at once: everybody waits as long as it asked, the send rate
drops to nine tenths of what the store took lately, and fewer requests are under way. From there the rate climbs back to
where it was refused, stays around it, and probes beyond it ever faster as long as nothing is refused.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

import anyio

from pipeline.errors import PlanError
from pipeline.events import Event, SendRateLowered
from pipeline.flow.stage import Clock
from pipeline.units import KiB, MiB, format_size

# The least that a rate may be. Below it, the shortest piece would take more than a quarter of a minute.
RATE_MIN = KiB
# What may go out at once, in seconds of the rate. Less costs throughput when timers are late, more makes bursts that a
# policed line drops.
BURST_S = 0.1
# The longest and the shortest piece that is sent between two looks at the clock.
_BITE_MAX = MiB
_BITE_MIN = 16 * KiB
# Fewer acknowledged requests than this tell no rate; half of them do before the first cut, when nothing else is known.
_MEASURED_MIN = 4
# After a cut, refusals mean nothing for as long as so many requests take at the new rate. 1 cuts too deep, 4 finds a
# store's rate too late.
_DEAF_REQUESTS = 2


class RateLimit:
    """A token bucket: bytes wait until they may go. On the event loop only."""

    def __init__(self, clock: Clock, bytes_per_s: float | None) -> None:
        """Start with a full bucket.

        Args:
            bytes_per_s: None for no limit.
        Raises:
            PlanError: a limit that lets nothing through.
        """
        if bytes_per_s is not None and bytes_per_s < RATE_MIN:
            raise PlanError("rate_limit is less than 1 KiB a second", operation="plan", hint='Write "10 MiB", say.')
        self.bytes_per_s = bytes_per_s
        self._clock = clock
        self._due = float("-inf")

    @property
    def bite(self) -> int:
        """How many bytes to wait for at once, so that they go out evenly."""
        if self.bytes_per_s is None:
            return _BITE_MAX
        return max(_BITE_MIN, min(_BITE_MAX, int(self.bytes_per_s * BURST_S)))

    async def wait(self, count: int) -> None:
        """Return when `count` more bytes may go; in the order of the calls. More than a burst is paid for later.

        Cancellation: the bytes count as gone.
        """
        now = self._clock.now()
        begins = max(self._due, now - BURST_S)
        if self.bytes_per_s is not None:
            self._due = begins + count / self.bytes_per_s
        if begins > now:
            await self._clock.sleep(begins - now)

    def pause(self, seconds: float) -> None:
        """Let nothing go for this long; what waits already goes as it was told."""
        self._due = max(self._due, self._clock.now() + seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pacing:
    """How a Pacer behaves. Seconds and shares.

    Attributes:
        cut: the share of the refused rate that is left after a refusal. 0.7 recovers longer and leaves a tenth of the
            store's rate unused, 0.95 is refused twice as often.
        regain_s: how long the climb back to the refused rate takes; as long again, and the rate is a tenth above it.
        cut_requests: the share of the requests under way that is left; each `regain_s / 4` adds one.
        measure_s: over how long the store's own rate is measured. Requests that take longer count by what went of
            them meanwhile, shorter ones when they are acknowledged.
    """

    cut: float = 0.9
    regain_s: float = 10.0
    cut_requests: float = 0.75
    measure_s: float = 5.0


class Flight:
    """One request's bytes on their way, and how many of them went lately."""

    __slots__ = ("_marks", "_sent", "begun")

    def __init__(self, now: float) -> None:
        self.begun = now
        self._sent = 0
        self._marks = deque([(now, 0)])  # (when, bytes sent before)

    def add(self, now: float, count: int, span: float) -> None:
        """So many bytes went out; what they were is remembered in tenths of `span` seconds."""
        if now - self._marks[-1][0] >= span / 10:
            self._marks.append((now, self._sent))
            while len(self._marks) > 1 and self._marks[1][0] <= now - span:
                self._marks.popleft()
        self._sent += count

    def lately(self, now: float, span: float) -> int | None:
        """Bytes of the last `span` seconds; None where it has not been under way for so long."""
        if now - self.begun < span:
            return None
        since, before = next(mark for mark in reversed(self._marks) if mark[0] <= now - span)
        return int((self._sent - before) * span / (now - since))


class Pacer:
    """One store's pace, shared by everything that is sent to it. On the event loop only."""

    def __init__(
        self,
        clock: Clock,
        *,
        requests: int,
        limit: float | None = None,
        emit: Callable[[Event], None] = lambda event: None,
        stage: str = "",
        pacing: Pacing | None = None,
    ) -> None:
        """Start without any restraint but the limit.

        Args:
            requests: how many may be under way at once, at most.
            limit: bytes a second that the user allows; None for any.
        """
        self._clock = clock
        self._requests = requests
        self._limit = limit
        self._bucket = RateLimit(clock, limit)
        self._beginnings = RateLimit(clock, limit)
        self._emit = emit
        self._stage = stage
        self._pacing = pacing or Pacing()
        self._ceiling: float | None = None  # the rate that was refused last
        self._climb_from = 0.0  # when the climb after the last cut begins
        self._deaf_until = float("-inf")
        self._requests_left = float(requests)
        self._taken: deque[tuple[float, int]] = deque()
        self._begun = float("inf")
        self._flights: set[Flight] = set()
        self._under_way = 0
        self._freed = anyio.Event()

    @property
    def bytes_per_s(self) -> float | None:
        """The rate at this moment; None where nothing restrains it."""
        if self._ceiling is None:
            return self._limit
        # A cubic: it starts at `cut`, is flat around the ceiling, and grows without bound behind it. Source: RFC 9438,
        # section 4.2, with rates for windows.
        regain = self._pacing.regain_s
        since = max(0.0, self._clock.now() - self._climb_from) / regain - 1
        rate = self._ceiling * (1 + (1 - self._pacing.cut) * since**3)
        return min(rate, self._limit) if self._limit is not None else rate

    @property
    def requests(self) -> int:
        """How many requests may be under way at this moment."""
        since = max(0.0, self._clock.now() - self._climb_from)
        return max(1, min(self._requests, int(self._requests_left + 4 * since / self._pacing.regain_s)))

    @property
    def bite(self) -> int:
        """How many bytes to wait for at once."""
        self._bucket.bytes_per_s = self.bytes_per_s
        return self._bucket.bite

    async def wait(self, count: int, flight: Flight | None = None) -> None:
        """Return when `count` more bytes may go, of the request `flight`."""
        self._begun = min(self._begun, self._clock.now())
        self._bucket.bytes_per_s = self.bytes_per_s
        await self._bucket.wait(count)
        if flight is not None:
            flight.add(self._clock.now(), count, self._pacing.measure_s)

    @contextmanager
    def flight(self) -> Iterator[Flight]:
        """While inside, a request is on its way; tell `taken` before the end where the store acknowledged it.

        A part of hundreds of MiB takes longer than a rate is measured: what went of it lately counts then, and not
        what happened to be acknowledged.
        """
        flight = Flight(self._clock.now())
        self._flights.add(flight)
        try:
            yield flight
        finally:
            self._flights.discard(flight)

    def now(self) -> float:
        """The moment, for `refused`."""
        return self._clock.now()

    @asynccontextmanager
    async def request(self, length: int) -> AsyncIterator[float]:
        """Hold one of the requests that may be under way, when its turn has come.

        A store judges a request when it begins, so beginnings are spread as their bytes are. Gives the moment of the
        beginning, for `refused`.
        """
        while self._under_way >= self.requests:
            if self._freed.is_set():
                self._freed = anyio.Event()
            freed = self._freed
            # The number grows with time, too; nobody tells when.
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._nap, tasks.cancel_scope)
                await freed.wait()
                tasks.cancel_scope.cancel()
        self._under_way += 1
        try:
            if self._ceiling is not None:
                self._beginnings.bytes_per_s = self.bytes_per_s
                await self._beginnings.wait(length)
            yield self._clock.now()
        finally:
            self._under_way -= 1
            self._freed.set()

    async def _nap(self, scope: anyio.CancelScope) -> None:
        await self._clock.sleep(self._pacing.regain_s / 4)
        scope.cancel()

    def taken(self, count: int, flight: Flight | None = None) -> None:
        """The store acknowledged so many bytes, of the request `flight`."""
        now = self._clock.now()
        lately = flight.lately(now, self._pacing.measure_s) if flight is not None else None
        self._taken.append((now, count if lately is None else lately))
        self._forget(now)

    def refused(self, begun: float, length: int = 0, retry_after_s: float | None = None) -> None:
        """The store asked for less.

        Args:
            length: of the refused request.
            begun: when the request began: one that is older than the last cut says nothing about the rate since.
            retry_after_s: as the store said; nothing is sent by anybody meanwhile.
        """
        now = self._clock.now()
        rate, measured = self.bytes_per_s, self._measured(now)
        if retry_after_s:
            for bucket in (self._bucket, self._beginnings):
                bucket.pause(retry_after_s)
            self._climb_from = max(self._climb_from, now + retry_after_s)
        if begun < self._deaf_until:
            return
        self._requests_left = max(2.0, self._pacing.cut_requests * self.requests)
        self._deaf_until = now
        self._climb_from = now + (retry_after_s or 0.0)
        # What was taken lately is known in whole requests only, and half more may be the truth: too high is mended
        # within seconds, too low only by the slow climb.
        if measured is not None:
            rate = min(rate or 1.5 * measured, 1.5 * measured)
        if rate is None:
            return  # nothing was taken yet: fewer requests at once, until something is
        self._ceiling = max(rate, float(_BITE_MIN))
        # A store that is out of breath refuses until it has drawn some; that says nothing about the new rate.
        deaf_s = min(_DEAF_REQUESTS * length / self._ceiling, self._pacing.regain_s)
        self._deaf_until = self._climb_from + deaf_s
        self._emit(
            SendRateLowered(
                stage=self._stage,
                bytes_per_s=int(self.bytes_per_s or 0),
                requests=self.requests,
                reason=f"the store asked for less than {format_size(self._ceiling)} a second",
            )
        )

    def _measured(self, now: float) -> float | None:
        """What the store took lately, in bytes a second; None where that is not known yet."""
        self._forget(now)
        span = self._pacing.measure_s
        long = [sent for flight in self._flights if (sent := flight.lately(now, span)) is not None]
        if long:
            return (sum(long) + sum(count for when, count in self._taken if when > now - span)) / span or None
        spent = now - max(self._begun, min(now - self._pacing.measure_s, self._taken[0][0] if self._taken else now))
        total = sum(count for _, count in self._taken)
        enough = _MEASURED_MIN if self._ceiling is not None else _MEASURED_MIN // 2
        return total / spent if len(self._taken) >= enough and spent >= BURST_S else None

    def _forget(self, now: float) -> None:
        while len(self._taken) > _MEASURED_MIN and self._taken[0][0] < now - self._pacing.measure_s:
            self._taken.popleft()
