"""The demo disk is a clean disk that holds what tests look for in it."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from pipeline.units import MiB
from tests.disks.demo import DELETED_RECORD, SMALLEST_SIZE, DiskNotBuilt, build_demo_disk, main
from tests.disks.mbr import PARTITION_START, SECTOR

_SBIN = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
needs_e2fsprogs = pytest.mark.skipif(shutil.which("mke2fs", path=_SBIN) is None, reason="needs mke2fs (e2fsprogs)")


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "demo.raw"
    build_demo_disk(path, 64 * MiB)
    return path


def filesystem_says(tool: str, disk: Path, *arguments: str) -> str:
    program = shutil.which(tool, path=_SBIN)
    assert program is not None
    command = [program, *arguments, f"{disk}?offset={PARTITION_START}"]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True).stdout


@needs_e2fsprogs
def test_filesystem_is_clean(disk: Path) -> None:
    assert "Pass 5" in filesystem_says("e2fsck", disk, "-f", "-n")


@needs_e2fsprogs
def test_one_active_linux_partition_reaches_the_end(disk: Path) -> None:
    record = disk.read_bytes()[:SECTOR]
    assert record[510:] == b"\x55\xaa"
    status, kind, start, sectors = struct.unpack_from("<B3xB3xII", record, 446)
    assert (status, kind) == (0x80, 0x83)
    assert start * SECTOR == PARTITION_START
    assert (start + sectors) * SECTOR == disk.stat().st_size == 64 * MiB
    assert record[462:510] == bytes(48)  # no other partition


@needs_e2fsprogs
def test_partitioning_tool_agrees(disk: Path) -> None:
    sfdisk = shutil.which("sfdisk", path=_SBIN)
    if sfdisk is None:
        pytest.skip("needs sfdisk")
    said = subprocess.run([sfdisk, "--dump", disk], stdout=subprocess.PIPE, text=True, check=True).stdout
    assert "label: dos" in said
    assert "start=        2048, size=      129024, type=83, bootable" in said


@needs_e2fsprogs
def test_files_are_there_and_the_deleted_one_only_in_free_space(disk: Path) -> None:
    assert "Demo Linux" in filesystem_says("debugfs", disk, "-R", "cat /etc/os-release")
    assert "deleted" not in filesystem_says("debugfs", disk, "-R", "ls /var/tmp")
    assert disk.read_bytes().count(DELETED_RECORD) > 1000


@needs_e2fsprogs
def test_disk_has_holes_zeros_and_data(disk: Path) -> None:
    allocated = disk.stat().st_blocks * 512
    data = disk.read_bytes()
    nonzero = sum(any(data[offset : offset + 4096]) for offset in range(0, len(data), 4096)) * 4096
    assert nonzero < allocated < len(data)
    assert nonzero > len(data) // 4


@needs_e2fsprogs
def test_same_size_gives_same_bytes(disk: Path, tmp_path: Path) -> None:
    build_demo_disk(tmp_path / "again.raw", 64 * MiB)
    assert (tmp_path / "again.raw").read_bytes() == disk.read_bytes()


@needs_e2fsprogs
def test_command_line_builds_the_smallest_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "small.raw"
    assert main([str(path), "--size", "32MiB"]) == 0
    assert f"{SMALLEST_SIZE} bytes" in capsys.readouterr().out
    assert "Pass 5" in filesystem_says("e2fsck", path, "-f", "-n")


@pytest.mark.parametrize("size", [SMALLEST_SIZE - MiB, SMALLEST_SIZE + 1])
def test_unusable_size_is_refused_before_anything_is_written(size: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=str(size)):
        build_demo_disk(tmp_path / "disk.raw", size)
    assert list(tmp_path.iterdir()) == []


def test_missing_tool_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(DiskNotBuilt, match="install the package e2fsprogs"):
        build_demo_disk(tmp_path / "disk.raw", SMALLEST_SIZE)
    assert list(tmp_path.iterdir()) == []
