"""LVM2 physical volumes that the real tools made without a device mapper; the test itself assembles the volumes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from pipeline.units import KiB, MiB
from stages.disk.filesystems import map_physical_volumes
from stages.disk.lvm import parse_text
from stages.disk.usage import Refusal, UsedMap
from stages.store.file import open_file_reader
from tests.disk.making import blank, copy_used, fill, hashes, map_of, mounted, need, needs_root, run

EXTENT = 4 * MiB
PE_START = MiB


@contextmanager
def attached(*images: Path) -> Iterator[list[str]]:
    """Loop devices of images, detached when the block ends."""
    with ExitStack() as stack:
        devices = []
        for image in images:
            device = run("losetup", "-f", "--show", image).strip()
            stack.callback(run, "losetup", "-d", device)
            devices.append(device)
        yield devices


def lvm(devices: list[str], *command: str) -> None:
    program, *rest = command
    run(program, "-q", "--driverloaded", "n", "--nohints", "--devices", ",".join(devices), *rest)


def transfer(source: Path, target: Path, moves: list[tuple[int, int]], length: int) -> None:
    """Copy `length` bytes from each first offset to each second one; zeros stay holes."""
    step = 64 * KiB
    with source.open("rb") as reading, target.open("r+b") as writing:
        for begin, end in moves:
            reading.seek(begin)
            for inside in range(0, length, step):
                data = reading.read(min(step, length - inside))
                if data.count(0) != len(data):
                    writing.seek(end + inside)
                    writing.write(data)


def place(image: Path, extents: list[int], content: Path) -> None:
    """Write a volume's content to its extents."""
    moves = [(index * EXTENT, PE_START + extent * EXTENT) for index, extent in enumerate(extents)]
    transfer(content, image, moves, EXTENT)


def assemble(image: Path, extents: list[int], path: Path) -> Path:
    """A volume's content from its extents."""
    blank(path, len(extents) * EXTENT)
    moves = [(PE_START + extent * EXTENT, index * EXTENT) for index, extent in enumerate(extents)]
    transfer(image, path, moves, EXTENT)
    return path


@needs_root
async def test_a_copy_of_the_used_blocks_has_the_same_volumes(tmp_path: Path) -> None:
    """A volume in two segments with ext4, one with xfs, one with swap, one without anything known, and free extents."""
    need("lvcreate", "mke2fs", "mkfs.xfs", "mkswap")
    image = blank(tmp_path / "pv", 900 * MiB)
    with attached(image) as devices:
        lvm(devices, "pvcreate", "--metadatacopies", "2", *devices)
        lvm(devices, "vgcreate", "vgtest", *devices)
        for name, count in (("root", 10), ("swap", 4), ("data", 80), ("odd", 2)):
            lvm(devices, "lvcreate", "-an", "-Zn", "-Wn", "-n", name, "-l", str(count), "vgtest")
        lvm(devices, "lvextend", "-l", "+7", "vgtest/root")
    root = [*range(10), *range(96, 103)]
    data = list(range(14, 94))
    for extents, make in ((root, ("mke2fs", "-q", "-t", "ext4", "-F")), (data, ("mkfs.xfs", "-q", "-f"))):
        volume = blank(tmp_path / "volume", len(extents) * EXTENT)
        run(*make, volume)
        with mounted(volume) as folder:
            fill(folder)
        place(image, extents, volume)
    swap = blank(tmp_path / "swap", 4 * EXTENT)
    run("mkswap", swap)
    place(image, [10, 11, 12, 13], swap)
    with image.open("r+b") as file:
        file.seek(PE_START + 95 * EXTENT)
        file.write(b"something" * 1000)
        file.seek(PE_START + 120 * EXTENT)
        file.write(b"forgotten" * 1000)
    used = await map_of(image)
    assert isinstance(used, UsedMap), used
    assert [note.split(",")[0] for note in used.notes] == [
        "vgtest/root: ext4",
        "vgtest/swap: swap",
        "vgtest/data: xfs",
        "vgtest/odd: copied whole: what it holds is not known",
    ]
    copy = copy_used(image, used)
    with attached(copy) as devices:
        lvm(devices, "pvck", *devices)
        lvm(devices, "vgck", "vgtest")
    for extents, check in ((root, ("e2fsck", "-fn")), (data, ("xfs_repair", "-n"))):
        before = assemble(image, extents, tmp_path / "before")
        after = assemble(copy, extents, tmp_path / "after")
        run(*check, after)
        with mounted(before, "loop,ro") as folder:
            wanted = hashes(folder)
        with mounted(after, "loop,ro,nouuid" if check[0] == "xfs_repair" else "loop,ro") as folder:
            assert hashes(folder) == wanted
    assert b"something" in assemble(copy, [95], tmp_path / "odd").read_bytes()
    assert b"forgotten" not in assemble(copy, [120], tmp_path / "free").read_bytes()
    assert used.used_bytes < 200 * MiB


@needs_root
async def test_a_striped_volume_over_two_members_is_looked_into(tmp_path: Path) -> None:
    need("lvcreate", "mke2fs")
    images = [blank(tmp_path / f"pv{number}", 120 * MiB) for number in (1, 2)]
    with attached(*images) as devices:
        lvm(devices, "vgcreate", "vgstripes", *devices)
        lvm(devices, "lvcreate", "-an", "-Zn", "-Wn", "-n", "root", "-i", "2", "-I", "64k", "-l", "40", "vgstripes")
    volume = blank(tmp_path / "volume", 40 * EXTENT)
    run("mke2fs", "-q", "-t", "ext4", "-F", volume)
    with mounted(volume) as folder:
        fill(folder)
    chunk = 64 * KiB
    rows = range(40 * EXTENT // chunk // 2)
    for number, image in enumerate(images):
        moves = [((2 * row + number) * chunk, PE_START + row * chunk) for row in rows]
        transfer(volume, image, moves, chunk)
    async with open_file_reader(images[0]) as first, open_file_reader(images[1]) as second:
        maps = await map_physical_volumes([first, second])
        alone = await map_physical_volumes([first])
    copies = []
    for image, used in zip(images, maps, strict=True):
        assert isinstance(used, UsedMap), used
        assert "ext4" in used.notes[0]
        copies.append(copy_used(image, used))
    after = blank(tmp_path / "after", 40 * EXTENT)
    for number, copy in enumerate(copies):
        moves = [(PE_START + row * chunk, (2 * row + number) * chunk) for row in rows]
        transfer(copy, after, moves, chunk)
    run("e2fsck", "-fn", after)
    with mounted(volume, "loop,ro") as folder:
        wanted = hashes(folder)
    with mounted(after, "loop,ro") as folder:
        assert hashes(folder) == wanted
    assert isinstance(alone[0], UsedMap)
    assert "partly on another disk" in alone[0].notes[0]
    assert alone[0].used_bytes >= 20 * EXTENT


RAID = """logical_volumes {
    root { id = "AAAAAA-AAAA-AAAA-AAAA-AAAA-AAAA-AAAAA0" status = ["READ", "WRITE", "VISIBLE"] flags = []
        creation_time = 1 creation_host = "x" segment_count = 1
        segment1 { start_extent = 0 extent_count = 10 type = "raid1" device_count = 2 region_size = 1024
            raids = ["root_rmeta_0", "root_rimage_0", "root_rmeta_1", "root_rimage_1"] } }
    %s
}"""
PART = """%s { id = "AAAAAA-AAAA-AAAA-AAAA-AAAA-AAAA-AAAAA%d" status = ["READ", "WRITE"] flags = []
        creation_time = 1 creation_host = "x" segment_count = 1
        segment1 { start_extent = 0 extent_count = %d type = "striped" stripe_count = 1 stripes = ["pv%d", %d] } }"""


@needs_root
@pytest.mark.parametrize("kind", ["raid1", "snapshot"])
async def test_volumes_of_other_types_are_copied_whole(kind: str, tmp_path: Path) -> None:
    """Without a device mapper lvcreate makes no RAID, so its metadata is written by hand and restored by LVM."""
    need("lvcreate", "vgcfgrestore")
    images = [blank(tmp_path / f"pv{number}", 200 * MiB) for number in (1, 2)]
    plain = ["lvcreate", "-an", "-Zn", "-Wn"]
    with attached(*images) as devices:
        lvm(devices, "vgcreate", "vgother", *devices)
        if kind == "raid1":
            backup = tmp_path / "backup"
            lvm(devices, "vgcfgbackup", "-f", str(backup), "vgother")
            parts = [
                PART % (f"root_{what}_{leg}", 1 + 2 * leg + (count > 1), count, leg, first)
                for leg in (0, 1)
                for what, count, first in (("rmeta", 1, 0), ("rimage", 10, 1))
            ]
            text = backup.read_text().rstrip()
            assert text.endswith("}")
            at = text.rindex("}")
            backup.write_text(text[:at] + RAID % "\n".join(parts) + "\n}\n")
            lvm(devices, "vgcfgrestore", "-f", str(backup), "vgother")
        else:
            lvm(devices, *plain, "-n", "root", "-L", "40M", "vgother")
            lvm(devices, *plain, "-n", "cow", "-L", "8M", "vgother")
            lvm(devices, "lvconvert", "-y", "-Zn", "-s", "vgother/root", "vgother/cow")
    async with open_file_reader(images[0]) as first, open_file_reader(images[1]) as second:
        maps = await map_physical_volumes([first, second])
    total = 0
    for used in maps:
        assert isinstance(used, UsedMap), used
        assert all("copied whole" in note for note in used.notes), used.notes
        total += used.used_bytes
    assert total >= {"raid1": 88 * MiB, "snapshot": 48 * MiB}[kind]
    assert total < 120 * MiB


@needs_root
async def test_metadata_that_is_damaged_or_exported_is_copied_whole(tmp_path: Path) -> None:
    need("vgexport")
    image = blank(tmp_path / "pv", 100 * MiB)
    with attached(image) as devices:
        lvm(devices, "vgcreate", "vgout", *devices)
        lvm(devices, "vgexport", "vgout")
    refusal = await map_of(image)
    assert isinstance(refusal, Refusal)
    assert "exported" in refusal.reason
    damaged = tmp_path / "damaged"
    shutil.copyfile(image, damaged)
    with damaged.open("r+b") as file:
        file.seek(4096 + 512 + 100)
        file.write(b"?" * 4000)
    refusal = await map_of(damaged)
    assert isinstance(refusal, Refusal)
    assert "checksum" in refusal.reason


def test_metadata_text_is_read_with_comments_and_quotes() -> None:
    text = 'vg {\n# a comment\nid = "a\\"b"\nflags = []\nlist = ["pv0", 3]\ninner { x = 5 } } # end\n'
    assert parse_text(text) == {"vg": {"id": 'a"b', "flags": [], "list": ["pv0", 3], "inner": {"x": 5}}}
