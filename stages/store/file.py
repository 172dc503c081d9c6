"""Read a stored image from a file, by ranges."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

import anyio.to_thread

from pipeline.errors import FormatError, StoreError


class FileReader:
    """A file or block device as a RangeReader. Opened read-only by `open_file_reader`, which also closes it."""

    def __init__(self, path: Path, fd: int, size: int) -> None:
        self._path = path
        self._fd = fd
        self.size = size

    def fileno(self) -> int:
        """The descriptor, borrowed; reading only."""
        return self._fd

    async def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes.

        Raises:
            FormatError: the file ends before; it is never filled up with zeros.
            StoreError: the medium or share failed.
        Cancellation: waits for the read that is under way.
        """
        if offset < 0 or length < 0:
            raise ValueError(f"no range: {offset}, {length}")
        return await anyio.to_thread.run_sync(self._read, offset, length)

    async def next_data(self, offset: int) -> range | None:
        """The first stretch with storage that ends behind `offset`; None where only a hole follows.

        A filesystem that knows no holes calls everything data.
        """
        return await anyio.to_thread.run_sync(self._next_data, offset)

    def _read(self, offset: int, length: int) -> bytes:
        if offset + length > self.size:
            raise self._cut_short(offset, length, max(0, self.size - offset))
        try:
            data = os.pread(self._fd, length, offset)
            if len(data) == length:
                return data
            made = bytearray(data)
            # One call reads 2 GiB at most, and a share may give less than was asked for.
            while len(made) < length:
                more = os.pread(self._fd, length - len(made), offset + len(made))
                if not more:
                    raise self._cut_short(offset, length, len(made))
                made += more
            return bytes(made)
        except OSError as error:
            raise _store_error(error, "read", self._path, offset) from None

    def _next_data(self, offset: int) -> range | None:
        try:
            start = os.lseek(self._fd, offset, os.SEEK_DATA)
            return range(start, min(self.size, os.lseek(self._fd, start, os.SEEK_HOLE)))
        except OSError as error:
            if error.errno == errno.ENXIO:
                # Behind the last data; but a file that was cut meanwhile has no hole there, it has nothing.
                end = os.lseek(self._fd, 0, os.SEEK_END)
                if end < self.size:
                    raise self._cut_short(offset, self.size - offset, max(0, end - offset)) from None
                return None
            if error.errno in (errno.EINVAL, errno.ENOTSUP):
                return range(offset, self.size) if offset < self.size else None
            raise _store_error(error, "look for data", self._path, offset) from None

    def _cut_short(self, offset: int, expected: int, got: int) -> FormatError:
        return FormatError(
            "the image ends early",
            operation="read",
            path=self._path,
            offset=offset,
            expected=expected,
            got=got,
            hint="The file is truncated or is still being written. Compare its size with the manifest.",
        )


@asynccontextmanager
async def open_file_reader(
    url: str | Path, *, endpoint: str = "", ca_file: Path | None = None
) -> AsyncIterator[FileReader]:
    """Open a path or a `file:` URL for reading.

    Args:
        endpoint, ca_file: ignored; every opener takes them.
    Raises:
        StoreError: it can't be opened, or is neither a file nor a block device.
    """
    path = local_path(url)
    fd, size = await anyio.to_thread.run_sync(_open, path)
    try:
        yield FileReader(path, fd, size)
    finally:
        os.close(fd)


def local_path(url: str | Path) -> Path:
    """The path that a `file:` URL names; anything else is a path already."""
    if isinstance(url, str) and url.startswith("file:"):
        return Path(unquote(urlsplit(url).path))
    return Path(url)


def _open(path: Path) -> tuple[int, int]:
    try:
        # Non-blocking: opening a pipe that nobody writes to would never return. It changes nothing for files.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise _store_error(error, "open", path) from None
    try:
        kind = os.fstat(fd).st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)):
            raise StoreError("this is neither a file nor a block device", operation="open", path=path)
        return fd, os.lseek(fd, 0, os.SEEK_END)
    except BaseException as error:
        os.close(fd)
        if isinstance(error, OSError):
            raise _store_error(error, "open", path) from None
        raise


def _store_error(error: OSError, operation: str, path: Path, offset: int | None = None) -> StoreError:
    hints = {
        errno.ENOENT: "Check the path; a relative one starts at the current folder.",
        errno.EACCES: "Read it as a user who may, or change its permissions.",
        errno.EPERM: "Something beyond permissions forbids it (a container?): read it where the machine itself may.",
        errno.EIO: "The medium or the share failed; look at the kernel's log (dmesg).",
        errno.ESTALE: "The network share went away; mount it again.",
    }
    what = "the device" if path.is_relative_to("/dev") else "the image file"
    return StoreError(
        f"{what} could not be read: {os.strerror(error.errno or 0)}",
        operation=operation,
        hint=hints.get(error.errno or 0, ""),
        path=path,
        offset=offset,
    )
