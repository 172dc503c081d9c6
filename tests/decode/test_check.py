"""The checkers are clean on every good image, and count what is there."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from pipeline.units import GiB, KiB, MiB
from stages.decode.check.blocks import find_overlaps
from stages.decode.check.checking import check, image_info
from stages.decode.check.qcow2 import check_qcow2
from stages.decode.check.report import CheckReport, Tally
from stages.decode.opening import FORMATS
from stages.decode.refusal import UnsupportedError
from stages.store.file import open_file_reader
from tests.decode.images import BytesReader, mixed_disk, qemu_convert, run
from tests.decode.made import made_by_qemu, made_gce, made_ova, readers
from tests.decode.test_formats import DISK, HOLES, OF_QEMU
from tests.disks.mbr import write_mbr

QCOW2 = [
    "",
    "-c",
    "-c -o compression_type=zstd",
    "-c -o compat=0.10",
    "-o compat=0.10",
    "-o lazy_refcounts=on",
    *(f"-o refcount_bits={bits}" for bits in (1, 2, 4, 8, 32, 64)),
    *(f"-o preallocation={kind}" for kind in ("metadata", "falloc", "full")),
    "-o preallocation=metadata,cluster_size=2M",
    *(f"-o cluster_size={size}" for size in ("512", "4k", "2M")),
    *(f"-c -o cluster_size={size}" for size in ("512", "4k", "2M")),
]


def assert_clean(report: CheckReport) -> None:
    assert [one for one in report.findings if one.kind != "warning"] == []
    assert report.verdict == "clean"
    assert report.is_complete
    assert report.info is not None
    assert report.metadata_bytes or report.format in ("raw", "gce")


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("arguments", QCOW2)
async def test_good_qcow2_images_are_clean(tmp_path: Path, arguments: str, deep: bool) -> None:
    report = await check(BytesReader(qemu_convert(tmp_path, DISK, *arguments.split())), "qcow2", deep=deep)
    assert_clean(report)
    assert report.findings == () or "QEMU reads this" in report.findings[0].message
    assert report.data_blocks + report.packed_blocks > 0
    assert bool(report.packed_blocks) == ("-c" in arguments.split())


@pytest.mark.parametrize("disk", [DISK, HOLES], ids=["mixed", "holes"])
@pytest.mark.parametrize("format, options", OF_QEMU)
async def test_good_images_of_other_formats_are_clean(tmp_path: Path, format: str, options: str, disk: bytes) -> None:
    image, extents, expected = made_by_qemu(tmp_path, disk, format, options)
    for deep in (False, True):
        report = await check(BytesReader(image), format, deep=deep, extents=readers(extents))
        assert_clean(report)
        assert report.info is not None
        assert report.info.virtual_size == len(expected)
        assert all("geometry" in one.message for one in report.findings)
    info = await image_info(BytesReader(image), format, extents=readers(extents))
    assert info == report.info


async def test_good_archives_are_clean(tmp_path: Path) -> None:
    vmdk, _, _ = made_by_qemu(tmp_path, DISK, "vmdk", "subformat=streamOptimized")
    for archive in (made_ova(vmdk), made_ova(vmdk, format=tarfile.GNU_FORMAT)):
        report = await check(BytesReader(archive), "ova", deep=True)
        assert_clean(report)
        assert report.findings == ()
    report = await check(BytesReader(made_gce(DISK)), "gce", deep=True)
    assert_clean(report)
    assert "whole GiB" in report.findings[0].message


async def test_snapshots_and_bitmaps_are_counted(tmp_path: Path) -> None:
    qemu_convert(tmp_path, mixed_disk(5 * MiB))
    path = tmp_path / "image.qcow2"
    for name in ("one", "two"):
        run("qemu-img", "snapshot", "-c", name, str(path))
        run("qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 1M", "-c", "discard 3M 64k", str(path))
    run("qemu-img", "bitmap", "--add", str(path), "changes")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 8 2M 1M", str(path))
    report = await check(BytesReader(path.read_bytes()), "qcow2", deep=True)
    assert_clean(report)
    assert report.findings == ()
    assert report.info is not None
    assert dict(report.info.details)["snapshots"] == "2"
    assert report.info.flags == ("bitmaps",)
    strict = await check(BytesReader(path.read_bytes()), "qcow2", strict=True)
    assert strict.verdict == "corrupt"


@pytest.mark.parametrize("window", [64, 7, 1])
async def test_counting_in_windows_finds_what_counting_at_once_finds(tmp_path: Path, window: int) -> None:
    image = bytearray(qemu_convert(tmp_path, DISK, "-c", "-o", "cluster_size=64k"))
    reader = BytesReader(image)
    good = await check_qcow2(reader, deep=False, strict=False, window=window)
    assert_clean(good.report(deep=False))
    # Refcounts of the last clusters off by one.
    block = int.from_bytes(image[int.from_bytes(image[48:56], "big") :][:8], "big")
    last = len(image) // (64 * KiB) - 2
    image[block + last * 2 + 1] += 1
    image[block + 11] = 0
    damaged = BytesReader(image)
    once = await check_qcow2(damaged, deep=False, strict=False)
    again = await check_qcow2(damaged, deep=False, strict=False, window=window)
    assert {one.kind for one in once.report(deep=False).findings} == {"corruption", "leak"}
    assert set(again.report(deep=False).findings) == set(once.report(deep=False).findings)


async def test_blocks_that_overlap_are_found_in_every_window() -> None:
    import numpy as np

    starts = np.array([0, 4096, 8192, 8193, 40960, 100_000, 103_000], np.int64)
    guests = np.arange(7, dtype=np.int64) * 4096

    async def places():  # type: ignore[no-untyped-def]
        yield starts[:4], guests[:4]
        yield starts[4:], guests[4:]

    for items in (100, 3, 2):
        tally = Tally("vhd")
        await find_overlaps(places, 4096, 200_000, tally, items=items)
        assert [one.image_offset for one in tally.report(deep=False).findings] == [8193, 103_000]


async def test_a_check_costs_tables_only(tmp_path: Path) -> None:
    """A disk of 100 GiB with data here and there is checked by reading under 1 MiB."""
    path = tmp_path / "image.qcow2"
    run("qemu-img", "create", "-f", "qcow2", str(path), "100G")
    run("qemu-io", "-f", "qcow2", *(word for at in range(0, 100, 5) for word in ("-c", f"write {at}G 1M")), str(path))

    class Counting:
        def __init__(self, inner: object) -> None:
            self.inner = inner
            self.size: int = inner.size  # type: ignore[attr-defined]
            self.total = 0

        async def read(self, offset: int, length: int) -> bytes:
            self.total += length
            data: bytes = await self.inner.read(offset, length)  # type: ignore[attr-defined]
            return data

    async with open_file_reader(path) as reader:
        counting = Counting(reader)
        report = await check(counting, "qcow2")
    assert_clean(report)
    assert report.data_blocks == 20 * MiB // (64 * KiB)
    assert report.blocks == 100 * GiB // (64 * KiB)
    assert counting.total < 3 * MiB


async def test_what_is_not_read_here_cannot_be_checked_and_says_so(tmp_path: Path) -> None:
    run("qemu-img", "create", "-f", "qcow2", "-o", "extended_l2=on", str(tmp_path / "image"), "1M")
    with pytest.raises(UnsupportedError, match="subclusters"):
        await check(BytesReader((tmp_path / "image").read_bytes()), "qcow2")


@pytest.mark.parametrize("format", [one for one in FORMATS if one != "raw"])
async def test_rubbish_is_corrupt_in_every_format(format: str) -> None:
    for rubbish in (b"", b"x" * 3 * MiB):
        report = await check(BytesReader(rubbish), format, deep=True)
        assert report.verdict == "corrupt"
        assert not report.is_complete
        assert report.info is None


async def test_raw_disks_are_checked_for_partition_tables_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(8 * MiB))
    write_mbr(path, 8 * MiB)
    image = path.read_bytes()
    assert (await check(BytesReader(image), "raw", deep=True)).findings == ()
    cut = await check(BytesReader(image[: 4 * MiB]), "raw")
    assert "may be cut short" in cut.findings[0].message
    assert cut.verdict == "clean"
    odd = await check(BytesReader(image[:-1]), "raw")
    assert "not whole sectors" in odd.findings[0].message


async def test_a_gpt_without_its_second_copy_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(8 * MiB))
    run("sfdisk", "--no-reread", "--no-tell-kernel", "-X", "gpt", str(path), input="start=2048\n")
    image = path.read_bytes()
    assert (await check(BytesReader(image), "raw")).findings == ()
    cut = await check(BytesReader(image[: 7 * MiB]), "raw")
    assert any("second GPT lies behind the end" in one.message for one in cut.findings)
    damaged = await check(BytesReader(image[:-512] + bytes(512)), "raw")
    assert "second GPT is damaged" in damaged.findings[0].message
    assert (
        "GPT header is damaged" in (await check(BytesReader(image[:512] + bytes(8 * MiB)), "raw")).findings[0].message
    )
