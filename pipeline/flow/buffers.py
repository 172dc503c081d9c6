"""The byte ledger, the pool of page-aligned buffers, and the slices that travel.

Everything that holds disk bytes is either a buffer of the Pool (what is read) or bytes charged to the Ledger (what is
made of it: compressed clusters, open parts). Channel depths are never a memory setting.
"""

from __future__ import annotations

import asyncio
import mmap
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import anyio

from pipeline.errors import StageError


class Ledger:
    """Counts bytes against a fixed total; a charge waits, in order of arrival, until it fits.

    Threads: `release` may be called from any thread; everything else on the event loop that made the ledger.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.charged = 0
        self.peak = 0
        self._waiters: deque[tuple[int, anyio.Event]] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.get_ident()

    async def charge(self, amount: int) -> Charge:
        """Take `amount` bytes, waiting until they are free.

        Raises:
            StageError: more was asked for than the ledger will ever have.
        Cancellation: nothing is taken.
        """
        if amount > self.total:
            raise StageError(
                "more memory is needed at once than the run may use",
                needed=amount,
                available=self.total,
                hint='Raise "memory" in [export].',
            )
        self._loop = self._loop or asyncio.get_running_loop()
        if self._waiters or self.charged + amount > self.total:
            turn = anyio.Event()
            self._waiters.append((amount, turn))
            try:
                await turn.wait()
            except BaseException:
                if turn.is_set():
                    self._give_back(amount)
                else:
                    self._waiters.remove((amount, turn))
                    self._admit()
                raise
        else:
            self._take(amount)
        return Charge(self, amount)

    def release(self, amount: int) -> None:
        """Give `amount` bytes back."""
        if threading.get_ident() == self._thread or self._loop is None:
            self._give_back(amount)
        else:
            self._loop.call_soon_threadsafe(self._give_back, amount)

    def _take(self, amount: int) -> None:
        self.charged += amount
        self.peak = max(self.peak, self.charged)

    def _give_back(self, amount: int) -> None:
        self.charged -= amount
        self._admit()

    def _admit(self) -> None:
        while self._waiters and self.charged + self._waiters[0][0] <= self.total:
            amount, turn = self._waiters.popleft()
            self._take(amount)
            turn.set()


class Charge:
    """Bytes taken from a ledger. Shrink it when less was needed; release it once."""

    __slots__ = ("_ledger", "amount")

    def __init__(self, ledger: Ledger, amount: int) -> None:
        self._ledger = ledger
        self.amount = amount

    def shrink(self, to: int) -> None:
        """Keep `to` bytes and give the rest back. Threads: any."""
        if to > self.amount:
            raise StageError("a charge can't grow", charged=self.amount, wanted=to)
        rest, self.amount = self.amount - to, to
        if rest:
            self._ledger.release(rest)

    def release(self) -> None:
        """Give all of it back. Threads: any."""
        self.shrink(0)


class _Hold:
    """Counts the slices that share one buffer or charge; the last one to go gives it back."""

    __slots__ = ("_count", "_give_back", "_lock", "pooled_bytes")

    def __init__(self, give_back: Callable[[], None], pooled_bytes: int = 0) -> None:
        self.pooled_bytes = pooled_bytes
        self._count = 1
        self._give_back = give_back
        self._lock = threading.Lock()

    def share(self) -> None:
        with self._lock:
            self._count += 1

    def drop(self) -> None:
        with self._lock:
            self._count -= 1
            last = self._count == 0
        if last:
            self._give_back()


class Slice:
    """A read-only window on a pool buffer or on charged bytes.

    Whoever receives it owns it: send it on, or release it once. `view` is valid until then.
    """

    __slots__ = ("_hold", "_live", "view")

    def __init__(self, view: memoryview, hold: _Hold) -> None:
        self.view = view
        self._hold = hold
        self._live = True

    def __len__(self) -> int:
        return self.view.nbytes

    def release(self) -> None:
        """Give it back. Threads: any. A second release is a defect and raises StageError."""
        self._end()
        self.view = memoryview(b"")
        self._hold.drop()

    def share(self, start: int, stop: int) -> Slice:
        """Another slice over [start, stop) of this one, with a life of its own."""
        self._hold.share()
        return Slice(self.view[start:stop], self._hold)

    @property
    def pooled_bytes(self) -> int:
        """Length of the pool buffer that this slice keeps, however little of it it shows; 0 for charged bytes."""
        return self._hold.pooled_bytes

    def shares_with(self, other: Slice) -> bool:
        """Whether both look at the same buffer or charge."""
        return self._hold is other._hold

    def _end(self) -> None:
        if not self._live:
            raise StageError("a slice was released twice")
        self._live = False


def charged_slice(data: bytes | bytearray | memoryview, charge: Charge) -> Slice:
    """A slice over bytes that were made, which owns `charge` and shrinks it to their length. Threads: any."""
    view = memoryview(data).toreadonly()
    charge.shrink(view.nbytes)
    return Slice(view, _Hold(charge.release))


def loose_slice(data: bytes | bytearray | memoryview) -> Slice:
    """A slice over bytes that no ledger counts: for tests and for readers that bound themselves."""
    return Slice(memoryview(data).toreadonly(), _Hold(lambda: None))


class Lease:
    """One writable buffer of the pool. Turn it into a slice, or release it."""

    __slots__ = ("_hold", "buffer")

    def __init__(self, buffer: memoryview, give_back: Callable[[], None]) -> None:
        self.buffer = buffer
        self._hold = _Hold(give_back, buffer.nbytes)

    def into_slice(self, length: int) -> Slice:
        """Hand the first `length` bytes on, read-only; the lease must not be used any more."""
        return Slice(self.buffer[:length].toreadonly(), self._hold)

    def release(self) -> None:
        """Give the buffer back unused."""
        self._hold.drop()


class Pool:
    """`count` page-aligned buffers of `buffer_size` bytes, made on first use and kept until `close`.

    Never lease while holding a lease from the same pool.
    """

    def __init__(self, buffer_size: int, count: int) -> None:
        self.buffer_size = buffer_size
        self.count = count
        self._gate = Ledger(count)
        self._free: list[mmap.mmap] = []
        self._made: list[mmap.mmap] = []

    @property
    def in_use(self) -> int:
        """How many buffers are leased now."""
        return self._gate.charged

    async def lease(self) -> Lease:
        """A buffer of `buffer_size` bytes with undefined content, as soon as one is free.

        Cancellation: nothing is leased.
        """
        charge = await self._gate.charge(1)
        if self._free:
            buffer = self._free.pop()
        else:
            # Shared mapping: O_DIRECT into a private one can corrupt memory when the process forks meanwhile
            # (open(2), NOTES).
            buffer = mmap.mmap(-1, self.buffer_size, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
            self._made.append(buffer)

        def give_back() -> None:
            self._free.append(buffer)
            charge.release()

        return Lease(memoryview(buffer), give_back)

    def close(self) -> None:
        """Unmap every buffer that nobody looks at any more."""
        for buffer in self._made:
            try:
                buffer.close()
            except BufferError:
                pass  # a view is still alive somewhere; the mapping goes when the view does
        self._made.clear()
        self._free.clear()


@dataclass(frozen=True, slots=True)
class Memory:
    """Where the disk bytes of a run live: buffers for what is read, charges for what is made of it.

    Attributes:
        made_max: bytes charged before a full window is prepared; 0 where the encoder passes the buffer on.
    """

    ledger: Ledger
    pool: Pool
    made_max: int

    @property
    def leaked(self) -> int:
        """Bytes that somebody still holds; 0 after a run that ended well."""
        return self.ledger.charged + self.pool.in_use * self.pool.buffer_size
