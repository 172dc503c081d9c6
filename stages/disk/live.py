"""The system that is running, as a `View`: real files below a folder, by calls that never follow a link out of it.

Every name is opened relative to the folder before it and never through a link; links are read and resolved here, so an
absolute one means the view's root. `/proc` and `/sys` are those below the root, so that a tree may bring its own.

Source: Linux open(2), "O_PATH"; statx(2), "stx_attributes"; ioctl_iflags(2).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import os
import stat as modes
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from anyio import to_thread

from stages.disk.paths import DEPTH_MAX, ENTRIES_MAX, LINKS_MAX, failure, split
from stages.disk.tree import READ_LIMIT, Entry, Kind, Node, Space

T = TypeVar("T")

_O_PATH = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
# Not blocking, and no terminal taken: what was a regular file a moment ago may be a pipe now.
_O_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_READ = 256 * 1024

_AT_EMPTY_PATH = 0x1000
_AT_NO_AUTOMOUNT = 0x800
_GETFLAGS = 0x80086601  # FS_IOC_GETFLAGS where a long has 8 bytes
IMMUTABLE, APPEND_ONLY = 0x10, 0x20  # the same bits in STATX_ATTR_* and FS_*_FL

_KINDS = {
    modes.S_IFREG: Kind.FILE,
    modes.S_IFDIR: Kind.DIRECTORY,
    modes.S_IFLNK: Kind.LINK,
    modes.S_IFCHR: Kind.CHARACTER,
    modes.S_IFBLK: Kind.BLOCK,
    modes.S_IFIFO: Kind.FIFO,
    modes.S_IFSOCK: Kind.SOCKET,
}


def kind_of_mode(mode: int) -> Kind:
    """What the upper bits of `st_mode` say."""
    return _KINDS.get(modes.S_IFMT(mode), Kind.UNKNOWN)


class LiveView:
    """The files below `root`, read by this machine's kernel. Implements `stages.disk.tree.View`.

    Holds no descriptor between calls. Every call is one trip into a worker thread.

    Args:
        root: of the system; its own `/` for the machine we run on.
    """

    def __init__(self, root: str | Path = "/") -> None:
        self._root = os.fspath(root)

    @property
    def is_live(self) -> bool:
        """True: what it says may change between two calls."""
        return True

    async def stat(self, path: str, *, follow: bool = True) -> Node:
        """The inode at `path`; of the link itself without `follow`. Needs no right to read the file."""

        def look() -> Node:
            with self._opened(path, follow) as (descriptor, _):
                return _node(descriptor)

        return await _in_thread(look)

    async def list(self, path: str) -> tuple[Entry, ...]:
        """All names of a folder but `.` and `..`. Raises OSError EFBIG for more than ENTRIES_MAX."""

        def look() -> tuple[Entry, ...]:
            with self._opened(path, True) as (descriptor, _):
                if not modes.S_ISDIR(os.fstat(descriptor).st_mode):
                    raise failure(errno.ENOTDIR, path)
                return _entries(descriptor, path)

        return await _in_thread(look)

    async def read(self, path: str, *, limit: int = READ_LIMIT) -> bytes:
        """A whole regular file of at most `limit` bytes; files of /proc and /sys that claim no size are read too."""

        def look() -> bytes:
            with self._reading(path) as (descriptor, size):
                if size > limit:
                    raise failure(errno.EFBIG, path)
                data = _read_to_end(descriptor, limit + 1)
            if len(data) > limit:
                raise failure(errno.EFBIG, path)
            return data

        return await _in_thread(look)

    async def read_at(self, path: str, offset: int, length: int) -> bytes:
        """Bytes of a regular file; fewer only at its end."""

        def look() -> bytes:
            with self._reading(path) as (descriptor, _):
                parts: list[bytes] = []
                position, end = offset, offset + length
                while position < end:
                    part = os.pread(descriptor, min(_READ * 16, end - position), position)
                    if not part:
                        break
                    parts.append(part)
                    position += len(part)
                return b"".join(parts)

        return await _in_thread(look)

    async def target(self, path: str) -> str:
        """What the link at `path` says. Raises OSError EINVAL where it is none."""

        def look() -> str:
            with self._opened(path, False) as (descriptor, _):
                if not modes.S_ISLNK(os.fstat(descriptor).st_mode):
                    raise failure(errno.EINVAL, path)
                return _link(descriptor)

        return await _in_thread(look)

    async def resolve(self, path: str) -> str:
        """The path without links, seen from the view's root. Everything on the way must exist."""

        def look() -> str:
            with self._opened(path, True) as (_, names):
                return "/" + "/".join(names)

        return await _in_thread(look)

    async def space(self, path: str) -> Space:
        """Of the filesystem that holds `path`; `free` is what root may use. Inodes only where they are counted."""

        def look() -> Space:
            with self._opened(path, True) as (descriptor, _):
                found = os.fstatvfs(descriptor)
            counted = found.f_files > 0
            return Space(
                total=found.f_blocks * found.f_frsize,
                free=found.f_bfree * found.f_frsize,
                inodes=found.f_files if counted else None,
                inodes_free=found.f_ffree if counted else None,
            )

        return await _in_thread(look)

    # -- walking ------------------------------------------------------------------------------------------------------

    @contextmanager
    def _opened(self, path: str, follow: bool) -> Iterator[tuple[int, Sequence[str]]]:
        """An O_PATH descriptor of what `path` means, and its names without links."""
        names, must_be_folder = split(path)
        waiting = names[::-1]
        links = 0
        stack = [os.open(self._root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)]
        seen: list[str] = []
        try:
            while waiting:
                name = waiting.pop()
                if not modes.S_ISDIR(os.fstat(stack[-1]).st_mode):
                    raise failure(errno.ENOTDIR, path)
                if name == "..":
                    if seen:
                        seen.pop()
                        os.close(stack.pop())
                    continue
                if len(stack) > DEPTH_MAX:
                    raise failure(errno.ENAMETOOLONG, path)
                descriptor = _open(name, _O_PATH, stack[-1], path)
                if modes.S_ISLNK(os.fstat(descriptor).st_mode) and (waiting or follow or must_be_folder):
                    try:
                        links += 1
                        if links > LINKS_MAX:
                            raise failure(errno.ELOOP, path)
                        said = _link(descriptor)
                    finally:
                        os.close(descriptor)
                    inner, wants_folder = split(said)
                    must_be_folder |= wants_folder and not waiting
                    waiting += inner[::-1]
                    if said.startswith("/"):
                        while len(stack) > 1:
                            os.close(stack.pop())
                        seen.clear()
                    continue
                stack.append(descriptor)
                seen.append(name)
            if must_be_folder and not modes.S_ISDIR(os.fstat(stack[-1]).st_mode):
                raise failure(errno.ENOTDIR, path)
            yield stack[-1], seen
        finally:
            for one in stack:
                os.close(one)

    @contextmanager
    def _reading(self, path: str) -> Iterator[tuple[int, int]]:
        """(descriptor to read from, size that it claims) of a regular file; nothing else is ever opened for reading."""
        with self._opened(path, True) as (found, names):
            found_mode = os.fstat(found).st_mode
            if modes.S_ISDIR(found_mode):
                raise failure(errno.EISDIR, path)
            if not modes.S_ISREG(found_mode):
                raise failure(errno.EINVAL, path)
            # Through its folder rather than /proc/self/fd, which a tree in a test or a chroot may not have.
            with self._opened("/" + "/".join(names[:-1]), False) as (folder, _):
                descriptor = _open(names[-1], _O_READ, folder, path)
            try:
                now = os.fstat(descriptor)
                if not modes.S_ISREG(now.st_mode):
                    raise failure(errno.EINVAL, path)
                yield descriptor, now.st_size
            finally:
                os.close(descriptor)


async def _in_thread(look: Callable[[], T]) -> T:
    return await to_thread.run_sync(look)


def _open(name: str, flags: int, folder: int, path: str) -> int:
    try:
        return os.open(os.fsencode(name), flags, dir_fd=folder)
    except OSError as error:
        raise failure(error.errno or errno.EIO, path) from None


def _link(descriptor: int) -> str:
    """What the link says that an O_PATH descriptor is of (readlinkat(2) with an empty path)."""
    return os.fsdecode(os.readlink(b"", dir_fd=descriptor))


def _node(descriptor: int) -> Node:
    found = os.fstat(descriptor)
    flags = _flags(descriptor, found.st_mode)
    return Node(
        kind=kind_of_mode(found.st_mode),
        number=found.st_ino,
        mode=modes.S_IMODE(found.st_mode),
        uid=found.st_uid,
        gid=found.st_gid,
        size=found.st_size,
        modified_s=found.st_mtime_ns // 10**9,
        immutable=None if flags is None else bool(flags & IMMUTABLE),
        append_only=None if flags is None else bool(flags & APPEND_ONLY),
    )


def _entries(descriptor: int, path: str) -> tuple[Entry, ...]:
    made: list[Entry] = []
    folder = _open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, descriptor, path)
    try:
        with os.scandir(folder) as found:
            for one in found:
                if len(made) >= ENTRIES_MAX:
                    raise failure(errno.EFBIG, path)
                made.append(Entry(one.name, one.inode(), _kind(one)))
    finally:
        os.close(folder)
    return tuple(made)


def _kind(entry: os.DirEntry[str]) -> Kind:
    try:
        if entry.is_symlink():
            return Kind.LINK
        if entry.is_dir(follow_symlinks=False):
            return Kind.DIRECTORY
        if entry.is_file(follow_symlinks=False):
            return Kind.FILE
        return kind_of_mode(entry.stat(follow_symlinks=False).st_mode)
    except OSError:
        return Kind.UNKNOWN  # gone meanwhile, or not ours to see


def _read_to_end(descriptor: int, most: int) -> bytes:
    parts: list[bytes] = []
    left = most
    while left > 0:
        part = os.read(descriptor, min(_READ, left))
        if not part:
            break
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


# -- inode flags ------------------------------------------------------------------------------------------------------


def _flags(descriptor: int, mode: int) -> int | None:
    """The flags that `lsattr` shows, of which only IMMUTABLE and APPEND_ONLY are promised; None: they can't be told."""
    found = _statx_flags(descriptor)
    if found is not None:
        return found
    if not (modes.S_ISREG(mode) or modes.S_ISDIR(mode)):
        return None
    return _ioctl_flags(descriptor)


@functools.cache
def _statx() -> Callable[..., int] | None:
    try:
        return ctypes.CDLL(None, use_errno=True).statx
    except (OSError, AttributeError):
        return None


def _statx_flags(descriptor: int) -> int | None:
    """By statx, which needs no right to open the file: whether /etc/shadow is immutable is told to anybody.

    A filesystem that does not know such flags has none. None where the kernel or the C library has no statx.
    """
    call = _statx()
    if call is None:
        return None
    made = ctypes.create_string_buffer(256)
    if call(descriptor, b"", _AT_EMPTY_PATH | _AT_NO_AUTOMOUNT, 0, made) != 0:
        return None
    attributes, known = struct.unpack_from("=Q", made, 8)[0], struct.unpack_from("=Q", made, 56)[0]
    return int(attributes & known)


def _ioctl_flags(descriptor: int) -> int | None:
    """By FS_IOC_GETFLAGS, for kernels before 4.11."""
    try:
        opened = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return int(struct.unpack_from("=I", fcntl.ioctl(opened, _GETFLAGS, bytes(8)))[0])
    except OSError as error:
        return 0 if error.errno in (errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL) else None
    finally:
        os.close(opened)
