"""XFS that mkfs.xfs made, versions 4 and 5."""

from __future__ import annotations

import shutil
import struct
import time
from pathlib import Path

import pytest

from pipeline.units import GiB, MiB
from stages.disk.usage import Refusal, UsedMap
from tests.disk.making import (
    blank,
    copy_used,
    fill,
    hashes,
    map_of,
    mounted,
    need,
    needs_root,
    partclone_blocks,
    run,
)

FEATURES: dict[str, tuple[str, int]] = {
    "version 5": ("", 310 * MiB),
    "blocks of 1 KiB": ("-b size=1024", 320 * MiB),
    "without rmapbt and reflink": ("-m rmapbt=0,reflink=0", 310 * MiB),
    "with rmapbt": ("-m rmapbt=1,reflink=1", 310 * MiB),
    "many groups": ("-d agcount=9", 600 * MiB),
    "a log stripe": ("-l su=256k,version=2", 400 * MiB),
    "sectors of 4096 bytes": ("-s size=4096", 400 * MiB),
    "a short last group": ("-d agsize=108m", 320 * MiB),
}


def make(path: Path, options: str, size: int) -> Path:
    run("mkfs.xfs", "-q", "-f", *options.split(), blank(path, size))
    return path


def agfl_blocks(image: Path) -> int:
    """Blocks in the free lists of all groups: free, but not in the b-trees."""
    groups = int(run("xfs_db", "-r", "-c", "sb 0", "-c", "print agcount", image).split("=")[1])
    count = 0
    for number in range(groups):
        count += int(run("xfs_db", "-r", "-c", f"agf {number}", "-c", "print flcount", image).split("=")[1])
    return count


@needs_root
@pytest.mark.parametrize("features", FEATURES)
async def test_a_copy_of_the_used_blocks_is_the_same_filesystem(features: str, tmp_path: Path) -> None:
    need("mkfs.xfs", "xfs_repair", "xfs_db")
    image = make(tmp_path / "image", *FEATURES[features])
    with mounted(image) as folder:
        fill(folder)
    used = await map_of(image)
    assert isinstance(used, UsedMap), used
    assert used.used_bytes == used.units_used * used.unit
    copy = copy_used(image, used)
    run("xfs_repair", "-n", copy)
    with mounted(image, "loop,ro") as before:
        wanted = hashes(before)
    with mounted(copy, "loop,ro,nouuid") as after:
        assert hashes(after) == wanted
    need("partclone.xfs")
    assert used.units_used == partclone_blocks("xfs", image) + agfl_blocks(image)


async def test_version_4_is_mapped(tmp_path: Path) -> None:
    """Kernels of today no longer mount it; mkfs fills it."""
    need("mkfs.xfs", "xfs_repair", "xfs_db", "partclone.xfs")
    data = tmp_path / "data"
    data.write_bytes(bytes(range(256)) * 8000)
    proto = tmp_path / "proto"
    proto.write_text(f"boot 0 0\nd--755 0 0\none ---644 0 0 {data}\ntwo ---644 0 0 {data}\n$\n")
    image = make(tmp_path / "image", f"-m crc=0 -p {proto}", 310 * MiB)
    used = await map_of(image)
    assert isinstance(used, UsedMap), used
    run("xfs_repair", "-n", copy_used(image, used))
    assert used.units_used == partclone_blocks("xfs", image) + agfl_blocks(image)


async def test_a_group_that_is_used_up_to_its_end_is_copied_up_to_its_end(tmp_path: Path) -> None:
    """The kernel rarely fills a group; so its last free extent is taken out of tree and count by hand."""
    need("mkfs.xfs")
    image = make(tmp_path / "image", "-m crc=0", 310 * MiB)
    before = await map_of(image)
    with image.open("r+b") as file:
        agf = bytearray(image.read_bytes()[512:1024])
        (root,), (free,) = struct.unpack_from(">I", agf, 16), struct.unpack_from(">I", agf, 52)
        file.seek(root * 4096)
        leaf = bytearray(file.read(4096))
        (records,) = struct.unpack_from(">H", leaf, 6)
        start, length = struct.unpack_from(">II", leaf, 16 + 8 * (records - 1))
        struct.pack_into(">H", leaf, 6, records - 1)
        struct.pack_into(">I", agf, 52, free - length)
        file.seek(root * 4096)
        file.write(leaf)
        file.seek(512)
        file.write(agf)
    used = await map_of(image)
    assert isinstance(before, UsedMap), before
    assert isinstance(used, UsedMap), used
    assert used.used_bytes == before.used_bytes + length * 4096
    assert any(offset <= start * 4096 and (start + length) * 4096 <= offset + size for offset, size in used.ranges())


@needs_root
async def test_fragmented_free_space_has_a_deep_tree_and_is_mapped(tmp_path: Path) -> None:
    need("mkfs.xfs", "xfs_repair", "xfs_db")
    image = make(tmp_path / "image", "-d agcount=2 -b size=1024", 320 * MiB)
    with mounted(image) as folder:
        big = folder / "big"
        big.write_bytes(bytes(30 * MiB))
        run("sync", "-f", folder)
        run(
            "xfs_io",
            *[word for number in range(0, 12 * 1024, 2) for word in ("-c", f"fpunch {number}k 1k")],
            big,
        )
    levels = int(run("xfs_db", "-r", "-c", "agf 0", "-c", "print bnolevel", image).split("=")[1])
    assert levels >= 2
    used = await map_of(image)
    assert isinstance(used, UsedMap), used
    run("xfs_repair", "-n", copy_used(image, used))


async def test_the_map_of_100_gib_takes_less_than_a_second(tmp_path: Path) -> None:
    need("mkfs.xfs")
    image = make(tmp_path / "image", "", 100 * GiB)
    begun = time.process_time()
    used = await map_of(image)
    assert time.process_time() - begun < 1
    assert isinstance(used, UsedMap)
    assert used.used_bytes < GiB


@needs_root
async def test_a_log_that_holds_changes_is_copied_whole_unless_frozen(tmp_path: Path) -> None:
    need("mkfs.xfs", "xfs_repair")
    image = make(tmp_path / "image", "", 310 * MiB)
    with mounted(image) as folder:
        (folder / "one").write_text("1")
        run("fsfreeze", "-f", folder)
        try:
            frozen = await map_of(image, frozen=True)
            live = await map_of(image)
            copy = tmp_path / "copy"
            shutil.copyfile(image, copy)
        finally:
            run("fsfreeze", "-u", folder)
    assert isinstance(frozen, UsedMap)
    assert isinstance(live, Refusal)
    assert "log" in live.reason


async def test_a_damaged_group_header_is_copied_whole(tmp_path: Path) -> None:
    need("mkfs.xfs")
    image = make(tmp_path / "image", "-m crc=0", 310 * MiB)
    with image.open("r+b") as file:
        file.seek(512 + 52)
        (free,) = struct.unpack(">I", file.read(4))
        file.seek(512 + 52)
        file.write(struct.pack(">I", free - 1))
    refusal = await map_of(image)
    assert isinstance(refusal, Refusal)
    assert "does not have as many blocks" in refusal.reason


async def test_a_realtime_device_is_copied_whole(tmp_path: Path) -> None:
    need("mkfs.xfs")
    image = make(tmp_path / "image", "-m crc=0", 310 * MiB)
    with image.open("r+b") as file:
        file.seek(16)
        file.write(struct.pack(">Q", 5))
    refusal = await map_of(image)
    assert isinstance(refusal, Refusal)
    assert "realtime" in refusal.reason
