"""Formats are told by magic at fixed places, once, and never of a block device."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from pipeline.errors import FormatError
from pipeline.units import KiB, MiB
from stages.decode.opening import open_image
from stages.decode.probing import probe, probe_format
from tests.decode.images import BytesReader, mixed_disk, qemu_convert
from tests.decode.made import made_by_qemu, made_gce, made_ova, made_stream, made_tar
from tests.decode.test_formats import OF_QEMU

DISK = mixed_disk(2 * MiB)


@pytest.mark.parametrize("format, options", OF_QEMU)
async def test_images_of_qemu_are_told_apart(tmp_path: Path, format: str, options: str) -> None:
    image, _, _ = made_by_qemu(tmp_path, DISK, format, options)
    reader = BytesReader(image)
    assert await probe_format(reader) == format
    assert await probe_format(reader, name_hint="something.raw" if "fixed" not in options else "disk.vhd") == format
    assert sum(length for _, length in reader.reads) < MiB


async def test_other_images_and_raw_disks_are_told_apart(tmp_path: Path) -> None:
    assert await probe_format(BytesReader(qemu_convert(tmp_path, DISK))) == "qcow2"
    assert await probe_format(BytesReader(made_ova(made_stream(DISK)))) == "ova"
    assert await probe_format(BytesReader(made_gce(DISK))) == "gce"
    assert await probe_format(BytesReader(DISK), name_hint="disk.img") == "raw"
    assert await probe_format(BytesReader(b"")) == "raw"
    assert (await probe(BytesReader(DISK))).note


async def test_a_block_device_is_raw_and_not_even_read(tmp_path: Path) -> None:
    """A guest that writes a qcow2 header into its first sector must not choose how its disk is read."""
    reader = BytesReader(qemu_convert(tmp_path, DISK))
    assert await probe_format(reader, is_block_device=True) == "raw"
    assert reader.reads == []


async def test_what_is_declared_raw_stays_raw(tmp_path: Path) -> None:
    image = qemu_convert(tmp_path, DISK)
    opened = await open_image(BytesReader(image), "raw")
    assert await opened.read(0, 4) == b"QFI\xfb"
    assert opened.size == len(image)


async def test_a_footer_at_the_end_of_a_raw_disk_is_told_as_uncertain(tmp_path: Path) -> None:
    image, _, _ = made_by_qemu(tmp_path, DISK, "vhd", "subformat=fixed,force_size=on")
    found = await probe(BytesReader(image))
    assert found.format == "vhd"
    assert "declare" in found.note
    as_raw = await probe(BytesReader(image), name_hint="/images/web.RAW")
    assert as_raw.format == "raw"
    assert "footer" in as_raw.note


@pytest.mark.parametrize("name", ["a.qcow2", "a.VHD", "b.vmdk", "c.vhdx", "d.ova", "e.tar.gz", "f.raw.zst", "g.img.GZ"])
async def test_a_name_that_the_bytes_deny_is_an_error_and_not_raw(name: str) -> None:
    """A fixed VHD that lost its footer would otherwise be exported with a part of its disk missing."""
    with pytest.raises(FormatError, match="cut short") as caught:
        await probe_format(BytesReader(DISK), name_hint=name)
    assert "declare" in caught.value.hint


@pytest.mark.parametrize(
    "head",
    [
        b"QED\0",
        bytes(64) + b"\x7f\x10\xda\xbe",
        b"COWD",
        b"\xbe\xba\xfe\xca\0\0\0\0",
        b"\x28\xb5\x2f\xfd",
        b"\x04\x22\x4d\x18",
        gzip.compress(b"hello", mtime=0),
        gzip.compress(made_tar({"disk.img": b"x" * 512}), mtime=0),
        b"\x1f\x8b\x08" + b"\xff" * 100,
        made_tar({"readme": b"x"}),
    ],
)
async def test_images_that_are_not_read_here_are_never_taken_for_raw(head: bytes) -> None:
    image = BytesReader(head + bytes(100 * KiB))
    try:
        format = await probe_format(image)
    except FormatError:
        return
    assert format == "vmdk"
    with pytest.raises(FormatError):
        await open_image(image, format)
