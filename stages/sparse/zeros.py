"""Find the zeros that were read: the smallest stage.

A window is split into grains; a grain whose bytes are all zero becomes a SCANNED zero run. The grain is 64 KiB or what
the encoder asks for: smaller grains find more zeros and cost more runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from pipeline.flow.items import Block, Content, Run, Why
from pipeline.flow.stage import BLOCKS, StageContext, StageSpec, option
from pipeline.units import KiB, Size, round_up

if TYPE_CHECKING:
    import numpy


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of sparse.zeros."""

    grain: Size | None = option(
        None, doc='Length of the stretches that are looked at; without it, what the encoder wants (mostly "64 KiB").'
    )

    def __post_init__(self) -> None:
        if self.grain is not None and (self.grain < 512 or self.grain & (self.grain - 1)):
            raise ValueError('grain must be a power of two of at least 512 bytes, for example "64 KiB"')


class ZeroScan:
    """Split the data runs of each window into data and SCANNED zeros."""

    def __init__(self, options: Options, context: StageContext) -> None:
        wanted = context.layout.grain if context.layout else 64 * KiB
        import numpy  # noqa: F401  # loaded before the first window, not in its thread

        self._grain = min(options.grain or wanted, context.window or wanted)

    def apply(self, block: Block) -> tuple[Block, None]:
        """Re-describe one block; its bytes stay as they are. Threads: any."""
        if block.data is None:
            return block, None
        flags = self._data_grains(block.data.view)
        runs: list[Run] = []
        for run in block.runs:
            if run.is_data:
                self._split(run, block.offset, flags, runs)
            else:
                _append(runs, run)
        if not any(run.is_data for run in runs):
            block.data.release()
            return Block(block.offset, block.length, None, tuple(runs)), None
        return Block(block.offset, block.length, block.data, tuple(runs)), None

    def observe(self, note: None) -> None:
        """Nothing to fold."""

    def confirm(self, note: None, offset: int) -> None:
        """Nothing to compare."""

    def finish(self) -> None:
        """No facts."""

    def _data_grains(self, view: memoryview) -> numpy.ndarray:
        """One flag per grain: whether any byte of it is not zero."""
        import numpy

        whole = view.nbytes // self._grain
        # bool view: `any` leaves a grain at its first non-zero byte and lets other threads run (16 GB/s all zero).
        head = numpy.frombuffer(view, dtype=numpy.bool_, count=whole * self._grain).reshape(whole, self._grain)
        flags: numpy.ndarray = numpy.asarray(head.any(axis=1))
        if whole * self._grain < view.nbytes:
            tail = numpy.frombuffer(view, dtype=numpy.bool_, offset=whole * self._grain)
            flags = numpy.append(flags, tail.any())
        return flags

    def _split(self, run: Run, base: int, flags: numpy.ndarray, runs: list[Run]) -> None:
        """Append the run, cut where whole grains change between data and zero."""
        import numpy

        grain = self._grain
        first = (run.offset - base) // grain
        last = round_up(run.end - base, grain) // grain
        cuts = numpy.flatnonzero(flags[first + 1 : last] != flags[first : last - 1])
        edges = [run.offset, *(base + (first + 1 + int(cut)) * grain for cut in cuts), run.end]
        for index, (start, stop) in enumerate(pairwise(edges)):
            is_data = bool(flags[first]) == (index % 2 == 0)
            content, why = (Content.DATA, run.why) if is_data else (Content.ZERO, Why.SCANNED)
            _append(runs, Run(start, stop - start, content, why))


def _append(runs: list[Run], run: Run) -> None:
    """Append, merging with a run of the same kind before it."""
    if runs and runs[-1].content is run.content and runs[-1].why is run.why:
        run = Run(runs[-1].offset, runs.pop().length + run.length, run.content, run.why)
    runs.append(run)


SPEC = StageSpec(
    name="sparse.zeros",
    summary="Find stretches that were read and are all zero, so that they need not be stored.",
    options=Options,
    takes=BLOCKS,
    gives=BLOCKS,
    build=ZeroScan,
)
