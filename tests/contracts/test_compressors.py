"""What every compressor of the catalog promises, whatever its codec."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import PlanError, StageError
from pipeline.flow.items import ImageWindow, Piece
from pipeline.flow.stage import PIECES_IN_SEQUENCE, StageSpec
from pipeline.units import MiB
from stages.catalog import CATALOG
from stages.compress.index import FrameIndex
from tests.compress.streams import WINDOW, Stream, compress, cut, make_compressor, mixed_image
from tests.decode.images import BytesReader

TOOLS = {"compress.lz4": "lz4", "compress.zstd": "zstd", "compress.gzip": "gzip"}


@dataclass(frozen=True)
class Variant:
    """One compressor with options."""

    spec: StageSpec
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join([self.spec.name, *(str(value) for value in self.options.values())])

    @property
    def made_options(self) -> Any:
        """The options as the stage takes them."""
        return self.spec.options(**self.options)


def _variants() -> Iterator[Variant]:
    for spec in CATALOG:
        if spec.role == "compress":
            yield Variant(spec)
            yield Variant(spec, {"level": "small"})


@pytest.fixture(scope="module", params=tuple(_variants()), ids=str)
def variant(request: pytest.FixtureRequest) -> Variant:
    """Every compressor with every level."""
    found: Variant = request.param
    return found


@pytest.fixture(scope="module")
def stream(variant: Variant) -> Stream:
    """What it makes of the mixed image."""
    return compress(variant.spec, variant.made_options, mixed_image())


def test_compressor_resumed_in_a_new_process_after_any_window_makes_the_same_stream(
    variant: Variant, stream: Stream
) -> None:
    assert len(stream.checkpoints) >= 5
    request = {
        "stage": variant.spec.name,
        "options": variant.options,
        "checkpoints": [(offset, base64.b64encode(state).decode()) for offset, _, state in stream.checkpoints],
    }
    answer = subprocess.run(
        [sys.executable, "-m", "tests.contracts.resumed_compressor"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert json.loads(answer.stdout) == [stream.digest(since) for _, since, _ in stream.checkpoints]


def test_the_standard_tool_unpacks_the_stream(variant: Variant, stream: Stream, tmp_path: Path) -> None:
    packed = tmp_path / "image"
    packed.write_bytes(stream.data)
    tool = TOOLS[variant.spec.name]
    unpacked = subprocess.run([tool, "-dc"], input=packed.read_bytes(), capture_output=True, check=True).stdout
    assert unpacked == mixed_image()


def test_stream_does_not_depend_on_the_order_in_which_windows_are_prepared(variant: Variant, stream: Stream) -> None:
    assert compress(variant.spec, variant.made_options, mixed_image(), shuffled=True).data == stream.data


def test_stream_does_not_depend_on_how_the_image_is_cut_into_pieces(variant: Variant, stream: Stream) -> None:
    image = mixed_image()
    for seed in (7, 8):
        pieces = list(cut(image, seed=seed))
        assert compress(variant.spec, variant.made_options, image, pieces=pieces).data == stream.data


def test_guest_bytes_are_conserved(stream: Stream) -> None:
    assert stream.guest_bytes == len(mixed_image())


def test_every_slice_and_charge_is_given_back(stream: Stream) -> None:
    assert stream.leaked == 0


def test_stream_of_noise_is_no_longer_than_the_layout_said(variant: Variant, stream: Stream) -> None:
    import random

    noise = random.Random(3).randbytes(5 * MiB + 1)
    made = compress(variant.spec, variant.made_options, noise)
    assert len(made.data) <= made.layout.image_bytes_max
    assert len(stream.data) <= stream.layout.image_bytes_max


def test_index_tells_where_every_frame_is(variant: Variant, stream: Stream) -> None:
    assert stream.index is not None
    again = FrameIndex.from_json(json.loads(json.dumps(stream.index.to_json())))
    assert again == stream.index
    tool, position, image = TOOLS[variant.spec.name], 0, mixed_image()
    assert again.size == len(image)
    for number, length in enumerate(again.lengths):
        if number in (0, 3, len(again.lengths) - 1):
            frame = bytes(stream.data[position : position + length])
            unpacked = subprocess.run([tool, "-dc"], input=frame, capture_output=True, check=True).stdout
            assert unpacked == image[number * WINDOW : (number + 1) * WINDOW]
        position += length


async def test_our_reader_reads_any_range(variant: Variant, stream: Stream) -> None:
    from stages.decode.opening import open_image

    image = mixed_image()
    reader = BytesReader(bytes(stream.data))
    opened = await open_image(reader, f"raw+{TOOLS[variant.spec.name]}", strict=True, index=stream.index)
    assert opened.size == len(image)
    for offset, length in ((0, 10), (WINDOW - 5, 10), (3 * WINDOW, 2 * WINDOW), (len(image) - 7, 7), (5, 5 * MiB)):
        assert await opened.read(offset, length) == image[offset : offset + length]


def test_window_out_of_order_is_refused(variant: Variant) -> None:
    compressor, _, _ = make_compressor(variant.spec, variant.made_options, 4 * WINDOW)
    with pytest.raises(StageError, match="do not come in order"):
        compressor.place(compressor.prepare(ImageWindow(WINDOW, WINDOW, [], WINDOW), None))


def test_hole_of_terabytes_takes_no_compressing(variant: Variant) -> None:
    """Its frames come from memory: a piece holds many of them."""
    size = 256 << 30
    compressor, layout, _ = make_compressor(variant.spec, variant.made_options, size)
    placed = list(compressor.place(compressor.prepare(ImageWindow(0, size, [], size), None)))
    assert sum(piece.guest_bytes for piece in placed) == size
    assert sum(piece.length for piece in placed) == compressor.position <= layout.image_bytes_max
    assert len(placed) == size // WINDOW // 64


def test_stage_declares_itself_in_sequence(variant: Variant) -> None:
    assert variant.spec.takes == variant.spec.gives == PIECES_IN_SEQUENCE


@pytest.mark.parametrize("damage", ["another window", "cut off", "garbage"])
def test_checkpoint_of_another_export_is_refused(variant: Variant, damage: str) -> None:
    options = variant.made_options
    state = make_compressor(variant.spec, options, 8 * WINDOW)[0].checkpoint()
    window = 2 * WINDOW if damage == "another window" else WINDOW
    state = {"cut off": state[:-4], "garbage": b"x" * len(state)}.get(damage, state)
    with pytest.raises(PlanError, match="checkpoint"):
        make_compressor(variant.spec, options, 8 * WINDOW, window=window)[0].restore(state)


def test_pieces_have_to_follow_each_other(variant: Variant) -> None:
    with pytest.raises(StageError, match="out of order"):
        compress(variant.spec, variant.made_options, b"x" * 512, pieces=[Piece(512, 512, b"y" * 512, 512)])
