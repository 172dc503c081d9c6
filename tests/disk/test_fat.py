"""FAT12, FAT16 and FAT32 that mkfs.fat made and mtools filled; and swap."""

from __future__ import annotations

import hashlib
import random
import re
import struct
from pathlib import Path

import pytest

from pipeline.flow.items import Why
from pipeline.units import GiB, KiB, MiB
from stages.disk import fat
from stages.disk.usage import Refusal, UsedMap
from tests.disk.making import blank, copy_used, map_of, need, partclone_blocks, run

FEATURES: dict[str, tuple[str, int]] = {
    "fat12": ("-F 12", 4 * MiB),
    "fat12 on a floppy": ("-F 12", 1440 * KiB),
    "fat16": ("-F 16", 64 * MiB),
    "fat16 with large clusters": ("-F 16 -s 64", 300 * MiB),
    "fat32": ("-F 32", 64 * MiB),
    "fat32 with clusters of 512 bytes": ("-F 32 -s 1", 64 * MiB),
    "fat32 with sectors of 4096 bytes": ("-F 32 -S 4096 -s 1", 300 * MiB),
    "fat32 with one FAT": ("-F 32 -f 1", 64 * MiB),
    "fat32 with an odd size": ("-F 32 -s 8", 300 * MiB + 3 * 512),
}


def make(path: Path, options: str, size: int) -> Path:
    run("mkfs.fat", *options.split(), blank(path, size))
    return path


def fill(image: Path, folder: Path) -> dict[str, str]:
    """Put files in and delete every third; SHA-256 by name of what is left."""
    dice = random.Random(7)
    left = {}
    room = image.stat().st_size // 40
    for number in range(24):
        data = folder / f"file{number}"
        data.write_bytes(dice.randbytes(dice.choice([1, 600, 5000, room])))
        run("mcopy", "-i", image, data, f"::file{number}")
        left[f"file{number}"] = hashlib.sha256(data.read_bytes()).hexdigest()
    for number in range(0, 24, 3):
        run("mdel", "-i", image, f"::file{number}")
        del left[f"file{number}"]
    run("mmd", "-i", image, "::folder")
    return left


@pytest.mark.parametrize("features", FEATURES)
async def test_a_copy_of_the_used_clusters_is_the_same_filesystem(features: str, tmp_path: Path) -> None:
    need("mkfs.fat", "fsck.fat", "mcopy")
    image = make(tmp_path / "image", *FEATURES[features])
    left = fill(image, tmp_path)
    used = await map_of(image)
    assert isinstance(used, UsedMap), used
    copy = copy_used(image, used)
    checked = re.search(r"(\d+)/\d+ clusters", run("fsck.fat", "-n", copy))
    assert checked is not None
    assert used.units_used == int(checked[1])
    for name, digest in left.items():
        out = tmp_path / "out"
        run("mcopy", "-n", "-o", "-i", copy, f"::{name}", out)
        assert hashlib.sha256(out.read_bytes()).hexdigest() == digest


@pytest.mark.parametrize("features", ["fat16", "fat32", "fat32 with clusters of 512 bytes"])
async def test_the_used_bytes_are_those_of_partclone(features: str, tmp_path: Path) -> None:
    """Not of FAT12, where partclone counts clusters as used that fsck.fat calls free."""
    need("mkfs.fat", "mcopy", "partclone.fat")
    image = make(tmp_path / "image", *FEATURES[features])
    fill(image, tmp_path)
    used = await map_of(image)
    assert isinstance(used, UsedMap), used
    assert used.used_bytes == partclone_blocks("fat", image) * 512


@pytest.mark.parametrize("kind, place", [("12", 37), ("16", 37), ("32", 65)])
async def test_a_fat_that_is_mounted_is_copied_whole(kind: str, place: int, tmp_path: Path) -> None:
    need("mkfs.fat")
    image = make(tmp_path / "image", f"-F {kind}", {"12": 4, "16": 64, "32": 64}[kind] * MiB)
    with image.open("r+b") as file:
        file.seek(place)
        file.write(b"\x01")
    refusal = await map_of(image)
    assert isinstance(refusal, Refusal)
    assert "not clean" in refusal.reason


async def test_a_fat_that_windows_left_dirty_is_copied_whole(tmp_path: Path) -> None:
    need("mkfs.fat")
    image = make(tmp_path / "image", "-F 32", 64 * MiB)
    with image.open("r+b") as file:
        file.seek(14)
        (reserved,) = struct.unpack("<H", file.read(2))
        file.seek(reserved * 512 + 4)
        file.write(struct.pack("<I", 0x07FFFFFF))
    refusal = await map_of(image)
    assert isinstance(refusal, Refusal)
    assert "not clean" in refusal.reason


async def test_fats_that_differ_are_copied_whole(tmp_path: Path) -> None:
    need("mkfs.fat")
    image = make(tmp_path / "image", "-F 32", 64 * MiB)
    with image.open("r+b") as file:
        file.seek(14)
        (reserved,) = struct.unpack("<H", file.read(2))
        file.seek(reserved * 512 + 400)
        file.write(b"\x07")
    refusal = await map_of(image)
    assert isinstance(refusal, Refusal)
    assert "differ" in refusal.reason


@pytest.mark.parametrize("page", [4096, 16384, 65536])
async def test_of_swap_only_the_header_is_copied(page: int, tmp_path: Path) -> None:
    need("mkswap")
    image = blank(tmp_path / "image", 16 * MiB)
    run("mkswap", "-p", str(page), "-L", "name", image)
    used = await map_of(image)
    assert isinstance(used, UsedMap), used
    assert list(used.ranges()) == [(0, page)]
    assert used.free is Why.SWAP
    assert "LABEL=name" in run("swaplabel", copy_used(image, used)).replace(":", "=").replace(" ", "")


async def test_a_hibernated_machine_is_copied_whole(tmp_path: Path) -> None:
    image = blank(tmp_path / "image", 16 * MiB)
    with image.open("r+b") as file:
        file.seek(4086)
        file.write(b"S1SUSPEND\0")
    refusal = await map_of(image)
    assert isinstance(refusal, Refusal)
    assert "hibernated" in refusal.reason


@pytest.mark.parametrize("features", ["fat12", "fat16", "fat32"])
async def test_a_fat_that_is_read_in_parts_gives_the_same_map(
    features: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need("mkfs.fat", "mcopy")
    image = make(tmp_path / "image", *FEATURES[features])
    fill(image, tmp_path)
    whole = await map_of(image)
    monkeypatch.setattr(fat, "_READ", 3 * 256)
    parts = await map_of(image)
    assert isinstance(whole, UsedMap)
    assert isinstance(parts, UsedMap)
    assert list(parts.ranges()) == list(whole.ranges())


async def test_a_large_empty_fat_is_mapped(tmp_path: Path) -> None:
    need("mkfs.fat")
    image = make(tmp_path / "image", "-F 32 -s 1", 4 * GiB)
    used = await map_of(image)
    assert isinstance(used, UsedMap), used
    run("fsck.fat", "-n", copy_used(image, used))
