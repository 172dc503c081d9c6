"""The used blocks of XFS: the free-space b-tree of every allocation group says what is not used.

The log is copied whole and always: the filesystem checks its sequence numbers against those of its metadata.

Source: XFS Algorithms & Data Structures, 3rd edition, "Superblocks", "AG Free Space Management", "AG Free Space
B+trees" and "Journaling Log".
"""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass

import numpy as np

from pipeline.errors import FormatError
from pipeline.flow.items import RangeReader
from stages.disk.checksums import crc32c
from stages.disk.reading import read_each
from stages.disk.usage import Numbers, RangeSet, Refusal, UsedMap, take_witness

_BB = 512  # a basic block, the unit of the log
_AGS_MAX = 1 << 16
_LEVELS_MAX = 9
# Blocks of a level of a tree at most, and how many are held at once.
_BLOCKS_MAX = 1 << 22
_AT_ONCE = 512

# ftype, sparse inodes, meta_uuid, bigtime, nrext64, exchange range, parent pointers
_INCOMPAT_KNOWN = 0x1 | 0x2 | 0x4 | 0x8 | 0x20 | 0x40 | 0x80
_INCOMPAT_NEEDS_REPAIR = 0x10
_RO_KNOWN = 0x1 | 0x2 | 0x4 | 0x8  # finobt, rmapbt, reflink, inobtcount

_LOG_MAGIC = 0xFEEDBABE
_UNMOUNT = 0x20
# A record is padded to the log stripe unit, which is 256 KiB at most.
_RECORD_MAX = 512 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Superblock:
    """What mapping needs of a superblock that was checked."""

    block: int  # bytes
    blocks: int
    ag_blocks: int
    ags: int
    sector: int  # bytes
    is_v5: bool
    log_start: int  # bytes of the partition; 0: on another device
    log_blocks: int
    realtime_blocks: int
    in_progress: bool
    incompat: int
    ro_compat: int

    @property
    def tree_header(self) -> int:
        """Bytes of a b-tree block before its records."""
        return 56 if self.is_v5 else 16


def parse_superblock(data: bytes, size: int) -> Superblock:
    """Check the first sector. `size` is the partition's. Raises FormatError."""
    magic, block, blocks, realtime = struct.unpack_from(">4sIQQ", data, 0)
    if magic != b"XFSB":
        raise FormatError("there is no XFS superblock")
    log_block = struct.unpack_from(">Q", data, 48)[0]
    ag_blocks, ags = struct.unpack_from(">II", data, 84)
    log_blocks, version, sector = struct.unpack_from(">IHH", data, 96)
    is_v5 = version & 0xF == 5
    if version & 0xF not in (4, 5):
        raise FormatError("its version is none that is known")
    if (
        not 512 <= block <= 65536
        or block & (block - 1)
        or not 512 <= sector <= 32768
        or sector & (sector - 1)
        or ag_blocks < 64
        or ag_blocks * block > 1 << 40
        or not 0 < ags <= _AGS_MAX
        or -(-blocks // ag_blocks) != ags
    ):
        raise FormatError("the superblock's numbers contradict each other")
    if blocks * block > size:
        raise FormatError(f"the filesystem has {blocks * block} bytes, its partition {size}")
    if is_v5:
        check_crc(data[:sector].ljust(sector, b"\0"), 224, "the superblock")
    shift = (ag_blocks - 1).bit_length()
    ag, inside = log_block >> shift, log_block & (1 << shift) - 1
    start = (ag * ag_blocks + inside) * block
    if log_block and start + log_blocks * block > size:
        raise FormatError("its log would be outside of the partition")
    incompat, ro_compat = (struct.unpack_from(">I", data, at)[0] if is_v5 else 0 for at in (216, 212))
    return Superblock(
        block=block,
        blocks=blocks,
        ag_blocks=ag_blocks,
        ags=ags,
        sector=sector,
        is_v5=is_v5,
        log_start=start,
        log_blocks=log_blocks,
        realtime_blocks=realtime,
        in_progress=bool(data[126]),
        incompat=incompat,
        ro_compat=ro_compat,
    )


def check_crc(data: bytes | memoryview, at: int, what: str) -> None:
    """The CRC32C at `at` is over the whole structure with itself as zeros."""
    if crc32c(data[at + 4 :], crc32c(bytes(4), crc32c(data[:at]))) != struct.unpack_from("<I", data, at)[0]:
        raise FormatError(f"the checksum of {what} is wrong")


async def map_xfs(reader: RangeReader, kind: str, *, frozen: bool = False) -> UsedMap | Refusal:
    """Read the free-space b-trees.

    Raises:
        FormatError: it is damaged.
    """
    found = parse_superblock(await reader.read(0, min(32768, reader.size)), reader.size)
    if reason := await _why_not(reader, found, frozen=frozen):
        return Refusal(kind, reason)
    ranges = RangeSet(reader.size)
    free = 0
    witness = [(0, 512)]
    for number in range(found.ags):
        base = number * found.ag_blocks
        length = min(found.ag_blocks, found.blocks - base)
        free += await _add_group(reader, found, number, length, ranges)
        witness.append((base * found.block + found.sector, 512))
    end = found.blocks * found.block
    ranges.add(end, reader.size - end)
    made, sizes = ranges.finish()
    return UsedMap(
        filesystem=kind,
        size=reader.size,
        starts=made,
        lengths=sizes,
        unit=found.block,
        units_used=found.blocks - free,
        witness=await take_witness(reader, witness),
    )


async def _why_not(reader: RangeReader, found: Superblock, *, frozen: bool) -> str:
    """Why the b-trees can't be trusted; empty where they can."""
    if found.realtime_blocks:
        return "it has a realtime device"
    if not found.log_start:
        return "its log is on another device"
    if found.in_progress:
        return "mkfs did not finish"
    if found.incompat & _INCOMPAT_NEEDS_REPAIR:
        return "it is marked as in need of xfs_repair"
    if unknown := found.incompat & ~_INCOMPAT_KNOWN:
        return f"it uses features that are not known here (incompat {unknown:#x})"
    if unknown := found.ro_compat & ~_RO_KNOWN:
        return f"it uses features that are not known here (ro_compat {unknown:#x})"
    if not frozen and not await log_is_clean(reader, found):
        return "it is not clean: its log has to be replayed"
    return ""


async def _add_group(reader: RangeReader, found: Superblock, number: int, length: int, ranges: RangeSet) -> int:
    """Add what is used of an allocation group of `length` blocks; returns its free blocks. Raises FormatError."""
    base = number * found.ag_blocks
    agf = await reader.read(base * found.block + found.sector, found.sector)
    magic, _version, sequence, said, root = struct.unpack_from(">4sIIII", agf, 0)
    levels = struct.unpack_from(">I", agf, 28)[0]
    free = int(struct.unpack_from(">I", agf, 52)[0])
    if found.is_v5:
        check_crc(agf, 216, f"the header of allocation group {number}")
    if magic != b"XAGF" or sequence != number or said != length or not 0 < levels <= _LEVELS_MAX:
        raise FormatError("the header of an allocation group makes no sense", group=number)
    nodes = np.array([root], np.int64)
    for level in range(levels - 1, 0, -1):
        nodes = await _children(reader, found, number, length, level, nodes)
    position = total = 0
    most = (found.block - found.tree_header) // 8
    async for records, body in _blocks(reader, found, number, length, 0, nodes):
        if records > most:
            raise FormatError("a b-tree leaf is overfull", group=number)
        table = np.frombuffer(body, ">u4", records * 2, found.tree_header).astype(np.int64).reshape(-1, 2)
        starts, stops = table[:, 0], table[:, 0] + table[:, 1]
        used_from = np.concatenate((np.array([position], np.int64), stops[:-1])) if records else starts
        if records:
            if bool((table[:, 1] == 0).any()) or bool((starts < used_from).any()) or int(stops[-1]) > length:
                raise FormatError("a free-space b-tree is not in order", group=number)
            position = int(stops[-1])
        total += int(table[:, 1].sum())
        ranges.add_many((used_from + base) * found.block, (starts + base) * found.block)
    if total != free:
        raise FormatError("a free-space b-tree does not have as many blocks as its header says", group=number)
    ranges.add((position + base) * found.block, (length - position) * found.block)
    return free


async def _children(
    reader: RangeReader, found: Superblock, number: int, length: int, level: int, nodes: Numbers
) -> Numbers:
    """The nodes below those of an inner level. Raises FormatError."""
    most = (found.block - found.tree_header) // 12
    below = []
    total = 0
    async for records, body in _blocks(reader, found, number, length, level, nodes):
        if records > most or not records:
            raise FormatError("a b-tree node is overfull or empty", group=number)
        below.append(np.frombuffer(body, ">u4", records, found.tree_header + most * 8).astype(np.int64))
        total += records
        if total > _BLOCKS_MAX:
            raise FormatError("a b-tree has absurdly many blocks", group=number)
    made = np.concatenate(below)
    if len(np.unique(made)) != len(made):
        raise FormatError("a b-tree has a loop", group=number)
    return made


async def _blocks(
    reader: RangeReader, found: Superblock, number: int, length: int, level: int, nodes: Numbers
) -> AsyncIterator[tuple[int, memoryview]]:
    """(records, block) of every node of one level, in the order of `nodes`. Raises FormatError."""
    if int(nodes.min()) <= 0 or int(nodes.max()) >= length:
        raise FormatError("a b-tree leaves its allocation group", group=number)
    for at in range(0, len(nodes), _AT_ONCE):
        offsets: list[int] = ((nodes[at : at + _AT_ONCE] + number * found.ag_blocks) * found.block).tolist()
        bodies: dict[int, tuple[int, memoryview]] = {}
        async for index, data in read_each(reader, offsets, found.block):
            magic, said, records = struct.unpack_from(">4sHH", data, 0)
            if magic != (b"AB3B" if found.is_v5 else b"ABTB") or said != level:
                raise FormatError("a block of a b-tree makes no sense", group=number, offset=offsets[index])
            if found.is_v5:
                check_crc(data, 52, "a b-tree block")
            bodies[index] = (records, data)
        for index in range(len(offsets)):
            yield bodies[index]


async def log_is_clean(reader: RangeReader, found: Superblock) -> bool:
    """Whether the last record of the log is that of an unmount, so that nothing has to be replayed.

    The head is found by bisection: every basic block carries the number of its pass over the log.
    """
    count = found.log_blocks * found.block // _BB
    if count < 2:
        return False

    async def cycle(index: int) -> int:
        word, second = struct.unpack_from(">II", await reader.read(found.log_start + index * _BB, 8))
        return int(second if word == _LOG_MAGIC else word)

    first, last = await cycle(0), await cycle(count - 1)
    if first == 0:
        return last == 0  # never written
    if first == last:
        head = count
    else:
        low, high = 0, count - 1  # the head is behind `low` and at most `high`
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if await cycle(middle) == first else (low, middle)
        head = high
    return await _ends_with_unmount(reader, found, head, count)


async def _ends_with_unmount(reader: RangeReader, found: Superblock, head: int, count: int) -> bool:
    """Whether the record before the head is that of an unmount: one operation, two or a few blocks long."""
    back = min(head, _RECORD_MAX // _BB)
    data = await reader.read(found.log_start + (head - back) * _BB, back * _BB)
    for index in range(back - 1, -1, -1):
        at = index * _BB
        if struct.unpack_from(">I", data, at)[0] != _LOG_MAGIC:
            continue
        version, length = struct.unpack_from(">II", data, at + 8)
        operations = struct.unpack_from(">I", data, at + 40)[0]
        size = struct.unpack_from(">I", data, at + 320)[0]
        headers = max(1, -(-size // 32768)) if version & 2 else 1
        if operations != 1 or index + headers + -(-length // _BB) != back:
            return False
        body = (index + headers) * _BB
        return body + 12 <= len(data) and bool(data[body + 9] & _UNMOUNT)
    return False
