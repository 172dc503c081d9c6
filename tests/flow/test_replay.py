"""Image bytes made again, in chains that only encode and in chains that compress behind the encoder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import SourceError, StageError
from pipeline.events import Event
from pipeline.flow.channels import Inlet, Outlet
from pipeline.flow.items import Piece, StoredImage
from pipeline.flow.stage import Catalog, SinkPlan, SinkRequest, StageContext
from pipeline.units import KiB, MiB
from stages.catalog import CATALOG
from stages.encode import raw
from stages.write import null
from tests.chains import export, write_toml
from tests.disks.letters import write_disk
from tests.flow.test_engine import _no_reader

# Boundaries inside windows, next to each other, in a hole, and behind the last window.
BOUNDARIES = (5 * MiB + 1, 5 * MiB + 4 * KiB, 9 * MiB, 14 * MiB + 77)
CHAINS = {
    "raw": ("encode.raw",),
    "raw, lz4": ("encode.raw", "compress.lz4"),
    "raw, zstd": ("encode.raw", "compress.zstd"),
    "qcow2 plain": ('encode.qcow2; compression = "none"',),
    "qcow2 plain, gzip": ('encode.qcow2; compression = "none"', "compress.gzip"),
    "vmdk": ("encode.vmdk",),
    "vmdk, lz4": ("encode.vmdk", "compress.lz4"),
    "vhd fixed, zstd": ('encode.vhd; variant = "fixed"', "compress.zstd"),
}


class Asking(null.NullWriter):
    """Keeps the image, and asks for everything behind each boundary once more, as soon as it has passed the next."""

    asked: list[tuple[int, int]]
    change: Any = None

    async def plan(self, request: SinkRequest) -> SinkPlan:
        head = request.layout.head_length
        return SinkPlan(boundaries=tuple(one for one in BOUNDARIES if one >= head), held_bytes=8 * MiB)

    async def run(self, inlet: Inlet[Piece], outlet: Outlet[StoredImage]) -> None:
        image = bytearray()
        context = self._context
        assert context.sink_plan is None
        waiting = list(BOUNDARIES)
        async for piece in inlet:
            image.extend(bytes(max(0, piece.end - len(image))))
            if piece.view is not None:
                image[piece.offset : piece.end] = piece.view
            piece.release()
            context.progress.acknowledge(guest_bytes=piece.guest_bytes, image_bytes=piece.length)
            while len(waiting) > 1 and piece.end > waiting[1]:
                await self._again(image, waiting.pop(0), piece.end)
        for start in waiting:
            if start < len(image):
                await self._again(image, start, len(image))
        await outlet.send(StoredImage("null:", len(image), _no_reader))

    async def _again(self, image: bytearray, start: int, end: int) -> None:
        replay = self._context.replay
        assert replay is not None
        if Asking.change is not None:
            Asking.change()
        position = start
        async for piece in replay.pieces(start, end):
            assert piece.offset == position
            position = piece.end
            view = piece.view if piece.view is not None else bytes(piece.length)
            assert bytes(image[piece.offset : piece.end]) == bytes(view)
            piece.release()
        assert position == end
        Asking.asked.append((start, end))


def catalog() -> Catalog:
    def build(options: Any, context: StageContext) -> Asking:
        return Asking(options, context)

    return Catalog([replace(spec, build=build) if spec.name == "write.null" else spec for spec in CATALOG])


@pytest.fixture(autouse=True)
def fresh() -> None:
    """Nobody asked yet."""
    Asking.asked = []
    Asking.change = None


def disk(folder: Path) -> Path:
    return write_disk(folder / "disk.raw", "ABC0DE-F" + "-" * 6 + "GHIJ-K0L" + "-" * 4 + "MNO", tail=1024)


def toml(folder: Path, *stages: str, memory: str = "96 MiB") -> Path:
    source = f'read.disk; path = "{disk(folder)}"'
    return write_toml(
        folder / "export.toml", source, "checksum.guest", "sparse.zeros", *stages, "write.null", memory=memory
    )


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("chain", CHAINS)
async def test_replay_makes_the_same_bytes(tmp_path: Path, chain: str, fuse: bool) -> None:
    await export(toml(tmp_path, *CHAINS[chain]), catalog=catalog(), fuse=fuse)
    assert len(Asking.asked) >= 3


async def test_disk_that_changed_is_found_out_behind_a_compressor_too(tmp_path: Path) -> None:
    def change() -> None:
        with open(tmp_path / "disk.raw", "r+b") as file:
            file.seek(7 * MiB + 100)
            file.write(b"changed")

    Asking.change = change
    with pytest.raises(SourceError, match="changed while it was being read"):
        await export(toml(tmp_path, *CHAINS["raw, lz4"]), catalog=catalog())


async def test_chain_with_compressor_and_replay_runs_in_little_memory(tmp_path: Path) -> None:
    events: list[Event] = []
    await export(toml(tmp_path, *CHAINS["raw, zstd"], memory="64 MiB"), catalog=catalog(), events=events)
    assert Asking.asked


class Replayed(raw.RawEncoder):
    """Loses a piece, or all from there on, when it makes bytes again."""

    made = 0
    loses = slice(0)

    def __init__(self, options: Any, context: StageContext) -> None:
        super().__init__(options, context)
        Replayed.made += 1
        self._is_replay = Replayed.made > 1

    def place(self, prepared: Any) -> list[Piece]:
        kept = []
        for piece in super().place(prepared):
            if self._is_replay and self.loses.start <= piece.offset < self.loses.stop:
                piece.release()
            else:
                kept.append(piece)
        return kept


@pytest.mark.parametrize(
    "loses, message",
    [
        (slice(6 * MiB, 8 * MiB), "have a gap"),
        (slice(8 * MiB, 1 << 60), "ended before the image bytes"),
    ],
)
async def test_replay_that_loses_bytes_is_an_error_and_not_a_shorter_part(
    tmp_path: Path, loses: slice, message: str
) -> None:
    Replayed.made, Replayed.loses = 0, loses
    specs = Catalog([replace(spec, build=Replayed) if spec.name == "encode.raw" else spec for spec in catalog()])
    chain = (f'read.disk; path = "{disk(tmp_path)}"', "encode.raw", "write.null")  # a digest would notice before
    with pytest.raises(StageError, match=message):
        await export(write_toml(tmp_path / "export.toml", *chain), catalog=specs)
