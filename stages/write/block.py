"""Store a raw image in place, on what is a disk already: the one writer behind write.nbd and write.device.

There is no temporary name here: what was there is gone with the first byte. So a target that holds something is refused
unless it may be overwritten, and a failed export leaves it without begin and end, which hold the partition tables: it
is never taken for a result.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

import anyio

from pipeline.errors import LeftBehindError, PlanError, StageError, StoreError
from pipeline.events import UploadRemoved
from pipeline.flow.buffers import Pool
from pipeline.flow.channels import Inlet, Outlet
from pipeline.flow.items import Piece, RangeReader, Receipt, StoredImage
from pipeline.flow.pacing import RateLimit
from pipeline.flow.stage import SinkPlan, SinkRequest, StageContext, UploadJournal
from pipeline.units import MiB, Size, format_size
from stages.write.ranges import RangeDriver

_STAGING = 2 * MiB
_STAGINGS = 4  # one is filled while three are written
_IN_FLIGHT = 4
# Begin and end that are looked at before, and made zero after a failure: partition tables, superblocks.
EDGE = MiB
# Cleaning up after a failure may take this long; see stages/write/driver.py.
ABORT_DEADLINE_S = 15.0


class BlockTarget(Protocol):
    """A disk that is written in place. Used by one run, then closed.

    Attributes:
        uri: for people, events and the manifest; without secrets.
        option: the name of the stage, for hints.
        reads_zero: known after `open`: every byte that is never written is zero already.
    """

    @property
    def uri(self) -> str: ...

    @property
    def option(self) -> str: ...

    @property
    def reads_zero(self) -> bool: ...

    async def open(self, request: SinkRequest) -> int:
        """Open it for writing, and for nobody else where that can be said; returns its size. Writes nothing.

        Raises:
            PlanError: it is in use, read-only, or the source itself.
            StoreError: it can't be reached.
        """
        ...

    async def write(self, parts: Sequence[tuple[int, memoryview]]) -> None:
        """As in RangeUpload."""
        ...

    async def zero(self, offset: int, length: int) -> None:
        """Make these bytes zero, at as little cost as it can. Raises StoreError."""
        ...

    async def flush(self) -> None:
        """Bring everything that was written to stable storage. Raises StoreError."""
        ...

    def forget(self) -> None:
        """What was written so far does not matter any more."""
        ...

    def open_reader(self, size: int) -> AbstractAsyncContextManager[RangeReader]:
        """Its first `size` bytes, for reading what the medium has."""
        ...

    def wipe_command(self) -> str:
        """A shell command that makes the first MiB zero."""
        ...

    async def close(self) -> None:
        """Let it go; idempotent."""
        ...


class BlockWriter:
    """One disk, written at any offset, in place."""

    def __init__(
        self,
        target: BlockTarget,
        context: StageContext,
        *,
        overwrite: bool,
        rate_limit: Size | None,
        own_bytes: int = 0,
    ) -> None:
        """Take over the target; nothing is opened.

        Args:
            own_bytes: what the target holds beside the pieces.
        """
        self._target = target
        self._context = context
        self._overwrite = overwrite
        self._own_bytes = own_bytes
        self._journal: UploadJournal | None = context.journal
        self._staging = Pool(_STAGING, _STAGINGS)
        self._limit = RateLimit(context.clock, rate_limit)
        self._size = 0
        self._is_begun = False  # something was written, now or by an earlier process

    # -- planning --------------------------------------------------------------------------------------------------

    async def plan(self, request: SinkRequest) -> SinkPlan:
        """Open the target and see that it may be overwritten. Raises PlanError or StoreError."""
        layout, target = request.layout, self._target
        if layout.format != "raw":
            raise PlanError(
                f"this target is a disk, and the image is a {layout.format} file",
                operation="plan",
                target=target.uri,
                hint="Use encode.raw, without a compressor.",
            )
        self._size = layout.image_bytes if layout.image_bytes is not None else layout.image_bytes_max
        room = await target.open(request)
        if room < self._size:
            raise PlanError(
                "the target is smaller than the disk",
                operation="plan",
                target=target.uri,
                size=room,
                needed=self._size,
                hint="Choose a larger one; begin and end of the disk belong together.",
            )
        resume_at = 0
        if self._journal is not None and self._journal.upload:
            resume_at = await self._go_on(self._journal)
        elif not self._overwrite:
            await self._check_empty()
        zeros = "known to be there" if target.reads_zero else "written"
        return SinkPlan(
            own_bytes=_STAGING * _STAGINGS + self._own_bytes,
            summary=(("target", f"{target.uri}: {format_size(room)}; zeros are {zeros}"),),
            resume_at=resume_at,
        )

    async def _go_on(self, journal: UploadJournal) -> int:
        """How far an earlier process came; nothing where the user wants it removed."""
        if journal.upload.get("target") == self._target.uri and not journal.discards:
            self._is_begun = True
            return journal.mark
        self._is_begun = True
        await self._wipe()
        journal.begin_anew("what was written before has been made unusable")
        return 0

    async def _check_empty(self) -> None:
        async with self._target.open_reader(self._size) as reader:
            for offset, length in self._edges():
                data = await reader.read(offset, length)
                if data.count(0) != len(data):
                    raise PlanError(
                        "the target holds data",
                        operation="plan",
                        target=self._target.uri,
                        hint=f"Is it the right one? Then set overwrite = true in {self._target.option}: "
                        "what it holds is lost.",
                    )

    def _edges(self) -> tuple[tuple[int, int], ...]:
        head = min(EDGE, self._size)
        tail = min(EDGE, self._size - head)
        return ((0, head), (self._size - tail, tail)) if tail else ((0, head),)

    # -- writing ---------------------------------------------------------------------------------------------------

    async def run(self, inlet: Inlet[Piece], outlet: Outlet[StoredImage]) -> None:
        """Write every piece, make all of it durable, hand it on.

        Raises:
            StoreError: the target failed for good; its begin and end are zero.
            LeftBehindError: that could not be done either.
        """
        driver = RangeDriver(
            self,
            self._context,
            staging=self._staging,
            in_flight=_IN_FLIGHT,
            limit=self._limit,
            journal=self._journal,
            make_durable=self._make_durable,
            clear=None if self._target.reads_zero else self._target.zero,
        )
        size = await driver.store(inlet)
        await outlet.send(StoredImage(self._target.uri, size, self._open_reader, self._fetch_receipt))

    async def _make_durable(self) -> bool:
        await self._target.flush()
        return True

    @property
    def partial_uri(self) -> str:
        """The target itself."""
        return self._target.uri

    @property
    def in_order(self) -> bool:
        """A disk takes writes at any offset."""
        return False

    async def can_rewrite(self) -> bool:
        """Always."""
        return True

    async def create(self) -> None:
        """From here on the target is not what it was."""
        if self._journal is not None:
            self._journal.note_upload({"target": self._target.uri, "commands": [self._target.wipe_command()]})
        self._is_begun = True

    async def write(self, parts: Sequence[tuple[int, memoryview]]) -> None:
        """As the target does. Raises StoreError."""
        await self._target.write(parts)

    async def seal(self, size: int) -> None:
        """On stable storage."""
        if size > self._size:
            raise StageError("the image grew past what was planned", operation="seal", expected=self._size, got=size)
        await self._target.flush()

    async def abort(self, cause: BaseException) -> None:
        """If anything was written, make begin and end zero within ABORT_DEADLINE_S. Raises LeftBehindError."""
        if self._is_begun:
            await self._take_back(cause)

    # -- verify, publish, withdraw ---------------------------------------------------------------------------------

    @asynccontextmanager
    async def _open_reader(self) -> AsyncIterator[RangeReader]:
        async with self._target.open_reader(self._size) as reader:
            yield reader

    @asynccontextmanager
    async def _fetch_receipt(self) -> AsyncIterator[Receipt]:
        yield Receipt(self._size, note="a disk keeps no checksum of itself")

    async def fetch_manifest(self) -> bytes | None:
        """There is no place for one beside a disk."""
        return None

    async def publish(self, manifest: bytes) -> str:
        """The disk is what it is; its manifest stays on this machine."""
        return ""

    async def withdraw(self) -> None:
        """Make begin and end zero, if anything was written. Raises LeftBehindError."""
        if self._is_begun:
            await self._take_back(None)

    async def _take_back(self, cause: BaseException | None) -> None:
        failure = f"the target did not answer within {ABORT_DEADLINE_S:.0f} s"
        with anyio.move_on_after(ABORT_DEADLINE_S, shield=True):
            try:
                await self._wipe()
                return
            except StoreError as error:
                failure = str(error)
        raise LeftBehindError(
            f"{cause or 'the image was withdrawn'}; and making the half-written disk unusable failed: {failure}",
            cause=cause or StoreError(failure),
            commands=(self._target.wipe_command(),),
            target=self._target.uri,
        )

    async def _wipe(self) -> None:
        self._target.forget()
        for offset, length in self._edges():
            await self._target.zero(offset, length)
        await self._target.flush()
        if self._is_begun:
            self._context.emit(UploadRemoved(uri=self._target.uri, how="removed"))
        self._is_begun = False

    async def close(self) -> None:
        """Let the target go; idempotent."""
        await self._target.close()
        self._staging.close()
