"""Folders of a filesystem that were read, kept while there is room; and the last answers of any other kind."""

from __future__ import annotations

import errno
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sized
from dataclasses import replace
from typing import Generic, TypeVar

from pipeline.errors import FormatError
from pipeline.units import MiB
from stages.disk.paths import ENTRIES_MAX, failure
from stages.disk.tree import Entry, Kind

K = TypeVar("K")
V = TypeVar("V")

# What holds as many names as are held at once, with room; more is taken for an attack.
FOLDER_MAX = 64 * MiB
# Inodes, and blocks of maps of files, that a tree keeps.
INODES_KEPT = 4096
MAPS_KEPT = 256

# What ext, xfs and btrfs write beside a name.
_TYPES = (
    Kind.UNKNOWN,
    Kind.FILE,
    Kind.DIRECTORY,
    Kind.CHARACTER,
    Kind.BLOCK,
    Kind.FIFO,
    Kind.SOCKET,
    Kind.LINK,
)

# Names kept over all folders of a tree; each costs some 200 bytes.
_NAMES_KEPT = 1 << 16
# A filesystem that does not say in a folder what a name is has its inodes asked, up to so many of a folder.
_KINDS_ASKED = 1 << 14


def check_count(entries: Sized, number: int) -> None:
    """Raise FormatError where a folder has more names than are held at once."""
    if len(entries) > ENTRIES_MAX:
        raise FormatError(f"a folder has more than {ENTRIES_MAX} names", inode=number)


def kind_of_type(number: int) -> Kind:
    """What the type beside a name means."""
    return _TYPES[number] if number < len(_TYPES) else Kind.UNKNOWN


class Recent(Generic[K, V]):
    """The answers that were used last."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K) -> V | None:
        """The answer, if it is still here."""
        found = self._kept.get(key)
        if found is not None:
            self._kept.move_to_end(key)
        return found

    def put(self, key: K, value: V) -> V:
        """Keep an answer; the oldest goes."""
        self._kept[key] = value
        self._kept.move_to_end(key)
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)
        return value


class Folders:
    """Entries of folders by inode number.

    Args:
        load: reads all entries of a folder.
        kind_of: what an inode is, for entries that do not say.
        fold: makes names equal that the filesystem takes for the same; None where case counts.
    """

    def __init__(
        self,
        load: Callable[[int], Awaitable[list[Entry]]],
        kind_of: Callable[[int], Awaitable[Kind]],
        fold: Callable[[str], str] | None = None,
    ) -> None:
        self._load = load
        self._kind_of = kind_of
        self._fold = fold
        self._kept: OrderedDict[int, tuple[tuple[Entry, ...], dict[str, int]]] = OrderedDict()
        self._names = 0

    async def entries(self, number: int) -> tuple[Entry, ...]:
        """All names of a folder. Raises FormatError for names that none can have."""
        return (await self._get(number))[0]

    async def find(self, number: int, name: str) -> int:
        """The inode of a name. Raises FileNotFoundError."""
        found = (await self._get(number))[1]
        inode = found.get(name)
        if inode is None and self._fold is not None:
            inode = found.get(self._fold(name))
        if inode is None:
            raise failure(errno.ENOENT, name)
        return inode

    async def _get(self, number: int) -> tuple[tuple[Entry, ...], dict[str, int]]:
        kept = self._kept.get(number)
        if kept is not None:
            self._kept.move_to_end(number)
            return kept
        loaded = await self._load(number)
        if any(one.kind is Kind.UNKNOWN for one in loaded) and len(loaded) <= _KINDS_ASKED:
            loaded = [await self._told(one) for one in loaded]
        names: dict[str, int] = {}
        for one in loaded:
            if not one.name or "/" in one.name or "\0" in one.name or one.name in (".", ".."):
                raise FormatError("a folder has a name that no file can have", inode=number)
            names.setdefault(one.name, one.number)
        if self._fold is not None:
            for one in loaded:
                names.setdefault(self._fold(one.name), one.number)
        if number not in self._kept:
            self._names += len(loaded) + 1
        made = self._kept[number] = tuple(loaded), names
        while self._names > _NAMES_KEPT and len(self._kept) > 1:
            _, (gone, _) = self._kept.popitem(last=False)
            self._names -= len(gone) + 1
        return made

    async def _told(self, entry: Entry) -> Entry:
        if entry.kind is not Kind.UNKNOWN:
            return entry
        try:
            return replace(entry, kind=await self._kind_of(entry.number))
        except FormatError:
            return entry
