"""Trees written to folders and filesystems, so that the same system can be looked at live and in an image."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from pipeline.units import MiB
from stages.disk.tree import Kind
from tests.disk.making import blank, need, run
from tests.disks.mbr import PARTITION_START, write_mbr
from tests.preflight.disks import ROOT_UUID, grub_sectors
from tests.preflight.trees import Content, Made


def write_tree(files: Mapping[str, Content], folder: Path) -> Path:
    """Write a system of a test below a folder, with modes and links."""
    folder.mkdir(exist_ok=True)
    for path, content in files.items():
        if content is None:
            continue
        made = (
            content
            if isinstance(content, Made)
            else Made(content=os.fsencode(content) if isinstance(content, str) else content)
        )
        place = folder / path.lstrip("/")
        if place.is_symlink() or place.exists():
            place.unlink()
        place.parent.mkdir(parents=True, exist_ok=True)
        if made.kind is Kind.DIRECTORY:
            place.mkdir(exist_ok=True)
        elif made.kind is Kind.LINK:
            place.symlink_to(os.fsdecode(made.content))
        else:
            place.write_bytes(made.content)
            place.chmod(made.mode)
            os.chown(place, made.uid, 0) if os.geteuid() == 0 else None
    return folder


def write_disk(tree: Path, disk: Path, *, size: int = 64 * MiB) -> Path:
    """A raw disk with an MBR, GRUB's first sectors and one ext4 that holds the tree."""
    need("mke2fs", "dd")
    part = blank(disk.with_suffix(".part"), size - PARTITION_START)
    run("mke2fs", "-q", "-t", "ext4", "-U", ROOT_UUID, "-d", tree, part)
    blank(disk, size)
    write_mbr(disk, size, disk_id=0x5A5A1234)
    with disk.open("r+b") as file:
        table = file.read(512)[440:]
        sectors = grub_sectors()
        file.seek(0)
        file.write(sectors[0][:440] + table + sectors[1])
    run("dd", f"if={part}", f"of={disk}", "bs=1M", f"seek={PARTITION_START // MiB}", "conv=notrunc,sparse")
    part.unlink()
    return disk


def write_efi_disk(tree: Path, disk: Path, *, esp: str, size: int = 96 * MiB) -> Path:
    """A raw disk with a GPT, an EFI system partition (what lies below `esp` of the tree) and an ext4 with the rest."""
    need("mke2fs", "dd", "sfdisk", "mkfs.fat", "mcopy")
    blank(disk, size)
    run("sfdisk", "-q", disk, text="label: gpt\n2048,32M,U\n,,L\n")  # sgdisk sleeps a second after it has written
    first, second = blank(disk.with_suffix(".esp"), 32 * MiB), blank(disk.with_suffix(".part"), size - 34 * MiB)
    run("mkfs.fat", "-i", "ABCD1234", first)
    for entry in sorted((tree / esp.lstrip("/")).iterdir()):
        run("mcopy", "-s", "-i", first, entry, "::")
    run("mke2fs", "-q", "-t", "ext4", "-U", ROOT_UUID, "-d", tree, second)
    for part, at in ((first, 1), (second, 33)):
        run("dd", f"if={part}", f"of={disk}", "bs=1M", f"seek={at}", "conv=notrunc,sparse")
        part.unlink()
    return disk
