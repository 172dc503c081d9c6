"""What our encoders write, our readers take in strict mode, and the checker is clean. They share no code."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.units import GiB, MiB, round_up
from stages.decode.check.checking import check
from stages.decode.opening import open_image
from stages.store.file import open_file_reader
from tests.chains import export, write_toml
from tests.disks.letters import write_disk

LETTERS = "A0-BAA---0CDE" + "-" * 20 + "F"

CASES = [
    ("raw", "raw", ""),
    ("qcow2", "qcow2", 'compression = "none"'),
    ("qcow2", "qcow2", 'compression = "zlib"'),
    ("qcow2", "qcow2", 'compression = "zstd"'),
    ("vhd", "vhd", 'variant = "dynamic"'),
    ("vhd", "vhd", 'variant = "fixed"'),
    ("vmdk", "vmdk", 'variant = "streamOptimized"'),
    ("vmdk", "vmdk", 'variant = "monolithicSparse"'),
    ("vhdx", "vhdx", ""),
    ("ova", "ova", ""),
    ("gce", "gce", ""),
]


@pytest.mark.parametrize("format, stage, options", CASES)
async def test_strict_readers_and_checkers_take_what_our_encoders_write(
    tmp_path: Path, format: str, stage: str, options: str
) -> None:
    source = write_disk(tmp_path / "disk.raw", LETTERS, tail=3 * 512)
    disk = source.read_bytes()
    target = tmp_path / "image"
    encode = "; ".join(part for part in (f"encode.{stage}", options) if part)
    toml = write_toml(
        tmp_path / "export.toml",
        f'read.disk; path = "{source}"',
        "checksum.guest",
        "sparse.zeros",
        encode,
        f'write.file; path = "{target}"',
    )
    await export(toml)
    async with open_file_reader(target) as reader:
        opened = await open_image(reader, format, strict=True)
        assert opened.warnings == ()
        assert opened.size in (len(disk), round_up(len(disk), MiB), round_up(len(disk), GiB))
        for start in range(0, len(disk), 2 * MiB):
            length = min(2 * MiB, len(disk) - start)
            assert await opened.read(start, length) == disk[start : start + length], start
        report = await check(reader, format, deep=True, strict=True)
    assert report.findings == ()
    assert report.is_complete
