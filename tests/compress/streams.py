"""An image of pieces through a compressor, as the engine does it, with checkpoints after each window."""

from __future__ import annotations

import hashlib
import random
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import anyio

from pipeline.flow.buffers import Ledger, loose_slice
from pipeline.flow.compressing import Gathered, Gatherer
from pipeline.flow.items import Piece
from pipeline.flow.stage import Layout, StageContext, StageSpec
from pipeline.units import KiB, MiB
from stages.compress.index import FRAME_INDEX, FrameIndex
from tests.encode.lettered import disk
from tests.verify.context import make_context

WINDOW = 2 * MiB


def mixed_image() -> bytes:
    """Nine windows and a cut one: text, noise, one byte over and over, zeros inside and zeros alone."""
    letters = "AB0-C.NAOS" * 3 + "A-" + "0" * 64 + "NOPQ" * 8 + "-" * 96 + "AS-N" * 8 + "S" * 5 + "0A"
    source = disk(letters, 64 * KiB, cut=4 * KiB + 100)
    image = bytearray(source.size)
    source.fill(0, memoryview(image))
    return bytes(image)


def cut(image: bytes, *, seed: int = 1, zeros: bool = True) -> Iterator[Piece]:
    """Pieces of odd lengths; long zeros without data. They account for as many guest bytes as they are long."""
    draw = random.Random(seed)
    offset = 0
    while offset < len(image):
        end = min(len(image), offset + draw.choice((512, 65536, 1 << 20, 3 << 20)))
        step = 64 * KiB
        if zeros and not any(image[offset : offset + step]):
            end = min(len(image), offset + step)
            while end < len(image) and not any(image[end : end + step]):
                end = min(len(image), end + step)
            yield Piece(offset, end - offset, None, end - offset)
        else:
            data = image[offset:end]
            yield Piece(offset, end - offset, data if draw.random() < 0.2 else loose_slice(data), end - offset)
        offset = end


def make_compressor(
    spec: StageSpec, options: Any, size: int, *, window: int = WINDOW
) -> tuple[Any, Layout, StageContext]:
    """A fresh compressor of a raw image, its layout and its context."""
    assert spec.wrap is not None
    inner = Layout(format="raw", virtual_size=size, head_length=0, image_bytes_max=size, image_bytes=size)
    layout = spec.wrap(options, inner, window)
    context = replace(make_context(spec.name, disk_size=size, layout=layout), window=window)
    return spec.build(options, context), layout, context


@dataclass
class Stream:
    """What a compressor made: the bytes, and after every window its state and how many bytes there were."""

    layout: Layout
    data: bytearray = field(default_factory=bytearray)
    guest_bytes: int = 0
    checkpoints: list[tuple[int, int, bytes]] = field(default_factory=list)  # (image offset, stream bytes, state)
    leaked: int = 0
    index: FrameIndex | None = None

    def digest(self, since: int = 0) -> str:
        """Of the bytes from `since` on."""
        return hashlib.sha256(self.data[since:]).hexdigest()


def compress(
    spec: StageSpec,
    options: Any,
    image: bytes,
    *,
    pieces: list[Piece] | None = None,
    shuffled: bool = False,
    resume: tuple[int, bytes] | None = None,
) -> Stream:
    """Run a compressor over an image, or over the rest of one from a checkpoint (image offset, state)."""

    async def run() -> Stream:
        compressor, layout, context = make_compressor(spec, options, len(image))
        made = Stream(layout)
        start = 0
        if resume:
            start, state = resume
            compressor.restore(state)
            assert compressor.checkpoint() == state
        ledger = Ledger(64 * layout.made_max)
        gatherer = Gatherer(window=WINDOW, ledger=ledger, made_max=layout.made_max, start=start)

        async def given() -> AsyncIterator[Piece]:
            for piece in pieces if pieces is not None else cut(image[start:], seed=2):
                yield replace(piece, offset=piece.offset + start)

        base = compressor.position

        def keep(placed: Any) -> None:
            for piece in placed:
                assert piece.offset == base + len(made.data)
                view = piece.view
                assert view is not None
                assert view.nbytes == piece.length
                made.data += view
                made.guest_bytes += piece.guest_bytes
                piece.release()

        gathered: list[Gathered] = [one async for one in gatherer.windows(given())]
        if shuffled:
            with ThreadPoolExecutor(4) as threads:
                futures = [threads.submit(compressor.prepare, one.window, one.charge) for one in reversed(gathered)]
                for future in reversed(futures):
                    keep(compressor.place(future.result()))
        else:
            for one in gathered:
                end = one.window.offset + one.window.length
                keep(compressor.place(compressor.prepare(one.window, one.charge)))
                made.checkpoints.append((end, base + len(made.data), compressor.checkpoint()))
        keep(compressor.finish())
        assert compressor.position == base + len(made.data)
        made.leaked = ledger.charged
        made.index = context.facts.find(FRAME_INDEX)
        return made

    return anyio.run(run)
