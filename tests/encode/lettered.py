"""Disks of letters, their blocks, and what an encoder makes of them.

A .. M   text-like data, shrinks to about a half    S   one byte over and over, shrinks to almost nothing
N .. R   noise, does not shrink                     0   was read and is zero
.        zero, but nobody looked: a data run        -   a hole
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio

from pipeline.flow.buffers import Charge, Ledger, Pool, Slice
from pipeline.flow.facts import Facts
from pipeline.flow.items import Block, Content, Piece, Run, Why, tiles
from pipeline.flow.meter import StageMeter
from pipeline.flow.orders import Order
from pipeline.flow.stage import Layout, LayoutRequest, Progress, StageContext, StageSpec
from pipeline.units import GiB, KiB, MiB

WINDOW = 2 * MiB
_PATTERN = 256 * KiB
_NOISE = 4 * MiB  # longer than any cluster, or a codec would find it again


@dataclass(frozen=True)
class LetterDisk:
    """A disk as (letter, length) extents; lengths are multiples of 512 but for the last."""

    extents: tuple[tuple[str, int], ...]

    @property
    def size(self) -> int:
        """Guest bytes."""
        return sum(length for _, length in self.extents)

    def runs(self, start: int, stop: int) -> tuple[Run, ...]:
        """The runs of [start, stop)."""
        found = []
        offset = 0
        for letter, length in self.extents:
            low, high = max(offset, start), min(offset + length, stop)
            if low < high:
                why = {"0": Why.SCANNED, "-": Why.HOLE}.get(letter, Why.READ)
                found.append(Run(low, high - low, Content.DATA if why is Why.READ else Content.ZERO, why))
            offset += length
        return tuple(found)

    def fill(self, start: int, buffer: memoryview) -> None:
        """Write the bytes from guest offset `start` on."""
        offset, stop = 0, start + len(buffer)
        for letter, length in self.extents:
            low, high = max(offset, start), min(offset + length, stop)
            if low < high:
                buffer[low - start : high - start] = _bytes(letter, low - offset, high - low)
            offset += length

    def write(self, path: Path) -> None:
        """The disk as a sparse raw file, padded to whole sectors."""
        with path.open("wb") as file:
            file.truncate(-(-self.size // 512) * 512)
            offset = 0
            for letter, length in self.extents:
                if letter not in "0-.":
                    file.seek(offset)
                    file.write(_bytes(letter, 0, length))
                offset += length

    def blocks(self, window: int = WINDOW) -> Iterator[Block]:
        """Windows and skips, without their bytes; a block needs loading where a run of it is data."""
        start = 0
        skip = 0
        while start < self.size:
            hole = self._hole_at(start)
            stop = start + window if hole < window else start + hole // window * window
            stop = self.size if hole >= self.size - start else min(stop, self.size)
            if hole >= min(window, self.size - start):
                start = stop
                continue
            if skip < start:
                yield Block(skip, start - skip, None, self.runs(skip, start))
            yield Block(start, stop - start, None, self.runs(start, stop))
            start = skip = stop
        if skip < start:
            yield Block(skip, start - skip, None, self.runs(skip, start))

    def _hole_at(self, start: int) -> int:
        """How many bytes from `start` on are holes."""
        offset = hole = 0
        for letter, length in self.extents:
            offset += length
            if offset <= start:
                continue
            if letter != "-":
                break
            hole = offset - start
        return hole


def disk(letters: str, unit: int = 64 * KiB, *, cut: int = 0) -> LetterDisk:
    """One extent of `unit` bytes a letter; the last is `cut` bytes shorter."""
    extents = [(letter, unit) for letter in letters]
    extents[-1] = (letters[-1], unit - cut)
    return LetterDisk(tuple(extents))


@functools.cache
def _pattern(letter: str) -> bytes:
    draw = random.Random(letter)
    if letter in "0-.":
        return bytes(_PATTERN)
    if letter == "S":
        return b"S" * _PATTERN
    if letter >= "N":
        return draw.randbytes(_NOISE)
    return draw.randbytes(_PATTERN).translate(bytes(32 + (value & value >> 3) % 64 for value in range(256)))


def _bytes(letter: str, start: int, length: int) -> bytes:
    pattern = _pattern(letter)
    first = start % len(pattern)
    times = -(-(first + length) // len(pattern))
    return (pattern * times if times > 1 else pattern)[first : first + length]


@dataclass
class Export:
    """The pieces of an image, each as (offset, length, bytes or None, guest bytes), in the order they came.

    Attributes:
        checkpoints: (how many blocks were placed, how many pieces there were, the state).
    """

    layout: Layout
    placed: list[tuple[int, int, bytes | None, int]] = field(default_factory=list)
    checkpoints: list[tuple[int, int, bytes]] = field(default_factory=list)
    leaked_buffers: int = 0
    leaked_bytes: int = 0
    position: int = 0

    @property
    def length(self) -> int:
        """Length of the image."""
        return max((offset + length for offset, length, _, _ in self.placed), default=0)

    @property
    def guest_bytes(self) -> int:
        """Sum over the pieces."""
        return sum(piece[3] for piece in self.placed)

    def write(self, path: Path) -> Path:
        """The image as a file; what is zero is never written."""
        with path.open("wb") as file:
            file.truncate(self.length)
            for offset, _, data, _ in self.placed:
                if data is not None:
                    file.seek(offset)
                    file.write(data)
        return path

    def digest(self, since: int = 0) -> str:
        """Of every piece from number `since` on, places and bytes."""
        state = hashlib.sha256()
        for offset, length, data, guest_bytes in self.placed[since:]:
            state.update(f"{offset} {length} {data is None} {guest_bytes}\n".encode())
            state.update(data or b"")
        return state.hexdigest()


def layout_of(
    spec: StageSpec,
    options: Any,
    disk_size: int,
    *,
    head_minimum: int = 0,
    window: int = WINDOW,
    order: Order | None = None,
) -> tuple[Layout, Order]:
    """The layout, in the order the encoder likes best with these options, or in another."""
    assert spec.layout is not None
    order = order or spec.orders_of(options)[0]
    request = LayoutRequest(disk_size=disk_size, window=window, order=order, head_minimum=head_minimum)
    return spec.layout(options, request), order


def make_encoder(
    spec: StageSpec, options: Any, disk_size: int, *, head_minimum: int = 0, window: int = WINDOW
) -> tuple[Any, Layout]:
    """A fresh encoder, and its layout."""
    layout, order = layout_of(spec, options, disk_size, head_minimum=head_minimum, window=window)
    context = StageContext(
        name=spec.name,
        emit=lambda event: None,
        facts=Facts(),
        progress=Progress(),
        meter=StageMeter(spec.name),
        ledger=Ledger(1 * GiB),
        threads=anyio.CapacityLimiter(1),
        workers=1,
        disk_size=disk_size,
        window=window,
        order=order,
        layout=layout,
    )
    return spec.build(options, context), layout


def export(
    spec: StageSpec,
    options: Any,
    source: LetterDisk,
    *,
    head_minimum: int = 0,
    window: int = WINDOW,
    shuffled: bool = False,
    checkpoints: bool = False,
    resume: tuple[int, bytes] | None = None,
) -> Export:
    """Run an encoder over a disk, with real buffers and charges.

    Args:
        shuffled: prepare all windows at once, in threads, the last first.
        checkpoints: take one behind every block.
        resume: (blocks already placed, state) to go on from.
    """

    async def run() -> Export:
        return await _export(spec, options, source, head_minimum, window, shuffled, checkpoints, resume)

    return anyio.run(run)


async def _export(
    spec: StageSpec,
    options: Any,
    source: LetterDisk,
    head_minimum: int,
    window: int,
    shuffled: bool,
    checkpoints: bool,
    resume: tuple[int, bytes] | None,
) -> Export:
    encoder, layout = make_encoder(spec, options, source.size, head_minimum=head_minimum, window=window)
    made = Export(layout)
    blocks = list(source.blocks(window))
    first = 0
    if resume:
        first, state = resume
        encoder.restore(state)
        assert encoder.checkpoint() == state
    pool = Pool(window, len(blocks) + 1)
    ledger = Ledger((len(blocks) + 1) * max(1, layout.made_max))

    async def load(block: Block) -> tuple[Block, Charge | None]:
        assert tiles(block.runs, block.offset, block.length)
        if not any(run.is_data for run in block.runs):
            return block, None
        lease = await pool.lease()
        lease.buffer[:] = b"\xee" * window  # nobody may rely on what a buffer held before
        source.fill(block.offset, lease.buffer[: block.length])
        charge = await ledger.charge(layout.made_max) if layout.made_max else None
        return Block(block.offset, block.length, lease.into_slice(block.length), block.runs), charge

    def keep(pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            assert piece.length > 0
            if piece.view is not None:
                assert len(piece.view) == piece.length
            data = None if piece.view is None else bytes(piece.view)
            made.placed.append((piece.offset, piece.length, data, piece.guest_bytes))
            assert piece.data is None or isinstance(piece.data, (Slice, bytes))
            piece.release()

    if shuffled:
        loaded = [await load(block) for block in blocks]
        with ThreadPoolExecutor(4) as threads:
            futures = {
                block.offset: threads.submit(encoder.prepare, block, charge) for block, charge in reversed(loaded)
            }
            for block in blocks:
                keep(list(encoder.place(futures[block.offset].result())))
    else:
        for number, wanted in enumerate(blocks):
            if number < first:
                continue
            block, charge = await load(wanted)
            keep(list(encoder.place(encoder.prepare(block, charge))))
            if checkpoints:
                made.checkpoints.append((number + 1, len(made.placed), encoder.checkpoint()))
    keep(list(encoder.finish()))
    made.position = encoder.position
    made.leaked_buffers, made.leaked_bytes = pool.in_use, ledger.charged
    pool.close()
    return made
