"""The qcow2 reader against images that qemu-img makes."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from pipeline.errors import FormatError
from pipeline.units import KiB, MiB, TiB
from stages.decode.opening import open_image
from stages.decode.qcow2 import open_qcow2
from tests.decode.images import BytesReader, Patched, content, mixed_disk, qemu_convert, run

SIZE = 5 * MiB + 37 * 512  # not whole clusters


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "-c",
        "-c -o compression_type=zstd",
        "-c -o compat=0.10",
        "-o compat=0.10",
        "-o lazy_refcounts=on",
        "-o refcount_bits=1",
        "-o refcount_bits=64",
        "-o preallocation=metadata",
        "-o preallocation=falloc",
        "-o preallocation=full",
        "-o preallocation=metadata,cluster_size=2M",
        *(f"-o cluster_size={size}" for size in ("512", "4k", "2M")),
        *(f"-c -o cluster_size={size}" for size in ("512", "4k", "1M", "2M")),
        *(f"-c -o compression_type=zstd,cluster_size={size}" for size in ("4k", "2M")),
    ],
)
async def test_every_image_of_qemu_decodes_to_the_disk(tmp_path: Path, arguments: str) -> None:
    disk = mixed_disk(SIZE)
    image = await open_image(BytesReader(qemu_convert(tmp_path, disk, *arguments.split())), "qcow2")
    assert image.size == SIZE
    assert await content(image) == disk
    extents = [extent async for extent in image.extents(0, SIZE)]
    assert extents[0].offset == 0
    assert extents[-1].end == SIZE
    assert all(one.end == other.offset for one, other in itertools.pairwise(extents))
    for extent in extents:
        if extent.is_zero:
            assert not any(disk[extent.offset : extent.end])


@pytest.mark.parametrize("arguments", ["", "-c", "-c -o cluster_size=2M", "-o cluster_size=512"])
async def test_odd_ranges_read_the_same_as_windows(tmp_path: Path, arguments: str) -> None:
    disk = mixed_disk(SIZE, seed=2)
    image = await open_image(BytesReader(qemu_convert(tmp_path, disk, *arguments.split())), "qcow2")
    for offset, length in ((0, 1), (65535, 2), (MiB - 7, 64 * KiB + 19), (SIZE - 1, 1), (SIZE - 70000, 70000), (5, 0)):
        assert await image.read(offset, length) == disk[offset : offset + length]
    with pytest.raises(ValueError, match="not inside"):
        await image.read(SIZE - 1, 2)


async def test_extents_of_a_part_stay_inside_it(tmp_path: Path) -> None:
    disk = mixed_disk(SIZE)
    image = await open_image(BytesReader(qemu_convert(tmp_path, disk)), "qcow2")
    extents = [extent async for extent in image.extents(MiB + 4096, 2 * MiB)]
    assert extents[0].offset == MiB + 4096
    assert extents[-1].end == 3 * MiB + 4096
    assert all(extent.length > 0 for extent in extents)


async def test_images_written_in_place_have_zero_clusters_and_overwrites(tmp_path: Path) -> None:
    """The zero flag, with and without storage behind it, and clusters that were written twice."""
    path = tmp_path / "image.qcow2"
    run("qemu-img", "create", "-f", "qcow2", str(path), "8M")
    commands = (
        "write -P 65 0 3M",
        "write -z 1M 512k",
        "write -z -u 2M 64k",
        "write -P 66 1088k 512",
        "discard 128k 64k",
    )
    run("qemu-io", "-f", "qcow2", *(word for command in commands for word in ("-c", command)), str(path))
    run("qemu-img", "convert", "-O", "raw", str(path), str(tmp_path / "expected"))
    image = await open_image(BytesReader(path.read_bytes()), "qcow2")
    assert await content(image) == (tmp_path / "expected").read_bytes()


async def test_clusters_that_read_as_zero_are_no_data(tmp_path: Path) -> None:
    """Also where storage is kept behind them (preallocation)."""
    path = tmp_path / "image.qcow2"
    run("qemu-img", "create", "-f", "qcow2", str(path), "1M")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 65 0 1M", "-c", "write -z 256k 256k", str(path))
    image = await open_image(BytesReader(path.read_bytes()), "qcow2")
    extents = [(one.offset // KiB, one.length // KiB, one.is_zero) async for one in image.extents(0, MiB)]
    assert extents == [(0, 256, False), (256, 256, True), (512, 512, False)]


@pytest.mark.parametrize("arguments", ["", "-c"])
async def test_decoding_overwrites_whatever_the_buffer_held(tmp_path: Path, arguments: str) -> None:
    disk = mixed_disk(SIZE, seed=6)
    image = await open_image(BytesReader(qemu_convert(tmp_path, disk, *arguments.split())), "qcow2")
    buffer = bytearray(b"\xff" * SIZE)
    image.decode(await image.fetch(0, SIZE), memoryview(buffer))
    assert buffer == disk


async def test_internal_snapshots_do_not_disturb_the_active_disk(tmp_path: Path) -> None:
    qemu_convert(tmp_path, mixed_disk(SIZE))
    path = tmp_path / "image.qcow2"
    run("qemu-img", "snapshot", "-c", "before", str(path))
    run("qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 1M", str(path))
    run("qemu-img", "convert", "-O", "raw", str(path), str(tmp_path / "expected"))
    reader = BytesReader(path.read_bytes())
    assert await content(await open_image(reader, "qcow2")) == (tmp_path / "expected").read_bytes()
    with pytest.raises(FormatError, match="snapshots"):
        await open_image(reader, "qcow2", strict=True)


async def test_a_dirty_image_is_read_with_a_warning(tmp_path: Path) -> None:
    disk = mixed_disk(MiB)
    patched = Patched(qemu_convert(tmp_path, disk))
    patched.put64(72, 1)
    image = await open_image(BytesReader(patched.bytes), "qcow2")
    assert await content(image) == disk
    assert "not closed properly" in image.warnings[0]
    with pytest.raises(FormatError, match="dirty"):
        await open_image(BytesReader(patched.bytes), "qcow2", strict=True)


async def test_a_sparse_disk_of_two_tebibytes_is_one_extent_and_two_reads(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    run("qemu-img", "create", "-f", "qcow2", str(path), "2T")
    reader = BytesReader(path.read_bytes())
    image = await open_qcow2(reader)
    assert [(one.offset, one.length, one.is_zero) async for one in image.extents(0, 2 * TiB)] == [(0, 2 * TiB, True)]
    assert len(reader.reads) == 2


@pytest.mark.parametrize("arguments", ["", "-c"])
async def test_a_window_costs_few_large_reads(tmp_path: Path, arguments: str) -> None:
    reader = BytesReader(qemu_convert(tmp_path, bytes(range(1, 256)) * 32897, *arguments.split()))
    image = await open_qcow2(reader)
    await image.fetch(0, 2 * MiB)
    reader.reads.clear()
    await image.fetch(2 * MiB, 2 * MiB)
    assert len(reader.reads) == 1


async def test_an_l2_table_is_read_once_for_all_its_windows(tmp_path: Path) -> None:
    reader = BytesReader(qemu_convert(tmp_path, mixed_disk(SIZE)))
    image = await open_qcow2(reader)
    table = Patched(bytes(reader.data)).l2
    await content(image)
    await content(image, window=64 * KiB)
    assert [offset for offset, _ in reader.reads].count(table) == 1


async def test_an_unknown_format_is_named_with_those_that_are_known() -> None:
    with pytest.raises(FormatError, match="format vdi") as caught:
        await open_image(BytesReader(b""), "vdi")
    assert "qcow2" in caught.value.hint
