"""encode.vmdk, proven by qemu-img, by 7zz and by a few lines that walk through the stream."""

from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import PlanError, StageError
from pipeline.flow.buffers import Ledger, Pool
from pipeline.flow.items import Block
from pipeline.flow.orders import Order
from pipeline.units import GiB, KiB, MiB, TiB
from stages.encode import vmdk_stream
from stages.encode.codecs import zlib_stream
from stages.encode.vmdk import SPEC, Options
from stages.encode.vmdk_structures import file_name
from tests.encode.judges import check, compare, prove, run_to_file, write_raw
from tests.encode.lettered import WINDOW, LetterDisk, disk, export, layout_of, make_encoder
from tests.encode.test_qcow2 import disks
from tests.encode.test_vhd import ALL_KINDS, image_bytes

STREAM = Options()
SMALL = Options(level="small")
SPARSE = Options(variant="monolithicSparse")


def walk(image: bytes) -> tuple[dict[int, bytes], list[tuple[int, int]]]:
    """The stream from its first grain to its end, strictly: (grains by number, (kind, sector) of every marker)."""
    grains: dict[int, bytes] = {}
    markers: list[tuple[int, int]] = []
    position = 128 * 512
    while position < len(image):
        sectors, size, kind = struct.unpack("<QII", image[position : position + 16])
        if size:
            assert sectors % 128 == 0
            assert not grains or sectors // 128 > max(grains)
            assert 12 + size <= 66_048
            stream = image[position + 12 : position + 12 + size]
            grain = zlib.decompress(stream)
            assert len(grain) == 64 * KiB
            grains[sectors // 128] = grain
            length = -(-(12 + size) // 512) * 512
            assert image[position + 12 + size : position + length] == bytes(length - 12 - size)
            position += length
        else:
            assert image[position + 16 : position + 512] == bytes(496)
            markers.append((kind, position // 512))
            position += (1 + sectors) * 512
    assert position == len(image)
    return grains, markers


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    source=disks,
    options=st.sampled_from((STREAM, SMALL, SPARSE)),
    window=st.sampled_from((64 * KiB, 2 * MiB, 4 * MiB)),
    head_minimum=st.sampled_from((0, 0, 5 * MiB)),
)
def test_image_of_any_disk_is_clean_and_identical(
    source: LetterDisk, options: Options, window: int, head_minimum: int
) -> None:
    prove(SPEC, options, source, "vmdk", window=window, head_minimum=head_minimum)


@pytest.mark.parametrize("options", [STREAM, SMALL, SPARSE])
def test_seven_zip_unpacks_the_disk(options: Options) -> None:
    prove(SPEC, options, ALL_KINDS, "vmdk", kind="vmdk")


@pytest.mark.parametrize("variant", ["streamOptimized", "monolithicSparse"])
async def test_chain_into_a_file_gives_the_disk(variant: str, tmp_path: Path) -> None:
    image = await run_to_file(tmp_path, f'encode.vmdk; variant = "{variant}"', ALL_KINDS)
    check(image, "vmdk")
    compare(write_raw(ALL_KINDS, tmp_path / "padded", 25 * MiB), image, "vmdk")


def test_stream_has_ascending_grains_and_a_table_behind_every_32_mib_that_hold_data() -> None:
    source = LetterDisk(
        (
            ("A", 1 * MiB),
            ("-", 31 * MiB),
            ("-", 64 * MiB),  # two tables of nothing
            ("N", 64 * KiB),
            ("-", 32 * MiB - 128 * KiB),
            ("S", 64 * KiB),
            ("A", 100),
        )
    )
    image = image_bytes(export(SPEC, STREAM, source))
    grains, markers = walk(image)
    assert sorted(grains) == [*range(16), 1536, 2047, 2048]
    assert grains[2048][100:] == bytes(64 * KiB - 100)
    assert [kind for kind, _ in markers] == [1, 1, 1, 2, 3, 0]
    tables = [sector + 1 for kind, sector in markers if kind == 1]
    directory = markers[3][1] + 1
    entries = struct.unpack("<5I", image[directory * 512 : directory * 512 + 20])
    assert entries == (tables[0], 0, 0, tables[1], tables[2])
    last = struct.unpack("<512I", image[tables[1] * 512 : (tables[1] + 4) * 512])
    assert [number for number, sector in enumerate(last) if sector] == [0, 511]
    assert struct.unpack("<Q", image[last[511] * 512 : last[511] * 512 + 8]) == (2047 * 128,)


def test_header_and_footer_are_what_importers_check() -> None:
    image = image_bytes(export(SPEC, STREAM, disk("A-N", 512 * KiB)))
    header, footer = image[:512], image[-1024:-512]
    fields = struct.unpack("<4sIIQQQQIQQQB4sH", header[:79])
    assert fields == (b"KDMV", 3, 0x30001, 4096, 128, 1, 20, 512, 0, 2**64 - 1, 128, 0, b"\n \r\n", 1)
    assert header[79:] == bytes(433)
    assert header[:56] + header[64:] == footer[:56] + footer[64:]
    assert image[-512:] == bytes(512)
    assert struct.unpack("<QII", image[-1536:-1520]) == (1, 0, 3)
    (directory,) = struct.unpack("<Q", footer[56:64])
    assert struct.unpack("<QII", image[directory * 512 - 512 : directory * 512 - 496]) == (1, 0, 2)


@pytest.mark.parametrize("options", [STREAM, SPARSE, Options(adapter="ide")])
def test_descriptor_has_only_lines_that_strict_readers_know(options: Options) -> None:
    image = image_bytes(export(SPEC, options, disk("A-N", 512 * KiB)))
    text = image[512 : 21 * 512].rstrip(b"\0").decode("ascii")
    lines = text.splitlines()
    assert lines[0] == "# Disk DescriptorFile"
    for line in lines:
        assert re.fullmatch(r'#.*|ddb\.\S+ = ".*"|\w+=\S+|RW 4096 SPARSE "disk\.vmdk"|', line), line
    assert f'createType="{options.variant}"' in lines
    heads, cylinders = (16, 4) if options.adapter == "ide" else (255, 1)
    assert f'ddb.geometry.heads = "{heads}"' in lines
    assert f'ddb.geometry.cylinders = "{cylinders}"' in lines
    assert int(re.findall("^CID=([0-9a-f]{8})$", text, re.M)[0], 16) < 0xFFFFFFFE


@pytest.mark.parametrize(
    "name, expected",
    [("web01", "web01"), ("../../etc/passwd", "etc_passwd"), ('a"b\nc', "a_b_c"), ("", "disk"), ("ü" * 99, "disk")],
)
def test_extent_is_never_named_like_a_path(name: str, expected: str) -> None:
    assert file_name(name) == expected


@pytest.mark.parametrize("level", ["fast", "small"])
def test_noise_stays_below_what_the_reader_of_vmware_takes(level: Any) -> None:
    source = bytearray(64 * KiB)
    for start in range(40):
        disk("N", 4 * MiB).fill(start * 64 * KiB, memoryview(source))
        assert 12 + len(zlib_stream(level).compress(bytes(source))) <= 66_048


def test_disk_of_noise_is_no_longer_than_the_layout_allows() -> None:
    made = export(SPEC, STREAM, disk("NOPQR", 800 * KiB, cut=37))
    assert made.layout.image_bytes_max - 64 * 63 * 512 <= made.length <= made.layout.image_bytes_max


def test_small_is_smaller_than_fast() -> None:
    lengths = [export(SPEC, options, disk("ABC" * 11)).length for options in (SMALL, STREAM)]
    assert lengths[0] < lengths[1]


async def test_compressing_gives_the_buffer_back_and_charges_only_what_was_made() -> None:
    encoder, layout = make_encoder(SPEC, STREAM, WINDOW)
    pool, ledger = Pool(WINDOW, 1), Ledger(layout.made_max)
    lease = await pool.lease()
    disk("S" * 32).fill(0, lease.buffer)
    block = Block(0, WINDOW, lease.into_slice(WINDOW), disk("S" * 32).runs(0, WINDOW))
    prepared = encoder.prepare(block, await ledger.charge(layout.made_max))
    assert pool.in_use == 0
    assert 0 < ledger.charged <= 32 * 512
    for piece in encoder.place(prepared):
        piece.release()
    assert ledger.charged == 0
    pool.close()


async def test_codec_that_fails_gives_buffer_and_charge_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.encode import codecs

    def refuse(grain: object) -> bytes:
        raise MemoryError("no room")

    monkeypatch.setattr(codecs, "zlib_stream", lambda level: codecs.Codec("refusing", refuse))
    encoder, layout = make_encoder(SPEC, STREAM, WINDOW)
    pool, ledger = Pool(WINDOW, 1), Ledger(layout.made_max)
    block = Block(0, WINDOW, (await pool.lease()).into_slice(WINDOW), disk("A" * 32).runs(0, WINDOW))
    with pytest.raises(MemoryError):
        encoder.prepare(block, await ledger.charge(layout.made_max))
    assert (pool.in_use, ledger.charged) == (0, 0)
    pool.close()


def test_stream_that_outgrows_its_tables_is_stopped_not_wrapped_around(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vmdk_stream, "IMAGE_MAX", 1 * MiB)
    with pytest.raises(StageError, match="2 TiB") as stopped:
        export(SPEC, STREAM, disk("NOPQ" * 8))
    assert "encode.qcow2" in stopped.value.hint


def test_disk_that_may_outgrow_the_tables_is_planned_with_a_note() -> None:
    layout, _ = layout_of(SPEC, STREAM, 8 * TiB)
    assert any("can't grow beyond 2 TiB" in note for note in layout.notes)
    assert 2 * TiB < layout.image_bytes_max < 2 * TiB + 2 * MiB
    assert layout_of(SPEC, STREAM, 1 * TiB)[0].notes == ()
    with pytest.raises(PlanError, match="beyond 62 TiB") as refused:
        layout_of(SPEC, STREAM, 62 * TiB + 1)
    assert "encode.vhdx" in refused.value.hint


def test_eight_tebibytes_of_mostly_nothing_cost_only_the_directory() -> None:
    source = LetterDisk((("A", 1 * MiB), ("-", 8 * TiB - 2 * MiB), ("N", 1 * MiB)))
    made = export(SPEC, STREAM, source, checkpoints=True)
    assert made.length < 4 * MiB
    assert max(len(state) for _, _, state in made.checkpoints) < 64 * KiB
    grains, _ = walk(image_bytes(made))
    assert sorted(grains) == [*range(16), *range(2**27 - 16, 2**27)]


def test_sparse_image_has_both_directories_where_vmware_computes_them() -> None:
    """5 GiB: two grain directories of 160 tables each, all of them there, most of them empty."""
    source = LetterDisk((("A", 1 * MiB), ("-", 5 * GiB - 2 * MiB), ("N", 1 * MiB)))
    made = export(SPEC, SPARSE, source)
    image = image_bytes(made)
    fields = struct.unpack("<4sIIQQQQIQQQB4sH", image[:79])
    capacity, second, directory, overhead = fields[3], fields[8], fields[9], fields[10]
    assert fields[:3] == (b"KDMV", 1, 3)
    assert (capacity, second, directory) == (5 * GiB // 512, 21, 21 + 2 + 4 * 160)
    assert overhead * 512 == made.layout.head_length
    tables = []
    for start in (second, directory):
        entries = struct.unpack("<160I", image[start * 512 : start * 512 + 640])
        assert entries == tuple(range(start + 2, start + 2 + 4 * 160, 4))
        tables.append(image[entries[0] * 512 : (entries[-1] + 4) * 512])
    assert tables[0] == tables[1]
    places = [sector for sector in struct.unpack(f"<{160 * 512}I", tables[0]) if sector]
    assert places == list(range(overhead, overhead + 32 * 128, 128))
    assert image[places[-1] * 512 :] == image_bytes(export(SPEC, SPARSE, disk("N", 1 * MiB)))[-64 * KiB :]


def test_sparse_variant_wants_free_access_and_takes_a_late_head_only_where_it_is_short() -> None:
    assert SPEC.orders_of(SPARSE) == (Order.RANDOM, Order.HEAD_LAST)
    assert SPEC.orders_of(STREAM) == (Order.SEQUENTIAL,)
    assert layout_of(SPEC, SPARSE, 127 * GiB, order=Order.HEAD_LAST)[0].head_length <= 16 * MiB
    with pytest.raises(PlanError, match="16 MiB are allowed") as refused:
        layout_of(SPEC, SPARSE, 128 * GiB, order=Order.HEAD_LAST)
    assert "streamOptimized" in refused.value.hint
    assert layout_of(SPEC, SPARSE, 1 * TiB)[0].head_length > 128 * MiB


def test_sparse_image_of_two_tebibytes_is_refused() -> None:
    with pytest.raises(PlanError, match="outgrow the 2 TiB") as refused:
        layout_of(SPEC, SPARSE, 2 * TiB)
    assert "streamOptimized" in refused.value.hint


def test_fresh_content_id_differs_and_travels_in_the_checkpoint() -> None:
    options, source = Options(reproducible=False), disk("A-N", WINDOW)
    first, other = (export(SPEC, options, source, checkpoints=True) for _ in range(2))
    assert image_bytes(first)[512:1024] != image_bytes(other)[512:1024]
    placed, since, state = first.checkpoints[0]
    assert export(SPEC, options, source, resume=(placed, state)).digest() == first.digest(since)
