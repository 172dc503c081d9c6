"""The map of whole disks: what is copied makes the same disk again."""

from __future__ import annotations

import random
import struct
from contextlib import ExitStack
from pathlib import Path

import pytest

from pipeline.flow.items import Content, Why, tiles
from pipeline.units import GiB, KiB, MiB
from stages.disk.mapping import DiskMap, map_disk
from stages.disk.signatures import Signature, identify
from stages.disk.usage import Refusal, UsedMap
from stages.store.file import open_file_reader
from tests.disk.making import blank, fill, hashes, mounted, need, needs_root, run
from tests.disk.memory import Memory


async def disk_map(image: Path) -> DiskMap:
    async with open_file_reader(image) as reader:
        return await map_disk(reader, reader.size)


def insert(image: Path, offset: int, content: Path) -> None:
    """Write a filesystem into its partition."""
    with image.open("r+b") as target, content.open("rb") as source:
        for begin in range(0, content.stat().st_size, MiB):
            data = source.read(MiB)
            if data.count(0) != len(data):
                target.seek(offset + begin)
                target.write(data)


def extract(image: Path, offset: int, length: int, path: Path) -> Path:
    """A partition as a file of its own."""
    blank(path, length)
    with image.open("rb") as source, path.open("r+b") as target:
        source.seek(offset)
        for begin in range(0, length, MiB):
            data = source.read(min(MiB, length - begin))
            if data.count(0) != len(data):
                target.seek(begin)
                target.write(data)
    return path


def copy_runs(image: Path, made: DiskMap) -> Path:
    """What an export of the map's runs stores."""
    copy = blank(image.with_suffix(".copy"), made.size)
    with image.open("rb") as source, copy.open("r+b") as target:
        for one in made.runs():
            if one.content is Content.DATA:
                source.seek(one.offset)
                target.seek(one.offset)
                target.write(source.read(one.length))
    return copy


@needs_root
async def test_a_whole_disk_is_mapped_and_copied(tmp_path: Path) -> None:
    """Boot code, an EFI partition, ext4, swap, something unknown, a gap that is empty and one that is not."""
    need("sgdisk", "mkfs.fat", "mke2fs", "mkswap", "e2fsck")
    image = blank(tmp_path / "disk", 400 * MiB)
    run(
        "sgdisk",
        *("-n", "1:1M:+40M", "-t", "1:ef00", "-n", "2:41M:+128M", "-n", "3:169M:+32M", "-t", "3:8200"),
        *("-n", "4:201M:+8M", "-n", "5:240M:+8M", image),
    )
    part = tmp_path / "part"
    run("mkfs.fat", "-F", "32", "-n", "EFI", blank(part, 40 * MiB))
    insert(image, MiB, part)
    run("mke2fs", "-q", "-t", "ext4", "-L", "root", "-F", blank(part, 128 * MiB))
    with mounted(part) as folder:
        fill(folder)
        wanted = hashes(folder)
    insert(image, 41 * MiB, part)
    run("mkswap", blank(part, 32 * MiB))
    insert(image, 169 * MiB, part)
    dice = random.Random(5)
    with image.open("r+b") as file:
        file.write(b"\xeb\x63boot")
        file.seek(170 * MiB)
        file.write(b"swapped out" * 1000)
        file.seek(201 * MiB + 5)
        file.write(dice.randbytes(100))
        file.seek(300 * MiB)
        file.write(b"in the middle of an empty gap")
        file.seek(209 * MiB + 100)
        file.write(b"at the begin of a gap")
    made = await disk_map(image)
    outcomes = {region.name: region.outcome for region in made.regions if region.outcome is not None}
    kinds = [outcome.filesystem for outcome in outcomes.values()]
    assert kinds == ["fat32", "ext4", "swap", "unknown", "unknown"]
    assert isinstance(outcomes["partition 4"], Refusal)
    reasons = dict(made.reasons())
    assert "what it holds is not known" in reasons["partition 4"]
    assert reasons[f"the gap at byte {209 * MiB}"] == "copied: no partition, but not empty"
    assert "empty at both ends" in reasons[f"the gap at byte {248 * MiB}"]
    runs = tuple(made.runs())
    assert tiles(runs, 0, made.size)
    assert sum(one.length for one in runs if one.content is Content.DATA) == made.used_bytes
    assert {one.why for one in runs if one.content is Content.ZERO} == {Why.FREE, Why.SWAP}
    assert sum(one.length for one in runs if one.why is Why.SWAP) == 32 * MiB - 4 * KiB
    copy = copy_runs(image, made)
    assert "No problems found" in run("sgdisk", "-v", copy)
    assert copy.open("rb").read(440) == image.open("rb").read(440)
    root = extract(copy, 41 * MiB, 128 * MiB, part)
    run("e2fsck", "-fn", root)
    with mounted(root, "loop,ro") as folder:
        assert hashes(folder) == wanted
    run("fsck.fat", "-n", extract(copy, MiB, 40 * MiB, part))
    for offset in (201 * MiB, 209 * MiB):
        assert (
            extract(copy, offset, 8 * MiB, part).read_bytes()
            == extract(image, offset, 8 * MiB, tmp_path / "other").read_bytes()
        )
    assert b"swapped out" not in extract(copy, 169 * MiB, 32 * MiB, part).read_bytes()
    again = await disk_map(image)
    assert again.digest() == made.digest()
    async with open_file_reader(image) as reader:
        assert await made.still_holds(reader)
        with image.open("r+b") as file:
            file.seek(41 * MiB + 1024 + 48)
            file.write(b"\x77")
        assert not await made.still_holds(reader)


@needs_root
async def test_physical_volumes_of_one_disk_are_mapped_together(tmp_path: Path) -> None:
    need("lvcreate", "sgdisk", "mke2fs")
    image = blank(tmp_path / "disk", 260 * MiB)
    run("sgdisk", "-n", "1:1M:+120M", "-n", "2:121M:+120M", image)
    volume = blank(tmp_path / "volume", 160 * MiB)
    run("mke2fs", "-q", "-t", "ext4", "-F", volume)
    with ExitStack() as stack:
        devices = []
        for offset in (MiB, 121 * MiB):
            device = run("losetup", "-f", "--show", "-o", str(offset), "--sizelimit", str(120 * MiB), image).strip()
            stack.callback(run, "losetup", "-d", device)
            devices.append(device)
        quiet = ("-q", "--driverloaded", "n", "--nohints", "--devices", ",".join(devices))
        run("vgcreate", *quiet, "vgboth", *devices)
        run("lvcreate", *quiet, "-an", "-Zn", "-Wn", "-n", "root", "-l", "40", "vgboth")
    first = extract(volume, 0, 116 * MiB, tmp_path / "first")
    insert(image, 2 * MiB, first)
    insert(image, 122 * MiB, extract(volume, 116 * MiB, 44 * MiB, tmp_path / "second"))
    made = await disk_map(image)
    notes = [region.outcome.notes for region in made.regions if isinstance(region.outcome, UsedMap)]
    assert [len(one) for one in notes] == [1, 1]
    assert all("vgboth/root: ext4" in one[0] for one in notes)
    assert made.used_bytes < 60 * MiB


async def test_a_filesystem_without_a_partition_table_is_mapped(tmp_path: Path) -> None:
    need("mke2fs")
    image = blank(tmp_path / "disk", 64 * MiB)
    run("mke2fs", "-q", "-t", "ext4", "-F", image)
    made = await disk_map(image)
    assert made.table.kind == "none"
    assert made.regions[0].name == "the disk"
    assert isinstance(made.regions[0].outcome, UsedMap)


async def test_a_disk_of_nothing_known_is_copied_whole() -> None:
    disk = Memory(10 * MiB, {5: b"what"})
    made = await map_disk(disk, disk.size)
    assert [(one.offset, one.length, one.content) for one in made.runs()] == [(0, 10 * MiB, Content.DATA)]


async def test_overlapping_partitions_and_gaps_of_a_damaged_table_are_copied_whole() -> None:
    record = bytearray(512)
    for slot, (start, count) in enumerate(((2048, 60000), (50000, 60000))):
        struct.pack_into("<B3xB3xII", record, 446 + 16 * slot, 0, 0x82, start, count)
    record[510:] = b"\x55\xaa"
    disk = Memory(400 * MiB, {0: bytes(record), 2048 * 512 + 4086: b"SWAPSPACE2"})
    made = await map_disk(disk, disk.size)
    assert made.used_bytes == disk.size
    assert dict(made.reasons())["partition 1"] == "copied whole: it overlaps another partition"


async def test_runs_can_begin_and_end_anywhere() -> None:
    record = bytearray(512)
    struct.pack_into("<B3xB3xII", record, 446, 0, 0x82, 2048, 200000)
    record[510:] = b"\x55\xaa"
    disk = Memory(400 * MiB, {0: bytes(record), 2048 * 512 + 4086: b"SWAPSPACE2"})
    made = await map_disk(disk, disk.size)
    whole = [(position, one.why) for one in made.runs() for position in range(one.offset, one.end, 512)]
    lookup = dict(whole)
    for start, stop in ((0, 512), (MiB, MiB + 512), (MiB + 4096, 300 * MiB), (399 * MiB, 400 * MiB), (512, 400 * MiB)):
        runs = tuple(made.runs(start, stop))
        assert tiles(runs, start, stop - start)
        assert all(one.why is lookup[one.offset] for one in runs)


MADE: dict[str, tuple[tuple[str, ...], Signature]] = {
    "ext4": (("mke2fs", "-q", "-F", "-t", "ext4", "-L", "name"), Signature(kind="ext4", label="name", state="clean")),
    "ext3": (("mke2fs", "-q", "-F", "-t", "ext3"), Signature(kind="ext3", state="clean")),
    "ext2": (("mke2fs", "-q", "-F", "-t", "ext2"), Signature(kind="ext2", state="clean")),
    "xfs": (("mkfs.xfs", "-q", "-L", "name"), Signature(kind="xfs", label="name")),
    "btrfs": (("mkfs.btrfs", "-q", "-L", "name"), Signature(kind="btrfs", label="name", state="clean")),
    "fat32": (("mkfs.fat", "-F", "32", "-n", "NAME"), Signature(kind="fat32", label="NAME", state="clean")),
    "exfat": (("mkfs.exfat",), Signature(kind="exfat", state="clean")),
    "ntfs": (("mkntfs", "-q", "-F", "-f"), Signature(kind="ntfs")),
    "swap": (("mkswap", "-L", "name"), Signature(kind="swap", label="name", state="clean")),
}


@pytest.mark.parametrize("kind", MADE)
async def test_what_the_tools_made_is_recognised(kind: str, tmp_path: Path) -> None:
    command, wanted = MADE[kind]
    need(command[0], "blkid")
    image = blank(tmp_path / "image", 320 * MiB)
    run(*command, image)
    async with open_file_reader(image) as reader:
        found = await identify(reader, 0, reader.size)
    assert (found.kind, found.label, found.state) == (wanted.kind, wanted.label, wanted.state)
    told = run("blkid", "-p", "-o", "value", "-s", "UUID", image).strip()
    assert found.uuid.lower() == told.lower()
    if found.size is not None:
        assert 300 * MiB < found.size <= 320 * MiB
    if found.used is not None and found.free is not None:
        assert 0 < found.used < found.free


async def test_two_filesystems_in_one_place_are_ambiguous(tmp_path: Path) -> None:
    need("mke2fs", "mkswap")
    image = blank(tmp_path / "image", 64 * MiB)
    run("mke2fs", "-q", "-t", "ext4", "-F", image)
    with image.open("r+b") as file:
        file.seek(4086)
        file.write(b"SWAPSPACE2")
    made = await disk_map(image)
    outcome = made.regions[0].outcome
    assert isinstance(outcome, Refusal)
    assert outcome.reason == "it bears the marks of ext4 and swap"


async def test_a_raid_member_is_recognised_by_its_end(tmp_path: Path) -> None:
    """A mirror of version 1.0 looks like its filesystem from the front."""
    need("mke2fs")
    image = blank(tmp_path / "image", 64 * MiB)
    run("mke2fs", "-q", "-t", "ext4", "-F", image)
    with image.open("r+b") as file:
        file.seek((64 * MiB // 512 - 16) * 512)
        file.write(struct.pack("<II", 0xA92B4EFC, 1).ljust(256, b"\0"))
    made = await disk_map(image)
    assert isinstance(made.regions[0].outcome, Refusal)


async def test_the_map_of_a_100_gib_disk_reads_little(tmp_path: Path) -> None:
    need("sgdisk", "mke2fs")
    image = blank(tmp_path / "disk", 100 * GiB)
    run("sgdisk", "-n", "1:1M:0", image)
    run("mke2fs", "-q", "-t", "ext4", "-F", "-E", f"offset={MiB}", image, str((100 * GiB - 2 * MiB) // KiB) + "k")
    async with open_file_reader(image) as reader:
        made = await map_disk(reader, reader.size)
    assert made.used_bytes < 3 * GiB
    assert isinstance(made.regions[1].outcome, UsedMap)
