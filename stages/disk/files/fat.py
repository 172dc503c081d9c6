"""Files of FAT12, FAT16 and FAT32, with long names. An inode's number is the place of its entry in a folder.

Source: Microsoft FAT32 File System Specification 1.03, "FAT Directory Structure", "FAT Long Directory Entries" and "FAT
Data Structure".
"""

from __future__ import annotations

import errno
import struct
from datetime import UTC, datetime

from pipeline.errors import FormatError
from pipeline.flow.items import RangeReader
from pipeline.units import KiB, MiB
from stages.disk.fat import used_entries
from stages.disk.files.folders import Folders, Recent
from stages.disk.files.placed import Placed, read_placed
from stages.disk.paths import failure
from stages.disk.reading import READ_MAX
from stages.disk.signatures import Signature, fat_kind
from stages.disk.tree import Entry, Kind, Node, Space

_ROOT = 0
_ENTRY = 32
_LABEL, _FOLDER, _LONG = 0x08, 0x10, 0x0F
_LAST_LONG = 0x40
_LONG_PARTS_MAX = 20
_LOWER_NAME, _LOWER_EXTENSION = 0x08, 0x10
# A folder has 65536 entries at most.
_FOLDER_MAX = 65536 * _ENTRY
# A page of the FAT: a multiple of 3, so that no FAT12 entry is cut, and of 4.
_PAGE = 12 * KiB
_PAGES_KEPT = 64
_CHAINS_KEPT = 64
# A FAT that is read to count what is free; it is 4 MiB long for 32 GiB of the usual clusters.
_COUNTED_MAX = 64 * MiB


class _Chain:
    """The clusters of a file as far as they were followed: (cluster of the file, cluster of the disk, count)."""

    def __init__(self, first: int) -> None:
        self.runs: list[tuple[int, int, int]] = []
        self.length = 0
        self.next = first


async def open_fat(reader: RangeReader, signature: Signature) -> FatTree:
    """Open a filesystem that fills `reader`.

    Raises:
        FormatError: it is damaged.
    """
    boot = await reader.read(0, 512)
    if fat_kind(boot) is None:
        raise FormatError("there is no FAT boot sector")
    tree = FatTree(reader, boot, signature)
    await tree.read_head()
    return tree


class FatTree:
    """A FAT filesystem. Made by `open_fat`; implements `stages.disk.tree.FileTree`."""

    def __init__(self, reader: RangeReader, boot: bytes, signature: Signature) -> None:
        self._reader = reader
        self._signature = signature
        sector, per_cluster, reserved, fats, root = struct.unpack_from("<HBHBH", boot, 11)
        total = struct.unpack_from("<H", boot, 19)[0] or struct.unpack_from("<I", boot, 32)[0]
        fat_size = struct.unpack_from("<H", boot, 22)[0] or struct.unpack_from("<I", boot, 36)[0]
        begin = reserved + fats * fat_size + -(-root * _ENTRY // sector)
        self._bits = {"fat12": 12, "fat16": 16, "fat32": 32}[str(fat_kind(boot))]
        self._cluster = sector * per_cluster
        self._clusters = (total - begin) // per_cluster
        self._data_at = begin * sector
        active = boot[40] & 0x0F if self._bits == 32 and boot[40] & 0x80 else 0
        if active >= fats:
            raise FormatError("its active FAT is none that it has")
        self._fat_at = (reserved + active * fat_size) * sector
        self._fat_length = -(-(self._clusters + 2) * self._bits // 8)
        if total * sector > reader.size:
            raise FormatError(f"the filesystem has {total * sector} bytes, its partition {reader.size}")
        if self._fat_length > fat_size * sector:
            raise FormatError("its FAT is too short for its clusters")
        # FAT12 and FAT16 have a root of fixed size between the FATs and the data.
        self._root_at, self._root_length = (reserved + fats * fat_size) * sector, root * _ENTRY
        self._root_cluster = struct.unpack_from("<I", boot, 44)[0] if self._bits == 32 else 0
        self._dirty = signature.state == "dirty"
        self._label = signature.label
        self._pages: Recent[int, tuple[int, ...]] = Recent(_PAGES_KEPT)
        self._chains: Recent[int, _Chain] = Recent(_CHAINS_KEPT)
        self._folders = Folders(self._load, self._kind_of, _upper)

    async def read_head(self) -> None:
        """Look at the marks in the FAT and for the label in the root. Raises FormatError."""
        mark = await self._follow(1)
        if self._bits == 16:
            self._dirty |= mark & 0xC000 != 0xC000
        elif self._bits == 32:
            self._dirty |= mark & 0x0C000000 != 0x0C000000
        data, _ = await self._folder_data(_ROOT)
        for at in range(0, len(data), _ENTRY):
            if not data[at]:
                break
            if data[at] != 0xE5 and data[at + 11] & 0x3F & ~0x20 == _LABEL:
                self._label = data[at : at + 11].decode("cp437").rstrip()
                break

    @property
    def kind(self) -> str:
        """vfat, whatever the width of its FAT."""
        return "vfat"

    @property
    def label(self) -> str:
        """The one in the root folder, else that in the boot sector."""
        return self._label

    @property
    def uuid(self) -> str:
        """The serial number, as 1234-ABCD."""
        return self._signature.uuid

    @property
    def root(self) -> int:
        """A number that no entry has."""
        return _ROOT

    @property
    def dirty(self) -> str | None:
        """Whether it was unmounted."""
        return "it is mounted or was not unmounted" if self._dirty else None

    async def node(self, number: int) -> Node:
        """Attributes of an entry. Raises FormatError for what can be none."""
        if number == _ROOT:
            return _node(number, bytes(11) + bytes([_FOLDER]) + bytes(20))
        return _node(number, await self._entry(number))

    async def entries(self, number: int) -> tuple[Entry, ...]:
        """Names of a folder; the long ones where there are any."""
        return await self._folders.entries(number)

    async def lookup(self, number: int, name: str) -> int:
        """The entry of a name; case does not count. Raises FileNotFoundError."""
        return await self._folders.find(number, name)

    async def target(self, number: int) -> str:
        """There are no links. Raises OSError EINVAL."""
        raise failure(errno.EINVAL, f"entry {number}")

    async def read(self, number: int, offset: int, length: int) -> bytes:
        """Bytes of a file."""
        if number == _ROOT:
            raise failure(errno.EISDIR, "the root folder")
        data = await self._entry(number)
        if data[11] & _FOLDER:
            raise failure(errno.EISDIR, f"entry {number}")
        length = min(length, struct.unpack_from("<I", data, 28)[0] - offset)
        if length <= 0:
            return b""
        return await read_placed(self._reader, await self._places(self._first(data), offset, length), offset, length)

    async def space(self) -> Space:
        """Free clusters are counted."""
        if self._fat_length > _COUNTED_MAX:
            raise FormatError("its FAT is too long to be counted", length=self._fat_length)
        used = -2  # the first two entries belong to no cluster
        step = READ_MAX // _PAGE * _PAGE
        for at in range(0, self._fat_length, step):
            part = await self._reader.read(self._fat_at + at, min(step, self._fat_length - at))
            flags = used_entries(part, self._bits)
            used += int(flags[: self._clusters + 2 - at * 8 // self._bits].sum())
        return Space(total=self._clusters * self._cluster, free=max(0, self._clusters - used) * self._cluster)

    # -- clusters -----------------------------------------------------------------------------------------------------

    async def _follow(self, cluster: int) -> int:
        """The FAT's entry of a cluster."""
        per_page = _PAGE * 8 // self._bits
        index, inside = divmod(cluster, per_page)
        page = self._pages.get(index)
        if page is None:
            at = index * _PAGE
            data = await self._reader.read(self._fat_at + at, min(_PAGE, self._fat_length - at))
            page = self._pages.put(index, _entries(data, self._bits))
        return page[inside]

    async def _places(self, first: int, offset: int, length: int) -> list[Placed]:
        """Where bytes of a file are whose chain begins at a cluster. Raises FormatError."""
        chain = self._chains.get(first) or self._chains.put(first, _Chain(first))
        wanted = -(-(offset + length) // self._cluster)
        while chain.length < wanted:
            cluster = chain.next
            if not 2 <= cluster < self._clusters + 2:
                raise FormatError("a file's chain of clusters breaks off", cluster=cluster)
            if chain.length >= self._clusters:
                raise FormatError("a file's chain of clusters is a loop", cluster=first)
            length_before = chain.length
            following = await self._follow(cluster)
            if chain.length != length_before:
                continue  # another task went on meanwhile
            if chain.runs and chain.runs[-1][1] + chain.runs[-1][2] == cluster:
                begin, start, count = chain.runs[-1]
                chain.runs[-1] = (begin, start, count + 1)
            else:
                chain.runs.append((chain.length, cluster, 1))
            chain.next = following
            chain.length += 1
        size, end = self._cluster, offset + length
        return [
            Placed(begin * size, count * size, self._data_at + (cluster - 2) * size)
            for begin, cluster, count in chain.runs
            if begin * size < end and (begin + count) * size > offset
        ]

    # -- folders ------------------------------------------------------------------------------------------------------

    async def _entry(self, number: int) -> bytes:
        data = await self._reader.read(number * _ENTRY, _ENTRY)
        if data[0] in (0, 0xE5) or data[11] & _LABEL:
            raise FormatError("a name means an entry that is free", entry=number)
        return data

    def _first(self, data: bytes) -> int:
        high, low = struct.unpack_from("<H4xH", data, 20)
        return int(low | high << 16) if self._bits == 32 else int(low)

    async def _kind_of(self, number: int) -> Kind:
        return (await self.node(number)).kind

    async def _folder_data(self, number: int) -> tuple[bytes, list[Placed]]:
        """The bytes of a folder, and where they are."""
        if number == _ROOT and self._bits != 32:
            place = Placed(0, self._root_length, self._root_at)
            return await self._reader.read(place.at, place.length), [place]
        first = self._root_cluster if number == _ROOT else self._first(await self._entry(number))
        made: list[bytes] = []
        length = 0
        while length < _FOLDER_MAX:
            data = await read_placed(
                self._reader, await self._places(first, length, self._cluster), length, self._cluster
            )
            made.append(data)
            length += self._cluster
            # The first entry that begins with a zero is the last.
            if not all(data[::_ENTRY]) or self._is_end(first):
                break
        return b"".join(made), await self._places(first, 0, length)

    def _is_end(self, first: int) -> bool:
        """Whether a chain was followed to its end."""
        chain = self._chains.get(first)
        return chain is None or chain.next >= {12: 0xFF8, 16: 0xFFF8, 32: 0x0FFFFFF8}[self._bits]

    async def _load(self, number: int) -> list[Entry]:
        if (await self.node(number)).kind is not Kind.DIRECTORY:
            raise failure(errno.ENOTDIR, f"entry {number}")
        data, places = await self._folder_data(number)
        made: list[Entry] = []
        long: list[bytes] = []
        position = 0
        for at in range(0, len(data), _ENTRY):
            raw = data[at : at + _ENTRY]
            if not raw[0]:
                break
            if raw[0] == 0xE5:
                long = []
            elif raw[11] & 0x3F == _LONG:
                if raw[0] & _LAST_LONG:
                    long = []
                long = [*long, raw][:_LONG_PARTS_MAX]
            else:
                if not raw[11] & _LABEL and raw[:11] not in (b".          ", b"..         "):
                    while at >= places[position].end:
                        position += 1
                    place = places[position].at + at - places[position].offset
                    kind = Kind.DIRECTORY if raw[11] & _FOLDER else Kind.FILE
                    made.append(Entry(_long_name(long, raw) or _short_name(raw), place // _ENTRY, kind))
                long = []
        return made


def _entries(data: bytes, bits: int) -> tuple[int, ...]:
    """The entries in a part of a FAT that begins with a whole one."""
    if bits == 16:
        return struct.unpack(f"<{len(data) // 2}H", data[: len(data) // 2 * 2])
    if bits == 32:
        return tuple(one & 0x0FFFFFFF for one in struct.unpack(f"<{len(data) // 4}I", data[: len(data) // 4 * 4]))
    made = []
    for at in range(0, len(data) - 1, 3):
        made.append(data[at] | (data[at + 1] & 0x0F) << 8)
        if at + 2 < len(data):
            made.append(data[at + 1] >> 4 | data[at + 2] << 4)
    return tuple(made)


def _node(number: int, data: bytes) -> Node:
    attributes = data[11]
    time, date = struct.unpack_from("<HH", data, 22)
    is_folder = bool(attributes & _FOLDER)
    return Node(
        kind=Kind.DIRECTORY if is_folder else Kind.FILE,
        number=number,
        mode=0o755,
        uid=0,
        gid=0,
        size=0 if is_folder else struct.unpack_from("<I", data, 28)[0],
        modified_s=_seconds(date, time),
    )


def _seconds(date: int, time: int) -> int:
    """Local time of wherever it was written, taken for UTC; 1980 where it makes no sense."""
    try:
        when = datetime(
            1980 + (date >> 9),
            date >> 5 & 0x0F,
            date & 0x1F,
            time >> 11,
            time >> 5 & 0x3F,
            (time & 0x1F) * 2,
            tzinfo=UTC,
        )
    except ValueError:
        return 315532800
    return int(when.timestamp())


def _short_name(raw: bytes) -> str:
    name = (b"\xe5" + raw[1:8] if raw[0] == 5 else raw[:8]).decode("cp437").rstrip(" ")
    extension = raw[8:11].decode("cp437").rstrip(" ")
    name = name.lower() if raw[12] & _LOWER_NAME else name
    extension = extension.lower() if raw[12] & _LOWER_EXTENSION else extension
    return f"{name}.{extension}" if extension else name


def _long_name(parts: list[bytes], raw: bytes) -> str:
    """The long name in front of a short entry; empty where there is none, or one of another file."""
    if not parts:
        return ""
    check = 0
    for byte in raw[:11]:
        check = ((check & 1) << 7 | check >> 1) + byte & 0xFF
    text = b""
    for index, part in enumerate(parts):
        if part[0] & 0x3F != len(parts) - index or bool(part[0] & _LAST_LONG) != (index == 0) or part[13] != check:
            return ""
        text = part[1:11] + part[14:26] + part[28:32] + text
    return text.decode("utf-16-le", "replace").split("\0", 1)[0]


def _upper(name: str) -> str:
    """As the filesystem compares names: letter by letter, so that no name changes its length."""
    return "".join(upper if len(upper := char.upper()) == 1 else char for char in name)
