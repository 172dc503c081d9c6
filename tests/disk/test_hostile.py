"""Metadata that real tools made and that was then changed: always an answer, soon, and with little memory."""

from __future__ import annotations

import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from awscrt.checksums import crc32c
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.units import KiB, MiB
from stages.disk.filesystems import map_filesystem
from stages.disk.lvm import _crc
from stages.disk.mapping import map_disk
from stages.disk.usage import Refusal, UsedMap
from tests.disk.making import blank, need, run
from tests.disk.memory import Memory

NODE = 16 * KiB


def _ext4(path: Path) -> None:
    run("mke2fs", "-q", "-F", "-t", "ext4", "-O", "^metadata_csum,^uninit_bg", path)


def _ext4_meta_bg(path: Path) -> None:
    run("mke2fs", "-q", "-F", "-t", "ext4", "-b", "1024", "-O", "^metadata_csum,uninit_bg,meta_bg,^resize_inode", path)


def _xfs(path: Path) -> None:
    run("mkfs.xfs", "-q", "-f", "-m", "crc=0", path)


def _btrfs(path: Path) -> None:
    run("mkfs.btrfs", "-q", "-f", path)


def _fat(path: Path) -> None:
    run("mkfs.fat", "-F", "32", path)


def _fat12(path: Path) -> None:
    run("mkfs.fat", "-F", "12", "-s", "128", path)


TEXT = """vg { id = "x" seqno = 1 status = ["READ"] extent_size = 8192
physical_volumes { pv0 { id = "AAAAAA-AAAA-AAAA-AAAA-AAAA-AAAA-AAAAAA" status = [] pe_start = 2048 pe_count = 70 } }
logical_volumes { root { status = ["READ", "VISIBLE"]
segment1 { start_extent = 0 extent_count = 8 type = "striped" stripe_count = 1 stripes = ["pv0", 3] }
segment2 { start_extent = 8 extent_count = 8 type = "striped" stripe_count = 2 stripe_size = 128
stripes = ["pv0", 20, "pv0", 30] } } } }
"""


def _lvm(path: Path) -> None:
    """A label and one metadata area as LVM2 writes them, with a text of our own."""
    text = TEXT.encode()
    label = bytearray(512)
    label[:32] = struct.pack("<8sQII8s", b"LABELONE", 1, 0, 32, b"LVM2 001")
    label[32:64] = b"A" * 32
    struct.pack_into("<QQQQQQQ", label, 64, 300 * MiB, MiB, 0, 0, 0, 4096, 1044480)
    struct.pack_into("<I", label, 16, _crc(bytes(label[20:])))
    header = bytearray(512)
    struct.pack_into("<16sIQQ", header, 4, b" LVM2 x[5A%r0N*>", 1, 4096, 1044480)
    struct.pack_into("<QQII", header, 40, 512, len(text), _crc(text), 0)
    struct.pack_into("<I", header, 0, _crc(bytes(header[4:])))
    with path.open("r+b") as file:
        file.seek(512)
        file.write(label)
        file.seek(4096)
        file.write(header + text)


MAKERS: dict[str, tuple[Callable[[Path], None], str, int]] = {
    "ext4": (_ext4, "mke2fs", 300 * MiB),
    "ext4 with meta_bg": (_ext4_meta_bg, "mke2fs", 100 * MiB),
    "xfs": (_xfs, "mkfs.xfs", 310 * MiB),
    "btrfs": (_btrfs, "mkfs.btrfs", 300 * MiB),
    "fat32": (_fat, "mkfs.fat", 300 * MiB),
    "fat12": (_fat12, "mkfs.fat", 64 * MiB),
    "lvm2": (_lvm, "true", 300 * MiB),
}


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Memory]:
    """Filesystems by name, each made once."""
    made: dict[str, Memory] = {}

    def get(name: str) -> Memory:
        if name not in made:
            maker, program, size = MAKERS[name]
            need(program)
            image = blank(tmp_path_factory.mktemp("hostile") / "image", size)
            maker(image)
            made[name] = Memory.of(image)
            image.unlink()
        return made[name].clone()

    return get


def _sound_again(name: str, disk: Memory, offset: int) -> None:
    """Make the checksums right that cover a changed byte, so that what lies behind them is tested too."""
    if name == "btrfs":
        if 64 * KiB <= offset < 68 * KiB:
            disk.write(64 * KiB, struct.pack("<I", crc32c(disk.peek(64 * KiB + 32, 4096 - 32))))
        elif offset >= MiB:
            node = offset // NODE * NODE
            disk.write(node, struct.pack("<I", crc32c(disk.peek(node + 32, NODE - 32))))
    elif name == "lvm2":
        disk.write(512 + 16, struct.pack("<I", _crc(disk.peek(512 + 20, 492))))
        length = struct.unpack("<Q", disk.peek(4096 + 48, 8))[0]
        if length < MiB:
            disk.write(4096 + 56, struct.pack("<I", _crc(disk.peek(4096 + 512, length))))
        disk.write(4096, struct.pack("<I", _crc(disk.peek(4096 + 4, 508))))


VALUES = (
    0,
    1,
    2,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    1 << 40,
    (1 << 63) - 1,
    (1 << 64) - 1,
)


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
async def test_any_change_of_metadata_gives_a_map_or_a_reason(
    name: str, disks: Callable[[str], Memory], data: st.DataObject
) -> None:
    disk = disks(name)
    blocks = disk.filled()
    for _ in range(data.draw(st.integers(1, 3))):
        block = data.draw(st.sampled_from(blocks[:6] if data.draw(st.booleans()) else blocks))
        offset = block + data.draw(st.one_of(st.integers(0, 4095), st.integers(0, 300), st.integers(1024, 1400)))
        width = data.draw(st.sampled_from([1, 2, 4, 8]))
        value = data.draw(st.one_of(st.sampled_from(VALUES), st.integers(0, (1 << 64) - 1))) & ((1 << 8 * width) - 1)
        disk.write(offset, value.to_bytes(width, data.draw(st.sampled_from(["little", "big"]))))
        _sound_again(name, disk, offset)
    begun = time.process_time()
    made = await map_filesystem(disk, 0, disk.size)
    assert time.process_time() - begun < 5
    assert disk.bytes_read < 400 * MiB
    if isinstance(made, UsedMap):
        stops = made.starts + made.lengths
        assert bool((made.lengths > 0).all())
        assert bool((made.starts[1:] > stops[:-1]).all())
        assert made.starts[0] >= 0
        assert stops[-1] <= disk.size
    else:
        assert made.reason


@pytest.mark.parametrize("name", MAKERS)
async def test_unchanged_it_is_mapped(name: str, disks: Callable[[str], Memory]) -> None:
    """So that the changes above start from something that works."""
    made = await map_filesystem(disks(name), 0, disks(name).size)
    assert isinstance(made, UsedMap), made


async def _peak(disk: Memory) -> tuple[UsedMap | Refusal, int]:
    tracemalloc.start()
    try:
        made = await map_filesystem(disk, 0, disk.size)
        return made, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def _put(disk: Memory, offset: int, form: str, *values: int) -> None:
    disk.write(offset, struct.pack(form, *values))


async def test_an_ext4_of_absurdly_many_groups_takes_little_memory(disks: Callable[[str], Memory]) -> None:
    disk = disks("ext4")
    disk.size = 1 << 44
    _put(disk, 1024 + 4, "<I", 0xFFFFFFFF)
    _put(disk, 1024 + 32, "<II", 256, 256)
    made, peak = await _peak(disk)
    assert isinstance(made, Refusal)
    assert peak < 64 * MiB


async def test_a_b_tree_that_points_to_itself_is_refused(disks: Callable[[str], Memory]) -> None:
    """An XFS root that claims to be an inner node whose every child is the root."""
    disk = disks("xfs")
    root = struct.unpack(">I", disk.peek(512 + 16, 4))[0]
    _put(disk, 512 + 28, ">I", 3)
    most = (4096 - 16) // 12
    disk.write(root * 4096, struct.pack(">4sHH", b"ABTB", 2, most))
    disk.write(root * 4096 + 16 + most * 8, struct.pack(">I", root) * most)
    made, peak = await _peak(disk)
    assert isinstance(made, Refusal)
    assert "loop" in made.reason
    assert peak < 64 * MiB


async def test_a_tree_of_btrfs_that_points_to_itself_is_refused(disks: Callable[[str], Memory]) -> None:
    disk = disks("btrfs")
    chunk_root = struct.unpack("<Q", disk.peek(64 * KiB + 88, 8))[0]
    place = chunk_root  # mkfs lays the first system chunk where it is addressed
    block = bytearray(disk.peek(place, NODE))
    if block[48:56] != struct.pack("<Q", chunk_root):
        place = next(
            at
            for at in range(MiB, 64 * MiB, NODE)
            if disk.peek(at + 48, 8) == struct.pack("<Q", chunk_root) and disk.peek(at + 100, 1) == b"\0"
        )
        block = bytearray(disk.peek(place, NODE))
    block[100] = 1
    struct.pack_into("<I", block, 96, 400)
    for index in range(400):
        struct.pack_into("<QBQQQ", block, 101 + 33 * index, 256, 228, 0, chunk_root, 1)
    struct.pack_into("<I", block, 0, crc32c(bytes(block[32:])))
    disk.write(place, bytes(block))
    disk.write(64 * KiB + 199, b"\x01")
    _sound_again("btrfs", disk, 64 * KiB)
    made, peak = await _peak(disk)
    assert isinstance(made, Refusal)
    assert "loop" in made.reason or "not the one" in made.reason
    assert peak < 64 * MiB


async def test_a_filesystem_longer_than_its_partition_is_refused(disks: Callable[[str], Memory]) -> None:
    for name in ("ext4", "xfs", "btrfs", "fat32"):
        disk = disks(name)
        made = await map_filesystem(disk, 0, disk.size - 16 * MiB)
        assert isinstance(made, Refusal), name
        assert "its partition" in made.reason


async def test_thousands_of_partitions_over_each_other_are_not_looked_into() -> None:
    entries = bytearray(128 * 32768)
    for index in range(32768):
        struct.pack_into("<16s16sQQQ", entries, 128 * index, b"t" * 16, index.to_bytes(16, "little"), 9000, 100000, 0)
    size = 300 * MiB
    head = bytearray(
        struct.pack("<8sIIIIQQQQ16sQ", b"EFI PART", 65536, 92, 0, 0, 1, size // 512 - 1, 8300, 600000, b"d" * 16, 2)
    )
    head += struct.pack("<III", 32768, 128, zlib.crc32(entries))
    struct.pack_into("<I", head, 16, zlib.crc32(head))
    mbr = bytearray(512)
    struct.pack_into("<B3xB3xII", mbr, 446, 0, 0xEE, 1, size // 512 - 1)
    mbr[510:] = b"\x55\xaa"
    disk = Memory(size, {0: bytes(mbr), 512: bytes(head), 1024: bytes(entries)})
    begun = time.process_time()
    made = await map_disk(disk, size)
    assert time.process_time() - begun < 5
    assert disk.bytes_read < 20 * MiB
    assert made.used_bytes == size
