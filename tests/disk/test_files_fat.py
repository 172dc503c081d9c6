"""Files of FAT, put there by mtools: this kernel may not mount it, so the tree that was copied is the truth."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from pipeline.errors import FormatError
from pipeline.units import KiB, MiB
from stages.disk.tree import Kind
from tests.disk.making import blank, need, run
from tests.disk.truth import opened, seen_by_us

SIZES = {
    "fat12": ("-F 12 -s 8", 8 * MiB),
    "fat12 with clusters of 512 bytes": ("-F 12 -s 1", 1 * MiB),
    "fat16": ("-F 16", 40 * MiB),
    "fat32": ("-F 32 -s 1", 40 * MiB),
    "fat32 with large clusters": ("-F 32 -s 16", 600 * MiB),
    "fat32 with sectors of 4 KiB": ("-F 32 -S 4096 -s 1", 300 * MiB),
    "fat16 with one FAT": ("-F 16 -f 1", 40 * MiB),
}

NAMES = [
    "BOOTX64.EFI",
    "grub.cfg",
    "Mixed Case.Txt",
    "späte.txt",
    "a" * 200 + ".long",
    "x.y.z",
    "13 characters",
    "no_ext",
]


@pytest.mark.parametrize("form", SIZES)
async def test_every_name_and_byte_is_what_was_copied(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need("mkfs.fat", "mcopy")
    monkeypatch.setenv("TZ", "UTC")
    monkeypatch.setenv("MTOOLS_SKIP_CHECK", "1")
    dice = random.Random(3)
    options, size = SIZES[form]
    tree = tmp_path / "tree"
    (tree / "EFI" / "BOOT").mkdir(parents=True)
    for number, name in enumerate(NAMES):
        path = tree / "EFI" / "BOOT" / name
        path.write_bytes(dice.randbytes(dice.choice([0, 1, 511, 512, 513, 5000, 40 * KiB])))
        os.utime(path, (10**9 + 1000 * number,) * 2)
    (tree / "many").mkdir()
    for number in range(120 if size <= 8 * MiB else 700):
        (tree / "many" / f"a long name, number {number}").write_bytes(b"")
    (tree / "large").write_bytes(dice.randbytes(300 * KiB if size < 8 * MiB else 3 * MiB))
    image = blank(tmp_path / "image", size)
    run("mkfs.fat", *options.split(), "-n", "A LABEL", image)
    # Fragments: what comes later fills the holes of what was deleted.
    (tmp_path / "piece").write_bytes(dice.randbytes(9 * KiB))
    for number in range(10):
        run("mcopy", "-i", image, tmp_path / "piece", f"::/piece{number}")
    for number in range(0, 10, 2):
        run("mdel", "-i", image, f"::/piece{number}")
    run("env", "LC_ALL=C.UTF-8", "mcopy", "-s", "-m", "-i", image, *sorted(tree.iterdir()), "::/")
    async with opened(image) as fat:
        ours = await seen_by_us(fat)
        assert {path for path in ours if path and not path.startswith("piece")} == {
            str(path.relative_to(tree)) for path in tree.rglob("*")
        }
        for path in tree.rglob("*"):
            seen = ours[str(path.relative_to(tree))]
            assert seen.mode == 0o755
            if path.is_file():
                inode = fat.root
                for name in str(path.relative_to(tree)).swapcase().split("/"):
                    inode = await fat.lookup(inode, name)
                assert await fat.read(inode, 0, 4 * MiB) == path.read_bytes(), "by a name in the other case"
                assert seen.size == path.stat().st_size
                if "EFI" in path.parts:
                    assert seen.modified_s == path.stat().st_mtime
            else:
                assert seen.kind is Kind.DIRECTORY
        assert (fat.kind, fat.label, fat.dirty) == ("vfat", "A LABEL", None)
        assert fat.uuid == run("blkid", "-p", "-o", "value", "-s", "UUID", image).strip()
        free = int(run("mdir", "-i", image, "::/").split("bytes free")[0].splitlines()[-1].replace(" ", ""))
        assert (await fat.space()).free == free


async def test_a_chain_that_loops_or_breaks_off_is_damage(tmp_path: Path) -> None:
    need("mkfs.fat", "mcopy")
    image = blank(tmp_path / "image", 20 * MiB)
    run("mkfs.fat", "-F", "16", "-s", "4", image)
    (tmp_path / "file").write_bytes(bytes(range(256)) * 100)
    run("mcopy", "-i", image, tmp_path / "file", "::/")
    data = bytearray(image.read_bytes())
    fat = 512 * int.from_bytes(data[14:16], "little")
    for entry, word in ((2, "loop"), (9999, "breaks off"), (0, "breaks off")):
        data[fat + 6 : fat + 8] = entry.to_bytes(2, "little")
        image.write_bytes(data)
        async with opened(image) as tree:
            inode = await tree.lookup(tree.root, "file")
            if word == "loop":
                assert len(await tree.read(inode, 0, 30000)) == 25600, "as long as the file says, no longer"
            else:
                with pytest.raises(FormatError, match=word):
                    await tree.read(inode, 0, 30000)
