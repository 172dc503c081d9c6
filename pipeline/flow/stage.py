"""What a stage is, the shapes it can have, and how it declares itself.

    Source         knows a map of the disk and loads, or fetches, any range of it again and again
    FunctionStage  a pure, threaded function of one block, whose notes are observed in order
    Encoder        prepare (threaded) / place (ordered) / finish / checkpoint / restore
    Compressor     the same shape, over windows of the image instead of blocks of the disk
    Stage          one task with an inlet and an outlet: writers, checks of the image
    Verifier       looks at a sealed image and gives a verdict

The SPEC of a stage is the only place where its name, help and ports are written.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import anyio

from pipeline.config.options import option as option  # re-exported: a stage module needs one import for its options
from pipeline.events import Event, LeftoverFound
from pipeline.flow.buffers import Charge, Ledger
from pipeline.flow.channels import Inlet, Outlet
from pipeline.flow.facts import Fact, Facts
from pipeline.flow.items import Block, ImageWindow, Piece, StoredImage, Verdict
from pipeline.flow.mapping import DataMap
from pipeline.flow.meter import StageMeter
from pipeline.flow.orders import Order, Traits
from pipeline.units import round_up

In_contra = TypeVar("In_contra", contravariant=True)
Out_co = TypeVar("Out_co", covariant=True)
Note = TypeVar("Note")
P = TypeVar("P")

DISK_SIZE: Fact[int] = Fact("disk size", int)


class Clock(Protocol):
    """Time, injected so that tests need not wait."""

    def now(self) -> float:
        """Monotonic seconds."""
        ...

    async def sleep(self, seconds: float) -> None: ...


class RealClock:
    """The clock of the machine."""

    def now(self) -> float:
        """Monotonic seconds."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Wait, cancellably."""
        await anyio.sleep(seconds)


@dataclass(slots=True)
class Progress:
    """The counters of a run. Written on the event loop only.

    Attributes:
        acked_bytes: guest bytes that the store acknowledged; what progress is measured by.
        stored_bytes: image bytes that the store acknowledged.
        earlier_acked_bytes, earlier_stored_bytes: those of them that earlier processes of the export sent.
    """

    disk_bytes: int = 0
    read_bytes: int = 0
    skipped_bytes: int = 0
    acked_bytes: int = 0
    stored_bytes: int = 0
    earlier_acked_bytes: int = 0
    earlier_stored_bytes: int = 0

    def acknowledge(self, *, guest_bytes: int, image_bytes: int, is_earlier: bool = False) -> None:
        """The store has these bytes for good; `is_earlier` where an earlier process sent them."""
        self.acked_bytes += guest_bytes
        self.stored_bytes += image_bytes
        if is_earlier:
            self.earlier_acked_bytes += guest_bytes
            self.earlier_stored_bytes += image_bytes


class Replay(Protocol):
    """Makes image bytes again from the source, from the checkpoint before them."""

    def pieces(self, start: int, end: int) -> AsyncIterator[Piece]:
        """The image bytes [start, end) once more, in order, exactly; the receiver owns each piece.

        `start` is at or behind a boundary that the sink asked for and has not given up. Uses memory of its own, so it
        makes progress while the chain stands still.

        Raises:
            SourceError: the disk gave other bytes than the first time.
        """
        ...

    def forget(self, below: int) -> None:
        """No byte below this image offset will be asked for again."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    """Where an encoder begins that has a compressor behind it. Bytes of the image before it is compressed.

    Attributes:
        position: of the first byte that the encoder makes.
        guest_bytes: how much of the disk its pieces before that accounted for.
        window_offset: of the first window that is compressed; what the encoder makes before it is there already.
    """

    position: int = 0
    guest_bytes: int = 0
    window_offset: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Where the bytes of a run begin: at the beginning, or where an earlier process of the same export had come to.

    Attributes:
        position: image offset of the first byte that comes to the writer.
        guest_offset: of the first block that is read.
        guest_bytes: how much of the disk the pieces before `position` accounted for.
        inner: the same for the encoder, where a compressor stands behind it.
    """

    position: int = 0
    guest_offset: int = 0
    guest_bytes: int = 0
    inner: Inner | None = None

    @property
    def of_encoder(self) -> Start:
        """As the encoder sees it."""
        if self.inner is None:
            return self
        return Start(position=self.inner.position, guest_offset=self.guest_offset, guest_bytes=self.inner.guest_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptPart:
    """A part that a store acknowledged, as a journal remembers it.

    Attributes:
        start, length: image bytes.
        guest_bytes: of the pieces that end in it.
        tag: what the store calls it.
        sums: checksums by name, as text.
    """

    number: int
    start: int
    length: int
    guest_bytes: int
    tag: str
    sums: Mapping[str, str] = field(default_factory=dict)


class UploadJournal(Protocol):
    """What a writer notes of its upload, so that a later process can go on with it.

    On the event loop. No call fails: a journal that can't be written says so once, and forgets what follows.

    Attributes:
        id: the same for every process of one export, and of no other export.
        upload: what was last noted, also by an earlier process; empty where there is nothing in the store.
        parts: acknowledged parts by number.
        mark: image bytes below this (behind a head that comes last) are in the target and durable.
        discards: the user wants what is in the store removed, not continued: remove it while planning, then call
            `begin_anew`.
        resends: parts that hold other bytes now may be sent again.
        start: where the pieces of this run begin; known after planning.
    """

    @property
    def id(self) -> str: ...

    @property
    def upload(self) -> Mapping[str, Any]: ...

    @property
    def parts(self) -> Mapping[int, KeptPart]: ...

    @property
    def mark(self) -> int: ...

    @property
    def discards(self) -> bool: ...

    @property
    def resends(self) -> bool: ...

    @property
    def start(self) -> Start: ...

    def note_upload(self, state: Mapping[str, Any]) -> None:
        """Remember how the upload is found again; plain JSON values, no secret. Durable when it returns."""
        ...

    def note_part(self, part: KeptPart) -> None:
        """The store acknowledged a part."""
        ...

    def note_mark(self, position: int) -> None:
        """Every image byte below is on stable storage in the target."""
        ...

    def drop_parts(self, numbers: Iterable[int]) -> None:
        """The store does not have these parts after all."""
        ...

    def begin_anew(self, reason: str) -> None:
        """Nothing of what earlier processes noted is in the store any more."""
        ...

    def keeps(self, error: BaseException) -> bool:
        """Whether what is in the store stays there after this failure, for a later process to go on with."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What an encoder knows of the image before the first byte.

    Attributes:
        format: the name a reader of it goes by ("qcow2", "raw").
        virtual_size: the disk a guest will see, in bytes; at least the exported size.
        head_length: image bytes [0, head_length) come last in HEAD_LAST order; 0 where nothing is patched.
        image_bytes_max: no image of this disk is longer.
        image_bytes: the exact length, where it is known up front.
        made_max: bytes that preparing one full window can make, charged to the ledger before; 0 where the encoder
            passes the window's own slice on.
        grain: zero runs are useful to the encoder from this length and alignment on, in guest bytes.
        positional: the image is the disk byte for byte, and what follows it depends on nothing of it; where the disk
            changed, meanwhile or between two processes of one export, what changed can be sent again.
        skips_grow: a long skip may make the image longer by as much; False where it costs tables only.
        notes: sentences that a person should read before the start: a size that was rounded up and why, a limit that
            the image may meet.
        map: what the map pass found, for an encoder that asked for one (`StageSpec.map_unit`).
    """

    format: str
    virtual_size: int
    head_length: int
    image_bytes_max: int
    image_bytes: int | None = None
    made_max: int = 0
    grain: int = 65536
    positional: bool = False
    skips_grow: bool = True
    notes: tuple[str, ...] = ()
    map: DataMap | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutRequest:
    """What the planning knows when it asks an encoder for its layout. Bytes.

    Attributes:
        head_minimum: a HEAD_LAST sink wants the head at least this long (the smallest part of a store); the bytes that
            the format does not need there are zero.
        map: which units of the disk hold data, after a map pass; None before it: then the layout of a full disk.
    """

    disk_size: int
    window: int
    order: Order
    head_minimum: int = 0
    map: DataMap | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SinkPlan:
    """How a writer is going to store an image of a given layout.

    Attributes:
        boundaries: image offsets, ascending, from which bytes may have to be made again (`StageContext.replay`).
        held_bytes: ledger and pool bytes that the writer may hold at once while it still makes progress.
        own_bytes: what the writer allocates by itself beside pieces (staging buffers); comes out of the run's memory.
        summary: what `pipeline plan` prints, (what, how much).
        resume_at: image bytes below this (behind a head that comes last) are in the target, from an earlier process;
            they are not needed again.
    """

    boundaries: tuple[int, ...] = ()
    held_bytes: int = 0
    own_bytes: int = 0
    summary: tuple[tuple[str, str], ...] = ()
    resume_at: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SinkRequest:
    """What the planning asks a writer.

    Attributes:
        layout: of the image at its longest.
        memory: bytes that blocks and pieces may hold beyond what the stages before the writer need to work.
        source_path: the local path of the disk that is read, where it has one: never a target.
    """

    layout: Layout
    order: Order
    memory: int
    source_path: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounding:
    """What a target wants of the size of a virtual disk. Bytes.

    Attributes:
        alignment: a multiple of this.
        minimum: at least this.
    """

    alignment: int
    minimum: int = 0

    def round(self, size: int) -> int:
        """The smallest size that the target takes a disk of `size` bytes with."""
        return round_up(max(size, self.minimum), self.alignment)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageContext:
    """What a stage gets from the engine. Owned by the engine; valid for the run.

    Attributes:
        name: the stage's TOML name, for events and errors.
        threads: the limiter to pass to `anyio.to_thread.run_sync`; threaded work is at least 1 MiB a call.
        workers: how many threads one stage may keep busy.
        order: how pieces travel in this chain.
        reload: guest bytes [offset, offset + length) from the source once more; for verification.
        journal: for writers whose SPEC says `resumable`: where to note the upload; None where the run keeps no journal.
        rounding: for sources: what the target wants of the disk's size; None: nothing is known of it.
        is_rehearsal: the plan is only looked at: nothing is stopped, frozen or made.
        own_files: local paths that the run writes to while it reads, for a source that holds filesystems still.
    """

    name: str
    emit: Callable[[Event], None]
    facts: Facts
    progress: Progress
    meter: StageMeter
    ledger: Ledger
    threads: anyio.CapacityLimiter
    workers: int
    clock: Clock = field(default_factory=RealClock)
    export_name: str = ""
    disk_size: int = 0
    window: int = 0
    order: Order = Order.SEQUENTIAL
    layout: Layout | None = None
    sink_plan: SinkPlan | None = None
    replay: Replay | None = None
    reload: Callable[[int, int], AsyncIterator[Block]] | None = None
    journal: UploadJournal | None = None
    rounding: Rounding | None = None
    is_rehearsal: bool = False
    own_files: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceInfo:
    """What a source is, once it is open.

    Attributes:
        size: guest bytes.
        mapped_bytes: how many of them the map calls data.
        path: local path of the disk, where it has one.
        block_size: the window that the user asked for, if any.
        own_bytes: what the source holds at most beside the run's buffers (tables, fetched bytes); comes out of the
            run's memory.
        identity: what tells this disk from another (serial, inode, mtime ...), for manifest and resume.
        summary: what `pipeline plan` prints of it, (what, how much).
        notes: sentences that a person should read before the start.
        is_changing: somebody may write to the disk while it is read.
        rereads: so often at most such a disk is read again to catch up with what changed, where the chain can.
    """

    size: int
    mapped_bytes: int
    sector_size: int = 512
    path: str | None = None
    block_size: int | None = None
    own_bytes: int = 0
    identity: dict[str, str] = field(default_factory=dict)
    summary: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    is_changing: bool = False
    rereads: int = 0


class Source(Protocol):
    """A map of the disk. Opened read-only, never written. Its bytes come by `load` or by `fetch`, whichever it has."""

    async def open(self) -> SourceInfo:
        """Open it and look at its size and kind. Raises SourceError or PlanError."""
        ...

    def windows(self, window: int, start: int = 0) -> AsyncIterator[Block]:
        """The disk from `start` (a window boundary) as blocks without data: whole aligned windows, and long skips."""
        ...

    async def close(self) -> None:
        """Close it; idempotent."""
        ...


@runtime_checkable
class LoadingSource(Source, Protocol):
    """A source that a thread reads."""

    def load(self, block: Block, buffer: memoryview) -> None:
        """Fill `buffer[:block.length]` with the block's bytes; its zero runs are zeroed, not read.

        Threads: any, several at once. Calling it again for the same block is the retry.
        Raises:
            SourceError: with operation, path and guest offset, also for a short read.
        """
        ...


@runtime_checkable
class FetchingSource(Source, Protocol):
    """A source whose input has to be awaited: the engine fetches on the event loop, and decodes in a thread."""

    async def fetch(self, block: Block) -> Callable[[memoryview], None]:
        """Read what the block needs. What comes back fills a buffer as `load` does, in any thread.

        Raises:
            SourceError, FormatError, StoreError: it can't be read, or is damaged.
        Cancellation: at once.
        """
        ...


@runtime_checkable
class ConcludingSource(Source, Protocol):
    """A source that looks back when every byte was read, before the image is verified."""

    async def conclude(self) -> None:
        """Leave facts, let go of what held the disk still.

        Raises:
            SourceError: the disk did not hold still, so that the image is of no use.
        """
        ...


Load = Callable[[memoryview], None]


def loader_of(source: Source) -> Callable[[Block], Awaitable[Load]]:
    """What makes the threaded call that fills a buffer with a block; what has to be awaited for it is awaited there."""
    if isinstance(source, FetchingSource):
        return source.fetch
    assert isinstance(source, LoadingSource), "a source has load or fetch"  # the catalog's contract test
    load_block = source.load

    async def load(block: Block) -> Load:
        return partial(load_block, block)

    return load


class FunctionStage(Protocol[Note]):
    """A pure function of one block, and an ordered look at what it noted."""

    def apply(self, block: Block) -> tuple[Block, Note]:
        """Look at or re-describe one block. Threads: any; keeps no state. Skips (no data) come too."""
        ...

    def observe(self, note: Note) -> None:
        """Fold the note of the next block, in guest order, on the event loop."""
        ...

    def confirm(self, note: Note, offset: int) -> None:
        """Compare the note of a block at guest `offset` that was loaded again. Raises SourceError when it changed."""
        ...

    def finish(self) -> None:
        """Every block was observed: leave facts."""
        ...


@runtime_checkable
class Remembering(Protocol):
    """A function stage whose observations outlive the process; without this, it has none that matter."""

    def delta(self) -> bytes:
        """What was observed since the last call, for `recall`; called between two blocks."""
        ...

    def recall(self, delta: bytes) -> None:
        """Observe again what an earlier process did, delta by delta, before the first block."""
        ...


@runtime_checkable
class Comparing(Protocol):
    """A function stage that can tell what changed when all of the disk is read once more."""

    def compare(self, note: Any, offset: int) -> tuple[range, ...]:
        """Take the note of the block at guest `offset` in place of the one before.

        Called with every block of a further look, in guest order, from 0 to the end of the disk, on the event loop.

        Returns:
            the guest ranges of the block that hold something else now, ascending.
        """
        ...


@runtime_checkable
class RememberingCheck(Protocol):
    """A check of the image whose digests outlive the process. It lags behind the encoder, so it says how far it is."""

    @property
    def covered(self) -> int:
        """Image bytes below this (behind a head that comes last) are in what `delta` gave, or `recall` took."""
        ...

    def delta(self) -> bytes:
        """What was added since the last call, for `recall`; empty where there is nothing new."""
        ...

    def recall(self, delta: bytes) -> None:
        """Add what an earlier process did, delta by delta, before the first piece; pieces below are then ignored."""
        ...


class Encoder(Protocol[P]):
    """Turns blocks into pieces. Keeps no state outside its checkpoint."""

    @property
    def position(self) -> int:
        """Image offset behind the last byte placed."""
        ...

    def prepare(self, block: Block, charge: Charge | None) -> P:
        """Everything about a block that needs no position: compress its clusters.

        Takes over the block's slice and `charge` (`Layout.made_max` bytes; None for skips or when that is 0).
        Threads: any, several at once; keeps no state.
        """
        ...

    def place(self, prepared: P) -> Iterable[Piece]:
        """Assign image offsets, in guest order, on the event loop; cheap. The caller owns the pieces."""
        ...

    def finish(self) -> Iterable[Piece]:
        """What follows the last block: tables, and the head (offset 0) last."""
        ...

    def checkpoint(self) -> bytes:
        """All of the state at a block boundary, small."""
        ...

    def restore(self, state: bytes) -> None:
        """Go back to a checkpoint, in this process or another, with the same options and layout."""
        ...


class Compressor(Protocol[P]):
    """Turns the pieces of an image, in sequence, into those of another. Keeps no state outside its checkpoint.

    An encoder over windows of the image: the same calls, under the same rules.
    """

    @property
    def position(self) -> int:
        """Offset behind the last byte placed, in the image that it makes."""
        ...

    def prepare(self, window: ImageWindow, charge: Charge | None) -> P:
        """Compress one window. Takes over its slices and `charge` (`Layout.made_max` bytes; None for zeros).

        Threads: any, several at once; keeps no state.
        """
        ...

    def place(self, prepared: P) -> Iterable[Piece]:
        """Assign offsets, in image order, on the event loop; cheap. The caller owns the pieces."""
        ...

    def finish(self) -> Iterable[Piece]:
        """What follows the last window; leaves facts."""
        ...

    def checkpoint(self) -> bytes:
        """All of the state at a window boundary, small."""
        ...

    def restore(self, state: bytes) -> None:
        """Go back to a checkpoint, in this process or another, with the same options and layout."""
        ...


class Stage(Protocol[In_contra, Out_co]):
    """One task with an inlet and an outlet.

    Cancellation: failure travels as cancellation only; a stage never ends its outlet itself.
    """

    async def run(self, inlet: Inlet[In_contra], outlet: Outlet[Out_co]) -> None:
        """Take every item of the inlet, then return."""
        ...


class Writer(Protocol):
    """A stage that stores pieces as one object, and ends it in one of four ways.

    `run` takes every piece, seals and sends one StoredImage. If it fails or is cancelled it aborts the upload itself,
    and raises LeftBehindError where that did not work. After a normal return the engine calls `publish`, or `withdraw`
    when anything failed since. It also calls `withdraw` after a failed `run`: then there is nothing to do, unless the
    failure struck between sealing and returning.
    """

    async def plan(self, request: SinkRequest) -> SinkPlan:
        """Check the target (reachable, allowed, absent) and say how the image will be stored. Sends no image byte.

        Raises:
            PlanError: the target exists, can't hold the image, or refuses the credentials.
            StoreError: it can't be reached.
        """
        ...

    async def run(self, inlet: Inlet[Piece], outlet: Outlet[StoredImage]) -> None: ...

    async def publish(self, manifest: bytes) -> str:
        """Make the sealed image the result and write its manifest last; returns the manifest's URI."""
        ...

    # A writer whose SPEC says `resumable` also has `async def fetch_manifest(self) -> bytes | None`: the manifest that
    # stands beside the target, also before planning.

    async def withdraw(self) -> None:
        """Remove the image if it was sealed; else do nothing. Raises LeftBehindError when it could not."""
        ...

    async def close(self) -> None:
        """Let connections go; idempotent, also without `run`."""
        ...


@runtime_checkable
class RewritingWriter(Protocol):
    """A writer that replaces image bytes which it stored already: takes pieces of later generations."""

    async def can_rewrite(self) -> bool:
        """Whether its target lets it; waits until that is known, which is soon after the run began."""
        ...


@runtime_checkable
class LookingWriter(Protocol):
    """A writer that can ask its store what other runs left of the same target."""

    async def find_leftovers(self) -> Sequence[LeftoverFound]:
        """All there is now, the oldest first; called once after planning. Raises StoreError."""
        ...


class Verifier(Protocol):
    """Looks at a sealed image."""

    async def verify(self, image: StoredImage) -> Verdict:
        """Compare it with what was read. Raises FormatError for an image that can't be decoded at all."""
        ...


@dataclass(frozen=True, slots=True)
class Port:
    """One side of a stage: which items, and for pieces in which orders, the best first."""

    item: str
    orders: tuple[Order, ...] = ()


NOTHING = Port("nothing")
BLOCKS = Port("blocks")
PIECES_IN_SEQUENCE = Port("pieces", (Order.SEQUENTIAL,))
STORED_IMAGE = Port("a stored image")
VERDICT = Port("a verdict")


def pieces(*orders: Order) -> Port:
    """A port that gives, or takes, pieces in these orders."""
    return Port("pieces", orders)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSpec:
    """The declaration of a stage.

    Attributes:
        name: TOML name; equals the module path below `stages/`.
        summary: one sentence for `pipeline stages`.
        options: a frozen dataclass whose fields are `option(...)`s.
        build: makes the stage: `build(options, context)`. Its type is checked against the ports by the shape
            protocols above.
        provides, needs: facts that the stage leaves, or reads.
        layout: for encoders: `layout(options, request)`, pure; raises PlanError.
        wrap: for compressors: `wrap(options, layout, window)`: the layout of what it makes of an image of `layout`.
        orders: for stages whose options decide on it: those orders of `gives` that these options can produce, the
            best first; of `takes` for a check of the image and for writers.
        orders_hint: why these options allow no other order, and what would work; empty where there is nothing to say.
        map_unit: for encoders that need to know, for these options and in this order, which units of the disk hold
            data before the first byte: the length of a unit in guest bytes; else None.
        holds_stdout: for writers: whether these options put the image on stdout.
        sink: for writers: what the target can do.
        checkpointed: for encoders and compressors: False where the state can't be saved (OVA), with the reason in
            `summary`.
        resumable: for writers: a later process can go on with an upload (`StageContext.journal`).
        not_resumable: why a stage with these options can't be gone on with; empty where it can.
        head_minimum: for writers in numbered parts: how long a head that comes last has to be to be a part of its own,
            by the length of the longest image; else the store's smallest part.
        missing: for verifiers: what this machine lacks for what these options ask, and how to get it; empty: nothing.
        image: whether the option values shape the image's bytes (then they go into the manifest as such).
        open_reader: opens a stored object by URL for reading, where `schemes` names the URL schemes; takes `endpoint`
            and `ca_file` too.
    """

    name: str
    summary: str
    options: type[Any]
    takes: Port
    gives: Port
    build: Callable[[Any, StageContext], Any]
    provides: tuple[Fact[Any], ...] = ()
    needs: tuple[Fact[Any], ...] = ()
    layout: Callable[[Any, LayoutRequest], Layout] | None = None
    wrap: Callable[[Any, Layout, int], Layout] | None = None
    orders: Callable[[Any], tuple[Order, ...]] | None = None
    orders_hint: Callable[[Any], str] | None = None
    map_unit: Callable[[Any, Order], int | None] | None = None
    holds_stdout: Callable[[Any], bool] | None = None
    sink: Traits | None = None
    checkpointed: bool = True
    resumable: bool = False
    head_minimum: Callable[[Any], Awaitable[Callable[[int], int]]] | None = None
    not_resumable: Callable[[Any], str] | None = None
    missing: Callable[[Any], str] | None = None
    schemes: tuple[str, ...] = ()
    open_reader: Callable[..., Any] | None = None

    @property
    def role(self) -> str:
        """The first half of the name: read, checksum, sparse, encode, compress, write, verify."""
        return self.name.partition(".")[0]

    @property
    def checks_image(self) -> bool:
        """Whether it looks at the pieces of the image that pass through, right before the writer."""
        return self.role == "checksum" and self.takes.item == "pieces"

    def orders_of(self, options: Any) -> tuple[Order, ...]:
        """The orders that it gives with these options, the best first; all of `gives` where `options` is None."""
        return self.gives.orders if self.orders is None or options is None else self.orders(options)


class Catalog:
    """The SPECs by name, in catalog order.

    Args:
        specs: all of them; or by name how each is loaded when it is first asked for: a run needs a few of many.
    """

    def __init__(self, specs: Iterable[StageSpec] | Mapping[str, Callable[[], StageSpec]]) -> None:
        self._loads = specs if isinstance(specs, Mapping) else {}
        self._specs = {} if isinstance(specs, Mapping) else {spec.name: spec for spec in specs}
        self._names = tuple(self._loads or self._specs)

    def __iter__(self) -> Iterator[StageSpec]:
        return (spec for name in self._names if (spec := self.find(name)))

    def find(self, name: str) -> StageSpec | None:
        """The SPEC of this TOML name, or None."""
        if name not in self._specs and name in self._loads:
            self._specs[name] = self._loads[name]()
        return self._specs.get(name)

    @property
    def names(self) -> tuple[str, ...]:
        """Every TOML name."""
        return self._names
