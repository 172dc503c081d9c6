"""Files of btrfs: the default subvolume, all others below the top, compressed extents unpacked.

A tree block is believed when its checksum, address, level and filesystem are right, and its first key is the one that
led to it; so no block is visited twice on a level. Where there are two copies on the disk and one is damaged, the other
is read. The log is not replayed. Checksums of data are not looked at.

An inode number is that of the subvolume and of the inode in it: the upper bits are those of the subvolume, zero for the
top one.

Source: Btrfs developer documentation, "On-disk Format" (inode, directory, extent data, root and reference items); Linux
fs/btrfs/lzo.c for the segments of LZO.
"""

from __future__ import annotations

import errno
import struct
import zlib
from bisect import bisect_right
from collections.abc import AsyncIterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import zstandard

from pipeline.errors import FormatError
from pipeline.flow.items import RangeReader
from pipeline.units import KiB, MiB
from stages.disk.btrfs import (
    CHUNK_ITEM,
    EXTENT_TREE_V2,
    HEADER,
    INCOMPAT_KNOWN,
    LEVELS_MAX,
    RAID_STRIPE_TREE,
    ROOT_ITEM,
    SUPERBLOCK_AT,
    SUPERBLOCK_SIZE,
    ZONED,
    Chunks,
    Superblock,
    add_system_chunks,
    leaves,
    parse_superblock,
    payload_of,
)
from stages.disk.files.folders import INODES_KEPT, Folders, Recent, check_count, kind_of_type
from stages.disk.files.lzo import unpack_lzo
from stages.disk.files.placed import Placed, read_placed
from stages.disk.live import kind_of_mode
from stages.disk.paths import PATH_MAX, failure
from stages.disk.signatures import Signature
from stages.disk.tree import Entry, Kind, Node, Space, Subvolume

_TOP = 5
_FIRST_INODE = 256
_EMPTY = 2  # the folder that stands where a snapshot has another subvolume's place
_INODE_ITEM, _INODE_REF, _DIR_ITEM, _DIR_INDEX, _EXTENT_DATA = 1, 12, 84, 96, 108
_ROOT_BACKREF = 144
_LAST = (1 << 64) - 1

_INLINE, _REGULAR, _PREALLOCATED = 0, 1, 2
_ZLIB, _LZO, _ZSTD = 1, 2, 3
# The kernel compresses 128 KiB at a time; it takes no stream with a larger window.
_PACKED_MAX = 128 * KiB
_IMMUTABLE, _APPEND = 1 << 6, 1 << 7

# Tree blocks kept; a leaf of 16 KiB takes some 100 KiB once parsed.
_NODES_KEPT = 96
_UNPACKED_KEPT = 8
_SUBVOLUMES_MAX = 4096
_PATH_DEPTH_MAX = 100

Key = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class _Block:
    """A parsed tree block: keys, and for each the payload of a leaf or the address of the block below."""

    keys: list[Key]
    payloads: list[memoryview]
    below: list[int]


@dataclass(frozen=True, slots=True)
class _Root:
    address: int
    level: int
    folder: int


async def open_btrfs(reader: RangeReader, signature: Signature) -> BtrfsTree:
    """Open a filesystem of which `reader` is one device; others are not needed where this has a copy of all.

    Raises:
        FormatError: it is damaged, uses features that are not read here, or needs other devices.
    """
    data = await reader.read(SUPERBLOCK_AT, SUPERBLOCK_SIZE)
    found = parse_superblock(data, reader.size)
    unknown = found.incompat & ~INCOMPAT_KNOWN | found.incompat & (ZONED | EXTENT_TREE_V2 | RAID_STRIPE_TREE)
    if unknown:
        raise FormatError(f"it uses features that are not known here (incompat {unknown:#x})")
    chunks = Chunks(found)
    add_system_chunks(found, chunks)
    async for body, items in leaves(reader, found, chunks, found.chunk_root, found.chunk_root_level):
        for item in items[items["type"] == CHUNK_ITEM]:
            chunks.add(int(item["offset"]), payload_of(body, item))
    chunks.check()
    total, used, top = struct.unpack_from("<QQQ", data, 112)
    tree = BtrfsTree(reader, found, chunks, signature, Space(total=total, free=max(0, total - used)))
    await tree.read_roots(top)
    return tree


class BtrfsTree:
    """A btrfs filesystem. Made by `open_btrfs`; implements `stages.disk.tree.FileTree` and `HasSubvolumes`."""

    def __init__(
        self, reader: RangeReader, found: Superblock, chunks: Chunks, signature: Signature, space: Space
    ) -> None:
        self._reader = reader
        self._found = found
        self._chunks = chunks
        self._signature = signature
        self._space = space
        self._roots: dict[int, _Root] = {}
        self._parents: dict[int, tuple[int, int, str]] = {}  # subvolume: the one above, folder there, name
        self._default = _TOP
        self._blocks: Recent[int, _Block] = Recent(_NODES_KEPT)
        self._items: Recent[int, bytes] = Recent(INODES_KEPT)
        self._unpacked: Recent[int, bytes] = Recent(_UNPACKED_KEPT)
        self._folders = Folders(self._load, self._kind_of)

    @property
    def kind(self) -> str:
        """btrfs."""
        return "btrfs"

    @property
    def label(self) -> str:
        """The volume's name."""
        return self._signature.label

    @property
    def uuid(self) -> str:
        """With hyphens, in lower case."""
        return self._signature.uuid

    @property
    def root(self) -> int:
        """Of the default subvolume, which a mount without options shows."""
        return self._top_of(self._default)

    @property
    def dirty(self) -> str | None:
        """Whether it has a log."""
        return "its log has to be replayed" if self._found.log_root else None

    async def node(self, number: int) -> Node:
        """Attributes of an inode. Raises FormatError where there is none such."""
        if number & _LAST == _EMPTY:
            return Node(kind=Kind.DIRECTORY, number=number, mode=0o755, uid=0, gid=0, size=0, modified_s=0)
        item = await self._inode(number)
        size = struct.unpack_from("<Q", item, 16)[0]
        links, uid, gid, mode = struct.unpack_from("<IIII", item, 40)
        flags = struct.unpack_from("<Q", item, 64)[0]
        if not links or size > 1 << 62:
            raise FormatError("a name means an inode that is free or damaged", inode=number)
        return Node(
            kind=kind_of_mode(mode),
            number=number,
            mode=mode & 0o7777,
            uid=uid,
            gid=gid,
            size=size,
            modified_s=struct.unpack_from("<q", item, 136)[0],
            immutable=bool(flags & _IMMUTABLE),
            append_only=bool(flags & _APPEND),
        )

    async def entries(self, number: int) -> tuple[Entry, ...]:
        """Names of a folder; subvolumes are folders too."""
        return await self._folders.entries(number)

    async def lookup(self, number: int, name: str) -> int:
        """The inode of a name. Raises FileNotFoundError."""
        return await self._folders.find(number, name)

    async def target(self, number: int) -> str:
        """What a link says. Raises OSError EINVAL for what is none."""
        found = await self.node(number)
        if found.kind is not Kind.LINK:
            raise failure(errno.EINVAL, f"inode {number}")
        if found.size > PATH_MAX:
            raise FormatError("a link is longer than any path", inode=number)
        return (await self._data(number, 0, found.size)).decode("utf-8", "surrogateescape")

    async def read(self, number: int, offset: int, length: int) -> bytes:
        """Bytes of a regular file, unpacked."""
        found = await self.node(number)
        if found.kind is not Kind.FILE:
            raise failure(errno.EISDIR if found.kind is Kind.DIRECTORY else errno.EINVAL, f"inode {number}")
        return await self._data(number, offset, max(0, min(length, found.size - offset)))

    async def space(self) -> Space:
        """As the superblock says; where data is kept twice, that much of the free room is not for files."""
        return self._space

    async def subvolumes(self) -> tuple[Subvolume, ...]:
        """All of them, the top first. Raises FormatError."""
        made = [Subvolume(_TOP, "", self._top_of(_TOP))]
        for number in sorted(self._parents):
            path = await self._path_of(number)
            if path is not None:
                made.append(Subvolume(number, path, self._top_of(number)))
        return tuple(made)

    # -- roots --------------------------------------------------------------------------------------------------------

    async def read_roots(self, top: int) -> None:
        """Read the tree of roots: all subvolumes, and which is the default. Raises FormatError."""
        tree = _Root(self._found.root, self._found.root_level, 0)
        async for (number, kind, above), payload in self._walk(tree, (0, 0, 0), (_LAST, 255, _LAST)):
            is_files = number == _TOP or _FIRST_INODE <= number < 1 << 63
            if kind == ROOT_ITEM and is_files and len(payload) >= 239:
                folder, address = struct.unpack_from("<QQ", payload, 168)
                self._roots[number] = _Root(address, payload[238], folder)
            elif kind == _ROOT_BACKREF and is_files and len(payload) >= 18:
                folder, _, length = struct.unpack_from("<QQH", payload, 0)
                name = bytes(payload[18 : 18 + length]).decode("utf-8", "surrogateescape")
                self._parents[number] = (above, folder, name)
            elif kind == _DIR_ITEM and number == top:
                for raw, location in _names(payload):
                    if raw == b"default" and location[1] == ROOT_ITEM:
                        self._default = location[0]
            if max(len(self._roots), len(self._parents)) > _SUBVOLUMES_MAX:
                raise FormatError(f"it has more than {_SUBVOLUMES_MAX} subvolumes")
        if _TOP not in self._roots:
            raise FormatError("it has no tree of files")
        if self._default not in self._roots:
            self._default = _TOP

    def _top_of(self, subvolume: int) -> int:
        root = self._roots.get(subvolume)
        return _number(subvolume, root.folder if root else _FIRST_INODE)

    async def _path_of(self, number: int) -> str | None:
        """Where a subvolume lies, from the top; None where that can't be told."""
        names: list[str] = []
        while number != _TOP:
            if number not in self._parents or len(names) > _PATH_DEPTH_MAX:
                return None
            above, folder, name = self._parents[number]
            names.append(name)
            root = self._roots.get(above)
            if root is None:
                return None
            while folder != root.folder:
                found = await self._name_of(root, folder)
                if found is None or len(names) > _PATH_DEPTH_MAX:
                    return None
                folder, name = found
                names.append(name)
            number = above
        return "/".join(reversed(names))

    async def _name_of(self, root: _Root, inode: int) -> tuple[int, str] | None:
        """(folder, name) of an inode."""
        async for (number, kind, folder), payload in self._walk(
            root, (inode, _INODE_REF, 0), (inode, _INODE_REF, _LAST)
        ):
            if (number, kind) == (inode, _INODE_REF) and len(payload) >= 10:
                length = struct.unpack_from("<H", payload, 8)[0]
                return folder, bytes(payload[10 : 10 + length]).decode("utf-8", "surrogateescape")
        return None

    # -- trees --------------------------------------------------------------------------------------------------------

    async def _walk(self, root: _Root, first: Key, last: Key) -> AsyncIterator[tuple[Key, memoryview]]:
        """Items from the last that is not behind `first`, up to `last`. Raises FormatError."""
        if root.level >= LEVELS_MAX:
            raise FormatError("a tree is absurdly high", level=root.level)
        async for found in self._descend(root.address, root.level, None, first, last):
            yield found

    async def _descend(
        self, address: int, level: int, key: Key | None, first: Key, last: Key
    ) -> AsyncIterator[tuple[Key, memoryview]]:
        block = await self._block(address, level)
        if key is not None and (not block.keys or block.keys[0] != key):
            raise FormatError("a tree block is not the one that it should be", logical=address)
        for index in range(max(0, bisect_right(block.keys, first) - 1), len(block.keys)):
            if block.keys[index] > last:
                return
            if level:
                async for found in self._descend(block.below[index], level - 1, block.keys[index], first, last):
                    yield found
            else:
                yield block.keys[index], block.payloads[index]

    async def _block(self, address: int, level: int) -> _Block:
        kept = self._blocks.get(address)
        if kept is not None and bool(kept.below) == bool(level):
            return kept
        wrong = FormatError("a tree block is not on this device", logical=address)
        for place in self._copies(address, self._found.node):
            try:
                body = await self._reader.read(place, self._found.node)
                return self._blocks.put(address, self._parsed(body, address, level))
            except FormatError as error:
                wrong = error
        raise wrong

    def _copies(self, logical: int, length: int) -> list[int]:
        """Every place on this device of a stretch. Raises FormatError where it is in no chunk."""
        if logical + length >= 1 << 62:
            raise FormatError("an address is absurd", logical=logical)
        spans = self._chunks.spans(np.array([logical], np.int64), np.array([length], np.int64))
        return [int(starts[0]) for starts, _ in spans if len(starts)]

    def _parsed(self, body: bytes, address: int, level: int) -> _Block:
        made = self._found.checksum(memoryview(body)[32:])
        if body[: len(made)] != made:
            raise FormatError("the checksum of a tree block is wrong", logical=address)
        if (
            struct.unpack_from("<Q", body, 48)[0] != address
            or body[100] != level
            or body[32:48] != self._found.metadata_uuid
        ):
            raise FormatError("a tree block is not the one that it should be", logical=address)
        count = struct.unpack_from("<I", body, 96)[0]
        size = 33 if level else 25
        if HEADER + count * size > len(body) or (level and not count):
            raise FormatError("a tree block is overfull or empty", logical=address)
        table = body[HEADER : HEADER + count * size]
        keys: list[Key] = []
        payloads: list[memoryview] = []
        below: list[int] = []
        view = memoryview(body)
        if level:
            for objectid, kind, offset, block, _ in struct.iter_unpack("<QBQQQ", table):
                keys.append((objectid, kind, offset))
                below.append(block)
        else:
            for objectid, kind, offset, at, length in struct.iter_unpack("<QBQII", table):
                if HEADER + at + length > len(body):
                    raise FormatError("an item lies outside of its leaf", logical=address)
                keys.append((objectid, kind, offset))
                payloads.append(view[HEADER + at : HEADER + at + length])
        if any(one >= following for one, following in pairwise(keys)):
            raise FormatError("the keys of a tree block are out of order", logical=address)
        return _Block(keys, payloads, below)

    # -- inodes -------------------------------------------------------------------------------------------------------

    def _root_of(self, number: int) -> tuple[int, _Root, int]:
        """(subvolume, its tree, inode in it)."""
        subvolume = (number >> 64) + _TOP
        root = self._roots.get(subvolume)
        if root is None:
            raise FormatError("a name means a subvolume that there is none of", subvolume=subvolume)
        return subvolume, root, number & _LAST

    async def _kind_of(self, number: int) -> Kind:
        return (await self.node(number)).kind

    async def _inode(self, number: int) -> bytes:
        kept = self._items.get(number)
        if kept is not None:
            return kept
        _, root, inode = self._root_of(number)
        wanted = (inode, _INODE_ITEM, 0)
        async for key, payload in self._walk(root, wanted, wanted):
            if key == wanted and len(payload) >= 160:
                return self._items.put(number, bytes(payload[:160]))
        raise FormatError("a name means an inode that there is none of", inode=number)

    # -- data ---------------------------------------------------------------------------------------------------------

    async def _data(self, number: int, offset: int, length: int) -> bytes:
        """Bytes of an inode; `length` was checked against its size."""
        if length <= 0:
            return b""
        _, root, inode = self._root_of(number)
        end = offset + length
        places: list[Placed] = []
        patches: list[tuple[int, bytes]] = []
        first, last = (inode, _EXTENT_DATA, offset), (inode, _EXTENT_DATA, end - 1)
        async for (owner, kind, begin), payload in self._walk(root, first, last):
            if (owner, kind) != (inode, _EXTENT_DATA):
                continue
            if len(payload) < 21:
                raise FormatError("an extent is cut off", inode=number)
            ram, packing, encryption, other, form = struct.unpack_from("<QBBHB", payload, 8)
            if encryption or other or packing > _ZSTD:
                raise FormatError("an extent is encoded in an unknown way", inode=number)
            if form == _INLINE:
                data = self._unpack(bytes(payload[21:]), packing, ram) if packing else bytes(payload[21:])
                patches.append((begin, data[:ram]))
                continue
            if form not in (_REGULAR, _PREALLOCATED) or len(payload) < 53:
                raise FormatError("an extent is of an unknown kind", inode=number)
            address, stored, inside, count = struct.unpack_from("<QQQQ", payload, 21)
            if not address or form == _PREALLOCATED or begin + count <= offset:
                continue
            low, high = max(begin, offset), min(begin + count, end)
            if packing:
                data = await self._extent(address, stored, packing, ram)
                if inside + count > len(data):
                    raise FormatError("an extent is shorter than it should be", inode=number)
                patches.append((low, data[inside + low - begin : inside + high - begin]))
            else:
                if inside + count > stored:
                    raise FormatError("an extent is shorter than it should be", inode=number)
                copies = self._copies(address + inside + low - begin, high - low)
                if not copies:
                    raise FormatError("a file's bytes are not on this device", inode=number)
                places.append(Placed(low, high - low, copies[0]))
        made = await read_placed(self._reader, places, offset, length)
        if not patches:
            return made
        patched = bytearray(made)
        for begin, data in patches:
            low, high = max(begin, offset), min(begin + len(data), end)
            if low < high:
                patched[low - offset : high - offset] = data[low - begin : high - begin]
        return bytes(patched)

    async def _extent(self, address: int, stored: int, packing: int, ram: int) -> bytes:
        """A compressed extent, unpacked."""
        kept = self._unpacked.get(address)
        if kept is None:
            if stored > _PACKED_MAX + 64 * KiB or ram > _PACKED_MAX:
                raise FormatError("a compressed extent is larger than any real one", logical=address)
            copies = self._copies(address, stored)
            if not copies:
                raise FormatError("a file's bytes are not on this device", logical=address)
            kept = self._unpacked.put(address, self._unpack(await self._reader.read(copies[0], stored), packing, ram))
        return kept

    def _unpack(self, data: bytes, packing: int, ram: int) -> bytes:
        """Exactly `ram` bytes. Raises FormatError."""
        if not 0 < ram <= _PACKED_MAX:
            raise FormatError("a compressed extent has a size that none has")
        try:
            if packing == _ZLIB:
                made = zlib.decompressobj().decompress(data, ram)
            elif packing == _ZSTD:
                unpacker = zstandard.ZstdDecompressor(max_window_size=MiB)
                made = unpacker.stream_reader(data, read_across_frames=False).read(ram)
            else:
                made = _unpack_segments(data, ram)
        except (zlib.error, zstandard.ZstdError) as error:
            raise FormatError(f"a compressed extent can't be unpacked: {error}") from None
        # A last extent may unpack to less than whole sectors; the rest reads as zero.
        return made.ljust(ram, b"\0")

    # -- folders ------------------------------------------------------------------------------------------------------

    async def _load(self, number: int) -> list[Entry]:
        if (await self.node(number)).kind is not Kind.DIRECTORY:
            raise failure(errno.ENOTDIR, f"inode {number}")
        if number & _LAST == _EMPTY:
            return []
        subvolume, root, inode = self._root_of(number)
        made: list[Entry] = []
        async for (owner, kind, _), payload in self._walk(root, (inode, _DIR_INDEX, 0), (inode, _DIR_INDEX, _LAST)):
            if (owner, kind) != (inode, _DIR_INDEX):
                continue
            for raw, (target, target_kind, _offset) in _names(payload):
                name = raw.decode("utf-8", "surrogateescape")
                if target_kind == ROOT_ITEM:
                    is_here = self._parents.get(target) == (subvolume, inode, name) and target in self._roots
                    below = self._top_of(target) if is_here else _number(subvolume, _EMPTY)
                    made.append(Entry(name, below, Kind.DIRECTORY))
                else:
                    made.append(Entry(name, _number(subvolume, target), kind_of_type(payload[29] & 0x7F)))
            check_count(made, number)
        return made


def _number(subvolume: int, inode: int) -> int:
    return (subvolume - _TOP) << 64 | inode


def _names(payload: memoryview) -> list[tuple[bytes, Key]]:
    """(name, what it means) of a directory item. Raises FormatError."""
    made = []
    at = 0
    while at + 30 <= len(payload):
        objectid, kind, offset = struct.unpack_from("<QBQ", payload, at)
        data, length = struct.unpack_from("<HH", payload, at + 25)
        if at + 30 + length + data > len(payload):
            raise FormatError("a name is cut off")
        made.append((bytes(payload[at + 30 : at + 30 + length]), (objectid, kind, offset)))
        at += 30 + length + data
    return made


def _unpack_segments(data: bytes, ram: int) -> bytes:
    """LZO as btrfs frames it: the whole length, then segments of a sector each; no length crosses a sector."""
    if len(data) < 8:
        raise FormatError("a compressed extent is cut off")
    end = min(struct.unpack_from("<I", data, 0)[0], len(data))
    sector = 4 * KiB
    at, made = 4, b""
    while at < end and len(made) < ram:
        if sector - at % sector < 4:
            at += sector - at % sector
        if at + 4 > end:
            break
        length = struct.unpack_from("<I", data, at)[0]
        at += 4
        if at + length > end:
            raise FormatError("a compressed extent is cut off")
        made += unpack_lzo(data[at : at + length], min(sector * 16, ram - len(made)))
        at += length
    return made
