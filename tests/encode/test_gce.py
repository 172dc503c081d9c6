"""encode.gce, proven by Python's tarfile and gzip, by tar, and by 7zz."""

from __future__ import annotations

import gzip
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import pytest
from isal import igzip

from pipeline.flow.items import Block
from pipeline.flow.orders import Order
from pipeline.units import GiB, KiB, MiB, TiB
from stages.encode.gce import SPEC, Options, longest_member
from stages.encode.gzip_zeros import zero_member
from stages.encode.tar import archive_end, member_header
from tests.encode.judges import run_to_file, write_raw
from tests.encode.lettered import WINDOW, disk, export, layout_of, make_encoder
from tests.encode.test_vhd import ALL_KINDS, image_bytes


@pytest.mark.parametrize("level", ["fast", "small"])
def test_archive_holds_the_disk_rounded_up_to_whole_gibibytes(level: str, tmp_path: Path) -> None:
    made = export(SPEC, Options(level=level), ALL_KINDS)  # type: ignore[arg-type]  # a text that is one of the two
    assert made.length <= made.layout.image_bytes_max
    image = made.write(tmp_path / "image.tar.gz")
    raw = write_raw(ALL_KINDS, tmp_path / "disk.raw", 1 * GiB)
    with igzip.open(image) as archive, raw.open("rb") as disk_file:  # type: ignore[no-untyped-call]
        member = tarfile.TarInfo.frombuf(archive.read(512), "ascii", "strict")
        assert (member.name, member.size, member.type) == ("disk.raw", 1 * GiB, tarfile.REGTYPE)
        assert (member.mode, member.mtime) == (0o644, 0)
        for _ in range(256):
            assert archive.read(4 * MiB) == disk_file.read(4 * MiB)
        end = archive.read()
    assert end == bytes(len(end))
    assert (512 + 1 * GiB + len(end)) % 10240 == 0


async def test_chain_into_a_file_gives_an_archive_that_tar_unpacks(tmp_path: Path) -> None:
    image = await run_to_file(tmp_path, "encode.gce", ALL_KINDS)
    raw = write_raw(ALL_KINDS, tmp_path / "padded", 1 * GiB)
    command = f'"{sys.executable}" -m isal.igzip -dc < "{image}" | tar -xOf - disk.raw | cmp - "{raw}"'
    subprocess.run(command, shell=True, check=True)


@pytest.mark.slow
def test_gzip_itself_takes_the_chain_of_members(tmp_path: Path) -> None:
    image = export(SPEC, Options(), ALL_KINDS).write(tmp_path / "image.tar.gz")
    subprocess.run(["gzip", "-t", image], check=True)
    names = subprocess.run(["tar", "-tzf", image], check=True, capture_output=True, text=True).stdout
    assert names == "disk.raw\n"


def test_every_window_is_a_member_of_its_own() -> None:
    made = export(SPEC, Options(), disk("A-N" * 40 + "A"))
    for _, _, data, _ in made.placed[:-1]:  # the last is zeros of nearly a GiB
        stream = zlib.decompressobj(31)
        assert data is not None
        while data:
            data = stream.unconsumed_tail if stream.decompress(data, 16 * MiB) and stream.unconsumed_tail else b""
        assert stream.eof


@pytest.mark.parametrize("length", [1, 100, MiB - 1, MiB, 3 * MiB + 5, 64 * MiB])
def test_member_of_zeros_unpacks_to_them(length: int) -> None:
    member = zero_member(length)
    assert gzip.decompress(member) == bytes(length)
    assert len(member) <= length // 900 + 40


def test_huge_hole_costs_a_thousandth_and_shares_one_member() -> None:
    encoder, _ = make_encoder(SPEC, Options(), 8 * TiB)
    hole = Block(0, 8 * TiB, None, disk("-", 8 * TiB).runs(0, 8 * TiB))
    placed = encoder.place(encoder.prepare(hole, None))
    assert sum(piece.length for piece in placed) < 8 * TiB // 1000
    assert sum(piece.guest_bytes for piece in placed) == 8 * TiB
    assert len({id(piece.data) for piece in placed}) == 2  # the tar header is the other


@pytest.mark.parametrize("level", ["fast", "small"])
@pytest.mark.parametrize("window", [64 * KiB, 2 * MiB, 4 * MiB])
def test_noise_is_no_longer_than_planned(level: str, window: int) -> None:
    source = disk("NOPQ", 1 * MiB, cut=37)
    made = export(SPEC, Options(level=level), source, window=window)  # type: ignore[arg-type]  # as above
    assert made.length <= made.layout.image_bytes_max
    assert longest_member(window) == made.layout.made_max


def test_whole_gibibytes_are_told_and_so_is_a_disk_too_large_to_boot() -> None:
    assert layout_of(SPEC, Options(), 3 * GiB)[0].notes == ()
    layout, _ = layout_of(SPEC, Options(), 3 * GiB + 1)
    assert layout.virtual_size == 4 * GiB
    assert "whole GiB" in layout.notes[0]
    assert "boots" in layout_of(SPEC, Options(), 3 * TiB)[0].notes[-1]


def test_stream_needs_no_patch() -> None:
    assert SPEC.gives.orders == (Order.SEQUENTIAL,)


@pytest.mark.parametrize("size", [0, 1, 8 * GiB - 1, 8 * GiB, 64 * TiB])
@pytest.mark.parametrize("dialect, magic", [("oldgnu", tarfile.GNU_MAGIC), ("ustar", tarfile.POSIX_MAGIC)])
def test_tar_header_of_any_size_is_read_by_others(size: int, dialect: str, magic: bytes) -> None:
    header = member_header("disk.raw", size, dialect=dialect, time=1_000_000_000)  # type: ignore[arg-type]  # as above
    found = tarfile.TarInfo.frombuf(header, "ascii", "strict")
    assert (found.name, found.size, found.mtime, found.mode, found.uid) == ("disk.raw", size, 10**9, 0o644, 0)
    assert header[257:265] == magic


@pytest.mark.parametrize("length", [0, 512, 9216, 9728, 10240, 1 * GiB + 512])
def test_archive_ends_with_two_blocks_on_a_whole_record(length: int) -> None:
    zeros = archive_end(length)
    assert zeros >= 1024
    assert (length + zeros) % 10240 == 0
    assert zeros < 1024 + 10240


def test_fresh_time_travels_in_the_checkpoint() -> None:
    options, source = Options(reproducible=False), disk("A-N", WINDOW)
    first = export(SPEC, options, source, checkpoints=True)
    assert image_bytes(first) != image_bytes(export(SPEC, Options(), source))
    placed, since, state = first.checkpoints[0]
    assert export(SPEC, options, source, resume=(placed, state)).digest() == first.digest(since)
