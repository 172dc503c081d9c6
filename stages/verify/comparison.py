"""Compare every byte that an image decodes to with the digest of the disk that was read.

Memory: at most `parallel` windows of 2 MiB at once, each with its stored and its decoded bytes.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import AsyncIterator, Callable, Sequence

import anyio
import anyio.to_thread
from anyio.streams.memory import MemoryObjectReceiveStream

from pipeline.errors import FormatError, first_error
from pipeline.events import Event, VerifyProgressed
from pipeline.flow.buffers import Ledger
from pipeline.flow.items import RangeReader, Verdict
from pipeline.flow.stage import Clock
from pipeline.units import MiB
from stages.checksum.leaves import LEAF, GuestDigest, hash_leaves, zero_leaf
from stages.compress.index import FrameIndex
from stages.decode.image import DecodedImage, Fetched
from stages.verify.sampling import Sample

# As large as the largest qcow2 cluster, so that no cluster is unpacked twice. Smaller costs round trips (a thread call
# is 0.1 to 0.2 ms), larger gains nothing (perf notes, "Chunk size") and costs memory for each window in flight.
WINDOW = 2 * MiB
# What one window holds: stored bytes with the gaps between them, decoded bytes, one unpacked cluster.
WINDOW_MEMORY = 3 * WINDOW
# Differing ranges told in a verdict, and kept while comparing.
TOLD_MAX = 16
_KEPT_MAX = 1024
_PROGRESS_EVERY_S = 0.25


class ProgressReport:
    """A `progress` for `verify_image` that emits events, four a second and a last one."""

    def __init__(self, stage: str, emit: Callable[[Event], None], clock: Clock) -> None:
        self._stage = stage
        self._emit = emit
        self._clock = clock
        self._next_s = clock.now()
        self._told = -1

    def __call__(self, done: int, total: int) -> None:
        """Guest bytes compared so far, and in total."""
        now = self._clock.now()
        if done != self._told and (now >= self._next_s or done == total):
            self._next_s = now + _PROGRESS_EVERY_S
            self._told = done
            self._emit(VerifyProgressed(stage=self._stage, done_bytes=done, total_bytes=total))


class Differences:
    """Differing guest ranges in any order, merged, the lowest ones kept, all of their bytes counted."""

    def __init__(self) -> None:
        self._ranges: list[range] = []
        self.total = 0

    def add(self, found: range) -> None:
        """Add a range that does not overlap an earlier one."""
        insort(self._ranges, found, key=lambda one: one.start)
        self.total += len(found)
        if len(self._ranges) > _KEPT_MAX:
            self._ranges = list(self.merged())[: _KEPT_MAX // 2]

    def merged(self) -> tuple[range, ...]:
        """Neighbours joined, ascending."""
        made: list[range] = []
        for one in self._ranges:
            if made and one.start <= made[-1].stop:
                made[-1] = range(made[-1].start, max(made[-1].stop, one.stop))
            else:
                made.append(one)
        return tuple(made)


async def verify_image(
    reader: RangeReader,
    format: str,
    digest: GuestDigest,
    *,
    virtual_size: int,
    image_size: int,
    parallel: int = 4,
    threads: anyio.CapacityLimiter | None = None,
    ledger: Ledger | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    index: FrameIndex | None = None,
    sample: Sample | None = None,
) -> Verdict:
    """Read the image back, decode it with a reader that shares no code with the encoder, and compare.

    All of it, or a sample. Ranges that the image does not store are compared without reading. Whatever is wrong with
    the image, up to one that can't be decoded at all, is the verdict "differs" with the reason.

    Args:
        reader: borrowed for the call.
        format: of the image, as in `Layout.format`.
        digest: of the disk as it was read.
        virtual_size: the disk a guest sees; what it has beyond `digest.size` must be zero.
        image_size: what the image should measure, in bytes.
        parallel: windows in flight; each needs up to `WINDOW_MEMORY`, charged to `ledger` where there is one.
        progress: called with guest bytes done and in total, after each window, on the event loop.
        index: of the frames of an image that a compressor packed.
        sample: which windows are compared; None: all. The verdict says how much of the disk they are.
    Raises:
        StoreError: the image can't be read.
    """
    # Here: with a decoder of every format it is a tenth of what a run imports before its first byte.
    from stages.decode.opening import is_known, open_image

    level = "sample" if sample else "readback"
    if not is_known(format):
        return Verdict(
            level, "unproven", 0.0, detail=f"no reader for {format} images is known; use verify.receipt instead"
        )
    if reader.size != image_size:
        return _differs(level, f"the stored image has {reader.size} bytes, {image_size} were written")
    try:
        image = await open_image(reader, format, strict=True, index=index)
    except FormatError as error:
        return _differs(level, f"the stored image can't be opened: {error}")
    if image.size != virtual_size or virtual_size < digest.size:
        return _differs(
            level, f"the image holds a disk of {image.size} bytes, {max(virtual_size, digest.size)} were exported"
        )
    chosen = sample.windows(digest, WINDOW) if sample else None
    comparison = _Comparison(image, digest, threads, ledger, progress, chosen)
    await comparison.run(parallel)
    verdict = comparison.verdict(format, image_size)
    return sample.judge(verdict, digest) if sample else verdict


class _Comparison:
    def __init__(
        self,
        image: DecodedImage,
        digest: GuestDigest,
        threads: anyio.CapacityLimiter | None,
        ledger: Ledger | None,
        progress: Callable[[int, int], None],
        chosen: Sequence[range] | None = None,
    ) -> None:
        self._chosen = chosen
        self._total = digest.size if chosen is None else sum(map(len, chosen))
        self._image = image
        self._digest = digest
        self._threads = threads
        self._ledger = ledger
        self._progress = progress
        self._differences = Differences()
        self._done = 0
        self._read = 0
        self._reason = ""

    async def run(self, parallel: int) -> None:
        """Compare the whole image, `parallel` windows at a time."""
        send, receive = anyio.create_memory_object_stream[range](0)
        try:
            async with anyio.create_task_group() as workers, send, receive:
                for _ in range(parallel):
                    workers.start_soon(self._work, receive.clone())
                receive.close()
                try:
                    async for window in self._windows():
                        await send.send(window)
                except FormatError as error:
                    self._note(error)
                send.close()
        except ExceptionGroup as group:
            raise first_error(group) from group

    async def _windows(self) -> AsyncIterator[range]:
        """Windows that hold stored bytes; the zeros between them are compared on the way, without reading."""
        if self._chosen is not None:
            for window in self._chosen:
                yield window
            return
        size = self._image.size
        reached = 0
        async for extent in self._image.extents(0, size):
            if extent.is_zero:
                continue
            first = max(reached, extent.offset - extent.offset % WINDOW)
            self._compare_zeros(range(reached, first))
            for start in range(first, extent.end, WINDOW):
                yield range(start, min(start + WINDOW, size))
                reached = min(start + WINDOW, size)
        self._compare_zeros(range(reached, size))

    async def _work(self, windows: MemoryObjectReceiveStream[range]) -> None:
        with windows:
            charge = None
            if self._ledger is not None:
                charge = await self._ledger.charge(min(WINDOW_MEMORY, self._ledger.total))
            try:
                buffer = bytearray(WINDOW)
                async for window in windows:
                    await self._compare(window, buffer)
            finally:
                if charge is not None:
                    charge.release()

    async def _compare(self, window: range, buffer: bytearray) -> None:
        compared = window
        try:
            fetched = await self._image.fetch(window.start, len(window))
            compared = range(fetched.offset, fetched.offset + fetched.length)  # a decoder's word, not ours
            differing = await anyio.to_thread.run_sync(self._decode_and_hash, fetched, buffer, limiter=self._threads)
        except FormatError as error:
            self._note(error)
            differing = [window]
        for found in differing:
            self._differences.add(found)
        self._read += len(compared)
        self._count(compared)

    def _decode_and_hash(self, fetched: Fetched, buffer: bytearray) -> list[range]:
        """Differing guest ranges of one window. Runs in a worker thread."""
        view = memoryview(buffer)[: fetched.length]
        self._image.decode(fetched, view)
        algorithm = self._digest.algorithm
        disk = min(fetched.length, max(0, self._digest.size - fetched.offset))
        differing = list(self._digest.differing(fetched.offset, hash_leaves(algorithm, view[:disk])))
        position = fetched.offset + disk
        for found in hash_leaves(algorithm, view[disk:]):
            length = min(LEAF, fetched.offset + fetched.length - position)
            if found != zero_leaf(algorithm, length):
                differing.append(range(position, position + length))
            position += length
        return differing

    def _compare_zeros(self, gap: range) -> None:
        """The image stores nothing in `gap`: every leaf recorded there must be one of zeros."""
        if not gap:
            return  # it would begin inside the short last leaf
        digest = self._digest
        size = digest.size
        tail = size % LEAF
        for found in digest.leaves.nonzero(gap.start // LEAF, min(-(-gap.stop // LEAF), digest.leaves.total)):
            stop = found.stop
            is_tail = bool(tail) and stop == digest.leaves.total
            if is_tail and digest.leaves.leaf(stop - 1) == zero_leaf(digest.algorithm, tail):
                stop -= 1
            if found.start < stop:
                self._differences.add(range(found.start * LEAF, min(stop * LEAF, size)))
        self._count(gap)

    def _count(self, compared: range) -> None:
        self._done += max(0, min(compared.stop, self._digest.size) - compared.start)
        self._progress(self._done, self._total)

    def _note(self, error: FormatError) -> None:
        self._reason = self._reason or str(error)

    def verdict(self, format: str, image_size: int) -> Verdict:
        """What was found."""
        digest = self._digest
        if self._done != self._total and not self._reason:
            self._reason = f"{self._done} of {self._total} bytes could be compared"
        differing = self._differences.merged()
        coverage = self._done / digest.size if digest.size else 1.0
        evidence = {
            "algorithm": digest.algorithm,
            "root": digest.root,
            "format": format,
            "image_bytes": str(image_size),
            "compared_bytes": str(self._done),
            "decoded_bytes": str(self._read),
        }
        if not differing and not self._reason:
            return Verdict(
                "readback",
                "identical",
                coverage,
                detail=f"all {digest.size} bytes of the disk were read back and are what was read ({digest.algorithm})",
                evidence=evidence,
            )
        detail = self._reason and f"the stored image is damaged: {self._reason}"
        if differing:
            where = f"{self._differences.total} bytes differ in windows of {LEAF}, the first at {differing[0].start}"
            detail = f"{detail}; {where}" if detail else where
        return Verdict("readback", "differs", coverage, differing[:TOLD_MAX], detail, evidence)


def _differs(level: str, detail: str) -> Verdict:
    return Verdict(level, "differs", 0.0, detail=detail)
