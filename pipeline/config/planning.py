"""From a wired chain to a plan: the source is open, every number is known, no byte has moved.

Checks that depend on the disk or the target happen here: sizes, the format's limits, parts, memory, the target itself.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import anyio

from pipeline.config.continuing import (
    Attempt,
    begin_or_compare,
    describe,
    head_length,
    journal_path,
    open_journal,
    tell_leftovers,
    told_resume,
)
from pipeline.config.options import Secret, without_secrets
from pipeline.config.parse import MEMORY_MIN, ExportConfig, StageConfig
from pipeline.config.wiring import WiredChain
from pipeline.errors import PlanError, first_error
from pipeline.events import EventStream, MapProgressed
from pipeline.flow.buffers import Ledger, Memory, Pool
from pipeline.flow.facts import Facts
from pipeline.flow.items import Block, Piece
from pipeline.flow.mapping import DataMap, MapRecorder
from pipeline.flow.meter import StageMeter
from pipeline.flow.orders import Order
from pipeline.flow.replay import Checkpoints, SourceReplay
from pipeline.flow.rereading import REREAD, Reread, why_none
from pipeline.flow.resume import RunJournal, restart
from pipeline.flow.segment import Segment
from pipeline.flow.stage import (
    DISK_SIZE,
    Clock,
    Compressor,
    Encoder,
    FunctionStage,
    Layout,
    LayoutRequest,
    Progress,
    RealClock,
    Rounding,
    SinkPlan,
    SinkRequest,
    Source,
    SourceInfo,
    Stage,
    StageContext,
    Start,
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
        compressed: what may exist of what a compressor takes and makes.
        replay: set aside for making parts again.
        for_writer: how much of buffers and made bytes the writer may hold.
    """

    total: int
    workers: int
    buffers: int
    made: int
    replay: int
    for_writer: int
    compressed: int = 0


@dataclass(slots=True, kw_only=True)
class RunPlan:
    """Everything that the engine needs, and what `pipeline plan` prints.

    Attributes:
        functions, encoder, compressor, checks, writer: the built stages, in chain order.
        inner: the encoder's layout; `layout` is that of the image that is stored.
        compressed_max: what compressing one window takes at most, in bytes; 0 without a compressor.
        meters: one per stage of the chain, in order.
        recorder: of the map; with what earlier processes of the export saw.
        journal: None where the run keeps none.
        start: where the disk is read from, and the image written.
        rereads: so often at most a disk in use is read again, for what changed to be sent again.
        preflight: what the rules of [target] said, for the manifest.
    """

    config: ExportConfig
    chain: WiredChain
    context: StageContext
    source: Source
    functions: list[FunctionStage[Any]]
    encoder: Encoder[Any]
    compressor: Compressor[Any] | None
    checks: list[Stage[Piece, Piece]]
    writer: Writer
    info: SourceInfo
    inner: Layout
    layout: Layout
    compressed_max: int
    memory_plan: MemoryPlan
    sink_plan: SinkPlan
    checkpoints: Checkpoints
    meters: list[StageMeter]
    fuse: bool = True
    recorder: MapRecorder = field(default_factory=MapRecorder)
    journal: RunJournal | None = None
    start: Start = field(default_factory=Start)
    rereads: int = 0
    preflight: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The export's name."""
        return self.config.export.name

    @property
    def target_uri(self) -> str:
        """Where the image goes, as the options say it."""
        return target_uri(self.chain)

    def meter(self, stage: str) -> StageMeter:
        """The meter of the stage of this TOML name."""
        return self.meters[self.chain.names.index(stage)]

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
            *self.info.summary,
            ("image", f"{self.layout.format}, {format_exact(exact)}" if exact is not None
             else f"{self.layout.format}, at most {format_exact(longest)}"),
            ("virtual size", format_exact(self.layout.virtual_size)),
            ("pieces", f"{self.context.order.value}, windows of {format_size(self.context.window)}"),
            ("memory", f"{format_size(memory.total)}: {memory.buffers} buffers of {format_size(self.context.window)}, "
                       f"{format_size(memory.made + memory.compressed)} for made bytes, {memory.workers} threads"),
            *self.sink_plan.summary,
            ("target", self.target_uri),
            ("after a kill", told_resume(self.config, self.chain)),
            *((("notes", "; ".join(self.notes)),) if self.notes else ()),
        )  # fmt: skip

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should read before the start."""
        missing = (one.spec.missing(one.options) for one in self.chain.verifiers if one.spec.missing is not None)
        return (*self.info.notes, *self._told_rereads(), *self.layout.notes, *filter(None, missing))

    def _told_rereads(self) -> Iterator[str]:
        if self.rereads:
            times = "once" if self.rereads == 1 else f"up to {self.rereads} times"
            yield f"what changes meanwhile is looked for {times}, until nothing has, and sent again"
        elif self.info.rereads:
            told = self.context.facts.find(REREAD)
            yield f"what changes meanwhile is not sent again: {told.why_none if told else ''}"


def target_uri(chain: WiredChain) -> str:
    """Where the image of a chain goes, as the options say it, without secrets."""
    options = chain.writer.options
    if command := getattr(options, "command", None):
        return "| " + without_secrets(shlex.join(command))
    place = getattr(options, "url", None) or getattr(options, "path", None) or chain.writer.spec.name
    return f"the URL in ${place.name}" if isinstance(place, Secret) else without_secrets(str(place))


@asynccontextmanager
async def plan_run(
    config: ExportConfig,
    chain: WiredChain,
    events: EventStream,
    *,
    clock: Clock | None = None,
    fuse: bool = True,
    attempt: Attempt | None = None,
    is_rehearsal: bool = False,
    rounding: Rounding | None = None,
) -> AsyncIterator[RunPlan]:
    """Open the source read-only, ask the encoder and the writer, divide the memory; close both at the end.

    Args:
        attempt: how a run that keeps a journal begins; None: it keeps none.
        is_rehearsal: the plan is only looked at; nothing is frozen.
        rounding: what the target wants of the size of the virtual disk.
    Raises:
        PlanError: it can't work for this disk or this target. SourceError, StoreError: it could not be found out.
        AlreadyFinished: an earlier process of the export to be resumed published the image.
    """
    journal: RunJournal | None = None
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
        is_rehearsal=is_rehearsal,
        rounding=rounding,
        own_files=tuple(_own_files(config, chain)),
    )
    try:
        source = _build(chain.source, context)
        info = await source.open()
        total = config.export.memory - info.own_bytes
        if info.own_bytes and total < MEMORY_MIN:
            raise PlanError(
                f"{chain.source.name} needs {format_size(info.own_bytes)} of memory by itself",
                hint=f'Raise "memory" in [export] to at least {format_size(info.own_bytes + MEMORY_MIN)}.',
            )
        if info.size <= 0:
            raise PlanError("the source is empty", path=info.path, hint="Name the disk itself, not an empty file.")
        context.facts.put(DISK_SIZE, info.size)
        context.progress.disk_bytes = info.size
        find_head_minimum = chain.writer.spec.head_minimum
        head_minimum = await find_head_minimum(chain.writer.options) if find_head_minimum is not None else None
        inner, window = _layout(chain, info, head_minimum)
        layout = _wrapped(chain, inner, window)
        compressed_max = layout.made_max if chain.compressors else 0
        sink = chain.writer.spec.sink
        gathered = chain.order is Order.HEAD_LAST and sink is not None and sink.parts is not None
        memory = divide_memory(
            total, window, inner.made_max, with_replay=True, compressed_max=compressed_max, gathered=gathered
        )
        threads = anyio.CapacityLimiter(memory.workers * (2 if chain.compressors else 1) + 4)
        context = replace(
            context, disk_size=info.size, window=window, layout=inner, workers=memory.workers, threads=threads
        )
        unit = chain.encoder.spec.map_unit and chain.encoder.spec.map_unit(chain.encoder.options, chain.order)
        if unit:
            found = await map_disk(chain, source, info, context, memory, unit)
            inner, _ = _layout(chain, info, head_minimum, found)
            layout = _wrapped(chain, inner, window)
            context = replace(context, layout=inner)
        functions = [_build(stage, context) for stage in chain.functions]
        compressors = chain.compressors
        # What is behind the encoder sees the image that is stored.
        outside = replace(context, layout=layout)
        replay = SourceReplay(
            source=source,
            functions=functions,
            make_encoder=lambda: _build(chain.encoder, context),
            window=window,
            made_max=inner.made_max,
            threads=threads,
            make_compressor=(lambda: _build(compressors[0], outside)) if compressors else None,
            compressed_max=compressed_max,
        )
        encoder: Encoder[Any] = _build(chain.encoder, context)
        compressor: Compressor[Any] | None = _build(compressors[0], outside) if compressors else None
        is_new = True
        if fuse:  # the stages of a chain that is not fused are at different blocks at the same time
            journal = open_journal(attempt, config, chain, info, context)
        meters = [StageMeter(name, parallelism=memory.workers) for name in chain.names]
        writer_meter = meters[chain.names.index(chain.writer.spec.name)]
        writer_meter.parallelism = 1
        writer = _build(chain.writer, replace(outside, replay=replay, meter=writer_meter, journal=journal))
        if journal is not None and attempt is not None:
            # A digest of the image holds what was sent first, and can't forget it.
            journal.resends = layout.positional and not chain.compressors and not chain.checks
            journal.expected = describe(
                config,
                chain,
                info,
                layout,
                window=window,
                encoder_identity=" ".join(getattr(one, "identity", "") for one in (encoder, compressor) if one),
                map_identity=inner.map.identity if inner.map is not None else "",
                target=target_uri(chain),
            )
            is_new = await begin_or_compare(journal, attempt, writer, context)
        request = SinkRequest(layout=layout, order=chain.order, memory=memory.for_writer, source_path=info.path)
        sink_plan = await writer.plan(request)
        if attempt is not None and is_new:
            await tell_leftovers(attempt, chain, writer, context, target_uri(chain))
        if sink_plan.boundaries and not chain.encoder.spec.checkpointed:
            raise PlanError(
                f"{chain.encoder.name} can't make a part again, and parts of this image are too long to wait in memory",
                operation="plan",
                hint='Raise "memory" in [export], write to a file, or choose encode.vmdk or encode.qcow2.',
            )
        memory = divide_memory(
            total - sink_plan.own_bytes,
            window,
            inner.made_max,
            with_replay=bool(sink_plan.boundaries),
            compressed_max=compressed_max,
            gathered=gathered,
        )
        memory = replace(memory, total=config.export.memory)
        context.ledger.total = memory.made
        replay.checkpoints = Checkpoints(sink_plan.boundaries, skips_grow=inner.skips_grow)
        recorder = MapRecorder()
        checks = [
            _build(stage, replace(outside, meter=meters[chain.names.index(stage.name)], journal=journal))
            for stage in chain.checks
        ]
        not_again = ""
        if info.rereads:
            not_again = why_none(
                encoder=chain.encoder.name,
                layout=inner,
                behind=[stage.name for stage in (*compressors, *chain.checks)],
                functions=functions,
                writer=writer,
                target=chain.writer.name,
            )
            context.facts.put(REREAD, Reread(why_none=not_again))
        if journal is not None and journal.is_unfinished:
            begun = await restart(
                journal,
                below=sink_plan.resume_at,
                info=info,
                source=source,
                make_functions=lambda: [_build(stage, context) for stage in chain.functions],
                make_encoder=lambda: _build(chain.encoder, context),
                compressor=compressor,
                checks=checks,
                window=window,
                workers=memory.workers,
                threads=threads,
                emit=events.emit,
            )
            functions[:] = begun.functions  # in place: the replay has the list
            encoder, recorder = begun.encoder, begun.recorder
        yield RunPlan(
            config=config,
            chain=chain,
            context=replace(outside, sink_plan=sink_plan, replay=replay),
            source=source,
            functions=functions,
            encoder=encoder,
            compressor=compressor,
            checks=checks,
            writer=writer,
            info=info,
            inner=inner,
            layout=layout,
            compressed_max=compressed_max,
            memory_plan=memory,
            sink_plan=sink_plan,
            checkpoints=replay.checkpoints,
            meters=meters,
            fuse=fuse,
            recorder=recorder,
            journal=journal,
            start=journal.start if journal is not None else Start(position=head_length(chain, layout)),
            rereads=info.rereads if fuse and not not_again else 0,
        )
    finally:
        if journal is not None:
            journal.close()
        with anyio.CancelScope(shield=True):
            if writer is not None:
                await writer.close()
            if source is not None:
                await source.close()


def _own_files(config: ExportConfig, chain: WiredChain) -> Iterator[Path]:
    """Local paths that a run writes to while it reads; manifest and report come when it has let go of the disk."""
    if config.export.journal != "off":
        yield journal_path(config)
    for asked in (config.observe.prometheus, config.observe.log_file):
        if asked is not None:
            yield asked
    target = getattr(chain.writer.options, "path", None)
    if target is not None and not getattr(chain.writer.options, "url", None):
        yield Path(target)


def _build(stage: StageConfig, context: StageContext) -> Any:
    """The stage itself, with a context of its name."""
    return stage.spec.build(stage.options, replace(context, name=stage.spec.name))


def _wrapped(chain: WiredChain, layout: Layout, window: int) -> Layout:
    """The layout of the image that is stored."""
    for stage in chain.compressors:
        assert stage.spec.wrap is not None, "every compressor says what it makes"  # the catalog's contract test
        layout = stage.spec.wrap(stage.options, layout, window)
    return layout


def _layout(
    chain: WiredChain,
    info: SourceInfo,
    find_head_minimum: Callable[[int], int] | None,
    found: DataMap | None = None,
) -> tuple[Layout, int]:
    """The encoder's layout and the window: 2 MiB where anything compresses, else 4 MiB, unless the user chose."""

    def ask(window: int, head_minimum: int) -> Layout:
        make = chain.encoder.spec.layout
        assert make is not None, "every encoder has a layout"  # the catalog's contract test
        request = LayoutRequest(
            disk_size=info.size, window=window, order=chain.order, head_minimum=head_minimum, map=found
        )
        layout: Layout = make(chain.encoder.options, request)
        return layout

    window = info.block_size or WINDOW_WHEN_COMPRESSING
    layout = ask(window, 0)
    if info.block_size is None and not layout.made_max and not chain.compressors:
        window = WINDOW
    sink = chain.writer.spec.sink
    head_minimum = 0
    # An image that fits into one request needs no head of its own: nothing is sent before its end is known.
    if chain.order is Order.HEAD_LAST and sink and sink.parts and layout.image_bytes_max > sink.parts.whole_max:
        head_minimum = sink.parts.part_min
        layout = ask(window, head_minimum)
        # A longer head makes the image longer, and that the parts of a store that wants them equal.
        while find_head_minimum is not None and (longer := find_head_minimum(layout.image_bytes_max)) > head_minimum:
            head_minimum = longer
            layout = ask(window, head_minimum)
    return ask(window, head_minimum), window


async def map_disk(
    chain: WiredChain, source: Source, info: SourceInfo, context: StageContext, memory: MemoryPlan, unit: int
) -> DataMap:
    """The map pass: which units of the disk hold data.

    A source that knows holes is believed. Any other is read as a whole, and its zeros are found by the sparse stages of
    the chain; then the disk is read twice.

    Raises:
        SourceError: it can't be read.
    """
    found = DataMap(unit, info.size)
    looks = info.mapped_bytes >= info.size and any(stage.spec.role == "sparse" for stage in chain.functions)
    scanning = [_build(stage, context) for stage in chain.functions if stage.spec.role == "sparse"] if looks else []
    every_s, next_s = 0.25, context.clock.now()

    def note(block: Block) -> None:
        nonlocal next_s
        for run in block.runs:
            if run.is_data:
                found.add(run.offset, run.end)
        block.release()
        if context.clock.now() >= next_s or block.end == info.size:
            next_s = context.clock.now() + every_s
            context.emit(MapProgressed(done_bytes=block.end, total_bytes=info.size))

    if not scanning:
        async for block in source.windows(context.window):
            note(block)
        return found

    class Noted:
        async def send(self, item: Block) -> None:
            note(item)

    pool = Pool(context.window, memory.workers + 2)
    segment = Segment(
        source=source,
        functions=scanning,
        encoder=None,
        meters=[StageMeter("") for _ in range(len(scanning) + 1)],
        memory=Memory(Ledger(0), pool, 0),
        disk_size=info.size,
        window=context.window,
        threads=context.threads,
        workers=memory.workers,
    )
    try:
        await segment.run(None, Noted())
    except BaseExceptionGroup as group:
        raise first_error(group) from group
    finally:
        pool.close()
    return found


def divide_memory(
    total: int, window: int, made_max: int, *, with_replay: bool, compressed_max: int = 0, gathered: bool = False
) -> MemoryPlan:
    """Divide the run's memory so that reader, encoder, compressor and writer can't starve each other.

    The next window in order always has its memory before any later one, so there is progress as long as the writer
    can live with `for_writer`. A compressor has memory of its own: the stages before it only feed it.

    Args:
        compressed_max: what compressing one window takes; 0 without a compressor.
        gathered: the writer gathers parts of an image that leaves zeros out: a part may hold a little of very many
            windows, so it is given made bytes, into which it copies what would keep a whole buffer.
    Raises:
        PlanError: not even one window at a time fits.
    """
    a_window = window + made_max + compressed_max
    replay = 2 * a_window if with_replay else 0
    # More threads than processors, because each call also waits for its read (perf: 4 is best on 2).
    workers = (os.cpu_count() or 1) + 2
    while workers > 1 and (workers + 2) * a_window + replay > total * 5 // 8:
        workers -= 1
    compressed = 0
    if compressed_max:
        # Read and not yet taken, taken and not yet compressed (each window may hold the buffer before its own too).
        buffers = 2 * (workers + 1) if workers > 1 else 4
        made = (workers + 3) * made_max
        # As many windows of memory as threads are kept to put the parts of one together.
        compressed = total - replay - buffers * window - made - workers * window
        for_writer = compressed - (workers + 1) * compressed_max
    elif made_max:
        buffers = workers + 2
        made = total - replay - buffers * window
        for_writer = made - (workers + 1) * made_max
    elif gathered:
        buffers = workers + 2
        made = total - replay - buffers * window
        for_writer = made - 2 * window
    else:
        buffers = (total - replay) // window
        made = 0
        for_writer = (buffers - workers - 1) * window
    if for_writer < window:
        raise PlanError(
            f"{format_size(total)} of memory is not enough for windows of {format_size(window)}",
            hint=f'Raise "memory" in [export]; {"64 MiB" if compressed_max else "32 MiB"} always does.',
        )
    return MemoryPlan(
        total=total,
        workers=workers,
        buffers=buffers,
        made=made,
        replay=replay,
        for_writer=for_writer,
        compressed=compressed,
    )
