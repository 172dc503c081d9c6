"""encode.vhd, proven by qemu-img, by 7zz and by a few lines that read its table."""

from __future__ import annotations

import struct
import uuid
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import PlanError
from pipeline.flow.buffers import loose_slice
from pipeline.flow.items import Block
from pipeline.flow.orders import Order
from pipeline.units import GiB, KiB, MiB, TiB
from stages.encode.vhd import DYNAMIC_MAX, SPEC, Options
from stages.encode.vhd_structures import geometry
from tests.encode.judges import compare, prove, run_to_file, write_raw
from tests.encode.lettered import WINDOW, Export, LetterDisk, disk, export, layout_of, make_encoder
from tests.encode.test_qcow2 import disks

DYNAMIC = Options()
FIXED = Options(variant="fixed")
ALL_KINDS = LetterDisk(
    (*disk("AB0-C.NAOS" * 3 + "A-").extents, ("-", 5 * WINDOW), *disk("AN-S0" * 40).extents, ("A", 5096))
)


class StrictVhd:
    """Reads guest sectors through the table of a dynamic VHD."""

    def __init__(self, image: Path) -> None:
        self.file = image.open("rb")
        self.end = image.stat().st_size
        self.header = struct.unpack(">8sQQIIII", self.at(512, 40))
        self.block = self.header[5]

    def at(self, offset: int, length: int) -> bytes:
        """Image bytes, all of them."""
        self.file.seek(offset)
        data = self.file.read(length)
        assert len(data) == length
        return data

    def read(self, offset: int, length: int) -> bytes:
        """Guest bytes inside one block."""
        number, inner = divmod(offset, self.block)
        (sector,) = struct.unpack(">I", self.at(self.header[2] + 4 * number, 4))
        if sector == 0xFFFFFFFF:
            return bytes(length)
        assert self.at(sector * 512, 512) == b"\xff" * 512
        return self.at(sector * 512 + 512 + inner, length)


def image_bytes(made: Export) -> bytes:
    """The whole image."""
    image = bytearray(made.length)
    for offset, _, data, _ in made.placed:
        if data is not None:
            image[offset : offset + len(data)] = data
    return bytes(image)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    source=disks,
    head_minimum=st.sampled_from((0, 0, 70_000, 5 * MiB)),
    window=st.sampled_from((256 * KiB, 2 * MiB, 4 * MiB)),
)
def test_dynamic_image_of_any_disk_is_identical(source: LetterDisk, head_minimum: int, window: int) -> None:
    """Windows of 256 KiB: a block is begun by one and ended by another."""
    prove(SPEC, DYNAMIC, source, "vpc", head_minimum=head_minimum, window=window)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(source=disks)
def test_fixed_image_of_any_disk_is_identical_and_as_long_as_said(source: LetterDisk) -> None:
    made = prove(SPEC, FIXED, source, "vpc")
    assert made.length == made.layout.image_bytes == made.layout.virtual_size + 512


@pytest.mark.parametrize("options", [DYNAMIC, FIXED])
def test_seven_zip_unpacks_the_disk(options: Options) -> None:
    prove(SPEC, options, ALL_KINDS, "vpc", kind="vhd")


@pytest.mark.parametrize("variant", ["dynamic", "fixed"])
async def test_chain_into_a_file_gives_the_disk(variant: str, tmp_path: Path) -> None:
    image = await run_to_file(tmp_path, f'encode.vhd; variant = "{variant}"', ALL_KINDS)
    compare(write_raw(ALL_KINDS, tmp_path / "padded", 25 * MiB), image, "vpc")


@pytest.mark.parametrize("options, kind, place", [(DYNAMIC, 3, 512), (FIXED, 2, 2**64 - 1)])
def test_footer_says_what_a_footer_must(options: Options, kind: int, place: int) -> None:
    image = image_bytes(export(SPEC, options, disk("A-N", 512 * KiB, cut=100)))
    footer = image[-512:]
    fields = struct.unpack(">8sIIQI4sI4sQQHBBII16s", footer[:84])
    assert fields[:5] == (b"conectix", 2, 0x10000, place, 0)
    assert fields[5] == b"qem2"
    assert fields[8:10] == (2 * MiB, 2 * MiB)
    assert fields[13] == kind
    assert fields[14] == ~(sum(footer) - sum(footer[64:68])) & 0xFFFFFFFF
    assert footer[84:] == bytes(428)
    if options is DYNAMIC:
        assert image[:512] == footer
        header = image[512:1536]
        fields = struct.unpack(">8sQQIIII", header[:40])
        assert fields[:6] == (b"cxsparse", 2**64 - 1, 1536, 0x10000, 1, 2 * MiB)
        assert struct.unpack(">I", header[36:40])[0] == ~(sum(header) - sum(header[36:40])) & 0xFFFFFFFF


@pytest.mark.parametrize(
    "size, expected",
    [
        (1 * MiB, (65535, 16, 255)),
        (17 * 4 * 8 * 512 * 8, (64, 4, 17)),  # exactly addressable
        (31 * 16 * 1000 * 512, (1000, 16, 31)),
        (63 * 16 * 4096 * 512, (4096, 16, 63)),
        (DYNAMIC_MAX, (65535, 16, 255)),
    ],
)
def test_geometry_gives_the_size_exactly_or_is_the_largest(size: int, expected: tuple[int, int, int]) -> None:
    assert geometry(size) == expected


def test_zero_block_is_not_stored_and_a_touched_one_is_stored_whole() -> None:
    source = LetterDisk((("-", 2 * MiB), ("A", 512), ("-", 2 * MiB - 512), ("0", 2 * MiB), ("N", 64 * KiB)))
    made = export(SPEC, DYNAMIC, source)
    assert made.length == 4096 + 2 * (4096 + 2 * MiB) + 512


def test_data_is_passed_on_from_where_it_lies_to_whole_pages_of_the_image() -> None:
    encoder, _ = make_encoder(SPEC, DYNAMIC, 2 * WINDOW)
    buffer = bytearray(b"a" * WINDOW)
    block = Block(0, WINDOW, loose_slice(buffer), disk("A", WINDOW).runs(0, WINDOW))
    prefix, data = encoder.place(encoder.prepare(block, None))
    buffer[:] = b"b" * WINDOW
    assert (prefix.offset, prefix.length) == (4096, 4096)
    assert (data.offset % 4096, data.length) == (0, WINDOW)
    assert bytes(data.view[:4]) == b"bbbb"


def test_zeros_inside_a_block_are_no_data() -> None:
    made = export(SPEC, DYNAMIC, disk("A-A" + "-" * 61))
    unit = 64 * KiB
    lengths = [(length, data is None) for _, length, data, _ in made.placed[:5]]
    assert lengths == [(4096, False), (unit, False), (unit, True), (unit, False), (29 * unit, True)]


def test_largest_disk_of_mostly_nothing_costs_only_its_table(tmp_path: Path) -> None:
    source = LetterDisk(
        (("A", 1 * MiB), ("-", 1 * TiB - 1 * MiB), ("N", 3 * MiB), ("-", 1016 * GiB - 4 * MiB), ("S", MiB))
    )
    assert source.size == DYNAMIC_MAX
    made = export(SPEC, DYNAMIC, source, head_minimum=5 * MiB, checkpoints=True)
    assert made.layout.head_length == 5 * MiB
    assert len(made.placed) < 40
    assert max(len(state) for _, _, state in made.checkpoints) < 4 * KiB
    reader = StrictVhd(made.write(tmp_path / "image"))
    for offset in (0, 1 * MiB, 1 * TiB, 1 * TiB + 2 * MiB, 1 * TiB + 3 * MiB, 2040 * GiB - 1 * MiB):
        expected = bytearray(4096)
        source.fill(offset, memoryview(expected))
        assert reader.read(offset, 4096) == expected
    reader.file.close()


def test_table_of_the_largest_disk_can_point_at_every_block() -> None:
    layout, _ = layout_of(SPEC, DYNAMIC, DYNAMIC_MAX)
    assert layout.image_bytes_max // 512 < 2**32
    assert layout.head_length < 5 * MiB  # fits the smallest part of a store


def test_disk_beyond_2040_gib_is_refused_as_dynamic_and_noted_as_fixed() -> None:
    with pytest.raises(PlanError, match="at most 2040") as refused:
        layout_of(SPEC, DYNAMIC, DYNAMIC_MAX + 1)
    assert "encode.vhdx" in refused.value.hint
    layout, _ = layout_of(SPEC, FIXED, 4 * TiB)
    assert "QEMU" in layout.notes[0]


def test_rounding_up_is_told() -> None:
    assert "rounded up from 1000 B" in layout_of(SPEC, DYNAMIC, 1000)[0].notes[0]
    assert layout_of(SPEC, DYNAMIC, 1 * MiB)[0].notes == ()


def test_orders_follow_from_the_variant() -> None:
    assert SPEC.orders_of(DYNAMIC) == (Order.HEAD_LAST,)
    assert SPEC.orders_of(FIXED) == (Order.SPARSE, Order.SEQUENTIAL)
    assert set(SPEC.orders_of(None)) == {Order.HEAD_LAST, Order.SPARSE, Order.SEQUENTIAL}


@pytest.mark.parametrize("variant", ["dynamic", "fixed"])
def test_fresh_identifiers_differ_and_travel_in_the_checkpoint(variant: str) -> None:
    options = Options(variant=variant, reproducible=False)  # type: ignore[arg-type]  # a text that is one of the two
    source = disk("A-N", WINDOW)
    first, other = (export(SPEC, options, source, checkpoints=True) for _ in range(2))
    ids = {image_bytes(made)[-512 + 68 : -512 + 84] for made in (first, other)}
    assert len(ids) == 2
    assert all(uuid.UUID(bytes=one).int for one in ids)
    placed, since, state = first.checkpoints[0]
    assert export(SPEC, options, source, resume=(placed, state)).digest() == first.digest(since)
