"""encode.raw: the image is the disk."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given, settings

from pipeline.flow.buffers import loose_slice
from pipeline.flow.items import Block
from pipeline.flow.orders import Order
from pipeline.units import KiB
from stages.encode.raw import SPEC, Options
from tests.encode.lettered import WINDOW, LetterDisk, disk, export, make_encoder
from tests.encode.test_qcow2 import disks


@settings(max_examples=20, deadline=None)
@given(source=disks)
def test_image_is_the_disk_padded_to_whole_sectors(source: LetterDisk) -> None:
    made = export(SPEC, Options(), source)
    image = bytearray(made.length)
    for offset, length, data, _ in made.placed:
        image[offset : offset + length] = data if data is not None else bytes(length)
    expected = bytearray(source.size)
    source.fill(0, memoryview(expected))
    assert image == bytes(expected) + bytes(-source.size % 512)
    assert made.layout.image_bytes == made.length
    assert made.guest_bytes == source.size


def test_neighbouring_runs_of_equal_content_become_one_piece() -> None:
    made = export(SPEC, Options(), disk("AB0--C0." + "-" * 24))
    unit = 64 * KiB
    assert [(length // unit, data is None) for _, length, data, _ in made.placed] == [
        (2, False),
        (3, True),
        (1, False),
        (1, True),
        (1, False),
        (24, True),
    ]


def test_window_is_passed_on_without_a_copy() -> None:
    encoder, _ = make_encoder(SPEC, Options(), WINDOW)
    buffer = bytearray(b"a" * WINDOW)
    block = Block(0, WINDOW, loose_slice(buffer), disk("A", WINDOW).runs(0, WINDOW))
    (piece,) = encoder.place(encoder.prepare(block, None))
    buffer[:] = b"b" * WINDOW
    assert bytes(piece.view[:4]) == b"bbbb"


def test_pad_to_the_next_sector_is_no_part_of_the_disk() -> None:
    made = export(SPEC, Options(), disk("A", 1000))
    assert [(offset, length, guest) for offset, length, _, guest in made.placed] == [(0, 1000, 1000), (1000, 24, 0)]


def test_sparse_sinks_are_served_best() -> None:
    assert SPEC.gives.orders == (Order.SPARSE, Order.SEQUENTIAL)


def test_image_written_sparsely_reads_as_the_disk(tmp_path: Path) -> None:
    source = disk("A-0N" * 20 + "-A", cut=100)
    raw = tmp_path / "disk.raw"
    source.write(raw)
    assert export(SPEC, Options(), source).write(tmp_path / "image.raw").read_bytes() == raw.read_bytes()
