"""The used blocks of ext2, ext3 and ext4: group descriptors lead to block bitmaps.

Source: Linux Documentation/filesystems/ext4, sections "The Super Block", "Block Group Descriptors", "Block and Inode
Bitmaps", "Meta Block Groups", "Bigalloc" and "Checksums".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import FormatError
from pipeline.flow.items import RangeReader
from pipeline.units import KiB, MiB
from stages.disk.checksums import crc32c
from stages.disk.reading import READ_MAX, read_each
from stages.disk.usage import RangeSet, Refusal, UsedMap, set_runs, take_witness

SUPERBLOCK_AT = 1024
SUPERBLOCK_SIZE = 1024
MAGIC = 0xEF53

VALID, ERROR = 1, 2  # s_state

COMPAT_HAS_JOURNAL = 0x4
_COMPAT_SPARSE_SUPER2 = 0x200
INCOMPAT_RECOVER = 0x4
INCOMPAT_JOURNAL_DEV = 0x8
_INCOMPAT_META_BG = 0x10
INCOMPAT_EXTENTS = 0x40
_INCOMPAT_64BIT = 0x80
_INCOMPAT_MMP = 0x100
_INCOMPAT_CSUM_SEED = 0x2000
# filetype, meta_bg, extent, 64bit, mmp, flex_bg, ea_inode, dirdata, csum_seed, largedir, inline_data, encrypt, casefold
_INCOMPAT_KNOWN = (
    0x2 | 0x10 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x1000 | 0x2000 | 0x4000 | 0x8000 | 0x10000 | 0x20000
)
_RO_SPARSE_SUPER = 0x1
_RO_GDT_CSUM = 0x10
_RO_BIGALLOC = 0x200
_RO_METADATA_CSUM = 0x400
# sparse_super, large_file, huge_file, gdt_csum, dir_nlink, extra_isize, quota, bigalloc, metadata_csum, readonly,
# project, verity, orphan_present
_RO_KNOWN = 0x1 | 0x2 | 0x8 | 0x10 | 0x20 | 0x40 | 0x100 | 0x200 | 0x400 | 0x1000 | 0x2000 | 0x8000 | 0x10000

_INODE_UNINIT, _BLOCK_UNINIT = 1, 2
# One bitmap covers 128 MiB with blocks of 4 KiB: this many groups are 512 TiB. A hostile superblock can't ask for more.
_GROUPS_MAX = 1 << 22
# Bits unpacked at once; each costs up to thirty bytes meanwhile, where used and free alternate.
_BITS_AT_ONCE = MiB
_MMP_CLEAN = 0xFF4D4D50


@dataclass(frozen=True, slots=True, kw_only=True)
class Superblock:
    """What mapping needs of a superblock that was checked. Blocks unless it says bytes."""

    block: int  # bytes
    blocks: int
    free_blocks: int
    first_data: int
    blocks_per_group: int
    clusters_per_group: int
    ratio: int
    inodes_per_group: int
    inode_size: int  # bytes
    desc_size: int  # bytes
    reserved_gdt: int
    first_meta_bg: int
    backup_groups: tuple[int, int]
    state: int
    compat: int
    incompat: int
    ro_compat: int
    seed: int
    uuid: bytes
    mmp_block: int

    @property
    def groups(self) -> int:
        """How many block groups there are."""
        return -(-(self.blocks - self.first_data) // self.blocks_per_group)

    @property
    def has_checksums(self) -> bool:
        """Whether descriptors and bitmaps carry CRC32C."""
        return bool(self.ro_compat & _RO_METADATA_CSUM)

    @property
    def has_uninit(self) -> bool:
        """Whether a descriptor's flags mean anything."""
        return bool(self.ro_compat & (_RO_METADATA_CSUM | _RO_GDT_CSUM))

    @property
    def descs_per_block(self) -> int:
        """Group descriptors in a block."""
        return self.block // self.desc_size

    @property
    def gdt_blocks(self) -> int:
        """Blocks of the whole descriptor table."""
        return -(-self.groups // self.descs_per_block)

    @property
    def itable_blocks(self) -> int:
        """Blocks of a group's inode table."""
        return -(-self.inodes_per_group * self.inode_size // self.block)

    def has_super(self, group: int) -> bool:
        """Whether the group begins with a copy of the superblock."""
        if self.compat & _COMPAT_SPARSE_SUPER2:
            return group == 0 or group in self.backup_groups
        if group <= 1 or not self.ro_compat & _RO_SPARSE_SUPER:
            return True
        return any(_is_power(group, base) for base in (3, 5, 7))

    def base_blocks(self, group: int) -> int:
        """Blocks at the begin of a group that hold superblock and descriptors."""
        has_super = self.has_super(group)
        meta_bg = bool(self.incompat & _INCOMPAT_META_BG)
        if not meta_bg or group // self.descs_per_block < self.first_meta_bg:
            old = self.first_meta_bg if meta_bg else self.gdt_blocks
            return 1 + old + self.reserved_gdt if has_super else 0
        return has_super + (group % self.descs_per_block in (0, 1, self.descs_per_block - 1))

    def gdt_block(self, index: int) -> int:
        """Where the index-th block of the descriptor table is."""
        if not self.incompat & _INCOMPAT_META_BG or index < self.first_meta_bg:
            return (1 if self.block == KiB else 0) + 1 + index
        group = index * self.descs_per_block
        shifted = self.block == KiB and index == 0 and self.first_data == 0
        return self.first_data + group * self.blocks_per_group + self.has_super(group) + shifted


def _is_power(number: int, base: int) -> bool:
    while number % base == 0:
        number //= base
    return number == 1


def parse_superblock(data: bytes, size: int) -> Superblock:
    """Check the 1024 bytes at byte 1024. `size` is the partition's. Raises FormatError."""

    def word(at: int) -> int:
        return int.from_bytes(data[at : at + 4], "little")

    def half(at: int) -> int:
        return int.from_bytes(data[at : at + 2], "little")

    if half(56) != MAGIC:
        raise FormatError("there is no ext superblock")
    compat, incompat, ro_compat = word(92), word(96), word(100)
    wide = bool(incompat & _INCOMPAT_64BIT)
    if ro_compat & _RO_METADATA_CSUM and raw_crc32c(0xFFFFFFFF, data[:1020]) != word(1020):
        raise FormatError("the checksum of the superblock is wrong")
    if word(24) > 6 or word(28) > 20:
        raise FormatError("the block size is none that exists")
    block = KiB << word(24)
    bigalloc = bool(ro_compat & _RO_BIGALLOC)
    ratio = 1 << (word(28) - word(24)) if bigalloc and word(28) >= word(24) else 1
    uuid = data[104:120]
    made = Superblock(
        block=block,
        blocks=word(4) | (word(0x150) << 32 if wide else 0),
        free_blocks=word(12) | (word(0x158) << 32 if wide else 0),
        first_data=word(20),
        blocks_per_group=word(32),
        clusters_per_group=word(36) if bigalloc else word(32),
        ratio=ratio,
        inodes_per_group=word(40),
        inode_size=half(88) if word(76) else 128,
        desc_size=(half(254) or 64) if wide else 32,
        reserved_gdt=half(206),
        first_meta_bg=word(0x104),
        backup_groups=struct.unpack_from("<II", data, 0x24C),
        state=half(58),
        compat=compat,
        incompat=incompat,
        ro_compat=ro_compat,
        seed=word(0x270) if incompat & _INCOMPAT_CSUM_SEED else raw_crc32c(0xFFFFFFFF, uuid),
        uuid=uuid,
        mmp_block=struct.unpack_from("<Q", data, 0x168)[0] if incompat & _INCOMPAT_MMP else 0,
    )
    per_group = made.clusters_per_group
    if (
        made.blocks <= made.first_data
        or made.first_data > 1
        or not made.blocks_per_group >= 256
        or per_group * ratio != made.blocks_per_group
        or per_group % 8
        or not 8 <= per_group <= 8 * block
        or not 0 < made.inodes_per_group <= 8 * block
        or made.inode_size < 128
        or made.inode_size & (made.inode_size - 1)
        or made.inode_size > block
        or made.desc_size not in (32, 64, 128, 256, 512, 1024)
        or made.groups > _GROUPS_MAX
        or made.reserved_gdt > block // 4
    ):
        raise FormatError("the superblock's numbers contradict each other")
    if made.blocks * block > size:
        raise FormatError(f"the filesystem has {made.blocks * block} bytes, its partition {size}")
    return made


def raw_crc32c(seed: int, data: bytes | memoryview) -> int:
    """CRC32C without the final inversion, as ext4 chains it."""
    inverted: int = crc32c(data, ~seed & 0xFFFFFFFF)
    return ~inverted & 0xFFFFFFFF


async def map_ext(reader: RangeReader, kind: str, *, frozen: bool = False) -> UsedMap | Refusal:
    """Read the block bitmaps.

    Raises:
        FormatError: it is damaged.
    """
    data = await reader.read(SUPERBLOCK_AT, SUPERBLOCK_SIZE)
    found = parse_superblock(data, reader.size)
    if reason := await _why_not(reader, found):
        return Refusal(kind, reason)
    ranges = RangeSet(reader.size)
    ranges.add(0, KiB)  # the boot block
    groups = found.groups
    used_clusters = free_clusters = 0
    batch = max(1, min(_BITS_AT_ONCE // found.clusters_per_group, READ_MAX // found.desc_size))
    batch = -(-batch // found.descs_per_block) * found.descs_per_block
    bits_at_once = max(1, _BITS_AT_ONCE // found.clusters_per_group)
    for first in range(0, groups, batch):
        descs = await read_descs(reader, found, first, min(batch, groups - first))
        check_descs(found, descs, first)
        _add_metadata(found, descs, ranges)
        for at in range(0, len(descs), bits_at_once):
            used, free = await _add_bitmaps(reader, found, descs[at : at + bits_at_once], first + at, ranges)
            used_clusters += used
            free_clusters += free
    # The kernel writes the sum back when it unmounts or freezes; a mounted one may lag, the groups' own counts don't.
    if not frozen and free_clusters * found.ratio != found.free_blocks:
        return Refusal(kind, f"its bitmaps have {free_clusters} free clusters, the superblock says otherwise")
    end = found.blocks * found.block
    ranges.add(end, reader.size - end)
    starts, lengths = ranges.finish()
    return UsedMap(
        filesystem=kind,
        size=reader.size,
        starts=starts,
        lengths=lengths,
        unit=found.block,
        units_used=found.blocks - free_clusters * found.ratio,
        witness=await take_witness(reader, [(SUPERBLOCK_AT, SUPERBLOCK_SIZE)]),
    )


async def _why_not(reader: RangeReader, found: Superblock) -> str:
    """Why the bitmaps can't be trusted; empty where they can."""
    if found.incompat & INCOMPAT_JOURNAL_DEV:
        return "it is the journal of another filesystem"
    if found.incompat & INCOMPAT_RECOVER:
        return "it is not clean: its journal has to be replayed"
    if not found.state & VALID:
        return "it is not clean: it is mounted or was not unmounted"
    if found.state & ERROR:
        return "it is marked as damaged"
    if unknown := found.incompat & ~_INCOMPAT_KNOWN:
        return f"it uses features that are not known here (incompat {unknown:#x})"
    if unknown := found.ro_compat & ~_RO_KNOWN:
        return f"it uses features that are not known here (ro_compat {unknown:#x})"
    if found.incompat & _INCOMPAT_MMP:
        magic, sequence = struct.unpack("<II", await reader.read(found.mmp_block * found.block, 8))
        if magic != 0x004D4D50 or sequence != _MMP_CLEAN:
            return "it may be mounted on another machine (multiple mount protection)"
    return ""


async def read_descs(reader: RangeReader, found: Superblock, first: int, count: int) -> NDArray[np.uint8]:
    """`count` group descriptors from group `first`, a multiple of what a block holds; one row each."""
    blocks = -(-count // found.descs_per_block)
    offsets = [found.gdt_block(first // found.descs_per_block + index) * found.block for index in range(blocks)]
    made = np.zeros((blocks, found.block), np.uint8)
    async for index, data in read_each(reader, offsets, found.block):
        made[index] = np.frombuffer(data, np.uint8)
    rows = made[:, : found.descs_per_block * found.desc_size].reshape(-1, found.desc_size)
    return rows[:count]


def column(found: Superblock, descs: NDArray[np.uint8], low: int, high: int, kind: str) -> NDArray[np.int64]:
    """A field of every descriptor whose upper half is in the second 32 bytes."""
    width = np.dtype(kind).itemsize
    made = np.ascontiguousarray(descs[:, low : low + width]).view(kind)[:, 0].astype(np.int64)
    if found.desc_size >= 64:
        upper = np.ascontiguousarray(descs[:, high : high + width]).view(kind)[:, 0].astype(np.int64)
        made |= upper << (8 * width)
    return made


def check_descs(found: Superblock, descs: NDArray[np.uint8], first: int) -> None:
    """The checksums of descriptors, where there are any. Raises FormatError."""
    if found.has_checksums:
        plain = descs.copy()
        plain[:, 30:32] = 0
        stored = np.ascontiguousarray(descs[:, 30:32]).view("<u2")[:, 0].tolist()
        for index, want in enumerate(stored):
            seed = raw_crc32c(found.seed, struct.pack("<I", first + index))
            if raw_crc32c(seed, plain[index].tobytes()) & 0xFFFF != want:
                raise FormatError("the checksum of a group descriptor is wrong", group=first + index)
    elif found.ro_compat & _RO_GDT_CSUM:
        numbers = np.arange(first, first + len(descs), dtype="<u4").view(np.uint8).reshape(-1, 4)
        uuid = np.broadcast_to(np.frombuffer(found.uuid, np.uint8), (len(descs), 16))
        made = _crc16(np.concatenate((uuid, numbers, descs[:, :30], descs[:, 32:]), axis=1))
        wrong = np.flatnonzero(made != np.ascontiguousarray(descs[:, 30:32]).view("<u2")[:, 0])
        if len(wrong):
            raise FormatError("the checksum of a group descriptor is wrong", group=first + int(wrong[0]))


def _crc16_table() -> NDArray[np.uint16]:
    made = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = value >> 1 ^ (0xA001 if value & 1 else 0)
        made.append(value)
    return np.array(made, np.uint16)


_CRC16 = _crc16_table()


def _crc16(rows: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """CRC-16 (polynomial 0x8005, reflected, begins with ones) of every row."""
    value = np.full(len(rows), 0xFFFF, np.uint16)
    for column in rows.T:
        value = value >> 8 ^ _CRC16[(value ^ column) & 0xFF]
    return value


def _add_metadata(found: Superblock, descs: NDArray[np.uint8], ranges: RangeSet) -> None:
    """Bitmaps and inode tables, which a group without a bitmap on disk has too. Raises FormatError."""
    for low, high, blocks in ((0, 32, 1), (4, 36, 1), (8, 40, found.itable_blocks)):
        places = column(found, descs, low, high, "<u4")
        if len(places) and (int(places.min()) < found.first_data or int(places.max()) + blocks > found.blocks):
            raise FormatError("a group descriptor points outside of the filesystem")
        ranges.add_many(places * found.block, (places + blocks) * found.block)


async def _add_bitmaps(
    reader: RangeReader, found: Superblock, descs: NDArray[np.uint8], first: int, ranges: RangeSet
) -> tuple[int, int]:
    """Add the used clusters of neighbouring groups; (used, free) clusters. Raises FormatError."""
    per_group, ratio = found.clusters_per_group, found.ratio
    flags = column(found, descs, 18, 18, "<u2") & 0xFFFF
    uninit = (flags & _BLOCK_UNINIT != 0) if found.has_uninit else np.zeros(len(descs), bool)
    places = column(found, descs, 0, 32, "<u4")
    rows = np.zeros((len(descs), per_group // 8), np.uint8)
    real = np.flatnonzero(~uninit)
    offsets: list[int] = (places[real] * found.block).tolist()
    stored = column(found, descs, 24, 56, "<u2")
    mask = 0xFFFFFFFF if found.desc_size >= 64 else 0xFFFF
    async for index, data in read_each(reader, offsets, found.block):
        group = int(real[index])
        bitmap = data[: per_group // 8]
        if found.has_checksums and raw_crc32c(found.seed, bytes(bitmap)) & mask != int(stored[group]) & mask:
            raise FormatError("the checksum of a block bitmap is wrong", group=first + group)
        rows[group] = np.frombuffer(bitmap, np.uint8)
    bits = np.unpackbits(rows, axis=1, bitorder="little")
    for group in np.flatnonzero(uninit).tolist():
        _synthesise(found, descs[group : group + 1], first + group, bits[group])
    clusters = -(-(found.blocks - found.first_data) // ratio)
    last = clusters - first * per_group
    flat = bits.reshape(-1)
    if last < len(flat):
        flat[last:] = 1  # bits behind the end are padding
    used_in_group = bits.sum(axis=1, dtype=np.int64)
    free_in_group = per_group - used_in_group
    said = column(found, descs, 12, 44, "<u2")
    wrong = np.flatnonzero(free_in_group != said)
    if len(wrong):
        group = int(wrong[0])
        raise FormatError(
            "a group's count of free clusters is not what its bitmap says",
            group=first + group,
            counted=int(free_in_group[group]),
            said=int(said[group]),
        )
    starts, stops = set_runs(flat)
    origin = found.first_data * found.block
    unit = ratio * found.block
    base = first * per_group
    end = found.blocks * found.block
    ranges.add_many((starts + base) * unit + origin, np.minimum((stops + base) * unit + origin, end))
    free = int(free_in_group.sum())
    return min(len(flat), last) - free, free


def _synthesise(found: Superblock, desc: NDArray[np.uint8], group: int, bits: NDArray[np.uint8]) -> None:
    """The bitmap of a group that has none on disk: its own metadata and nothing else."""
    first = found.first_data + group * found.blocks_per_group
    stop = first + found.blocks_per_group
    spans = [(first, found.base_blocks(group))]
    for low, high, blocks in ((0, 32, 1), (4, 36, 1), (8, 40, found.itable_blocks)):
        spans.append((int(column(found, desc, low, high, "<u4")[0]), blocks))
    for place, blocks in spans:
        begin, end = max(place, first), min(place + blocks, stop)
        if begin < end:
            bits[(begin - first) // found.ratio : -(-(end - first) // found.ratio)] = 1
