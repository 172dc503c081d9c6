"""Write the disk onto a block device, in place: O_DIRECT, zeros by the kernel, only on a device that nobody uses."""

from __future__ import annotations

import errno
import os
import shlex
import stat
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from fcntl import ioctl
from pathlib import Path
from typing import Final

from pipeline.errors import PlanError, StoreError
from pipeline.flow.items import RangeReader
from pipeline.flow.orders import SPARSE_SINK, Order
from pipeline.flow.pacing import RATE_MIN
from pipeline.flow.parallel import in_thread
from pipeline.flow.stage import STORED_IMAGE, SinkRequest, StageContext, StageSpec, option, pieces
from pipeline.units import MiB, Size
from stages.store.file import open_file_reader
from stages.store.first_bytes import FirstBytes
from stages.write.block import BlockWriter
from stages.write.packing import UNIT

# linux/fs.h: make a range zero, by whatever the device can do; where it can't, the kernel writes zeros.
_BLKZEROOUT: Final = 0x127F
# One call, so that it can be interrupted and progress is seen.
_ZERO_AT_ONCE = 256 * MiB


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of write.device."""

    path: Path = option(doc="The block device; a mounted one, or one in use, is refused.", example="/dev/sdb")
    overwrite: bool = option(False, doc="Write although the device holds data, which is lost.")
    rate_limit: Size | None = option(
        None, doc='Write at most this much a second, as in "200 MiB".', may_change=True, minimum=RATE_MIN
    )


class DeviceTarget:
    """A block device that is claimed while it is written."""

    option = "write.device"
    reads_zero = False

    def __init__(self, options: Options, context: StageContext) -> None:
        self._path = options.path.absolute()
        self._context = context
        self._fd = self._direct_fd = -1

    @property
    def uri(self) -> str:
        """Its path."""
        return str(self._path)

    async def open(self, request: SinkRequest) -> int:
        """Claim it, so that nobody can mount it meanwhile. Raises PlanError."""
        return await in_thread(self._context.threads, lambda: self._open(request.source_path))

    def _open(self, source: str | None) -> int:
        path = self._path
        try:
            found = os.stat(path)
        except OSError as error:
            raise self._plan_error(error) from None
        if not stat.S_ISBLK(found.st_mode):
            raise PlanError(
                "the target is no block device", operation="plan", path=path, hint="For a file, use write.file."
            )
        if source is not None and os.path.exists(source) and os.stat(source).st_rdev == found.st_rdev:
            raise PlanError("the target is the source", operation="plan", path=path, hint="Choose another device.")
        try:
            # O_EXCL on a block device: refused while it, or a partition of it, is mounted, swapped on or held by
            # another driver; and while we have it, mounting is refused (open(2)).
            self._fd = os.open(path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
            self._direct_fd = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
            size = os.lseek(self._fd, 0, os.SEEK_END)
        except OSError as error:
            self._close()
            raise self._plan_error(error) from None
        backing = _backing_file(found.st_rdev)
        if source is not None and backing and os.path.exists(source) and os.path.samefile(backing, source):
            self._close()
            raise PlanError("the target lies on the source", operation="plan", path=path, file=backing)
        return size

    def _plan_error(self, error: OSError) -> PlanError:
        if error.errno == errno.EBUSY:
            users = users_of(self._path)
            return PlanError(
                "the target is in use" + (f": {', '.join(users)}" if users else ""),
                operation="plan",
                path=self._path,
                hint="Unmount it, with all of its partitions; is it the right one?",
            )
        hints = {
            errno.EACCES: "Only root may write to devices.",
            errno.EROFS: "It is write-protected (blockdev --setrw).",
            errno.EPERM: "It is write-protected (blockdev --setrw).",
        }
        return PlanError(
            f"the target can't be opened: {error.strerror}",
            operation="plan",
            path=self._path,
            hint=hints.get(error.errno or 0, ""),
        )

    async def write(self, parts: Sequence[tuple[int, memoryview]]) -> None:
        """One thread call for all of it. Raises StoreError."""
        await in_thread(self._context.threads, lambda: self._write(parts))

    def _write(self, parts: Sequence[tuple[int, memoryview]]) -> None:
        for offset, view in parts:
            head = min(-offset % UNIT, view.nbytes)
            middle = head + (view.nbytes - head) // UNIT * UNIT
            try:
                _write_fully(self._fd, view[:head], offset)
                try:
                    _write_fully(self._direct_fd, view[head:middle], offset + head)
                except OSError as error:
                    if error.errno != errno.EINVAL:  # memory that is not aligned for this device
                        raise
                    _write_fully(self._fd, view[head:middle], offset + head)
                _write_fully(self._fd, view[middle:], offset + middle)
            except OSError as error:
                raise self._store_error(error, offset) from None

    async def zero(self, offset: int, length: int) -> None:
        """By the kernel, in whole units; what is beside them is written. Raises StoreError."""
        begin = offset + -offset % UNIT
        end = offset + length - (offset + length) % UNIT
        edges = ((offset, begin), (end, offset + length)) if begin < end else ((offset, offset + length),)
        await self.write([(start, memoryview(bytes(stop - start))) for start, stop in edges if start < stop])
        for start in range(begin, end, _ZERO_AT_ONCE):
            stop = min(end, start + _ZERO_AT_ONCE)
            await in_thread(self._context.threads, lambda start=start, stop=stop: self._zero(start, stop))  # type: ignore[misc]  # defaults

    def _zero(self, start: int, stop: int) -> None:
        try:
            ioctl(self._fd, _BLKZEROOUT, struct.pack("=QQ", start, stop - start))
        except OSError as error:
            raise self._store_error(error, start) from None

    async def flush(self) -> None:
        """On the medium, and out of the page cache, so that verification reads the medium. Raises StoreError."""
        await in_thread(self._context.threads, self._flush)

    def _flush(self) -> None:
        try:
            os.fsync(self._fd)
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise self._store_error(error, None) from None

    def forget(self) -> None:
        """Nothing is remembered of it."""

    @asynccontextmanager
    async def open_reader(self, size: int) -> AsyncIterator[RangeReader]:
        """The device itself, read-only."""
        async with open_file_reader(self._path) as reader:
            yield FirstBytes(reader, size)

    def wipe_command(self) -> str:
        """With dd."""
        return shlex.join(["dd", "if=/dev/zero", f"of={self._path}", "bs=1M", "count=1", "conv=fsync"])

    async def close(self) -> None:
        """Give the device back; idempotent."""
        self._close()

    def _close(self) -> None:
        for fd in (self._fd, self._direct_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._direct_fd = -1

    def _store_error(self, error: OSError, offset: int | None) -> StoreError:
        hints = {
            errno.EIO: "The device failed; look at the kernel's log (dmesg).",
            errno.ENOSPC: "What the device lies on is full (thin volume, loop file).",
        }
        return StoreError(
            f"the device could not be written: {error.strerror}",
            operation="write",
            path=self._path,
            offset=offset,
            hint=hints.get(error.errno or 0, ""),
        )


def _write_fully(fd: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < view.nbytes:
        done += os.pwrite(fd, view[done:], offset + done)


def users_of(path: Path) -> list[str]:
    """Who uses a device or a partition of it, as far as the kernel tells."""
    try:
        number = os.stat(path).st_rdev
    except OSError:
        return []
    folder = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    parts = [folder, *(one.parent for one in folder.glob("*/partition"))]
    numbers = {one.joinpath("dev").read_text().strip() for one in parts if one.joinpath("dev").exists()}
    found = []
    for line in _lines("/proc/self/mountinfo"):
        words = line.split()
        if len(words) > 4 and words[2] in numbers:
            found.append(f"mounted on {words[4]}")
    for line in _lines("/proc/swaps")[1:]:
        device = line.split()[0]
        try:
            status = os.stat(device)
        except OSError:
            continue
        if f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}" in numbers:
            found.append("swapped on")
    found += [f"held by {holder.name}" for one in parts for holder in one.glob("holders/*")]
    return sorted(set(found))


def _backing_file(number: int) -> str:
    """The file behind a loop device; empty for others."""
    path = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/loop/backing_file")
    try:
        name = path.read_text().strip()
    except OSError:
        return ""
    return name if os.path.exists(name) else ""


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


class DeviceWriter(BlockWriter):
    """One block device, written in place."""

    def __init__(self, options: Options, context: StageContext) -> None:
        super().__init__(
            DeviceTarget(options, context), context, overwrite=options.overwrite, rate_limit=options.rate_limit
        )


SPEC = StageSpec(
    name="write.device",
    summary="Write the disk onto a block device that nobody uses, in place: O_DIRECT, zeros by the kernel, fsync.",
    options=Options,
    takes=pieces(Order.SPARSE),
    gives=STORED_IMAGE,
    build=DeviceWriter,
    sink=SPARSE_SINK,
    resumable=True,
)
