"""A disk that exists only as arithmetic: incompressible bytes of any size, at memory speed, without a file.

For measuring and for tests of what is too large to lie on a disk. The same seed gives the same disk.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.flow.items import Block, Content, Run, Why
from pipeline.flow.stage import BLOCKS, DISK_SIZE, NOTHING, SourceInfo, StageContext, StageSpec, option
from pipeline.units import KiB, Size

if TYPE_CHECKING:
    import numpy

_TILE = 64 * KiB
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: consecutive multiples are far apart in every bit


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of read.synthetic."""

    size: Size = option(doc="How large the disk is.", example="64 GiB")
    seed: int = option(1, doc="Another seed gives another disk.")

    def __post_init__(self) -> None:
        if self.size % 512:
            raise ValueError("size must be a multiple of 512 bytes")


class SyntheticReader:
    """Random tiles, each turned by a number of its own, so that no two stretches are alike."""

    def __init__(self, options: Options, context: StageContext) -> None:
        import numpy

        self._size = int(options.size)
        self._seed = options.seed
        self._tile: numpy.ndarray = numpy.random.default_rng(options.seed).integers(
            0, 1 << 64, _TILE // 8, dtype=numpy.uint64
        )

    async def open(self) -> SourceInfo:
        """Nothing to open."""
        identity = {"kind": "synthetic", "size": str(self._size), "seed": str(self._seed)}
        return SourceInfo(size=self._size, mapped_bytes=self._size, identity=identity)

    async def windows(self, window: int, start: int = 0) -> AsyncIterator[Block]:
        """All of it is data."""
        for offset in range(start, self._size, window):
            length = min(window, self._size - offset)
            yield Block(offset, length, None, (Run(offset, length, Content.DATA, Why.READ),))

    def load(self, block: Block, buffer: memoryview) -> None:
        """Make the block's bytes. Threads: any."""
        import numpy

        for begin in range(0, block.length, _TILE):
            turn = numpy.uint64(((block.offset + begin) // _TILE + 1) * _GOLDEN & 0xFFFFFFFFFFFFFFFF)
            count = min(_TILE, block.length - begin) // 8
            target = numpy.frombuffer(buffer, dtype=numpy.uint64, count=count, offset=begin)
            numpy.bitwise_xor(self._tile[:count], turn, out=target)

    async def close(self) -> None:
        """Nothing to close."""


SPEC = StageSpec(
    name="read.synthetic",
    summary="A generated, incompressible disk of any size, for measuring.",
    options=Options,
    takes=NOTHING,
    gives=BLOCKS,
    build=SyntheticReader,
    provides=(DISK_SIZE,),
)
