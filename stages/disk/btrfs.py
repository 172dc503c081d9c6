"""The used blocks of btrfs: the extent tree says what is used, the chunk tree where that lies on this device.

Tree blocks are read breadth first, each level in few large reads. A tree block is believed when its checksum, address,
level and filesystem are right, and a level names each block once, so there are no loops.

Source: Btrfs developer documentation, "On-disk Format" (superblock, header, chunk, extent and root items).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import xxhash
from numpy.typing import NDArray

from pipeline.errors import FormatError
from pipeline.flow.items import RangeReader
from pipeline.units import GiB, KiB, MiB
from stages.disk.checksums import crc32c
from stages.disk.reading import read_each
from stages.disk.usage import Numbers, RangeSet, Refusal, UsedMap, take_witness

SUPERBLOCK_AT = 64 * KiB
SUPERBLOCK_SIZE = 4 * KiB
_MIRRORS = (64 * KiB, 64 * MiB, 256 * GiB)
# The first MiB belongs to no chunk; boot loaders use it.
_RESERVED = MiB

HEADER = 101
_ITEMS = np.dtype(
    [("objectid", "<u8"), ("type", "u1"), ("offset", "<u8"), ("at", "<u4"), ("size", "<u4")]
)  # packed: 25 bytes
_POINTERS = np.dtype([("objectid", "<u8"), ("type", "u1"), ("offset", "<u8"), ("block", "<u8"), ("generation", "<u8")])
LEVELS_MAX = 8

ROOT_ITEM, _EXTENT_ITEM, _METADATA_ITEM, CHUNK_ITEM = 132, 168, 169, 228
_EXTENT_TREE = 2

ZONED, EXTENT_TREE_V2, RAID_STRIPE_TREE = 1 << 12, 1 << 13, 1 << 14
INCOMPAT_KNOWN = (1 << 12) - 1 | 1 << 16  # up to raid1c34, and simple quotas
_STRIPED = 1 << 3 | 1 << 6 | 1 << 7 | 1 << 8  # RAID0, 10, 5, 6

# Tree blocks of a level at most: 4 million of 16 KiB are 64 GiB of metadata. It bounds what a hostile tree costs.
_BLOCKS_MAX = 1 << 22
_CHUNKS_MAX = 1 << 18


@dataclass(frozen=True, slots=True, kw_only=True)
class Superblock:
    """What mapping needs of a superblock that was checked."""

    root: int
    chunk_root: int
    log_root: int
    used: int
    devices: int
    node: int
    incompat: int
    root_level: int
    chunk_root_level: int
    device_id: int
    device_size: int
    metadata_uuid: bytes
    checksum: Callable[[bytes | memoryview], bytes]
    system_chunks: bytes


def _crc(data: bytes | memoryview) -> bytes:
    return struct.pack("<I", crc32c(bytes(data)))


def _xxh64(data: bytes | memoryview) -> bytes:
    return xxhash.xxh64(data).digest()[::-1]


def _sha256(data: bytes | memoryview) -> bytes:
    return hashlib.sha256(data).digest()


def _blake2b(data: bytes | memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=32).digest()


_CHECKSUMS = {0: _crc, 1: _xxh64, 2: _sha256, 3: _blake2b}


def parse_superblock(data: bytes, size: int) -> Superblock:
    """Check the 4096 bytes at byte 65536. `size` is the partition's. Raises FormatError."""
    if data[64:72] != b"_BHRfS_M":
        raise FormatError("there is no btrfs superblock")
    checksum = _CHECKSUMS.get(struct.unpack_from("<H", data, 196)[0])
    if checksum is None:
        raise FormatError("its checksums are of an unknown kind")
    made = checksum(data[32:SUPERBLOCK_SIZE])
    if data[: len(made)] != made:
        raise FormatError("the checksum of the superblock is wrong")
    root, chunk_root, log_root = struct.unpack_from("<QQQ", data, 80)
    used, _root_dir, devices, sector, node = struct.unpack_from("<QQQII", data, 120)
    array = struct.unpack_from("<I", data, 160)[0]
    incompat = struct.unpack_from("<Q", data, 188)[0]
    device_id, device_size = struct.unpack_from("<QQ", data, 201)
    if not 4 * KiB <= node <= 64 * KiB or node & (node - 1) or sector & (sector - 1) or array > 2048:
        raise FormatError("the superblock's numbers contradict each other")
    if device_size > size:
        raise FormatError(f"the filesystem has {device_size} bytes, its partition {size}")
    return Superblock(
        root=root,
        chunk_root=chunk_root,
        log_root=log_root,
        used=used,
        devices=devices,
        node=node,
        incompat=incompat,
        root_level=data[198],
        chunk_root_level=data[199],
        device_id=device_id,
        device_size=device_size,
        metadata_uuid=data[571:587] if incompat & 1 << 10 else data[32:48],
        checksum=checksum,
        system_chunks=data[811 : 811 + array],
    )


class Chunks:
    """Where logical addresses lie on this device. Filled while the chunk tree is read."""

    def __init__(self, found: Superblock) -> None:
        self._device = found.device_id
        self._size = found.device_size
        self._known: dict[int, tuple[int, list[int], bool]] = {}
        self._frozen: tuple[Numbers, Numbers, Numbers, NDArray[np.bool_]] | None = None

    def add(self, logical: int, item: bytes | memoryview) -> int:
        """Add a chunk item; returns its length in bytes. Raises FormatError."""
        if len(item) < 48:
            raise FormatError("a chunk item is cut off")
        length, _owner, _stripe, kind = struct.unpack_from("<QQQQ", item, 0)
        stripes = struct.unpack_from("<H", item, 44)[0]
        if len(item) < 48 + 32 * stripes or not stripes:
            raise FormatError("a chunk item is cut off")
        if not 0 < length <= 1 << 50 or logical + length > 1 << 62:
            raise FormatError("a chunk has an absurd size", logical=logical, length=length)
        mine = []
        for index in range(stripes):
            device, offset = struct.unpack_from("<QQ", item, 48 + 32 * index)
            if device == self._device:
                if not kind & _STRIPED and offset + length > self._size:
                    raise FormatError("a chunk lies outside of the device", logical=logical)
                mine.append(offset)
        if len(self._known) >= _CHUNKS_MAX:
            raise FormatError("there are absurdly many chunks")
        self._known[logical] = (length, mine, bool(kind & _STRIPED))
        self._frozen = None
        return 48 + 32 * int(stripes)

    @property
    def is_striped(self) -> bool:
        """Whether any chunk is spread over devices in stripes."""
        return any(striped for _, _, striped in self._known.values())

    def check(self) -> None:
        """Raise FormatError where chunks overlap, logically or on the device."""
        self._arrays()
        physical = sorted(
            (place, length) for length, mine, striped in self._known.values() if not striped for place in mine
        )
        for (place, length), (following, _) in pairwise(physical):
            if place + length > following:
                raise FormatError("two chunks share bytes of the device", offset=following)

    def physical(self, logical: int, length: int) -> int:
        """The first place on this device of a stretch. Raises FormatError."""
        for starts, stops in self.spans(np.array([logical], np.int64), np.array([length], np.int64)):
            if len(starts) and stops[0] - starts[0] == length:
                return int(starts[0])
        raise FormatError("a tree block is not on this device", logical=logical)

    def spans(self, logical: Numbers, length: Numbers) -> list[tuple[Numbers, Numbers]]:
        """(starts, stops) on this device of stretches, once for every copy. Raises FormatError where none has one."""
        begins, sizes, places, striped = self._arrays()
        index = np.searchsorted(begins, logical, side="right") - 1
        if not len(begins) or bool((index < 0).any()):
            raise FormatError("an extent is in no chunk")
        inside = logical - begins[index]
        if bool((inside + length > sizes[index]).any()) or bool((length < 0).any()) or bool(striped[index].any()):
            raise FormatError("an extent is in no chunk")
        made = []
        for copy in range(places.shape[1]):
            base = places[index, copy]
            here = base >= 0
            starts = (base + inside)[here]
            made.append((starts, starts + length[here]))
        return made

    def _arrays(self) -> tuple[Numbers, Numbers, Numbers, NDArray[np.bool_]]:
        if self._frozen is None:
            ordered = sorted(self._known.items())
            copies = max((len(mine) for _, (_, mine, _) in ordered), default=0)
            begins = np.array([logical for logical, _ in ordered], np.int64)
            sizes = np.array([length for _, (length, _, _) in ordered], np.int64)
            if np.any(begins[:-1] + sizes[:-1] > begins[1:]):
                raise FormatError("two chunks overlap")
            places = np.full((len(ordered), copies), -1, np.int64)
            for row, (_, (_, mine, _)) in enumerate(ordered):
                places[row, : len(mine)] = mine
            striped = np.array([spread for _, (_, _, spread) in ordered], bool)
            self._frozen = begins, sizes, places, striped
        return self._frozen


async def map_btrfs(reader: RangeReader, kind: str, *, frozen: bool = False) -> UsedMap | Refusal:
    """Read the chunk, root and extent trees.

    Raises:
        FormatError: it is damaged.
    """
    data = await reader.read(SUPERBLOCK_AT, SUPERBLOCK_SIZE)
    found = parse_superblock(data, reader.size)
    if reason := _why_not(found):
        return Refusal(kind, reason)
    chunks = Chunks(found)
    add_system_chunks(found, chunks)
    async for body, items in leaves(reader, found, chunks, found.chunk_root, found.chunk_root_level):
        for item in items[items["type"] == CHUNK_ITEM]:
            chunks.add(int(item["offset"]), payload_of(body, item))
    chunks.check()
    if chunks.is_striped:
        return Refusal(kind, "it is striped over several devices (RAID0, 10, 5 or 6)")
    root, level = await _find_extent_root(reader, found, chunks)
    ranges = RangeSet(reader.size)
    ranges.add(0, _RESERVED)
    for mirror in _MIRRORS:
        if mirror + SUPERBLOCK_SIZE <= found.device_size:
            ranges.add(mirror, SUPERBLOCK_SIZE)
    used = 0
    position = 0
    async for _, items in leaves(reader, found, chunks, root, level):
        wanted = items[(items["type"] == _EXTENT_ITEM) | (items["type"] == _METADATA_ITEM)]
        if not len(wanted):
            continue
        if int(wanted["objectid"].max()) >= 1 << 62 or int(wanted["offset"].max()) > 1 << 62:
            raise FormatError("an extent has an absurd address")
        starts = wanted["objectid"].astype(np.int64)
        lengths = np.where(wanted["type"] == _METADATA_ITEM, found.node, wanted["offset"].astype(np.int64))
        if starts[0] < position or bool((starts[1:] < starts[:-1] + lengths[:-1]).any()):
            raise FormatError("extents overlap or are out of order")
        position = int(starts[-1] + lengths[-1])
        used += int(lengths.sum())
        for begins, ends in chunks.spans(starts, lengths):
            ranges.add_many(begins, ends)
    if used != found.used:
        return Refusal(kind, f"its extents have {used} bytes, the superblock says {found.used}")
    ranges.add(found.device_size, reader.size - found.device_size)
    made, sizes = ranges.finish()
    return UsedMap(
        filesystem=kind,
        size=reader.size,
        starts=made,
        lengths=sizes,
        unit=4 * KiB,
        units_used=used // (4 * KiB),
        witness=await take_witness(reader, [(SUPERBLOCK_AT, SUPERBLOCK_SIZE)]),
    )


def _why_not(found: Superblock) -> str:
    """Why the extent tree can't be trusted; empty where it can."""
    if found.log_root:
        return "it is not clean: its log has to be replayed"
    if found.incompat & ZONED:
        return "it is zoned"
    if found.incompat & EXTENT_TREE_V2:
        return "it has an extent tree of version 2"
    if found.incompat & RAID_STRIPE_TREE:
        return "it has a stripe tree"
    if unknown := found.incompat & ~INCOMPAT_KNOWN:
        return f"it uses features that are not known here (incompat {unknown:#x})"
    return ""


def add_system_chunks(found: Superblock, chunks: Chunks) -> None:
    """Add the chunks that the superblock itself lists: without them the chunk tree could not be found.

    Source: btrfs on-disk format, "Superblock", sys_chunk_array: a key of 17 bytes and a chunk item, one after another.
    Raises:
        FormatError: the list is no such list.
    """
    array = found.system_chunks
    at = 0
    while at + 17 <= len(array):
        objectid, kind, logical = struct.unpack_from("<QBQ", array, at)
        if kind != CHUNK_ITEM or objectid != 256:
            raise FormatError("the superblock's list of chunks makes no sense")
        at += 17 + chunks.add(logical, array[at + 17 :])


async def _find_extent_root(reader: RangeReader, found: Superblock, chunks: Chunks) -> tuple[int, int]:
    """(logical address, level) of the extent tree's root. Raises FormatError."""
    async for body, items in leaves(reader, found, chunks, found.root, found.root_level):
        for item in items[(items["type"] == ROOT_ITEM) & (items["objectid"] == _EXTENT_TREE)]:
            payload = payload_of(body, item)
            if len(payload) < 239:
                raise FormatError("a root item is cut off")
            return int(struct.unpack_from("<Q", payload, 176)[0]), payload[238]
    raise FormatError("it has no extent tree")


def payload_of(body: memoryview, item: np.void) -> memoryview:
    """The bytes of an item of a leaf; a view of `body`, the whole leaf. Raises FormatError where it lies outside."""
    start = HEADER + int(item["at"])
    if start + int(item["size"]) > len(body):
        raise FormatError("an item lies outside of its leaf")
    return body[start : start + int(item["size"])]


async def leaves(
    reader: RangeReader, found: Superblock, chunks: Chunks, root: int, level: int
) -> AsyncIterator[tuple[memoryview, NDArray[np.void]]]:
    """(block, its items) of every leaf of a tree, ascending. Raises FormatError."""
    if level >= LEVELS_MAX:
        raise FormatError("a tree is absurdly high", level=level)
    nodes = np.array([root], np.uint64)
    for height in range(level, 0, -1):
        below = []
        total = 0
        async for body, count in _blocks(reader, found, chunks, nodes, height):
            if HEADER + count * _POINTERS.itemsize > found.node or not count:
                raise FormatError("a tree block is overfull or empty")
            below.append(np.frombuffer(body, _POINTERS, count, HEADER)["block"].copy())
            total += count
            if total > _BLOCKS_MAX:
                raise FormatError("there are absurdly many tree blocks")
        nodes = np.concatenate(below)
        if len(np.unique(nodes)) != len(nodes):
            raise FormatError("a tree has a loop")
    async for body, count in _blocks(reader, found, chunks, nodes, 0):
        if HEADER + count * _ITEMS.itemsize > found.node:
            raise FormatError("a leaf is overfull")
        yield body, np.frombuffer(body, _ITEMS, count, HEADER)


# Tree blocks looked up and held at once, so that neighbours on the device are read together.
_AT_ONCE = 256


async def _blocks(
    reader: RangeReader, found: Superblock, chunks: Chunks, nodes: NDArray[np.uint64], level: int
) -> AsyncIterator[tuple[memoryview, int]]:
    """(block, number of items) of tree blocks, in the order of `nodes`. Raises FormatError."""
    for at in range(0, len(nodes), _AT_ONCE):
        batch: list[int] = nodes[at : at + _AT_ONCE].tolist()
        if max(batch) >= 1 << 62:
            raise FormatError("a tree points nowhere")
        places = [chunks.physical(node, found.node) for node in batch]
        bodies: dict[int, memoryview] = {}
        async for index, data in read_each(reader, places, found.node):
            body = memoryview(bytes(data))
            made = found.checksum(body[32:])
            if body[: len(made)] != made:
                raise FormatError("the checksum of a tree block is wrong", logical=batch[index])
            logical = struct.unpack_from("<Q", body, 48)[0]
            if logical != batch[index] or body[100] != level or body[32:48] != found.metadata_uuid:
                raise FormatError("a tree block is not the one that it should be", logical=batch[index])
            bodies[index] = body
        for index in range(len(batch)):
            yield bodies[index], int(struct.unpack_from("<I", bodies[index], 96)[0])
