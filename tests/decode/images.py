"""Disks and images for decoder tests: mixed content, qemu-img as the writer, and a reader over bytes that counts."""

from __future__ import annotations

import random
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import FormatError
from pipeline.units import KiB, MiB
from stages.decode.image import DecodedImage

WINDOW = 2 * MiB


class BytesReader:
    """A RangeReader over bytes. `reads` lists every (offset, length) asked for."""

    def __init__(self, data: bytes | bytearray) -> None:
        self.data = data
        self.size = len(data)
        self.reads: list[tuple[int, int]] = []

    async def read(self, offset: int, length: int) -> bytes:
        """As the protocol says: exactly `length` bytes, or FormatError."""
        self.reads.append((offset, length))
        if offset < 0 or length < 0 or offset + length > len(self.data):
            raise FormatError("the image ends early", offset=offset, expected=length, got=len(self.data) - offset)
        return bytes(self.data[offset : offset + length])


def mixed_disk(size: int, *, seed: int = 1) -> bytes:
    """Per 64 KiB: noise, words, a few bytes in zeros, or nothing. The last 100 bytes are always something."""
    draw = random.Random(seed)
    made = bytearray(size)
    for start in range(0, size, 64 * KiB):
        length = min(64 * KiB, size - start)
        kind = draw.choice("RWS--")
        if kind == "R":
            made[start : start + length] = draw.randbytes(length)
        elif kind == "W":
            words = b" ".join(b"word%d" % draw.randrange(999) for _ in range(length // 4))
            made[start : start + length] = words[:length]
        elif kind == "S" and length > 5000:
            made[start + 4096 : start + 4196] = b"q" * 100
    made[-100:] = b"e" * 100
    return bytes(made)


def qemu_convert(folder: Path, disk: bytes, *arguments: str) -> bytes:
    """What `qemu-img convert -O qcow2 ARGUMENTS` makes of a disk."""
    raw, image = folder / "disk.raw", folder / "image.qcow2"
    raw.write_bytes(disk)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", *arguments, str(raw), str(image))
    return image.read_bytes()


def run(*command: str, input: str | None = None) -> None:
    """Run a tool; its complaints become the test's."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, input=input)
    assert done.returncode == 0, done.stderr


async def content(image: DecodedImage, *, window: int = WINDOW) -> bytes:
    """The whole disk that an image decodes to, window by window."""
    made = bytearray()
    for start in range(0, image.size, window):
        made += await image.read(start, min(window, image.size - start))
    return bytes(made)


class Patched:
    """A qcow2 image with named fields to read and overwrite."""

    def __init__(self, image: bytes) -> None:
        self.bytes = bytearray(image)

    def u32(self, offset: int) -> int:
        """Big-endian, at an image offset."""
        return int(struct.unpack_from(">I", self.bytes, offset)[0])

    def u64(self, offset: int) -> int:
        """Big-endian, at an image offset."""
        return int(struct.unpack_from(">Q", self.bytes, offset)[0])

    def put32(self, offset: int, value: int) -> None:
        """Overwrite a field."""
        struct.pack_into(">I", self.bytes, offset, value)

    def put64(self, offset: int, value: int) -> None:
        """Overwrite a field."""
        struct.pack_into(">Q", self.bytes, offset, value)

    @property
    def cluster(self) -> int:
        """Bytes of a cluster."""
        return 1 << self.u32(20)

    @property
    def l1(self) -> int:
        """Image offset of the L1 table."""
        return self.u64(40)

    @property
    def l2(self) -> int:
        """Image offset of the first L2 table."""
        return self.u64(self.l1) & 0x00FF_FFFF_FFFF_FE00

    def entries(self, wanted: Callable[[int], bool]) -> list[int]:
        """Image offsets of the first L2 table's entries that fulfil `wanted`."""
        found = range(self.l2, self.l2 + self.cluster, 8)
        return [offset for offset in found if wanted(self.u64(offset))]

    @property
    def plain(self) -> list[int]:
        """Image offsets of the entries of uncompressed clusters."""
        return self.entries(lambda entry: bool(entry) and not entry >> 62 & 1)

    @property
    def compressed(self) -> list[int]:
        """Image offsets of the entries of compressed clusters."""
        return self.entries(lambda entry: bool(entry >> 62 & 1))
