"""From a wired chain to a plan: the source is open, every number is known, no byte has moved.

Checks that depend on the disk or the target happen here: sizes, the format's limits, parts, memory, the target itself.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import anyio

from pipeline.config.parse import ExportConfig, StageConfig
from pipeline.config.wiring import WiredChain
from pipeline.errors import PlanError
from pipeline.events import EventStream
from pipeline.flow.buffers import Ledger
from pipeline.flow.facts import Facts
from pipeline.flow.meter import StageMeter
from pipeline.flow.orders import Order
from pipeline.flow.replay import Checkpoints, SourceReplay
from pipeline.flow.stage import (
    DISK_SIZE,
    Clock,
    Encoder,
    FunctionStage,
    Layout,
    LayoutRequest,
    Progress,
    RealClock,
    SinkPlan,
    SinkRequest,
    Source,
    SourceInfo,
    StageContext,
    Writer,
)
from pipeline.units import MiB, format_exact, format_size

WINDOW_WHEN_COMPRESSING = 2 * MiB
WINDOW = 4 * MiB


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """How the run's memory is divided. Bytes and counts.

    Attributes:
        buffers: windows that may be read and not yet stored.
        made: what may exist of made bytes (compressed clusters, open parts).
        replay: set aside for making parts again.
        for_writer: how much of buffers and made bytes the writer may hold.
    """

    total: int
    workers: int
    buffers: int
    made: int
    replay: int
    for_writer: int


@dataclass(slots=True, kw_only=True)
class RunPlan:
    """Everything that the engine needs, and what `pipeline plan` prints.

    Attributes:
        functions, encoder, writer, verifiers: the built stages, in chain order.
        meters: one per stage of the chain, in order.
    """

    config: ExportConfig
    chain: WiredChain
    context: StageContext
    source: Source
    functions: list[FunctionStage[Any]]
    encoder: Encoder[Any]
    writer: Writer
    info: SourceInfo
    layout: Layout
    memory_plan: MemoryPlan
    sink_plan: SinkPlan
    checkpoints: Checkpoints
    meters: list[StageMeter]
    fuse: bool = True

    @property
    def name(self) -> str:
        """The export's name."""
        return self.config.export.name

    @property
    def target_uri(self) -> str:
        """Where the image goes, as the options say it."""
        options = self.chain.writer.options
        return str(getattr(options, "url", None) or getattr(options, "path", None) or self.chain.writer.spec.name)

    @property
    def summary(self) -> tuple[tuple[str, str], ...]:
        """What a person wants to know before it starts: (what, how much)."""
        longest = self.layout.image_bytes_max
        exact = self.layout.image_bytes
        memory = self.memory_plan
        return (
            ("chain", " -> ".join(self.chain.names)),
            ("disk", format_exact(self.info.size)),
            ("to read", f"{format_exact(self.info.mapped_bytes)} by the source's map"),
            ("image", f"{self.layout.format}, {format_exact(exact)}" if exact is not None
             else f"{self.layout.format}, at most {format_exact(longest)}"),
            ("virtual size", format_exact(self.layout.virtual_size)),
            ("pieces", f"{self.context.order.value}, windows of {format_size(self.context.window)}"),
            ("memory", f"{format_size(memory.total)}: {memory.buffers} buffers of {format_size(self.context.window)}, "
                       f"{format_size(memory.made)} for made bytes, {memory.workers} threads"),
            *self.sink_plan.summary,
            ("target", self.target_uri),
        )  # fmt: skip


@asynccontextmanager
async def plan_run(
    config: ExportConfig, chain: WiredChain, events: EventStream, *, clock: Clock | None = None, fuse: bool = True
) -> AsyncIterator[RunPlan]:
    """Open the source read-only, ask the encoder and the writer, divide the memory; close both at the end.

    Raises:
        PlanError: it can't work for this disk or this target. SourceError, StoreError: it could not be found out.
    """
    source: Source | None = None
    writer: Writer | None = None
    context = StageContext(
        name="",
        emit=events.emit,
        facts=Facts(),
        progress=Progress(),
        meter=StageMeter(""),
        ledger=Ledger(0),
        threads=anyio.CapacityLimiter(1),
        workers=1,
        clock=clock or RealClock(),
        export_name=config.export.name,
        order=chain.order,
    )
    total = config.export.memory
    try:
        source = _build(chain.source, context)
        info = await source.open()
        if info.size <= 0:
            raise PlanError("the source is empty", path=info.path, hint="Name the disk itself, not an empty file.")
        context.facts.put(DISK_SIZE, info.size)
        context.progress.disk_bytes = info.size
        layout, window = _layout(chain, info)
        memory = divide_memory(total, window, layout.made_max, with_replay=True)
        threads = anyio.CapacityLimiter(memory.workers + 4)
        context = replace(
            context, disk_size=info.size, window=window, layout=layout, workers=memory.workers, threads=threads
        )
        functions = [_build(stage, context) for stage in chain.functions]
        replay = SourceReplay(
            source=source,
            functions=functions,
            make_encoder=lambda: _build(chain.encoder, context),
            window=window,
            made_max=layout.made_max,
            threads=threads,
        )
        meters = [StageMeter(name, parallelism=memory.workers) for name in chain.names]
        writer_meter = meters[chain.names.index(chain.writer.spec.name)]
        writer_meter.parallelism = 1
        writer = _build(chain.writer, replace(context, replay=replay, meter=writer_meter))
        request = SinkRequest(layout=layout, order=chain.order, memory=memory.for_writer, source_path=info.path)
        sink_plan = await writer.plan(request)
        memory = divide_memory(
            total - sink_plan.own_bytes, window, layout.made_max, with_replay=bool(sink_plan.boundaries)
        )
        memory = replace(memory, total=total)
        context.ledger.total = memory.made
        replay.checkpoints = Checkpoints(sink_plan.boundaries)
        yield RunPlan(
            config=config,
            chain=chain,
            context=replace(context, sink_plan=sink_plan, replay=replay),
            source=source,
            functions=functions,
            encoder=_build(chain.encoder, context),
            writer=writer,
            info=info,
            layout=layout,
            memory_plan=memory,
            sink_plan=sink_plan,
            checkpoints=replay.checkpoints,
            meters=meters,
            fuse=fuse,
        )
    finally:
        with anyio.CancelScope(shield=True):
            if writer is not None:
                await writer.close()
            if source is not None:
                await source.close()


def _build(stage: StageConfig, context: StageContext) -> Any:
    """The stage itself, with a context of its name."""
    return stage.spec.build(stage.options, replace(context, name=stage.spec.name))


def _layout(chain: WiredChain, info: SourceInfo) -> tuple[Layout, int]:
    """The encoder's layout and the window: 2 MiB where it compresses, else 4 MiB, unless the user chose."""

    def ask(window: int, head_minimum: int) -> Layout:
        make = chain.encoder.spec.layout
        assert make is not None, "every encoder has a layout"  # the catalog's contract test
        request = LayoutRequest(disk_size=info.size, window=window, order=chain.order, head_minimum=head_minimum)
        layout: Layout = make(chain.encoder.options, request)
        return layout

    window = info.block_size or WINDOW_WHEN_COMPRESSING
    layout = ask(window, 0)
    if info.block_size is None and not layout.made_max:
        window = WINDOW
    sink = chain.writer.spec.sink
    head_minimum = 0
    # An image that fits into one request needs no head of its own: nothing is sent before its end is known.
    if chain.order is Order.HEAD_LAST and sink and sink.parts and layout.image_bytes_max > sink.parts.whole_max:
        head_minimum = sink.parts.part_min
    return ask(window, head_minimum), window


def divide_memory(total: int, window: int, made_max: int, *, with_replay: bool) -> MemoryPlan:
    """Divide the run's memory so that reader, encoder and writer can't starve each other.

    The next window in order always has its memory before any later one, so there is progress as long as the writer
    can live with `for_writer`.

    Raises:
        PlanError: not even one window at a time fits.
    """
    replay = 2 * (window + made_max) if with_replay else 0
    # More threads than processors, because each call also waits for its read (perf: 4 is best on 2).
    workers = (os.cpu_count() or 1) + 2
    while workers > 1 and (workers + 2) * (window + made_max) + replay > total * 5 // 8:
        workers -= 1
    if made_max:
        buffers = workers + 2
        made = total - replay - buffers * window
        for_writer = made - (workers + 1) * made_max
    else:
        buffers = (total - replay) // window
        made = 0
        for_writer = (buffers - workers - 1) * window
    if for_writer < window:
        raise PlanError(
            f"{format_size(total)} of memory is not enough for windows of {format_size(window)}",
            hint='Raise "memory" in [export]; 32 MiB always does.',
        )
    return MemoryPlan(total=total, workers=workers, buffers=buffers, made=made, replay=replay, for_writer=for_writer)
