"""Filesystems with files on them, changed at random: what is mapped is no worse in its copy."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.units import KiB, MiB
from stages.disk.usage import UsedMap
from tests.disk.making import blank, copy_used, fill, hashes, map_of, mounted, need, needs_root, run
from tests.disk.test_fat import fill as fill_fat
from tests.disk.test_hostile import VALUES

# Few checksums: a change should get past them more often than not.
MAKERS: dict[str, tuple[str, int, str]] = {
    "ext4": ("mke2fs -q -F -t ext4 -O ^metadata_csum,^uninit_bg", 64 * MiB, "e2fsck -fn"),
    "ext4 with checksums": ("mke2fs -q -F -t ext4", 64 * MiB, "e2fsck -fn"),
    "ext2 with blocks of 1 KiB": ("mke2fs -q -F -t ext2 -b 1024", 32 * MiB, "e2fsck -fn"),
    "ext4 with bigalloc": ("mke2fs -q -F -t ext4 -O bigalloc,^metadata_csum -C 65536", 96 * MiB, "e2fsck -fn"),
    "xfs": ("mkfs.xfs -q -f", 310 * MiB, "xfs_repair -n"),
    "btrfs": ("mkfs.btrfs -q -f", 120 * MiB, "btrfs check --check-data-csum"),
    "fat16": ("mkfs.fat -F 16", 48 * MiB, "fsck.fat -n"),
    "fat32": ("mkfs.fat -F 32 -s 1", 48 * MiB, "fsck.fat -n"),
}
CHANGED = 25


def _report(checker: str, image: Path) -> str:
    """What the checker says of an image, without its name.

    xfs_repair tells where in its own memory a check failed, and its threads do not always speak in one order.
    """
    said = run(*checker.split(), image, expect=tuple(range(256))).replace(str(image), "IMAGE")
    said = re.sub(r"\b(0x)?[0-9a-f]{12}\b", "ADDRESS", said)
    return "\n".join(sorted(said.splitlines())) if checker.startswith("xfs") else said


def _is_clean(report: str, checker: str, image: Path) -> bool:
    """Nothing to complain about, and nothing that is told and let pass."""
    if checker.startswith("fsck.fat"):
        return re.fullmatch(r"fsck\.fat [^\n]*\n[^\n]*clusters\n", report) is not None
    return subprocess.run([*checker.split(), image], capture_output=True, check=False).returncode == 0


def _places(image: Path, dice: random.Random) -> Callable[[], int]:
    """Where metadata is: the beginning, and blocks that hold mostly zeros and small numbers."""
    filled = []
    with image.open("rb") as file:
        size = image.stat().st_size
        for offset in range(0, size, 4 * KiB):
            block = file.read(4 * KiB)
            if any(block) and block.count(0) > 1000:
                filled.append(offset)
    return lambda: (
        dice.choice(filled[:4] if dice.random() < 0.5 else filled)
        + dice.choice([dice.randrange(4096), dice.randrange(512), 1024 + dice.randrange(300)])
    )


@pytest.mark.slow
@needs_root
@pytest.mark.parametrize("name", MAKERS)
async def test_what_is_mapped_and_clean_is_the_same_in_its_copy(name: str, tmp_path: Path) -> None:
    make, size, checker = MAKERS[name]
    need(make.split()[0], checker.split()[0], "mcopy")
    original = blank(tmp_path / "original", size)
    run(*make.split(), original)
    if "fat" in name:
        fill_fat(original, tmp_path)
    else:
        with mounted(original) as folder:
            fill(folder)
    dice = random.Random(name)
    place = _places(original, dice)
    seen = {"refused": 0, "unclean": 0, "compared": 0}
    image = tmp_path / "image"
    while seen["compared"] < CHANGED and sum(seen.values()) < 20 * CHANGED:
        run("cp", "--sparse=always", original, image)
        with image.open("r+b") as file:
            for _ in range(dice.randint(1, 2)):
                width = dice.choice([1, 2, 4, 8])
                value = dice.choice([dice.choice(VALUES), dice.getrandbits(64)]) & ((1 << 8 * width) - 1)
                file.seek(place())
                file.write(value.to_bytes(width, dice.choice(["little", "big"])))
        used = await map_of(image)
        if not isinstance(used, UsedMap):
            seen["refused"] += 1
            continue
        report = _report(checker, image)
        wanted = _content(name, image, tmp_path) if _is_clean(report, checker, image) else None
        copy = copy_used(image, used)
        assert _report(checker, copy) == report
        image.unlink()  # of two filesystems with one UUID the kernel mounts one
        if wanted is not None:
            assert _content(name, copy, tmp_path) == wanted
        seen["unclean" if wanted is None else "compared"] += 1
    assert seen["compared"] >= 5, seen


def _content(name: str, image: Path, folder: Path) -> dict[str, str] | None:
    """Hashes of all files; None where the kernel does not take what its checker does."""
    if "fat" in name:
        out = folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        run("mcopy", "-n", "-s", "-i", image, "::", out)
        return hashes(out)
    try:
        with mounted(image, "loop,ro,nouuid" if name == "xfs" else "loop,ro") as where:
            return hashes(where)
    except AssertionError:
        return None
