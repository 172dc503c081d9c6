"""Run a plan: move every byte, seal, verify, publish or withdraw.

One task group carries the transfer. Failure travels as cancellation only, and a stream ends only when its stage
returned normally. Then the sealed image is verified, and the upload ends in exactly one of publish and withdraw.
"""

from __future__ import annotations

import dataclasses
import platform
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import aiofiles
import anyio

from pipeline import __version__
from pipeline.config.options import without_secrets
from pipeline.errors import (
    KeptError,
    LeftBehindError,
    PipelineError,
    StageError,
    VerificationError,
    first_error,
    leaves,
)
from pipeline.events import (
    EventStream,
    FallbackTaken,
    ImagePublished,
    ImageSealed,
    ImageVerified,
    ProgressSampled,
    RunFinished,
    RunPlanned,
    RunStarted,
    UploadKept,
)
from pipeline.flow.buffers import Ledger, Memory, Pool
from pipeline.flow.channels import Channel
from pipeline.flow.compressing import CompressingSegment
from pipeline.flow.items import Block, Content, Receipt, Run, StoredImage, Verdict, Why, weakest
from pipeline.flow.manifest import MANIFEST_SUFFIX, DiskRecord, ImageRecord, Manifest, pack_runs
from pipeline.flow.mapping import SKIPPED_RANGES, MapRecorder
from pipeline.flow.meter import StageMeter, find_bottleneck
from pipeline.flow.replay import Marks
from pipeline.flow.rereading import REREAD, Rereading
from pipeline.flow.resume import RunJournal, remembering, remembering_checks
from pipeline.flow.segment import Segment
from pipeline.flow.series import SeriesRecorder
from pipeline.flow.stage import Compressor, ConcludingSource, RewritingWriter, Start, Verifier, loader_of

if TYPE_CHECKING:
    from pipeline.config.planning import RunPlan

SAMPLE_EVERY_S = 0.25
# Withdrawing talks to the store; a store that does not answer must not hold a failed run longer than this.
WITHDRAW_DEADLINE_S = 60.0
# Items travel by reference: two are enough to keep both sides busy, more would only delay cancellation.
_DEPTH = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run ended well.

    Attributes:
        state: as `weakest` says of the verdicts.
        keeps_manifest: a local copy was wanted; without one, and where the target holds none, none is kept.
        earlier_disk_bytes, earlier_read_bytes, earlier_stored_bytes: what earlier processes of the export did of the
            disk, of what was read, and of what was stored. Times are this process's alone.
        leaked_bytes: memory that a stage did not give back; always 0, looked at by tests.
    """

    uri: str
    state: Literal["identical", "proven", "unproven", "stored"]
    verdicts: tuple[Verdict, ...]
    disk_size: int
    image_size: int
    read_bytes: int
    stored_bytes: int
    elapsed_s: float
    bottleneck: str
    manifest_uri: str
    manifest_path: Path | None
    manifest: Manifest
    keeps_manifest: bool = True
    earlier_disk_bytes: int = 0
    earlier_read_bytes: int = 0
    earlier_stored_bytes: int = 0
    leaked_bytes: int = 0


async def run_export(plan: RunPlan, events: EventStream) -> Outcome:
    """Export the disk as planned.

    Raises:
        SourceError, StoreError, StageError: it failed; what was stored is gone again.
        VerificationError: the stored image is not the disk; it was withdrawn.
        LeftBehindError: it failed, and something may be left in the store.
    Cancellation: the upload is aborted or withdrawn first, shielded and with a deadline.
    """
    context = plan.context
    emit = events.emit
    over_time = SeriesRecorder()
    events.subscribe(over_time, with_fallbacks=True)
    emit(
        RunPlanned(
            name=plan.name,
            chain=plan.chain.names,
            disk_bytes=plan.info.size,
            mapped_bytes=plan.info.mapped_bytes,
            image_bytes_max=plan.layout.image_bytes_max,
            window_bytes=context.window,
            memory_bytes=plan.memory_plan.total,
            target=plan.target_uri,
            notes=plan.notes,
        )
    )
    emit(RunStarted(name=plan.name))
    begun = time.monotonic()
    recorder = plan.recorder
    acknowledge_earlier(plan)
    earlier_read = recorder.read_bytes
    memory = Memory(context.ledger, Pool(context.window, plan.memory_plan.buffers), plan.inner.made_max)
    compressed = Ledger(plan.memory_plan.compressed)
    try:
        try:
            async with _sampling(plan, recorder, begun):
                stored = await _transfer(plan, recorder, memory, compressed)
                if isinstance(plan.source, ConcludingSource):
                    await plan.source.conclude()
        finally:
            memory.pool.close()
        transfer_s = time.monotonic() - begun
        emit(ImageSealed(uri=stored.uri, size_bytes=stored.size))
        if not plan.info.is_changing:  # what was a hole then may hold data since, and rightly so
            context.facts.put(SKIPPED_RANGES, recorder.skipped())
        verdicts, receipt = await _verify(plan, stored)
        bottleneck = find_bottleneck(plan.meters, transfer_s)
        manifest = _manifest(plan, stored, recorder, verdicts, receipt, bottleneck.sentence, time.monotonic() - begun)
        manifest = replace(manifest, series=over_time.series(plan.meters).to_json())
        manifest_uri = await plan.writer.publish(manifest.to_json())
        if plan.journal is not None:
            plan.journal.note_published(stored.uri)
    except BaseException as error:
        if plan.journal is not None and plan.journal.keeps(error):
            _keep(plan, plan.journal, error)
            raise
        await _withdraw(plan, error)
        if plan.journal is not None and not isinstance(first_error(error), LeftBehindError):
            plan.journal.remove()
        raise
    with anyio.CancelScope(shield=True):  # the image is the result: a signal comes too late to undo it
        manifest_path = await _keep_local_copy(plan, stored, manifest, manifest_uri)
        if plan.journal is not None:
            plan.journal.remove()
    emit(ImagePublished(uri=stored.uri, manifest_uri=manifest_uri))
    outcome = Outcome(
        uri=stored.uri,
        state=manifest.state,  # type: ignore[arg-type]  # a Literal in Outcome, a text in JSON
        verdicts=verdicts,
        disk_size=plan.info.size,
        image_size=stored.size,
        read_bytes=recorder.read_bytes,
        stored_bytes=context.progress.stored_bytes,
        earlier_disk_bytes=context.progress.earlier_acked_bytes,
        earlier_read_bytes=earlier_read,
        earlier_stored_bytes=context.progress.earlier_stored_bytes,
        elapsed_s=time.monotonic() - begun,
        bottleneck=bottleneck.sentence,
        manifest_uri=manifest_uri,
        manifest_path=manifest_path,
        manifest=manifest,
        keeps_manifest=plan.config.export.manifest != "off",
        leaked_bytes=memory.leaked + compressed.charged,
    )
    emit(
        RunFinished(
            name=plan.name,
            uri=outcome.uri,
            verified="" if outcome.state == "stored" else outcome.state,
            disk_bytes=outcome.disk_size,
            read_bytes=outcome.read_bytes,
            stored_bytes=outcome.stored_bytes,
            elapsed_s=outcome.elapsed_s,
            bottleneck=outcome.bottleneck,
            manifest_path=str(manifest_path or ""),
        )
    )
    return outcome


# -- transfer ---------------------------------------------------------------------------------------------------------


async def _transfer(plan: RunPlan, recorder: MapRecorder, memory: Memory, compressed: Ledger) -> StoredImage:
    """Move every byte through the chain and seal; checks what every edge carried."""
    segments = _segments(plan, recorder, memory, compressed)
    writer_meter = plan.meter(plan.chain.writer.name)
    done_meter = StageMeter("engine")
    channels: list[Channel[Any]] = [
        Channel(depth=_DEPTH, sender=segment_meters[-1], receiver=next_meter)
        for (_, segment_meters), next_meter in zip(
            segments, [*(meters[0] for _, meters in segments[1:]), writer_meter], strict=True
        )
    ]
    result: Channel[StoredImage] = Channel(depth=1, sender=writer_meter, receiver=done_meter)
    stored: list[StoredImage] = []

    async def collect() -> None:
        stored.extend([image async for image in result])

    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(collect)
            inlet: Channel[Any] | None = None
            for (run, _), outlet in zip(segments, channels, strict=True):
                tasks.start_soon(_stage, run, inlet, outlet)
                inlet = outlet
            tasks.start_soon(_stage, plan.writer.run, inlet, result)
    except BaseExceptionGroup as group:
        raise _worth_telling(group) from group
    finally:
        for channel in (*channels, result):
            channel.discard()
    _check_conservation(plan, channels)
    if len(stored) != 1:
        raise StageError(f"the writer sealed {len(stored)} images instead of one", stage=plan.chain.writer.spec.name)
    return stored[0]


async def _stage(run: _Run, inlet: Any, outlet: Channel[Any]) -> None:
    """Run one stage; its outlet ends only when it returned normally."""
    await run(inlet, outlet)
    outlet.end()


_Run = Callable[[Any, Any], Awaitable[None]]


def _segments(
    plan: RunPlan, recorder: MapRecorder, memory: Memory, compressed: Ledger
) -> list[tuple[_Run, list[StageMeter]]]:
    """The stages before the writer: up to the encoder one segment when fused, else one per stage; then the others."""
    meters = plan.meters[: len(plan.functions) + 2]
    marks = Marks(plan.checkpoints, plan.compressor) if plan.compressor else None
    shared: dict[str, Any] = {
        "memory": memory,
        "disk_size": plan.info.size,
        "window": plan.context.window,
        "threads": plan.context.threads,
        "workers": plan.memory_plan.workers,
    }
    last: dict[str, Any] = {
        "encoder": plan.encoder,
        "observed": recorder.observe,
        "checkpoints": marks or plan.checkpoints,
        "start": plan.start.of_encoder,
        "on_boundary": _point_taker(plan),
        **shared,
    }
    segments: list[tuple[_Run, list[StageMeter]]] = []
    if plan.fuse:
        again = _rereader(plan, recorder, meters, shared)
        whole = Segment(source=plan.source, functions=plan.functions, meters=meters, before_finish=again, **last)
        segments.append((whole.run, meters))
    else:
        first = Segment(source=plan.source, functions=[], encoder=None, meters=meters[:1], **shared)
        segments.append((first.run, meters[:1]))
        for function, meter in zip(plan.functions, meters[1:-1], strict=True):
            one = Segment(source=None, functions=[function], encoder=None, meters=[meter], **shared)
            segments.append((one.run, [meter]))
        encoding = Segment(source=None, functions=[], meters=meters[-1:], **last)
        segments.append((encoding.run, meters[-1:]))
    if plan.compressor and marks:
        meter = plan.meter(plan.chain.compressors[0].name)
        compressing = CompressingSegment(
            plan.compressor,
            window=plan.context.window,
            ledger=compressed,
            made_max=plan.compressed_max,
            meter=meter,
            threads=plan.context.threads,
            workers=plan.memory_plan.workers,
            checkpoints=plan.checkpoints,
            marks=marks,
            start=plan.start,
            on_window=_window_point_taker(plan, plan.compressor),
        )
        segments.append((compressing.run, [meter]))
    for stage, check in zip(plan.chain.checks, plan.checks, strict=True):
        segments.append((check.run, [plan.meter(stage.name)]))
    return segments


def _rereader(
    plan: RunPlan, recorder: MapRecorder, meters: list[StageMeter], shared: dict[str, Any]
) -> Callable[[Any], Awaitable[None]] | None:
    """What looks again at a disk in use, where the chain can send what changed."""
    writer = plan.writer
    if not plan.rereads or not isinstance(writer, RewritingWriter):
        return None
    rereading = Rereading(
        looks=plan.rereads,
        source=plan.source,
        functions=plan.functions,
        writer=writer,
        recorder=recorder,
        on_rewrite=plan.journal.note_rewriting if plan.journal is not None else lambda offset: None,
        emit=plan.context.emit,
        meters=meters[:-1],
        **shared,
    )

    async def read_again(outlet: Any) -> None:
        plan.context.facts.put(REREAD, await rereading.run(outlet))

    return read_again


def _point_taker(plan: RunPlan) -> Callable[[Start, bool], None] | None:
    """What notes the state of the run at block boundaries, where it keeps a journal."""
    journal = plan.journal
    if journal is None:
        return None
    noted = remembering(plan.functions, plan.recorder)
    checks = remembering_checks(plan.checks)

    def take(here: Start, is_end: bool) -> None:
        journal.take_point(
            plan.encoder, here, noted, checks=checks, is_end=is_end, is_inner=plan.compressor is not None
        )

    return take


def _window_point_taker(plan: RunPlan, compressor: Compressor[Any]) -> Callable[[int, int], None] | None:
    """What makes points of the encoder's states where a compressor stands behind it."""
    journal = plan.journal
    if journal is None:
        return None
    checks = remembering_checks(plan.checks)

    def take(window_offset: int, guest_bytes: int) -> None:
        journal.take_outer_point(compressor, window_offset, guest_bytes, checks)

    return take


def acknowledge_earlier(plan: RunPlan) -> None:
    """Count what earlier processes of the export stored."""
    start = plan.start
    image_bytes = max(0, start.position - plan.layout.head_length)
    plan.context.progress.acknowledge(guest_bytes=start.guest_bytes, image_bytes=image_bytes, is_earlier=True)


def _check_conservation(plan: RunPlan, channels: list[Channel[Any]]) -> None:
    """Guest bytes are conserved on every edge, and all of them are in the store."""
    size = plan.info.size
    behind = 1 + len(plan.checks) if plan.compressor else len(channels)  # edges behind the compressor, or all
    for number, channel in enumerate(channels):
        start = plan.start if number >= len(channels) - behind else plan.start.of_encoder
        earlier = start.guest_bytes
        if channel.guest_bytes != size - earlier:
            raise StageError(f"edge {number} carried {channel.guest_bytes} of {size - earlier} guest bytes")
    if plan.context.progress.acked_bytes != size:
        raise StageError(f"the store acknowledged {plan.context.progress.acked_bytes} of {size} guest bytes")


def _worth_telling(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one error of a failed transfer; a cancellation from outside stays one.

    A writer that could not clean up knows only that it was cancelled. What made the run fail is beside it in the group.
    """
    error = first_error(group)
    if isinstance(error, LeftBehindError) and not isinstance(error.cause, Exception):
        causes = [other for other in leaves(group) if other is not error and isinstance(other, Exception)]
        error.cause = first_error(ExceptionGroup("causes", causes)) if causes else error.cause
    return error


@dataclass
class _sampling:
    """While inside, emit the counters four times a second, and once more at the end."""

    plan: RunPlan
    recorder: MapRecorder
    begun: float

    async def __aenter__(self) -> None:
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        self._tasks.start_soon(self._sample)
        if self.plan.journal is not None:
            self._tasks.start_soon(self.plan.journal.keep_durable, self.plan.context.threads)

    async def __aexit__(self, kind: Any, error: Any, trace: Any) -> bool | None:
        self._tasks.cancel_scope.cancel()
        self._emit()
        try:
            return await self._tasks.__aexit__(kind, error, trace)
        except BaseExceptionGroup as group:
            raise first_error(group) from group

    async def _sample(self) -> None:
        while True:
            await anyio.sleep(SAMPLE_EVERY_S)
            self._emit()

    def _emit(self) -> None:
        progress = self.plan.context.progress
        # A further look at a disk in use may find more holes than the one before.
        progress.read_bytes = max(progress.read_bytes, self.recorder.read_bytes)
        progress.skipped_bytes = sum(self.recorder.totals.values()) - self.recorder.read_bytes
        self.plan.context.emit(
            ProgressSampled(
                elapsed_s=time.monotonic() - self.begun,
                disk_bytes=progress.disk_bytes,
                read_bytes=progress.read_bytes,
                skipped_bytes=progress.skipped_bytes,
                acked_bytes=progress.acked_bytes,
                stored_bytes=progress.stored_bytes,
                waits={meter.name: _times(meter) for meter in self.plan.meters},
            )
        )


def _times(meter: StageMeter) -> tuple[float, float, float, float]:
    return (meter.working_s, meter.waiting_in_s, meter.waiting_out_s, meter.waiting_buffer_s)


# -- verify, publish, withdraw ----------------------------------------------------------------------------------------


async def _verify(plan: RunPlan, stored: StoredImage) -> tuple[tuple[Verdict, ...], Receipt | None]:
    """Every verification that the chain names, and the store's receipt for the manifest.

    Raises:
        VerificationError: one of them says "differs" or "disproven".
    """
    verdicts = []
    for stage in plan.chain.verifiers:
        context = replace(plan.context, name=stage.spec.name, reload=_reloader(plan))
        verifier: Verifier = stage.spec.build(stage.options, context)
        verdict = await verifier.verify(stored)
        plan.context.emit(
            ImageVerified(stage=stage.spec.name, state=verdict.state, coverage=verdict.coverage, detail=verdict.detail)
        )
        if verdict.state == "disproven":
            raise VerificationError(
                f"the stored image is disproven: {verdict.detail}",
                operation=stage.spec.name,
                hint="It was not published. What is wrong may be so on the disk itself: pipeline prove tells more.",
                uri=stored.uri,
            )
        if verdict.state == "differs":
            raise VerificationError(
                f"the stored image is not the disk: {verdict.detail or 'bytes differ'}",
                operation=stage.spec.name,
                hint="It was not published. Run the export again; if it differs again, test memory, cable and target.",
                uri=stored.uri,
                ranges=", ".join(f"{found.start}-{found.stop - 1}" for found in verdict.differing[:4]) or None,
            )
        verdicts.append(verdict)
    receipt = None
    if stored.fetch_receipt is not None:
        async with stored.fetch_receipt() as receipt:
            pass
    return tuple(verdicts), receipt


def _reloader(plan: RunPlan) -> Callable[[int, int], AsyncIterator[Block]]:
    """Read guest ranges from the source once more, also those that the map skips; the receiver owns the blocks."""

    async def reload(offset: int, length: int) -> AsyncIterator[Block]:
        window = plan.context.window
        pool = Pool(window, 1)
        try:
            for start in range(offset - offset % window, offset + length, window):
                size = min(window, plan.info.size - start)
                lease = await pool.lease()
                wanted = Block(start, size, None, (Run(start, size, Content.DATA, Why.READ),))
                load = await loader_of(plan.source)(wanted)
                await anyio.to_thread.run_sync(load, lease.buffer, limiter=plan.context.threads)
                yield replace(wanted, data=lease.into_slice(size))
        finally:
            pool.close()

    return reload


async def _withdraw(plan: RunPlan, error: BaseException) -> None:
    """Remove what was sealed, whatever happens meanwhile."""
    if isinstance(error, LeftBehindError):
        return  # the writer's own clean-up failed already, and says so
    with anyio.CancelScope(shield=True):
        try:
            with anyio.fail_after(WITHDRAW_DEADLINE_S):
                await plan.writer.withdraw()
        except LeftBehindError as left:
            raise LeftBehindError(left.message, cause=error, commands=left.commands) from error
        except (PipelineError, TimeoutError) as failure:
            raise LeftBehindError(
                f"the image could not be removed: {failure}", cause=error, commands=(f"remove {plan.target_uri}",)
            ) from error


def _keep(plan: RunPlan, journal: RunJournal, error: BaseException) -> None:
    """Leave what was stored and the journal, and say how to go on and how to be rid of it.

    Raises:
        KeptError: instead of any error; a cancellation is left to travel on.
    """
    commands = journal.remove_commands()
    plan.context.emit(UploadKept(uri=plan.target_uri, resume=journal.resume_command, remove=commands))
    journal.close()
    if isinstance(error, Exception):
        raise KeptError(
            f"the export stopped; what was sent is kept ({plan.context.progress.acked_bytes} of "
            f"{plan.info.size} bytes of the disk)",
            cause=error,
            resume=journal.resume_command,
            commands=commands,
        ) from error


async def _keep_local_copy(plan: RunPlan, stored: StoredImage, manifest: Manifest, manifest_uri: str) -> Path | None:
    """Write the manifest beside the TOML or where [export] says. The image is published: failing undoes nothing."""
    export = plan.config.export
    if export.manifest == "off":
        return None
    name = stored.uri.rstrip("/").rpartition("/")[2]
    path = export.manifest or plan.config.file.parent / (name + MANIFEST_SUFFIX)
    if path.absolute() == Path(manifest_uri):
        return path  # the writer has put it there already, safe from a power loss
    try:
        async with aiofiles.open(path, "wb") as file:
            await file.write(manifest.to_json())
    except OSError as error:
        plan.context.emit(
            FallbackTaken(stage="engine", what=f"no local copy of the manifest at {path}", reason=error.strerror or "")
        )
        return None
    return path


def _manifest(
    plan: RunPlan,
    stored: StoredImage,
    recorder: MapRecorder,
    verdicts: tuple[Verdict, ...],
    receipt: Receipt | None,
    bottleneck: str,
    elapsed_s: float,
) -> Manifest:
    facts = {}
    for stage in plan.chain.stages:
        for fact in stage.spec.provides:
            value: Any = plan.context.facts.find(fact)
            if hasattr(value, "to_json"):
                facts[fact.name] = value.to_json()
    return Manifest(
        name=plan.name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        disk=DiskRecord(
            size=plan.info.size,
            identity=plan.info.identity,
            totals={why.value: length for why, length in recorder.totals.items() if length},
            runs=pack_runs(list(recorder.runs())),
            runs_exact=recorder.is_exact,
        ),
        image=ImageRecord(
            uri=stored.uri,
            format=plan.layout.format,
            size=stored.size,
            virtual_size=plan.layout.virtual_size,
            window=plan.context.window,
            order=plan.context.order.value,
            head_length=plan.layout.head_length,
        ),
        state=weakest(verdicts),
        facts=facts,
        options={
            "export": _shown(plan.config.export),
            **({"target": _shown(plan.config.target)} if plan.config.target.profile else {}),
            **{stage.spec.name: _shown(stage.options) for stage in plan.chain.stages},
        },
        receipt=receipt.proofs if receipt else (),
        verdicts=tuple(_shown(verdict) for verdict in verdicts),
        versions={"disk-pipeline": __version__, "python": platform.python_version(), **_library_versions()},
        timings={
            meter.name: dict(zip(("working", "in", "out", "buffer"), _times(meter), strict=True))
            for meter in plan.meters
        },
        bottleneck=bottleneck,
        elapsed_s=elapsed_s,
        attempts=plan.journal.attempts if plan.journal else 1,
        preflight=plan.preflight,
    )


def _shown(value: Any) -> dict[str, Any]:
    """A dataclass as plain JSON values; secrets and paths as text."""

    def plain(item: Any) -> Any:
        if isinstance(item, (list, tuple)):
            return [plain(one) for one in item]
        if isinstance(item, dict):
            return {str(key): plain(one) for key, one in item.items()}
        if isinstance(item, range):
            return [item.start, item.stop]
        if item is None or isinstance(item, (bool, int, float)):
            return item
        return without_secrets(str(item))

    return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}


def _library_versions() -> dict[str, str]:
    """Of the libraries that shape an image or its digests, those that this run loaded."""
    names = ("isal", "zlib_ng", "zstandard", "xxhash", "blake3", "lz4")
    loaded = {name: module for name in names if (module := sys.modules.get(name))}
    return {name.replace("_", "-"): _version(module) for name, module in loaded.items()}


def _version(module: ModuleType) -> str:
    # xxhash has no __version__. The packages' metadata would bring a parser of e-mail with it.
    return str(getattr(module, "__version__", None) or getattr(module, "VERSION", "unknown"))
