"""Files of ext2, ext3 and ext4: inode tables, extents or indirect blocks, folders read from end to end.

A hashed folder is also a list of all its names, so it is read like any other. The journal is not replayed: what an
unclean filesystem says may be older than what it would say once mounted, and `dirty` tells so.

Source: Linux Documentation/filesystems/ext4, sections "Index Nodes", "The Contents of inode.i_block", "Directory
Entries", "Extended Attributes", "Inline Data" and "Checksums".
"""

from __future__ import annotations

import errno
import struct
import unicodedata
from dataclasses import dataclass
from itertools import pairwise

from pipeline.errors import FormatError
from pipeline.flow.items import RangeReader
from pipeline.units import KiB
from stages.disk.ext import (
    ERROR,
    INCOMPAT_JOURNAL_DEV,
    INCOMPAT_RECOVER,
    SUPERBLOCK_AT,
    SUPERBLOCK_SIZE,
    VALID,
    Superblock,
    check_descs,
    column,
    parse_superblock,
    raw_crc32c,
    read_descs,
)
from stages.disk.files.folders import FOLDER_MAX, INODES_KEPT, MAPS_KEPT, Folders, Recent, check_count, kind_of_type
from stages.disk.files.placed import Placed, read_placed
from stages.disk.live import kind_of_mode
from stages.disk.paths import PATH_MAX, failure
from stages.disk.reading import READ_MAX
from stages.disk.signatures import Signature
from stages.disk.tree import Entry, Kind, Node, Space

_ROOT = 2

# All that mapping knows, and a journal that was not replayed; compression never existed outside of patches.
_INCOMPAT_READ = 0x2 | 0x4 | 0x10 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x2000 | 0x4000 | 0x8000 | 0x10000 | 0x20000
_INCOMPAT_FILETYPE = 0x2
_INCOMPAT_CASEFOLD = 0x20000

_FLAG_IMMUTABLE, _FLAG_APPEND, _FLAG_ENCRYPTED = 0x10, 0x20, 0x800
_FLAG_HASHED, _FLAG_EXTENTS, _FLAG_INLINE, _FLAG_CASEFOLD = 0x1000, 0x80000, 0x10000000, 0x40000000

_EXTENT_MAGIC = 0xF30A
_DEPTH_MAX = 5
_UNWRITTEN = 1 << 15
_XATTR_MAGIC = 0xEA020000
_XATTR_SYSTEM = 7
_TAIL = struct.Struct("<IHBBI")
_TAIL_MARK = 0xDE

# Groups whose descriptors are looked at together for the free space.
_GROUPS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class _Inode:
    node: Node
    flags: int
    root: bytes  # i_block, 60 bytes
    inline: bytes  # the rest of inline data, out of the extended attributes in the inode
    seed: int  # of the checksums of what belongs to the inode


async def open_ext(reader: RangeReader, signature: Signature) -> ExtTree:
    """Open a filesystem that fills `reader`.

    Raises:
        FormatError: it is damaged, or uses features that are not read here.
    """
    data = await reader.read(SUPERBLOCK_AT, SUPERBLOCK_SIZE)
    found = parse_superblock(data, reader.size)
    if found.incompat & INCOMPAT_JOURNAL_DEV:
        raise FormatError("it is the journal of another filesystem")
    if unknown := found.incompat & ~_INCOMPAT_READ:
        raise FormatError(f"it uses features that are not known here (incompat {unknown:#x})")
    return ExtTree(reader, found, data, signature)


class ExtTree:
    """An ext filesystem. Made by `open_ext`; implements `stages.disk.tree.FileTree`."""

    def __init__(self, reader: RangeReader, found: Superblock, data: bytes, signature: Signature) -> None:
        self._reader = reader
        self._found = found
        self._signature = signature
        self._inodes, self._overhead = struct.unpack_from("<I", data, 0)[0], struct.unpack_from("<I", data, 0x248)[0]
        self._tables: Recent[int, int] = Recent(INODES_KEPT)
        self._known: Recent[int, _Inode] = Recent(INODES_KEPT)
        self._blocks: Recent[int, bytes] = Recent(MAPS_KEPT)
        self._folders = Folders(self._load, self._kind_of, _folded if found.incompat & _INCOMPAT_CASEFOLD else None)

    @property
    def kind(self) -> str:
        """ext2, ext3 or ext4."""
        return self._signature.kind

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
        """Inode 2."""
        return _ROOT

    @property
    def dirty(self) -> str | None:
        """What its flags say."""
        if self._found.incompat & INCOMPAT_RECOVER:
            return "its journal has to be replayed"
        if self._found.state & ERROR:
            return "it is marked as damaged"
        if not self._found.state & VALID:
            return "it is mounted or was not unmounted"
        return None

    async def node(self, number: int) -> Node:
        """Attributes of an inode. Raises FormatError where it is free or damaged."""
        return (await self._inode(number)).node

    async def entries(self, number: int) -> tuple[Entry, ...]:
        """Names of a folder."""
        return await self._folders.entries(number)

    async def lookup(self, number: int, name: str) -> int:
        """The inode of a name; case does not count in folders that say so. Raises FileNotFoundError."""
        if self._found.incompat & _INCOMPAT_CASEFOLD and not (await self._inode(number)).flags & _FLAG_CASEFOLD:
            for one in await self._folders.entries(number):
                if one.name == name:
                    return one.number
            raise failure(errno.ENOENT, name)
        return await self._folders.find(number, name)

    async def target(self, number: int) -> str:
        """What a link says. Raises OSError EINVAL for what is none, ENOKEY where it is encrypted."""
        found = await self._inode(number)
        if found.node.kind is not Kind.LINK:
            raise failure(errno.EINVAL, f"inode {number}")
        if found.node.size > PATH_MAX:
            raise FormatError("a link is longer than any path", inode=number)
        if found.flags & _FLAG_ENCRYPTED:
            raise failure(errno.ENOKEY, f"inode {number}")
        if not found.flags & (_FLAG_EXTENTS | _FLAG_INLINE) and found.node.size < len(found.root):
            raw = found.root[: found.node.size]
        else:
            raw = await self._data(found, 0, found.node.size)
        return raw.decode("utf-8", "surrogateescape")

    async def read(self, number: int, offset: int, length: int) -> bytes:
        """Bytes of a regular file. Raises OSError ENOKEY where it is encrypted."""
        found = await self._inode(number)
        if found.node.kind is not Kind.FILE:
            raise failure(errno.EISDIR if found.node.kind is Kind.DIRECTORY else errno.EINVAL, f"inode {number}")
        if found.flags & _FLAG_ENCRYPTED:
            raise failure(errno.ENOKEY, f"inode {number}")
        return await self._data(found, offset, max(0, min(length, found.node.size - offset)))

    async def space(self) -> Space:
        """The sum over all groups; without what the filesystem needs for itself, as far as it says that."""
        found = self._found
        clusters = inodes = 0
        batch = -(-_GROUPS_AT_ONCE // found.descs_per_block) * found.descs_per_block
        batch = max(found.descs_per_block, min(batch, READ_MAX // found.block * found.descs_per_block))
        for first in range(0, found.groups, batch):
            descs = await read_descs(self._reader, found, first, min(batch, found.groups - first))
            clusters += int((column(found, descs, 12, 44, "<u2")).sum())
            inodes += int((column(found, descs, 14, 46, "<u2")).sum())
        unit = found.ratio * found.block
        return Space(
            total=max(0, found.blocks * found.block - self._overhead * unit),
            free=clusters * unit,
            inodes=self._inodes,
            inodes_free=inodes,
        )

    # -- inodes -------------------------------------------------------------------------------------------------------

    async def _kind_of(self, number: int) -> Kind:
        return (await self._inode(number)).node.kind

    async def _inode(self, number: int) -> _Inode:
        kept = self._known.get(number)
        if kept is not None:
            return kept
        found = self._found
        if not 0 < number <= min(self._inodes, found.groups * found.inodes_per_group):
            raise FormatError("a name means an inode that there is none of", inode=number)
        group, index = divmod(number - 1, found.inodes_per_group)
        table = self._tables.get(group)
        if table is None:
            table = self._tables.put(group, await self._table(group))
        data = await self._reader.read(table * found.block + index * found.inode_size, found.inode_size)
        return self._known.put(number, self._parse(number, data))

    async def _table(self, group: int) -> int:
        """The block where a group's inodes begin."""
        found = self._found
        first = group // found.descs_per_block * found.descs_per_block
        descs = await read_descs(self._reader, found, first, min(found.descs_per_block, found.groups - first))
        mine = descs[group - first : group - first + 1]
        check_descs(found, mine, group)
        table = int(column(found, mine, 8, 40, "<u4")[0])
        if not found.first_data < table <= found.blocks - found.itable_blocks:
            raise FormatError("a group descriptor points outside of the filesystem", group=group)
        return table

    def _parse(self, number: int, data: bytes) -> _Inode:
        mode, uid, size, modified = struct.unpack_from("<HHI8xI", data, 0)
        gid, links = struct.unpack_from("<HH", data, 24)
        flags = struct.unpack_from("<I", data, 32)[0]
        size_high = struct.unpack_from("<I", data, 108)[0]
        uid_high, gid_high = struct.unpack_from("<HH", data, 120)
        extra = struct.unpack_from("<H", data, 128)[0] if len(data) >= 132 else 0
        if extra > len(data) - 128:
            raise FormatError("an inode claims more than it has", inode=number)
        seed = self._check(number, data, extra)
        if not links:
            raise FormatError("a name means an inode that is free", inode=number)
        kind = kind_of_mode(mode)
        if kind in (Kind.FILE, Kind.DIRECTORY):
            size |= size_high << 32
        if size > 1 << 62:
            raise FormatError("a file has an absurd size", inode=number)
        seconds = struct.unpack("<i", struct.pack("<I", modified))[0]
        if extra >= 12:  # up to i_mtime_extra, whose low two bits count spans of 2**32 seconds
            seconds += (struct.unpack_from("<I", data, 136)[0] & 3) << 32
        return _Inode(
            node=Node(
                kind=kind,
                number=number,
                mode=mode & 0o7777,
                uid=uid | uid_high << 16,
                gid=gid | gid_high << 16,
                size=size,
                modified_s=seconds,
                immutable=bool(flags & _FLAG_IMMUTABLE),
                append_only=bool(flags & _FLAG_APPEND),
            ),
            flags=flags,
            root=data[40:100],
            inline=_inline_rest(data, 128 + extra) if flags & _FLAG_INLINE else b"",
            seed=seed,
        )

    def _check(self, number: int, data: bytes, extra: int) -> int:
        """Check an inode's checksum; returns the seed of those of its blocks. Raises FormatError."""
        if not self._found.has_checksums:
            return 0
        seed = raw_crc32c(self._found.seed, struct.pack("<I", number) + data[100:104])
        plain = bytearray(data)
        plain[124:126] = bytes(2)
        stored = int(struct.unpack_from("<H", data, 124)[0])
        mask = 0xFFFF
        if extra >= 4:
            plain[130:132] = bytes(2)
            stored |= struct.unpack_from("<H", data, 130)[0] << 16
            mask = 0xFFFFFFFF
        if raw_crc32c(seed, bytes(plain)) & mask != stored:
            raise FormatError("the checksum of an inode is wrong", inode=number)
        return seed

    # -- data ---------------------------------------------------------------------------------------------------------

    async def _data(self, found: _Inode, offset: int, length: int) -> bytes:
        """Bytes of whatever an inode holds; `length` was checked against its size."""
        if length <= 0:
            return b""
        if found.flags & _FLAG_INLINE:
            whole = (found.root + found.inline)[: found.node.size]
            return whole.ljust(found.node.size if found.node.size <= KiB * 64 else 0, b"\0")[offset : offset + length]
        block = self._found.block
        first, stop = offset // block, -(-(offset + length) // block)
        places: list[Placed] = []
        if found.flags & _FLAG_EXTENTS:
            await self._extents(found, found.root, None, first, stop, places)
        else:
            await self._indirect(found.root, first, stop, places)
        return await read_placed(self._reader, places, offset, length)

    async def _block(self, block: int) -> bytes:
        """A block of a file's map."""
        kept = self._blocks.get(block)
        if kept is None:
            kept = self._blocks.put(block, await self._reader.read(self._place(block, 1), self._found.block))
        return kept

    def _place(self, block: int, count: int) -> int:
        """Where blocks lie in the partition. Raises FormatError where the filesystem has none such."""
        if not self._found.first_data < block <= self._found.blocks - count:
            raise FormatError("a file lies outside of its filesystem", block=block, blocks=count)
        return block * self._found.block

    async def _extents(
        self, found: _Inode, data: bytes, depth: int | None, first: int, stop: int, places: list[Placed]
    ) -> None:
        """Add what a node of the extent tree says about the blocks [first, stop) of a file."""
        magic, count, most, said = struct.unpack_from("<HHHH", data, 0)
        if magic != _EXTENT_MAGIC or count > most or 12 + 12 * most > len(data) or said > _DEPTH_MAX:
            raise FormatError("a file's extents make no sense", inode=found.node.number)
        if depth is not None:
            if said != depth:
                raise FormatError("a file's extents make no sense", inode=found.node.number)
            at = 12 + 12 * most
            is_checked = self._found.has_checksums and at + 4 <= len(data)
            if is_checked and raw_crc32c(found.seed, data[:at]) != struct.unpack_from("<I", data, at)[0]:
                raise FormatError("the checksum of a file's extents is wrong", inode=found.node.number)
        begins = [struct.unpack_from("<I", data, 12 + 12 * index)[0] for index in range(count)]
        if any(begin >= following for begin, following in pairwise(begins)):
            raise FormatError("a file's extents are out of order", inode=found.node.number)
        size = self._found.block
        for index, begin in enumerate(begins):
            at = 12 + 12 * index
            end = begins[index + 1] if index + 1 < count else stop
            if said:
                if max(begin, first) < min(end, stop):
                    low, high = struct.unpack_from("<IH", data, at + 4)
                    inner = await self._block(low | high << 32)
                    await self._extents(found, inner, said - 1, max(begin, first), min(end, stop), places)
                continue
            length, high, low = struct.unpack_from("<HHI", data, at + 4)
            if length <= _UNWRITTEN:  # else allocated, but never written: it reads as zero
                start, last = max(begin, first), min(begin + length, stop)
                if start < last:
                    place = self._place((low | high << 32) + start - begin, last - start)
                    places.append(Placed(start * size, (last - start) * size, place))

    async def _indirect(self, root: bytes, first: int, stop: int, places: list[Placed]) -> None:
        """Add what 12 direct and 3 indirect blocks say about the blocks [first, stop) of a file."""
        pointers = struct.unpack("<15I", root)
        each = self._found.block // 4
        for index in range(first, min(stop, 12)):
            self._add_pointer(pointers[index], index, places)
        begin = 12
        for level in (1, 2, 3):
            span = each**level
            if first < begin + span and stop > begin:
                await self._below(pointers[11 + level], level, begin, first, stop, places)
            begin += span

    async def _below(self, block: int, level: int, begin: int, first: int, stop: int, places: list[Placed]) -> None:
        """Add what an indirect block says, whose first pointer is about the file's block `begin`."""
        if not block:
            return
        each = self._found.block // 4
        span = each ** (level - 1)
        pointers = struct.unpack(f"<{each}I", await self._block(block))
        for index in range(max(0, (first - begin) // span), min(each, -(-(stop - begin) // span))):
            if level == 1:
                self._add_pointer(pointers[index], begin + index, places)
            else:
                await self._below(pointers[index], level - 1, begin + index * span, first, stop, places)

    def _add_pointer(self, block: int, index: int, places: list[Placed]) -> None:
        if not block:
            return
        size = self._found.block
        at = self._place(block, 1)
        if places and places[-1].end == index * size and places[-1].at + places[-1].length == at:
            last = places.pop()
            places.append(Placed(last.offset, last.length + size, last.at))
        else:
            places.append(Placed(index * size, size, at))

    # -- folders ------------------------------------------------------------------------------------------------------

    async def _load(self, number: int) -> list[Entry]:
        found = await self._inode(number)
        if found.node.kind is not Kind.DIRECTORY:
            raise failure(errno.ENOTDIR, f"inode {number}")
        if found.flags & _FLAG_ENCRYPTED:
            raise failure(errno.ENOKEY, f"inode {number}")
        made: list[Entry] = []
        if found.flags & _FLAG_INLINE:
            self._add_names(found, found.root[4:], made)  # behind the number of the folder above
            self._add_names(found, found.inline, made)
            return made
        size = found.node.size
        if size > FOLDER_MAX:
            raise FormatError("a folder is larger than any real one", inode=number, size=size)
        for offset in range(0, size, READ_MAX):
            data = memoryview(await self._data(found, offset, min(READ_MAX, size - offset)))
            for at in range(0, len(data), self._found.block):
                is_root = offset + at == 0 and bool(found.flags & _FLAG_HASHED)
                self._add_block(found, data[at : at + self._found.block], is_root, made)
        return made

    def _add_block(self, found: _Inode, data: memoryview, is_root: bool, made: list[Entry]) -> None:
        """Add the names in a block of a folder. Its index blocks look like blocks without names."""
        if self._found.has_checksums and len(data) == self._found.block and not is_root:
            first, span = struct.unpack_from("<IH", data, 0)
            is_index = first == 0 and span in (len(data), 0, 0xFFFF)
            inode, length, name, mark, stored = _TAIL.unpack_from(data, len(data) - _TAIL.size)
            # An index block was a block of names once, and may still have its tail.
            has_tail = (inode, length, name, mark) == (0, _TAIL.size, 0, _TAIL_MARK) and not is_index
            if has_tail and raw_crc32c(found.seed, data[: -_TAIL.size]) != stored:
                raise FormatError("the checksum of a folder is wrong", inode=found.node.number)
        self._add_names(found, data, made)
        check_count(made, found.node.number)

    def _add_names(self, found: _Inode, data: bytes | memoryview, made: list[Entry]) -> None:
        has_kinds = bool(self._found.incompat & _INCOMPAT_FILETYPE)
        at = 0
        while at + 8 <= len(data):
            number, length, name_length, kind = struct.unpack_from("<IHBB", data, at)
            # Blocks of 64 KiB have lengths that need 17 bits: the low two bits, always zero else, are the upper ones.
            length = len(data) - at if length in (0, 0xFFFF) else length & 0xFFFC | (length & 3) << 16
            if not has_kinds:
                name_length, kind = name_length | kind << 8, 0
            if length < 8 or at + length > len(data) or 8 + name_length > length:
                raise FormatError("a folder is damaged", inode=found.node.number)
            if number and name_length:
                name = bytes(data[at + 8 : at + 8 + name_length]).decode("utf-8", "surrogateescape")
                if name not in (".", ".."):
                    made.append(Entry(name, number, kind_of_type(kind)))
            at += length


def _inline_rest(data: bytes, at: int) -> bytes:
    """What inline data has beyond its first 60 bytes: the attribute system.data in the inode. Raises FormatError."""
    if at + 4 > len(data) or struct.unpack_from("<I", data, at)[0] != _XATTR_MAGIC:
        return b""
    begin = position = at + 4
    while position + 16 <= len(data) and data[position : position + 4] != bytes(4):
        length, index, offset, block, size = struct.unpack_from("<BBHII", data, position)
        name = data[position + 16 : position + 16 + length]
        if index == _XATTR_SYSTEM and name == b"data" and not block:
            if begin + offset + size > len(data):
                raise FormatError("inline data lies outside of its inode")
            return data[begin + offset : begin + offset + size]
        position += (16 + length + 3) & ~3
    return b""


def _folded(name: str) -> str:
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())
