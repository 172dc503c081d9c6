"""encode.vhdx, proven by qemu-img, by 7zz and by a few lines that read its table."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from awscrt import checksums
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import PlanError
from pipeline.flow.orders import Order
from pipeline.units import GiB, KiB, MiB, TiB
from stages.encode.vhdx import SPEC, Options
from tests.encode.judges import check, compare, prove, run_to_file, write_raw
from tests.encode.lettered import WINDOW, LetterDisk, disk, export, layout_of
from tests.encode.test_qcow2 import disks
from tests.encode.test_vhd import ALL_KINDS, image_bytes


class StrictVhdx:
    """Reads guest bytes through the table of a VHDX."""

    def __init__(self, image: Path, block: int) -> None:
        self.file = image.open("rb")
        self.block = block

    def at(self, offset: int, length: int) -> bytes:
        """Image bytes, all of them."""
        self.file.seek(offset)
        data = self.file.read(length)
        assert len(data) == length
        return data

    def read(self, offset: int, length: int) -> bytes:
        """Guest bytes inside one block."""
        number, inner = divmod(offset, self.block)
        place = number + number // (2**32 // self.block)
        (entry,) = struct.unpack("<Q", self.at(3 * MiB + 8 * place, 8))
        if entry == 2:
            return bytes(length)
        assert entry % MiB == 6
        return self.at(entry // MiB * MiB + inner, length)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    source=disks,
    head_minimum=st.sampled_from((0, 0, 5 * MiB)),
    window=st.sampled_from((256 * KiB, 2 * MiB, 4 * MiB)),
)
def test_image_of_any_disk_is_clean_and_identical(source: LetterDisk, head_minimum: int, window: int) -> None:
    prove(SPEC, Options(), source, "vhdx", head_minimum=head_minimum, window=window)


def test_seven_zip_unpacks_the_disk() -> None:
    prove(SPEC, Options(), ALL_KINDS, "vhdx", kind="vhdx")


async def test_chain_into_a_file_gives_the_disk(tmp_path: Path) -> None:
    image = await run_to_file(tmp_path, "encode.vhdx", ALL_KINDS)
    check(image, "vhdx")
    compare(write_raw(ALL_KINDS, tmp_path / "padded", 25 * MiB), image, "vhdx")


def test_structures_carry_the_checksums_that_readers_verify() -> None:
    image = image_bytes(export(SPEC, Options(), disk("A-N", 512 * KiB)))
    assert image[:8] == b"vhdxfile"
    for offset, length, magic in (
        (64 * KiB, 4096, b"head"),
        (128 * KiB, 4096, b"head"),
        (192 * KiB, 64 * KiB, b"regi"),
        (256 * KiB, 64 * KiB, b"regi"),
    ):
        part = bytearray(image[offset : offset + length])
        assert part[:4] == magic
        (stored,) = struct.unpack("<I", part[4:8])
        part[4:8] = bytes(4)
        assert checksums.crc32c(bytes(part)) == stored
    sequences = [struct.unpack("<Q", image[offset + 8 : offset + 16])[0] for offset in (64 * KiB, 128 * KiB)]
    assert sequences == [1, 2]
    assert image[64 * KiB + 48 : 64 * KiB + 64] == bytes(16)  # no log to replay
    assert image[1 * MiB : 2 * MiB] == bytes(1 * MiB)


def test_block_that_reads_as_zero_is_said_to_be_zero_not_undefined() -> None:
    image = image_bytes(export(SPEC, Options(), disk("-A-0", 2 * MiB)))
    assert struct.unpack("<5Q", image[3 * MiB : 3 * MiB + 40]) == (2, 4 * MiB | 6, 2, 2, 0)


@pytest.mark.parametrize(
    "size, block",
    [(6 * GiB, 2 * MiB), (1 * TiB, 2 * MiB), (2 * TiB, 4 * MiB), (16 * TiB, 32 * MiB), (64 * TiB, 128 * MiB)],
)
def test_table_finds_every_block_of_a_large_disk(size: int, block: int, tmp_path: Path) -> None:
    """Behind every 4 GiB of disk stands an entry that is no block's, and large blocks span windows."""
    third = size // 3 // WINDOW * WINDOW
    tail = 3 * WINDOW
    source = LetterDisk(
        (
            ("A", 1 * MiB),
            ("-", third - 1 * MiB),
            ("N", 3 * WINDOW),
            ("-", size - third - 3 * WINDOW - tail),
            ("S", tail - 1 * MiB),
            ("N", 1 * MiB),
        )
    )
    made = export(SPEC, Options(), source, head_minimum=5 * MiB, checkpoints=True)
    assert len(made.placed) < 60
    assert max(len(state) for _, _, state in made.checkpoints) < 8 * KiB
    image = made.write(tmp_path / "image")
    check(image, "vhdx")
    reader = StrictVhdx(image, block)
    near = (
        0,
        4096,
        1 * MiB,
        4 * GiB - 4096,
        4 * GiB,
        third - 4096,
        third,
        third + 3 * WINDOW - 4096,
        third + 3 * WINDOW,
    )
    for offset in (*near, size // 2, size - tail - 4096, size - tail, size - 4096):
        expected = bytearray(4096)
        source.fill(offset, memoryview(expected))
        assert reader.read(offset, 4096) == expected, offset
    reader.file.close()
    stored = (made.length - made.layout.head_length) // block
    assert stored <= 2 + 2 * (1 + 3 * WINDOW // block)


def test_block_that_spans_windows_is_begun_once_and_filled_with_zero_pieces() -> None:
    """Blocks of 128 MiB: data in the first window and in the third, and holes around them."""
    source = LetterDisk(
        (
            ("-", WINDOW),
            ("A", 64 * KiB),
            ("-", 2 * WINDOW - 64 * KiB),
            ("A", 64 * KiB),
            ("-", 64 * TiB - 3 * WINDOW - 64 * KiB),
        )
    )
    made = export(SPEC, Options(), source)
    head = made.layout.head_length
    body = [(offset - head, length, data is None) for offset, length, data, _ in made.placed if offset >= head]
    unit = 64 * KiB
    assert body == [
        (0, WINDOW, True),
        (WINDOW, unit, False),
        (WINDOW + unit, 2 * WINDOW - unit, True),
        (3 * WINDOW, unit, False),
        (3 * WINDOW + unit, 128 * MiB - 3 * WINDOW - unit, True),
    ]


def test_disk_beyond_64_tib_is_refused() -> None:
    with pytest.raises(PlanError, match="at most 64 TiB") as refused:
        layout_of(SPEC, Options(), 64 * TiB + 1)
    assert "encode.qcow2" in refused.value.hint


def test_head_comes_last_and_is_as_long_as_a_store_wants() -> None:
    assert SPEC.orders_of(Options()) == (Order.HEAD_LAST,)
    assert layout_of(SPEC, Options(), 1 * GiB)[0].head_length == 4 * MiB
    assert layout_of(SPEC, Options(), 1 * GiB, head_minimum=5 * MiB)[0].head_length == 5 * MiB
    assert layout_of(SPEC, Options(), 1 * GiB, head_minimum=5 * MiB + 1)[0].head_length == 6 * MiB
