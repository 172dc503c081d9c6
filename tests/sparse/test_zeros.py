from __future__ import annotations

from dataclasses import replace

import anyio
from hypothesis import given
from hypothesis import strategies as st

from pipeline.flow.buffers import Ledger, loose_slice
from pipeline.flow.facts import Facts
from pipeline.flow.items import Block, Content, Run, Why, tiles
from pipeline.flow.meter import StageMeter
from pipeline.flow.stage import Progress, StageContext
from pipeline.units import KiB, Size
from stages.sparse.zeros import Options, ZeroScan

CONTEXT = StageContext(
    name="sparse.zeros",
    emit=lambda event: None,
    facts=Facts(),
    progress=Progress(),
    meter=StageMeter(""),
    ledger=Ledger(0),
    threads=anyio.CapacityLimiter(1),
    workers=1,
    window=1 << 20,
)


def scan(content: bytes, runs: tuple[Run, ...], offset: int, grain: int) -> Block:
    block = Block(offset, len(content), loose_slice(content), runs)
    return ZeroScan(Options(grain=Size(grain)), CONTEXT).apply(block)[0]


@given(
    grains=st.lists(st.sampled_from([b"\0", b"x"]), min_size=1, max_size=24),
    tail=st.integers(0, 511),
    odd=st.integers(0, 3),
    grain=st.sampled_from([512, 4096]),
)
def test_zero_runs_are_exactly_the_grains_without_a_byte(grains: list[bytes], tail: int, odd: int, grain: int) -> None:
    """One byte anywhere in a grain, also in a short last one, keeps all of it."""
    parts = [
        bytearray(grain) if one == b"\0" else bytearray(b"\0" * (grain - 1 - odd) + b"x" + b"\0" * odd)
        for one in grains
    ]
    content = b"".join(parts) + b"\0" * tail
    offset = 7 << 20
    whole = Run(offset, len(content), Content.DATA, Why.READ)
    block = scan(content, (whole,), offset, grain)
    assert tiles(block.runs, offset, len(content))
    for index, part in enumerate(parts):
        place = offset + index * grain
        run = next(run for run in block.runs if run.offset <= place < run.end)
        assert run.is_data == any(part)
        assert run.why is (Why.READ if any(part) else Why.SCANNED)
    assert (block.data is None) == (not any(content))


def test_why_of_what_was_not_read_survives() -> None:
    runs = (
        Run(0, 8 * KiB, Content.ZERO, Why.HOLE),
        Run(8 * KiB, 4 * KiB, Content.DATA, Why.READ),
        Run(12 * KiB, 4 * KiB, Content.ZERO, Why.FREE),
    )
    block = scan(bytes(8 * KiB) + b"\1" * (4 * KiB) + bytes(4 * KiB), runs, 0, 4 * KiB)
    assert block.runs == runs


def test_data_run_inside_a_grain_is_judged_by_its_bytes() -> None:
    runs = (Run(0, 512, Content.ZERO, Why.HOLE), Run(512, 3584, Content.DATA, Why.READ))
    assert scan(bytes(4096), runs, 0, 4096).data is None
    assert scan(bytes(4095) + b"x", runs, 0, 4096).runs == runs


def test_skip_passes_untouched() -> None:
    skip = Block(0, 1 << 40, None, (Run(0, 1 << 40, Content.ZERO, Why.HOLE),))
    assert ZeroScan(Options(), CONTEXT).apply(skip)[0] is skip


def test_grain_is_never_larger_than_the_window() -> None:
    content = bytes(4096) + b"x" * 4096
    context = replace(CONTEXT, window=8192)
    block = Block(0, 8192, loose_slice(content), (Run(0, 8192, Content.DATA, Why.READ),))
    seen, _ = ZeroScan(Options(grain=Size(1 << 20)), context).apply(block)
    assert seen.runs == block.runs
