"""Files of XFS: inodes found by their number, extents or a b-tree of them, folders of every form.

The log is not replayed: what an unclean filesystem says may be older than what it would say once mounted.

Source: XFS Algorithms & Data Structures, 3rd edition, "On-disk Inode", "Data Extents", "Directories" and "Symbolic
Links"; Linux fs/xfs/libxfs/xfs_format.h for bigtime and large extent counts.
"""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass
from itertools import pairwise

from pipeline.errors import FormatError
from pipeline.flow.items import RangeReader
from pipeline.units import GiB
from stages.disk.files.folders import FOLDER_MAX, INODES_KEPT, MAPS_KEPT, Folders, Recent, check_count, kind_of_type
from stages.disk.files.placed import Placed, read_placed
from stages.disk.live import kind_of_mode
from stages.disk.paths import PATH_MAX, failure
from stages.disk.reading import READ_MAX
from stages.disk.signatures import Signature
from stages.disk.tree import Entry, Kind, Node, Space
from stages.disk.xfs import Superblock, check_crc, log_is_clean, parse_superblock

# ftype, sparse inodes, meta_uuid, bigtime, needs repair, nrext64, exchange range, parent pointers
_INCOMPAT_READ = 0x1 | 0x2 | 0x4 | 0x8 | 0x10 | 0x20 | 0x40 | 0x80
_INCOMPAT_FTYPE, _INCOMPAT_NEEDS_REPAIR = 0x1, 0x10
_V4_FTYPE = 0x200  # of sb_features2

_DEV, _LOCAL, _EXTENTS, _BTREE = 0, 1, 2, 3
_REALTIME, _IMMUTABLE, _APPEND = 0x1, 0x8, 0x10
_BIGTIME, _NREXT64 = 1 << 3, 1 << 4  # of di_flags2
_LEVELS_MAX = 9
_LEAF_AT = 32 * GiB  # where in a folder's file its index begins

_DATA_MAGICS = (b"XD2D", b"XDD3")
_BLOCK_MAGICS = (b"XD2B", b"XDB3")
_FREE = 0xFFFF


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """What files need of the superblock beyond what maps need."""

    root: int
    inode_size: int
    inode_bits: int
    block_bits: int  # of a block's number inside of its allocation group
    folder_block: int  # bytes
    has_types: bool
    inodes: int
    inodes_free: int
    blocks_free: int
    inodes_percent: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Inode:
    node: Node
    format: int
    fork: bytes
    extents: int
    is_realtime: bool


async def open_xfs(reader: RangeReader, signature: Signature) -> XfsTree:
    """Open a filesystem that fills `reader`.

    Raises:
        FormatError: it is damaged, or uses features that are not read here.
    """
    data = await reader.read(0, min(32768, reader.size))
    found = parse_superblock(data, reader.size)
    if unknown := found.incompat & ~_INCOMPAT_READ:
        raise FormatError(f"it uses features that are not known here (incompat {unknown:#x})")
    if found.in_progress:
        raise FormatError("mkfs did not finish")
    shape = _shape(data, found)
    dirty = None
    if found.incompat & _INCOMPAT_NEEDS_REPAIR:
        dirty = "it is marked as in need of xfs_repair"
    elif not found.log_start:
        dirty = "its log is on another device"
    elif not await log_is_clean(reader, found):
        dirty = "its log has to be replayed"
    return XfsTree(reader, found, shape, signature, dirty)


def _shape(data: bytes, found: Superblock) -> _Shape:
    root = struct.unpack_from(">Q", data, 56)[0]
    inode_size, per_block = struct.unpack_from(">HH", data, 104)
    inode_bits, block_bits = data[123], data[124]
    folder_bits = data[192]
    if (
        not 256 <= inode_size <= min(2048, found.block)
        or inode_size & (inode_size - 1)
        or per_block * inode_size != found.block
        or 1 << inode_bits != per_block
        or block_bits != (found.ag_blocks - 1).bit_length()
        or found.block << folder_bits > 65536
    ):
        raise FormatError("the superblock's numbers contradict each other")
    features = struct.unpack_from(">I", data, 200)[0]
    inodes, inodes_free, blocks_free = struct.unpack_from(">QQQ", data, 128)
    return _Shape(
        root=root,
        inode_size=inode_size,
        inode_bits=inode_bits,
        block_bits=block_bits,
        folder_block=found.block << folder_bits,
        has_types=bool(found.incompat & _INCOMPAT_FTYPE if found.is_v5 else features & _V4_FTYPE),
        inodes=inodes,
        inodes_free=inodes_free,
        blocks_free=blocks_free,
        inodes_percent=data[127],
    )


class XfsTree:
    """An XFS filesystem. Made by `open_xfs`; implements `stages.disk.tree.FileTree`."""

    def __init__(
        self, reader: RangeReader, found: Superblock, shape: _Shape, signature: Signature, dirty: str | None
    ) -> None:
        self._reader = reader
        self._found = found
        self._shape = shape
        self._signature = signature
        self._dirty = dirty
        self._known: Recent[int, _Inode] = Recent(INODES_KEPT)
        self._blocks: Recent[int, bytes] = Recent(MAPS_KEPT)
        self._folders = Folders(self._load, self._kind_of)

    @property
    def kind(self) -> str:
        """xfs."""
        return "xfs"

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
        """As the superblock says."""
        return self._shape.root

    @property
    def dirty(self) -> str | None:
        """Whether its log holds changes."""
        return self._dirty

    async def node(self, number: int) -> Node:
        """Attributes of an inode. Raises FormatError where it is free or damaged."""
        return (await self._inode(number)).node

    async def entries(self, number: int) -> tuple[Entry, ...]:
        """Names of a folder."""
        return await self._folders.entries(number)

    async def lookup(self, number: int, name: str) -> int:
        """The inode of a name. Raises FileNotFoundError."""
        return await self._folders.find(number, name)

    async def target(self, number: int) -> str:
        """What a link says. Raises OSError EINVAL for what is none."""
        found = await self._inode(number)
        if found.node.kind is not Kind.LINK:
            raise failure(errno.EINVAL, f"inode {number}")
        size = found.node.size
        if size > PATH_MAX:
            raise FormatError("a link is longer than any path", inode=number)
        if found.format == _LOCAL:
            raw = found.fork[:size]
        else:
            raw = b""
            places: list[Placed] = []
            await self._map(found, 0, -(-size // self._found.block) + 1, places)
            for place in places:
                raw += self._part_of_link(await self._reader.read(place.at, min(place.length, 2 * PATH_MAX)))
        if len(raw) < size:
            raise FormatError("a link is cut off", inode=number)
        return raw[:size].decode("utf-8", "surrogateescape")

    def _part_of_link(self, data: bytes) -> bytes:
        """What an extent of a long link says; version 5 has a header in each."""
        if not self._found.is_v5:
            return data
        magic, _offset, length = struct.unpack_from(">4sII", data, 0)
        if magic != b"XSLM" or 56 + length > len(data):
            raise FormatError("a link makes no sense")
        check_crc(data, 12, "a link")
        return data[56 : 56 + length]

    async def read(self, number: int, offset: int, length: int) -> bytes:
        """Bytes of a regular file."""
        found = await self._inode(number)
        if found.node.kind is not Kind.FILE:
            raise failure(errno.EISDIR if found.node.kind is Kind.DIRECTORY else errno.EINVAL, f"inode {number}")
        if found.is_realtime:
            raise FormatError("a file lies on the realtime device", inode=number)
        return await self._data(found, offset, max(0, min(length, found.node.size - offset)))

    async def space(self) -> Space:
        """As the superblock says, which is exact after a clean unmount; inodes as many as there is room for."""
        shape, found = self._shape, self._found
        log = found.log_blocks if found.log_start else 0
        room = shape.inodes + (shape.blocks_free << shape.inode_bits)
        if shape.inodes_percent:
            most = found.blocks * shape.inodes_percent // 100 << shape.inode_bits
            room = max(shape.inodes, min(room, most))
        return Space(
            total=(found.blocks - log) * found.block,
            free=shape.blocks_free * found.block,
            inodes=room,
            inodes_free=room - shape.inodes + shape.inodes_free,
        )

    # -- inodes -------------------------------------------------------------------------------------------------------

    def _place(self, block: int, count: int) -> int:
        """Where blocks lie in the partition, whose numbers leave gaps between allocation groups. Raises FormatError."""
        group, inside = block >> self._shape.block_bits, block & (1 << self._shape.block_bits) - 1
        first = group * self._found.ag_blocks + inside
        if group >= self._found.ags or inside + count > self._found.ag_blocks or first + count > self._found.blocks:
            raise FormatError("a file lies outside of its filesystem", block=block, blocks=count)
        return first * self._found.block

    async def _kind_of(self, number: int) -> Kind:
        return (await self._inode(number)).node.kind

    async def _inode(self, number: int) -> _Inode:
        kept = self._known.get(number)
        if kept is not None:
            return kept
        shape = self._shape
        inside = number & (1 << shape.inode_bits) - 1
        at = self._place(number >> shape.inode_bits, 1) + inside * shape.inode_size
        data = await self._reader.read(at, shape.inode_size)
        return self._known.put(number, self._parse(number, data))

    def _parse(self, number: int, data: bytes) -> _Inode:
        magic, mode, version, form, old_links, uid, gid, links = struct.unpack_from(">2sHBBHIII", data, 0)
        if magic != b"IN" or version not in (1, 2, 3) or (version == 3) != self._found.is_v5:
            raise FormatError("a name means an inode that there is none of", inode=number)
        flags2 = 0
        if version == 3:
            check_crc(data, 100, "an inode")
            if struct.unpack_from(">Q", data, 152)[0] != number:
                raise FormatError("an inode is not the one that it should be", inode=number)
            flags2 = struct.unpack_from(">Q", data, 120)[0]
        if not mode or not (old_links if version == 1 else links):
            raise FormatError("a name means an inode that is free", inode=number)
        size = struct.unpack_from(">Q", data, 56)[0]
        extents = struct.unpack_from(">Q", data, 24)[0] if flags2 & _NREXT64 else struct.unpack_from(">I", data, 76)[0]
        flags = struct.unpack_from(">H", data, 90)[0]
        if flags2 & _BIGTIME:
            seconds = struct.unpack_from(">Q", data, 40)[0] // 10**9 - (1 << 31)
        else:
            seconds = struct.unpack_from(">i", data, 40)[0]
        begin = 176 if version == 3 else 100
        end = begin + 8 * data[82] if data[82] else len(data)
        if end > len(data) or size > 1 << 62:
            raise FormatError("an inode makes no sense", inode=number)
        kind = kind_of_mode(mode)
        return _Inode(
            node=Node(
                kind=kind,
                number=number,
                mode=mode & 0o7777,
                uid=uid,
                gid=gid,
                size=size,
                modified_s=seconds,
                immutable=bool(flags & _IMMUTABLE),
                append_only=bool(flags & _APPEND),
            ),
            format=form,
            fork=data[begin:end],
            extents=extents,
            is_realtime=bool(flags & _REALTIME) and kind is Kind.FILE,
        )

    # -- data ---------------------------------------------------------------------------------------------------------

    async def _data(self, found: _Inode, offset: int, length: int) -> bytes:
        if length <= 0:
            return b""
        if found.format == _LOCAL:
            return found.fork[: found.node.size][offset : offset + length]
        places: list[Placed] = []
        block = self._found.block
        await self._map(found, offset // block, -(-(offset + length) // block), places)
        return await read_placed(self._reader, places, offset, length)

    async def _map(self, found: _Inode, first: int, stop: int, places: list[Placed]) -> None:
        """Add where the blocks [first, stop) of a file are. Raises FormatError."""
        if found.format == _EXTENTS:
            if found.extents * 16 > len(found.fork):
                raise FormatError("an inode has more extents than room", inode=found.node.number)
            self._add_extents(found, found.fork, 0, found.extents, first, stop, places)
        elif found.format == _BTREE:
            level, count = struct.unpack_from(">HH", found.fork, 0)
            most = (len(found.fork) - 4) // 16
            if not 0 < level <= _LEVELS_MAX:
                raise FormatError("the tree of a file's extents is absurdly high", inode=found.node.number)
            await self._descend(found, found.fork, 4, count, most, level, first, stop, places)
        else:
            raise FormatError("an inode's data is of no known form", inode=found.node.number, form=found.format)

    async def _descend(
        self,
        found: _Inode,
        data: bytes,
        header: int,
        count: int,
        most: int,
        level: int,
        first: int,
        stop: int,
        places: list[Placed],
    ) -> None:
        """Follow the children of a node that have to do with the blocks [first, stop)."""
        if count > most:
            raise FormatError("a node of a file's extents is overfull", inode=found.node.number)
        begins = struct.unpack_from(f">{count}Q", data, header)
        if any(begin >= following for begin, following in pairwise(begins)):
            raise FormatError("a file's extents are out of order", inode=found.node.number)
        for index, begin in enumerate(begins):
            low, high = max(begin, first), min(begins[index + 1] if index + 1 < count else stop, stop)
            if low >= high:
                continue
            child = struct.unpack_from(">Q", data, header + 8 * most + 8 * index)[0]
            inner = await self._node(found, child, level - 1)
            size = 72 if self._found.is_v5 else 24
            records = struct.unpack_from(">H", inner, 6)[0]
            if level == 1:
                if size + 16 * records > len(inner):
                    raise FormatError("a leaf of a file's extents is overfull", inode=found.node.number)
                self._add_extents(found, inner, size, records, low, high, places)
            else:
                room = (len(inner) - size) // 16
                await self._descend(found, inner, size, records, room, level - 1, low, high, places)

    async def _node(self, found: _Inode, block: int, level: int) -> bytes:
        kept = self._blocks.get(block)
        if kept is None:
            kept = await self._reader.read(self._place(block, 1), self._found.block)
            if self._found.is_v5:
                check_crc(kept, 64, "a file's extents")
            self._blocks.put(block, kept)
        magic, said = struct.unpack_from(">4sH", kept, 0)
        if magic != (b"BMA3" if self._found.is_v5 else b"BMAP") or said != level:
            raise FormatError("a block of a file's extents makes no sense", inode=found.node.number)
        return kept

    def _add_extents(
        self, found: _Inode, data: bytes, at: int, count: int, first: int, stop: int, places: list[Placed]
    ) -> None:
        size = self._found.block
        position = 0
        for high, low in struct.iter_unpack(">QQ", data[at : at + 16 * count]):
            begin = (high & (1 << 63) - 1) >> 9
            length = low & 0x1FFFFF
            if begin < position:
                raise FormatError("a file's extents are out of order", inode=found.node.number)
            position = begin + length
            start, end = max(begin, first), min(begin + length, stop)
            if start < end and not high >> 63:  # else allocated, but never written: it reads as zero
                block = (high & 0x1FF) << 43 | low >> 21
                places.append(
                    Placed(start * size, (end - start) * size, self._place(block + start - begin, end - start))
                )

    # -- folders ------------------------------------------------------------------------------------------------------

    async def _load(self, number: int) -> list[Entry]:
        found = await self._inode(number)
        if found.node.kind is not Kind.DIRECTORY:
            raise failure(errno.ENOTDIR, f"inode {number}")
        made: list[Entry] = []
        if found.format == _LOCAL:
            self._add_short(found, made)
            return made
        size, each = found.node.size, self._shape.folder_block
        if size > min(FOLDER_MAX, _LEAF_AT):
            raise FormatError("a folder is larger than any real one", inode=number, size=size)
        places: list[Placed] = []
        await self._map(found, 0, -(-size // self._found.block), places)
        # Read in large steps; blocks that the folder no longer has are holes, and whole ones.
        step = READ_MAX // each * each
        present = {at // each for place in places for at in range(place.offset, place.end, self._found.block)}
        for offset in range(0, size, step):
            data = await read_placed(self._reader, places, offset, min(step, size - offset))
            for at in range(0, len(data), each):
                if (offset + at) // each in present:
                    self._add_block(found, data[at : at + each], made)
                    check_count(made, number)
        return made

    def _add_short(self, found: _Inode, made: list[Entry]) -> None:
        """Add the names of a folder that fits into its inode."""
        data = found.fork[: found.node.size]
        if len(data) < 6:
            raise FormatError("a folder is cut off", inode=found.node.number)
        wide = 8 if data[1] else 4
        typed = 1 if self._shape.has_types else 0
        at = 2 + wide
        for _ in range(data[0]):
            length = data[at] if at < len(data) else 0
            end = at + 3 + length + typed + wide
            if not length or end > len(data):
                raise FormatError("a folder is damaged", inode=found.node.number)
            name = data[at + 3 : at + 3 + length].decode("utf-8", "surrogateescape")
            kind = kind_of_type(data[at + 3 + length]) if typed else Kind.UNKNOWN
            made.append(Entry(name, int.from_bytes(data[end - wide : end], "big"), kind))
            at = end

    def _add_block(self, found: _Inode, data: bytes, made: list[Entry]) -> None:
        """Add the names of a block of a folder."""
        magic = data[:4]
        if len(data) != self._shape.folder_block:
            raise FormatError("a folder ends inside of a block", inode=found.node.number)
        if magic not in _DATA_MAGICS and magic not in _BLOCK_MAGICS:
            raise FormatError("a block of a folder makes no sense", inode=found.node.number)
        at = 64 if self._found.is_v5 else 16
        if self._found.is_v5:
            check_crc(data, 4, "a folder")
        end = len(data)
        if magic in _BLOCK_MAGICS:  # its index is behind the names in the same block
            end -= 8 + 8 * int(struct.unpack_from(">I", data, end - 8)[0])
            if end < at:
                raise FormatError("a folder is damaged", inode=found.node.number)
        typed = 1 if self._shape.has_types else 0
        while at + 8 <= end:
            tag, length = struct.unpack_from(">HH", data, at)
            if tag == _FREE:
                if length < 8 or length % 8 or at + length > end:
                    raise FormatError("a folder is damaged", inode=found.node.number)
                at += length
                continue
            number, length = struct.unpack_from(">QB", data, at) if at + 9 <= end else (0, 0)
            step = (8 + 1 + length + typed + 2 + 7) & ~7
            if not length or at + step > end:
                raise FormatError("a folder is damaged", inode=found.node.number)
            name = data[at + 9 : at + 9 + length].decode("utf-8", "surrogateescape")
            if name not in (".", ".."):
                kind = kind_of_type(data[at + 9 + length]) if typed else Kind.UNKNOWN
                made.append(Entry(name, number, kind))
            at += step
