"""The readers of VHD, VMDK, VHDX, OVA and GCE against images that other tools make."""

from __future__ import annotations

import itertools
import tarfile
from pathlib import Path

import pytest

from pipeline.errors import FormatError
from pipeline.units import GiB, KiB, MiB, TiB
from stages.decode.image import DecodedImage
from stages.decode.opening import open_image
from tests.decode.images import BytesReader, content, mixed_disk, run
from tests.decode.made import made_by_qemu, made_gce, made_ova, made_sparse_gce, readers

SIZE = 5 * MiB + 37 * 512  # no whole blocks
DISK = mixed_disk(SIZE)
# A block of 2 MiB that is empty, and one that is not.
HOLES = bytes(6 * MiB) + mixed_disk(3 * MiB) + bytes(4 * MiB) + b"e" * 512

OF_QEMU = [
    ("vhd", "subformat=dynamic"),
    ("vhd", "subformat=dynamic,force_size=on"),
    ("vhd", "subformat=fixed"),
    ("vhd", "subformat=fixed,force_size=on"),
    ("vmdk", ""),
    ("vmdk", "subformat=monolithicSparse,zeroed_grain=on"),
    ("vmdk", "subformat=monolithicSparse,compat6"),
    ("vmdk", "subformat=streamOptimized"),
    ("vmdk", "subformat=twoGbMaxExtentSparse"),
    ("vmdk", "subformat=twoGbMaxExtentFlat"),
    ("vmdk", "subformat=monolithicFlat"),
    ("vhdx", ""),
    ("vhdx", "subformat=fixed"),
    ("vhdx", "block_size=1M"),
    ("vhdx", "block_size=32M,log_size=2M"),
    ("vhdx", "block_size=256M"),
    ("vhdx", "block_size=1M,block_state_zero=off"),
]


async def check_tiling(image: DecodedImage, disk: bytes) -> None:
    """Extents tile the disk, and what they call zero is zero."""
    extents = [extent async for extent in image.extents(0, image.size)]
    assert extents[0].offset == 0
    assert extents[-1].end == image.size
    assert all(one.end == other.offset for one, other in itertools.pairwise(extents))
    for extent in extents:
        if extent.is_zero:
            assert not any(disk[extent.offset : extent.end])


@pytest.mark.parametrize("disk", [DISK, HOLES], ids=["mixed", "holes"])
@pytest.mark.parametrize("format, options", OF_QEMU)
async def test_every_image_of_qemu_decodes_to_the_disk(tmp_path: Path, format: str, options: str, disk: bytes) -> None:
    image, extents, expected = made_by_qemu(tmp_path, disk, format, options)
    assert expected[: len(disk)] == disk
    opened = await open_image(BytesReader(image), format, extents=readers(extents))
    assert opened.format == format
    assert opened.size == len(expected)
    assert opened.warnings == ()
    assert await content(opened) == expected
    assert await content(opened, window=77 * KiB + 13) == expected
    await check_tiling(opened, expected)
    for offset, length in ((0, 1), (65535, 2), (MiB - 7, 64 * KiB + 19), (len(disk) - 1, 1), (5, 0)):
        assert await opened.read(offset, length) == expected[offset : offset + length]
    with pytest.raises(ValueError, match="not inside"):
        await opened.read(opened.size, 1)


@pytest.mark.parametrize("format, options", [("vhd", "subformat=dynamic"), ("vmdk", ""), ("vhdx", "block_size=1M")])
async def test_holes_cost_no_data_reads(tmp_path: Path, format: str, options: str) -> None:
    image, _, _ = made_by_qemu(tmp_path, HOLES, format, options)
    reader = BytesReader(image)
    opened = await open_image(reader, format)
    extents = [(one.offset // MiB, one.is_zero) async for one in opened.extents(0, opened.size)]
    assert extents[0] == (0, True)
    assert any(not is_zero for _, is_zero in extents)
    before = sum(length for _, length in reader.reads)
    assert await opened.read(0, 6 * MiB) == bytes(6 * MiB)
    assert sum(length for _, length in reader.reads) == before


@pytest.mark.parametrize(
    "format, options, size",
    [("vhd", "", 2040 * GiB), ("vmdk", "", TiB), ("vhdx", "block_size=32M", 64 * TiB), ("vhd", "force_size=on", GiB)],
)
async def test_a_huge_empty_disk_is_one_extent(tmp_path: Path, format: str, options: str, size: int) -> None:
    path = tmp_path / "image"
    more = ["-o", options] if options else []
    run("qemu-img", "create", "-f", {"vhd": "vpc"}.get(format, format), *more, str(path), str(size))
    from stages.store.file import open_file_reader

    async with open_file_reader(path) as reader:
        opened = await open_image(reader, format)
        assert size <= opened.size <= size + GiB
        extents = [(one.offset, one.length, one.is_zero) async for one in opened.extents(0, opened.size)]
    assert extents == [(0, opened.size, True)]


@pytest.mark.parametrize("format, options", [("vhd", ""), ("vmdk", ""), ("vmdk", "subformat=streamOptimized")])
async def test_a_window_costs_few_large_reads(tmp_path: Path, format: str, options: str) -> None:
    image, _, _ = made_by_qemu(tmp_path, bytes(range(1, 256)) * 32897, format, options)
    reader = BytesReader(image)
    opened = await open_image(reader, format)
    await opened.fetch(0, 2 * MiB)
    reader.reads.clear()
    await opened.fetch(2 * MiB, 2 * MiB)
    assert len(reader.reads) == 1


async def test_images_written_in_place_read_like_qemu_reads_them(tmp_path: Path) -> None:
    """Grains and blocks out of order, overwritten, and zeroed."""
    for format, options in (("vpc", ""), ("vmdk", "-o zeroed_grain=on"), ("vhdx", "")):
        path = tmp_path / format
        run("qemu-img", "create", "-f", format, *options.split(), str(path), "12M")
        commands = ("write -P 65 5M 3M", "write -P 66 0 1M", "write -z 6M 512k", "write -P 67 5M 512")
        run("qemu-io", "-f", format, *(word for command in commands for word in ("-c", command)), str(path))
        run("qemu-img", "convert", "-f", format, "-O", "raw", str(path), str(tmp_path / "expected"))
        opened = await open_image(BytesReader(path.read_bytes()), format)
        assert await content(opened) == (tmp_path / "expected").read_bytes()


async def test_extents_are_taken_in_order_or_by_name_and_never_guessed(tmp_path: Path) -> None:
    descriptor, extents, expected = made_by_qemu(tmp_path, DISK, "vmdk", "subformat=monolithicFlat")
    flat = BytesReader(extents["image-flat"])
    assert await content(await open_image(BytesReader(descriptor), "vmdk", extents=[flat])) == expected
    with pytest.raises(FormatError, match="other files") as caught:
        await open_image(BytesReader(descriptor), "vmdk")
    assert "image-flat" in caught.value.hint
    with pytest.raises(FormatError, match="2 files were named"):
        await open_image(BytesReader(descriptor), "vmdk", extents=[flat, flat])
    with pytest.raises(FormatError, match="no file was named"):
        await open_image(BytesReader(descriptor), "vmdk", extents={"other": flat})
    with pytest.raises(FormatError, match="has no extent 'other'"):
        await open_image(BytesReader(descriptor), "vmdk", extents={"other": flat, "image-flat": flat})
    with pytest.raises(FormatError, match="has no extents"):
        await open_image(BytesReader(descriptor), "raw", extents=[flat])


async def test_a_descriptor_joins_files_and_zeros_of_many_kinds(tmp_path: Path) -> None:
    sparse, _, _ = made_by_qemu(tmp_path, DISK[: 2 * MiB], "vmdk")
    packed, _, _ = made_by_qemu(tmp_path, DISK[: 3 * MiB], "vmdk", "subformat=streamOptimized")
    descriptor = b"""# Disk DescriptorFile
version=1
CID=12345678
parentCID=ffffffff
createType="custom"
RW 4096 SPARSE "one.vmdk"
RW 2048 ZERO
RW 1024 FLAT "two.bin" 3
RDONLY 6144 SPARSE "three.vmdk"
"""
    files = {"one.vmdk": sparse, "two.bin": bytes(3 * 512) + DISK[:MiB], "three.vmdk": packed}
    opened = await open_image(BytesReader(descriptor), "vmdk", extents=readers(files))
    expected = DISK[: 2 * MiB] + bytes(MiB) + DISK[: 512 * KiB] + DISK[: 3 * MiB]
    assert await content(opened) == expected
    assert await content(opened, window=100_003) == expected
    await check_tiling(opened, expected)


async def test_the_disk_of_an_ova_is_read_in_place(tmp_path: Path) -> None:
    vmdk, _, expected = made_by_qemu(tmp_path, DISK, "vmdk", "subformat=streamOptimized")
    for archive in (made_ova(vmdk), made_ova(vmdk, name="d" * 150 + ".vmdk", format=tarfile.GNU_FORMAT)):
        opened = await open_image(BytesReader(archive), "ova")
        assert opened.format == "ova"
        assert await content(opened) == expected
        await check_tiling(opened, expected)
    pax = made_ova(vmdk, name="é" * 120 + ".vmdk", format=tarfile.PAX_FORMAT)
    assert await content(await open_image(BytesReader(pax), "ova", member="é" * 120 + ".vmdk")) == expected
    with pytest.raises(FormatError, match="no disk 'other"):
        await open_image(BytesReader(pax), "ova", member="other.vmdk")


@pytest.mark.parametrize("member", [None, MiB, 64 * KiB + 3])
async def test_a_gce_archive_is_read_forward_backward_and_at_once(member: int | None) -> None:
    """One gzip member, or one for every window as our own encoder writes it."""
    disk = mixed_disk(24 * MiB, seed=9)
    reader = BytesReader(made_gce(disk, member=member))
    opened = await open_image(reader, "gce")
    assert opened.size == len(disk)
    assert await content(opened) == disk
    once = sum(length for _, length in reader.reads)
    assert once < len(reader.data) + 2 * MiB
    for offset in (23 * MiB, 5, 12 * MiB + 1, 0, 20 * MiB):
        assert await opened.read(offset, 70_000) == disk[offset : offset + 70_000]
    await check_tiling(opened, disk)


async def test_going_back_in_a_gzip_stream_begins_at_a_kept_place() -> None:
    disk = mixed_disk(2 * MiB, seed=2) * 32
    reader = BytesReader(made_gce(disk))
    opened = await open_image(reader, "gce")
    assert await content(opened) == disk
    reader.reads.clear()
    offset = 50 * MiB
    assert await opened.read(offset, 1000) == disk[offset : offset + 1000]
    assert min(offset for offset, _ in reader.reads) > len(reader.data) // 2
    assert sum(length for _, length in reader.reads) < len(reader.data) // 3


async def test_a_sparse_gce_archive_of_gnu_tar_gives_its_holes(tmp_path: Path) -> None:
    disk = bytearray(40 * MiB)
    for number in range(60):
        disk[number * 600 * KiB // 4096 * 4096] = 1 + number
    opened = await open_image(BytesReader(made_sparse_gce(tmp_path, bytes(disk))), "gce")
    assert await content(opened) == disk
    await check_tiling(opened, bytes(disk))
    assert sum([one.length async for one in opened.extents(0, opened.size) if not one.is_zero]) < MiB


async def test_a_gce_archive_whose_last_checksum_is_wrong_is_refused_with_the_end_of_the_disk() -> None:
    disk = mixed_disk(3 * MiB)
    image = bytearray(made_gce(disk))
    image[-6] ^= 1
    opened = await open_image(BytesReader(image), "gce")
    assert await opened.read(0, MiB) == disk[:MiB]
    with pytest.raises(FormatError, match="gzip stream is damaged"):
        await content(opened)


async def test_old_virtual_pc_footers_of_511_bytes_are_found(tmp_path: Path) -> None:
    image, _, expected = made_by_qemu(tmp_path, DISK, "vhd", "subformat=fixed,force_size=on")
    assert await content(await open_image(BytesReader(image[:-1]), "vhd")) == expected


async def test_a_dynamic_vhd_with_one_good_footer_is_read_with_a_warning(tmp_path: Path) -> None:
    image, _, expected = made_by_qemu(tmp_path, DISK, "vhd")
    for damaged in (b"x" * 512 + image[512:], image[:-512] + b"x" * 512, image[:-512]):
        opened = await open_image(BytesReader(damaged), "vhd")
        assert await content(opened) == expected
        assert "footer" in opened.warnings[0]
        with pytest.raises(FormatError, match="footer"):
            await open_image(BytesReader(damaged), "vhd", strict=True)


async def test_strict_reading_refuses_bitmaps_that_call_sectors_unused(tmp_path: Path) -> None:
    """Some readers see zeros there; QEMU reads what is stored, and so does lenient reading."""
    image, _, expected = made_by_qemu(tmp_path, DISK, "vhd", "force_size=on")
    assert await content(await open_image(BytesReader(image), "vhd", strict=True)) == expected
    changed = bytearray(image)
    changed[int.from_bytes(image[1536:1540], "big") * 512 + 3] = 0x7F
    assert await content(await open_image(BytesReader(changed), "vhd")) == expected
    with pytest.raises(FormatError, match="unused"):
        await content(await open_image(BytesReader(changed), "vhd", strict=True))


async def test_strict_reading_refuses_vmdk_and_vhdx_that_no_export_writes(tmp_path: Path) -> None:
    grains, _, expected = made_by_qemu(tmp_path, DISK, "vmdk")
    unclean = bytearray(grains)
    unclean[72] = 1
    assert await content(await open_image(BytesReader(grains), "vmdk", strict=True)) == expected
    with pytest.raises(FormatError, match="not closed properly"):
        await open_image(BytesReader(unclean), "vmdk", strict=True)
    with pytest.raises(FormatError, match="whole GiB"):
        await open_image(BytesReader(made_gce(DISK[: 2 * MiB])), "gce", strict=True)
