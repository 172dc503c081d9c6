"""A disk file with bad sectors: a file system of one file, served from this process over FUSE. Needs root.

Reads of the bad range end with EIO, as a failing medium's do; the file may also become shorter while it is read.

Source: Linux, include/uapi/linux/fuse.h (the kernel's interface, protocol 7.31), Documentation/filesystems/fuse.rst.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAME = "disk.raw"

_HEADER = struct.Struct("<IIQQIIIHH")  # fuse_in_header
_OUT = struct.Struct("<IiQ")  # fuse_out_header
_ATTR = struct.Struct("<QQQQQQIIIIIIIIII")  # fuse_attr
_LOOKUP, _FORGET, _GETATTR, _OPEN, _READ, _RELEASE, _FLUSH, _INIT, _BATCH_FORGET = 1, 2, 3, 14, 15, 18, 25, 26, 42
_ROOT, _FILE = 1, 2
_MESSAGE_MAX = 1 << 20
_MNT_DETACH = 2
_libc = ctypes.CDLL(None, use_errno=True)


class FailingDisk:
    """What the file holds and which of its reads fail. Made by `failing_disk`.

    Attributes:
        path: of the file.
        size: bytes it has now; assigning less makes it shorter.
        shrinks_to: its size from the first read on that reaches `bad`; None where those reads fail instead.
    """

    def __init__(self, folder: Path, content: bytes, bad: range, shrinks_to: int | None) -> None:
        self.path = folder / NAME
        self.size = len(content)
        self.shrinks_to = shrinks_to
        self._content = content
        self._bad = bad

    def read(self, offset: int, length: int) -> bytes:
        """The bytes of one read. Raises OSError."""
        if offset < self._bad.stop and offset + length > self._bad.start:
            if self.shrinks_to is None:
                raise OSError(errno.EIO, "bad sector")
            self.size = self.shrinks_to
        return self._content[offset : min(offset + length, self.size)]


@contextmanager
def failing_disk(
    folder: Path, content: bytes, bad: range = range(0), *, shrinks_to: int | None = None
) -> Iterator[FailingDisk]:
    """Mount it over `folder`, and take it away in the end.

    Args:
        bad: reads that touch this range of bytes fail, or make the file shorter.
    """
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={fd},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()},allow_other"
    if _libc.mount(b"failing", os.fsencode(folder), b"fuse", 0, options.encode()):
        os.close(fd)
        raise OSError(ctypes.get_errno(), "mount of a FUSE file system")
    disk = FailingDisk(folder, content, bad, shrinks_to)
    server = threading.Thread(target=_serve, args=(fd, disk), daemon=True)
    server.start()
    try:
        yield disk
    finally:
        _libc.umount2(os.fsencode(folder), _MNT_DETACH)
        server.join(timeout=10)
        os.close(fd)


def _serve(fd: int, disk: FailingDisk) -> None:
    while True:
        try:
            message = os.read(fd, _MESSAGE_MAX)
        except OSError as error:
            if error.errno in (errno.EINTR, errno.ENOENT):
                continue
            return  # ENODEV: unmounted
        _, operation, unique, node, *_ = _HEADER.unpack_from(message)
        if operation in (_FORGET, _BATCH_FORGET):
            continue
        try:
            answer = _answer(disk, operation, node, message[_HEADER.size :])
        except OSError as error:
            os.write(fd, _OUT.pack(_OUT.size, -(error.errno or errno.EIO), unique))
        else:
            os.write(fd, _OUT.pack(_OUT.size + len(answer), 0, unique) + answer)


def _answer(disk: FailingDisk, operation: int, node: int, body: bytes) -> bytes:
    if operation == _INIT:
        # major, minor, readahead, flags, background, congestion, write size, time grain, pages, alignment, unused
        return struct.pack("<IIIIHHIIHH8I", 7, 31, 0, 0, 16, 12, 1 << 17, 1, 256, 0, *[0] * 8)
    if operation == _LOOKUP:
        if body.rstrip(b"\0").decode() != NAME:
            raise OSError(errno.ENOENT, "no such file")
        return struct.pack("<QQQQII", _FILE, 0, 0, 0, 0, 0) + _attributes(disk, _FILE)
    if operation == _GETATTR:
        return struct.pack("<QII", 0, 0, 0) + _attributes(disk, node)
    if operation == _OPEN:
        return struct.pack("<QII", 0, 0, 0)
    if operation == _READ:
        _, offset, length = struct.unpack_from("<QQI", body)
        return disk.read(offset, length)
    if operation in (_RELEASE, _FLUSH):
        return b""
    raise OSError(errno.ENOSYS, "not needed here")


def _attributes(disk: FailingDisk, node: int) -> bytes:
    is_file = node == _FILE
    mode = stat.S_IFREG | 0o444 if is_file else stat.S_IFDIR | 0o555
    size = disk.size if is_file else 0
    return _ATTR.pack(node, size, size // 512, 0, 0, 0, 0, 0, 0, mode, 1, os.getuid(), os.getgid(), 0, 4096, 0)
