"""Filesystems checked by their own tools, on what is served of an image."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.units import MiB
from stages.decode.named import NamedImage
from stages.prove.filesystems import check_filesystems
from stages.prove.steps import StepResult
from stages.serve.opening import open_disk
from tests.disks.damage import flip_block_bitmap
from tests.disks.mounts import mounted, system

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="filesystems are mounted")


async def checked(path: Path) -> StepResult:
    before = path.read_bytes() if path.stat().st_size < 64 * MiB else b""
    async with open_disk(NamedImage(place=str(path), format="raw")) as opened:
        result = await check_filesystems(opened.disk)
    assert not before or path.read_bytes() == before
    assert not [line for line in Path("/proc/mounts").read_text().splitlines() if "pipeline-prove-" in line]
    return result


def made(folder: Path, size: int, *mkfs: str) -> Path:
    path = folder / "disk"
    with path.open("wb") as file:
        file.truncate(size)
    system(*mkfs, path)
    return path


def in_use(path: Path, kind: str, folder: Path) -> Path:
    """A copy that was taken while the filesystem was mounted and written: its log wants to be replayed."""
    with mounted(folder / "mnt", kind, path, "loop"):
        for number in range(50):
            (folder / f"mnt/file{number}").write_bytes(os.urandom(3000))
        system("sync", "--file-system", folder / "mnt")
        shutil.copyfile(path, folder / "copy")
    return folder / "copy"


@pytest.mark.parametrize(
    "size, mkfs",
    [
        (16 * MiB, ("mkfs.ext4", "-q", "-F")),
        (16 * MiB, ("mkfs.ext2", "-q", "-F")),
        (40 * MiB, ("mkfs.fat", "-F", "32")),
        (120 * MiB, ("mkfs.btrfs", "-q")),
        (320 * MiB, ("mkfs.xfs", "-q")),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
async def test_clean_filesystems_are_clean(tmp_path: Path, size: int, mkfs: tuple[str, ...]) -> None:
    result = await checked(made(tmp_path, size, *mkfs))
    assert result.state == "passed", result
    assert result.evidence["filesystems"] == "1"


async def test_a_journal_that_wants_replay_is_no_damage(tmp_path: Path) -> None:
    result = await checked(in_use(made(tmp_path, 16 * MiB, "mkfs.ext4", "-q", "-F"), "ext4", tmp_path))
    assert "needs_recovery" in system("dumpe2fs", "-h", tmp_path / "copy"), "the test is about something"
    assert result.state == "passed", result


async def test_an_xfs_log_that_wants_replay_is_no_damage(tmp_path: Path) -> None:
    result = await checked(in_use(made(tmp_path, 320 * MiB, "mkfs.xfs", "-q"), "xfs", tmp_path))
    assert result.state == "passed", result
    assert "replayed" in " ".join(result.details)


async def test_damage_is_damage(tmp_path: Path) -> None:
    path = made(tmp_path, 16 * MiB, "mkfs.ext4", "-q", "-F")
    flip_block_bitmap(path)
    result = await checked(path)
    assert result.state == "failed"
    assert "e2fsck" in " ".join(result.details)


def test_what_was_mounted_for_a_checker_goes_with_us_also_on_kill_9(tmp_path: Path) -> None:
    # Inodes that have to be looked at, so that the checker takes longer than it takes to see it.
    path = made(tmp_path, 160 * MiB, "mkfs.ext4", "-q", "-F", "-O", "^metadata_csum,^uninit_bg", "-N", "200000")
    words = [sys.executable, "-m", "pipeline", "prove", str(path), "-f", "raw"]
    words += ["--skip", "digest,structure,preflight,boot"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def is_mounted() -> bool:
        return f"/pipeline-prove-{process.pid}-" in Path("/proc/mounts").read_text()

    ends = time.monotonic() + 30
    while not is_mounted():
        assert process.poll() is None
        assert time.monotonic() < ends
    process.kill()
    process.wait()
    while is_mounted():
        assert time.monotonic() < ends


async def test_nothing_that_can_be_checked_is_no_pass(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(4 * MiB))
    result = await checked(path)
    assert result.state == "unknown"
    assert "--skip filesystems" in result.hint


async def test_names_in_a_filesystem_do_nothing_to_a_terminal(tmp_path: Path) -> None:
    path = made(tmp_path, 16 * MiB, "mkfs.ext4", "-q", "-F", "-L", "a\x1b[31mred")
    result = await checked(path)
    assert all(char.isprintable() or char == "\n" for char in result.log)
