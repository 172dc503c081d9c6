"""A bounded cache over an image's reader that reads ahead of whoever goes straight through it.

A lone read costs one page; a stream of them doubles what is read at once, up to `RUN_MAX`. What is being read is
waited for, not read twice. Zeros take no memory.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing

import anyio
import anyio.to_thread

from pipeline.errors import PipelineError, StoreError
from pipeline.units import KiB, MiB
from stages.decode.image import DecodedImage, Extent
from stages.decode.places import Placing
from stages.decode.raw import RawImage
from stages.serve.disk import Span, Stored

# The smallest read. A compressed cluster is as long; a larger page makes a booting guest read what it never asks for.
PAGE = 64 * KiB
# The longest read. Larger ones cost fewer thread calls, and every answer under way holds one.
RUN_MAX = MiB
CACHE = 64 * MiB
_LOADS = 8
_STREAMS = 32
# More pieces than these in one answer are put together here, in fewer calls.
_PLACES_MAX = 32


class _Run:
    """Neighbouring pages that were read together.

    Attributes:
        data: None where all of it is zero.
        failure: why it can't be had.
        is_ready: `data` says what the image holds.
    """

    __slots__ = ("data", "failure", "first", "is_ready", "length", "pages", "ready")

    def __init__(self, first: int, pages: int, length: int) -> None:
        self.first = first
        self.pages = pages
        self.length = length
        self.data: memoryview | None = None
        self.failure: PipelineError | None = None
        self.is_ready = False
        self.ready = anyio.Event()


class CachedImage:
    """An image as a disk that can be read. Borrows the image."""

    can_write = False

    def __init__(
        self,
        image: DecodedImage,
        *,
        capacity: int = CACHE,
        fd: int | None = None,
        on_sent: Callable[[int], None] = lambda count: None,
    ) -> None:
        """Prepare it; nothing is read.

        Args:
            capacity: bytes kept. What answers under way hold comes on top.
            fd: of the local file that is the image, where it is one; borrowed.
            on_sent: told how many bytes of that file the kernel sends by itself.
        """
        self.fd = fd if isinstance(image, Placing) else None
        self._on_sent = on_sent
        self._image = image
        self._capacity = capacity
        self._pages: dict[int, _Run] = {}
        self._runs: OrderedDict[_Run, None] = OrderedDict()
        self._held = 0
        self._loads = anyio.Semaphore(_LOADS)
        self._ends: OrderedDict[int, int] = OrderedDict()  # page behind a run -> pages of that run
        self.size = image.size

    def extents(self, offset: int, length: int) -> AsyncIterator[Extent]:
        """As the image says."""
        return self._image.extents(offset, length)

    async def read(self, offset: int, length: int) -> Sequence[Span]:
        """From memory where it is there."""
        spans: list[Span] = []
        position, end = offset, offset + length
        while position < end:
            run = self._pages.get(position // PAGE)
            if run is None:
                run = await self._load(position // PAGE, -(-end // PAGE))
            elif not run.is_ready:
                await run.ready.wait()
            if run.failure is not None:
                raise run.failure
            if not run.is_ready:  # whoever read it was cancelled
                continue
            if run in self._runs:
                self._runs.move_to_end(run)
            start = position - run.first * PAGE
            count = min(end - position, run.length - start)
            spans.append(Span(count, run.data[start : start + count] if run.data is not None else None))
            position += count
        return spans

    async def locate(self, offset: int, length: int) -> Sequence[Stored] | None:
        """As the image's tables say, where nothing of it is packed."""
        if isinstance(self._image, RawImage):
            self._on_sent(length)
            return (Stored(length, offset),)
        if not isinstance(self._image, Placing):
            return None
        found: list[Stored] = []
        position, end = offset, offset + length
        async with aclosing(self._image.places(offset, length)) as places:  # type: ignore[type-var]  # a generator
            async for place in places:
                if place.kind == "packed" or (place.kind == "data" and place.at is None) or len(found) > _PLACES_MAX:
                    return None
                if place.offset > position:
                    found.append(Stored(place.offset - position, None))
                found.append(Stored(place.length, place.at if place.kind == "data" else None))
                position = place.end
        if position < end:
            found.append(Stored(end - position, None))
        self._on_sent(sum(one.length for one in found if one.at is not None))
        return found

    async def write(self, offset: int, data: memoryview) -> None:
        """Never: the image is only read."""
        raise StoreError("the image is only read", operation="write", offset=offset)

    async def zero(self, offset: int, length: int) -> None:
        """Never."""
        raise StoreError("the image is only read", operation="write", offset=offset)

    async def flush(self) -> None:
        """Nothing to do."""

    async def _load(self, page: int, stop: int) -> _Run:
        """Read from `page` on: what is asked for, or more where somebody reads straight on."""
        before = self._ends.pop(page, 0)
        pages = min(max(stop - page, 2 * before), RUN_MAX // PAGE)
        last = -(-self.size // PAGE)
        pages = next((at - page for at in range(page + 1, min(page + pages, last)) if at in self._pages), pages)
        pages = min(pages, last - page)
        run = _Run(page, pages, min(pages * PAGE, self.size - page * PAGE))
        for at in range(page, page + pages):
            self._pages[at] = run
        self._ends[page + pages] = pages
        if len(self._ends) > _STREAMS:
            self._ends.popitem(last=False)
        try:
            async with self._loads:
                await self._fill(run)
            run.is_ready = True
        except PipelineError as error:
            run.failure = error
            raise
        finally:
            if run.is_ready:
                self._keep(run)
            else:
                self._forget(run)
            run.ready.set()
        return run

    async def _fill(self, run: _Run) -> None:
        fetched = await self._image.fetch(run.first * PAGE, run.length)
        if fetched.parts:
            view = memoryview(bytearray(run.length))
            await anyio.to_thread.run_sync(self._image.decode, fetched, view)
            run.data = view.toreadonly()

    def _keep(self, run: _Run) -> None:
        self._runs[run] = None
        self._held += self._weight(run)
        while self._held > self._capacity and len(self._runs) > 1:
            oldest, _ = self._runs.popitem(last=False)
            self._held -= self._weight(oldest)
            self._forget(oldest)

    def _forget(self, run: _Run) -> None:
        for at in range(run.first, run.first + run.pages):
            if self._pages.get(at) is run:
                del self._pages[at]

    @staticmethod
    def _weight(run: _Run) -> int:
        # Zeros cost their entries: as if 1 KiB a page, so that they can't grow without end.
        return run.length if run.data is not None else run.pages * KiB
