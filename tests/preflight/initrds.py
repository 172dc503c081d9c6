"""Initramfs images, packed by the real tools where a test says so."""

from __future__ import annotations

import bz2
import gzip
import lzma
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

CODECS = ("none", "gzip", "xz", "zstd", "lz4", "bzip2", "lzma")
# As initramfs-tools, dracut and mkinitcpio call them.
_TOOLS = {
    "gzip": ("gzip", "-n"),
    "xz": ("xz", "--check=crc32"),
    "zstd": ("zstd", "-q", "-c"),
    "lz4": ("lz4", "-q", "-l", "-c"),
    "bzip2": ("bzip2", "-c"),
    "lzma": ("xz", "--format=lzma", "-c"),
}


def cpio(names: Sequence[str], content: bytes = b"\x7fELF" * 5) -> bytes:
    """A "newc" archive written here. Source: Linux Documentation/driver-api/early-userspace/buffer-format.rst."""
    made = b""
    for number, name in enumerate([*names, "TRAILER!!!"]):
        data = content if name.endswith((".ko", ".gz", ".xz", ".zst")) else b""
        fields = (number, 0o100644 if data else 0o40755, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        made += b"070701" + b"".join(b"%08x" % one for one in fields) + name.encode() + b"\0"
        made += bytes(-len(made) % 4) + data
        made += bytes(-len(made) % 4)
    return made + bytes(-len(made) % 512)


def packed(data: bytes, codec: str) -> bytes:
    """Packed by Python's own libraries: for systems that tests write down."""
    if codec == "gzip":
        return gzip.compress(data, mtime=0)
    if codec == "xz":
        return lzma.compress(data, check=lzma.CHECK_CRC32)
    if codec == "zstd":
        import zstandard

        return zstandard.ZstdCompressor().compress(data)
    if codec == "bzip2":
        return bz2.compress(data)
    return data


def cpio_by_tool(folder: Path, names: Sequence[str]) -> bytes:
    """An archive that GNU cpio makes of files below a folder."""
    if shutil.which("cpio") is None:
        pytest.skip("cpio is not installed")
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\x7fELF" + name.encode() * 20)
    listed = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    done = subprocess.run(
        ["cpio", "--quiet", "-o", "-H", "newc"],
        input="\n".join(listed).encode(),
        cwd=folder,
        capture_output=True,
        check=True,
    )
    return done.stdout


def packed_by_tool(data: bytes, codec: str) -> bytes:
    """Packed by the tool that makers of initramfs images call."""
    if codec == "none":
        return data
    tool = _TOOLS[codec]
    if shutil.which(tool[0]) is None:
        pytest.skip(f"{tool[0]} is not installed")
    return subprocess.run(tool, input=data, capture_output=True, check=True).stdout
