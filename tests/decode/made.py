"""Images of every format for decoder tests, made by qemu-img, tar and gzip, and what is asked of a refusal."""

from __future__ import annotations

import gzip
import hashlib
import io
import struct
import subprocess
import tarfile
import time
import tracemalloc
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.errors import FormatError
from pipeline.flow.items import RangeReader
from pipeline.units import GiB, KiB, MiB
from stages.decode.opening import open_image
from tests.decode.images import BytesReader, run

QEMU_NAMES = {"vhd": "vpc"}
TIME_MAX_S = 2
MEMORY_MAX = 200 * MiB


def made_by_qemu(folder: Path, disk: bytes, format: str, options: str = "") -> tuple[bytes, dict[str, bytes], bytes]:
    """The image that `qemu-img convert` makes, its extents by name, and the disk that qemu-img reads from it."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    name = QEMU_NAMES.get(format, format)
    (folder / "disk.raw").write_bytes(disk)
    more = ["-o", options] if options else []
    run("qemu-img", "convert", "-f", "raw", "-O", name, *more, str(folder / "disk.raw"), str(folder / "image"))
    run("qemu-img", "convert", "-f", name, "-O", "raw", str(folder / "image"), str(folder / "again.raw"))
    extents = {one.name: one.read_bytes() for one in folder.iterdir() if one.name.startswith("image-")}
    return (folder / "image").read_bytes(), extents, (folder / "again.raw").read_bytes()


def readers(files: Mapping[str, bytes]) -> dict[str, RangeReader]:
    """A reader for each file."""
    return {name: BytesReader(data) for name, data in files.items()}


def made_ova(vmdk: bytes, *, name: str = "web-disk1.vmdk", format: int = tarfile.USTAR_FORMAT) -> bytes:
    """An OVA of one disk with a manifest."""
    members = {"web.ovf": b"<Envelope/>" + b"\n" * 100, name: vmdk}
    lines = [f"SHA256({one})= {hashlib.sha256(data).hexdigest()}\n" for one, data in members.items()]
    return made_tar({**members, "web.mf": "".join(lines).encode()}, format=format)


def made_tar(members: Mapping[str, bytes], *, format: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar archive of these members."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=format) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return made.getvalue()


def made_gce(disk: bytes, *, member: int | None = None, name: str = "disk.raw") -> bytes:
    """`disk.raw` in a tar, packed as one gzip member or as one for every `member` bytes."""
    archive = made_tar({name: disk}, format=tarfile.GNU_FORMAT)
    step = member or len(archive)
    return b"".join(gzip.compress(archive[at : at + step], 1) for at in range(0, len(archive), step))


def made_sparse_gce(folder: Path, disk: bytes) -> bytes:
    """As Google's documentation makes it: `tar --format=oldgnu -Sczf`, of a file with holes."""
    path = folder / "disk.raw"
    with open(path, "wb") as file:
        for at in range(0, len(disk), 4096):
            if any(disk[at : at + 4096]):
                file.seek(at)
                file.write(disk[at : at + 4096])
        file.truncate(len(disk))
    subprocess.run(
        ["tar", "--format=oldgnu", "-Sczf", "disk.tar.gz", "disk.raw"], cwd=folder, check=True, capture_output=True
    )
    return (folder / "disk.tar.gz").read_bytes()


@contextmanager
def bounded(*, memory: int = MEMORY_MAX) -> Iterator[None]:
    """What is done inside takes no more time and memory than a small image may: of this process, others are busy too.

    The time is that of all threads, and is longer than without tracing.
    """
    tracemalloc.start()
    begun = time.process_time()
    try:
        yield
        assert time.process_time() - begun < TIME_MAX_S
        assert tracemalloc.get_traced_memory()[1] < memory
    finally:
        tracemalloc.stop()  # or all later tests of this process are traced


async def refused(
    image: bytes | bytearray, format: str, *, strict: bool = False, extents: Mapping[str, RangeReader] | None = None
) -> FormatError:
    """The error that reading all of the image raises, in time, within memory and without a read outside of it."""
    reader = BytesReader(image)
    with bounded(), pytest.raises(FormatError) as caught:
        await read_all(reader, format, strict=strict, extents=extents)
    for offset, length in reader.reads:
        assert offset >= 0
        assert offset + length <= len(image)
    return caught.value


async def read_all(
    reader: RangeReader, format: str, *, strict: bool = False, extents: Mapping[str, RangeReader] | None = None
) -> int:
    """Read what an image stores as a copier does: extents first, data in windows; the bytes that were read."""
    image = await open_image(reader, format, strict=strict, extents=extents)
    total = 0
    async for extent in image.extents(0, image.size):
        assert extent.length > 0
        if extent.is_zero:
            continue
        for start in range(extent.offset, extent.end, 2 * MiB):
            total += len(await image.read(start, min(2 * MiB, extent.end - start)))
            assert total < 8 * GiB
    return total


class Fields:
    """Bytes of an image with numbers to read and overwrite; `order` as in `struct`."""

    def __init__(self, image: bytes, order: str) -> None:
        self.bytes = bytearray(image)
        self._order = order

    def get(self, code: str, at: int) -> int:
        """The number at an image offset."""
        return int(struct.unpack_from(self._order + code, self.bytes, at)[0])

    def put(self, code: str, at: int, value: int) -> None:
        """Overwrite a number."""
        struct.pack_into(self._order + code, self.bytes, at, value)


def made_stream(disk: bytes, *, level: int = 1) -> bytes:
    """A streamOptimized VMDK as VMware makes it, with markers, footer and end of stream."""
    grain, sector = 64 * KiB, 512
    capacity = -(-len(disk) // grain) * 128
    descriptor = (
        "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n"
        f'createType="streamOptimized"\n\n# Extent description\nRW {capacity} SPARSE "image"\n\n'
        '# The Disk Data Base\n#DDB\n\nddb.adapterType = "lsilogic"\n'
    ).encode()

    def header(directory: int) -> bytes:
        fields = (b"KDMV", 3, 0x30001, capacity, 128, 1, 20, 512, 0, directory, 128)
        return (struct.pack("<4sIIQQQQIQQQ", *fields) + b"\0\n \r\n" + struct.pack("<H", 1)).ljust(sector, b"\0")

    def marker(sectors: int, kind: int) -> bytes:
        return struct.pack("<QII", sectors, 0, kind).ljust(sector, b"\0")

    made = bytearray(header((1 << 64) - 1) + descriptor).ljust(128 * sector, b"\0")
    directory: list[int] = []
    for first in range(0, len(disk), 512 * grain):
        table = [0] * 512
        for number, at in enumerate(range(first, min(first + 512 * grain, len(disk)), grain)):
            data = disk[at : at + grain].ljust(grain, b"\0")
            if any(data):
                table[number] = len(made) // sector
                packed = zlib.compress(data, level)
                made += struct.pack("<QI", at // sector, len(packed)) + packed
                made += bytes(-len(made) % sector)
        made += marker(4, 1)
        directory.append(len(made) // sector)
        made += struct.pack("<512I", *table)
    made += marker(-(-len(directory) * 4 // sector), 2)
    place = len(made) // sector
    made += struct.pack(f"<{len(directory)}I", *directory)
    made += bytes(-len(made) % sector)
    return bytes(made) + marker(1, 3) + header(place) + bytes(sector)
