"""What a reader of a filesystem offers: names, attributes and bytes of files, without mounting anything.

A `FileTree` is one filesystem and knows no paths: links are data to it, and it never follows one. `View` is what rules
and people look at: a whole system by absolute paths, several trees mounted into each other, links resolved inside of it
and never out of it.

What a filesystem says is data: every offset and count is checked before use. Damage raises `FormatError`; what is
not there raises the `OSError` that the kernel would raise (`FileNotFoundError`, `NotADirectoryError` ...), so that a
live system and an image of it answer alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol, runtime_checkable

from pipeline.units import MiB

# A whole file is read only up to here unless the caller asks for more: configuration is small, a huge one an attack.
READ_LIMIT = 4 * MiB


class Kind(Enum):
    """What an inode is."""

    FILE = "file"
    DIRECTORY = "directory"
    LINK = "link"
    CHARACTER = "character device"
    BLOCK = "block device"
    FIFO = "fifo"
    SOCKET = "socket"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One inode.

    Attributes:
        kind: what it is.
        number: of the inode within its filesystem; a made-up one that stays the same where it has none (fat).
        mode: permission bits, 0 to 0o7777. Filesystems without any say 0o755.
        uid, gid: of the owner.
        size: bytes.
        modified_s: seconds since 1970.
        immutable, append_only: the flags that `lsattr` shows as i and a; None where they could not be told.
    """

    kind: Kind
    number: int
    mode: int
    uid: int
    gid: int
    size: int
    modified_s: int
    immutable: bool | None = False
    append_only: bool | None = False


@dataclass(frozen=True, slots=True)
class Entry:
    """A name in a directory. Names are bytes on disk; here undecodable ones are surrogate-escaped."""

    name: str
    number: int
    kind: Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """Room in a filesystem: bytes, and inodes where they are counted (else None)."""

    total: int
    free: int
    inodes: int | None = None
    inodes_free: int | None = None


class FileTree(Protocol):
    """One filesystem, opened read-only. Safe to use from many tasks at once. Numbers are inode numbers of this tree.

    Attributes:
        kind: as `blkid` names it: ext4, xfs, btrfs, vfat ...
        label, uuid: as `blkid` prints them; empty where there is none.
        dirty: why its content may not be the last that was written (a journal to replay, not unmounted); None: clean.
    """

    @property
    def kind(self) -> str: ...

    @property
    def label(self) -> str: ...

    @property
    def uuid(self) -> str: ...

    @property
    def dirty(self) -> str | None: ...

    @property
    def root(self) -> int: ...

    async def node(self, number: int) -> Node: ...

    async def entries(self, number: int) -> tuple[Entry, ...]:
        """All names of a directory but `.` and `..`, in the order of the disk."""
        ...

    async def lookup(self, number: int, name: str) -> int:
        """The inode that a name of a directory means; case counts where the filesystem makes it count."""
        ...

    async def target(self, number: int) -> str:
        """What a symbolic link says."""
        ...

    async def read(self, number: int, offset: int, length: int) -> bytes:
        """Bytes of a file; fewer only at its end. Holes read as zero."""
        ...

    async def space(self) -> Space: ...


@dataclass(frozen=True, slots=True)
class Subvolume:
    """A root inside of a filesystem that has several.

    Attributes:
        number: as the filesystem counts them.
        path: from the filesystem's top, without a slash in front; empty for the top itself.
        root: its inode, for the tree.
    """

    number: int
    path: str
    root: int


@runtime_checkable
class HasSubvolumes(Protocol):
    """A FileTree with several roots; its own `root` is the default one."""

    async def subvolumes(self) -> tuple[Subvolume, ...]:
        """All of them, the top first. Raises FormatError."""
        ...


class View(Protocol):
    """A system by absolute paths, live or on a disk. Links are followed inside of it; `..` above the root stays there.

    Raises (all calls): `OSError` of the kind that the kernel would give, `FormatError` where the filesystem is damaged.
    """

    @property
    def is_live(self) -> bool: ...

    async def stat(self, path: str, *, follow: bool = True) -> Node: ...

    async def list(self, path: str) -> tuple[Entry, ...]: ...

    async def read(self, path: str, *, limit: int = READ_LIMIT) -> bytes:
        """A whole file, which must be a regular one and no longer than `limit` bytes (else `OSError` EFBIG)."""
        ...

    async def read_at(self, path: str, offset: int, length: int) -> bytes: ...

    async def target(self, path: str) -> str:
        """What the link at `path` says, unresolved."""
        ...

    async def resolve(self, path: str) -> str:
        """The path without links, as the system itself would see it."""
        ...

    async def space(self, path: str) -> Space:
        """Of the filesystem that holds `path`."""
        ...
