"""Write the disk to an NBD server, in place: several connections, zeros by their length alone, flushed at the end.

Where the server says that all of the export reads as zero, zeros are not even named. A server that was restarted may
have lost what it acknowledged and was not flushed: that is compared before the export goes on.
"""

from __future__ import annotations

import shlex
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from pipeline.errors import PlanError, StageError, StoreError
from pipeline.flow.items import RangeReader
from pipeline.flow.orders import SPARSE_SINK, Order
from pipeline.flow.pacing import RATE_MIN
from pipeline.flow.stage import STORED_IMAGE, SinkRequest, StageContext, StageSpec, option, pieces
from pipeline.units import MiB, Size
from stages.write.block import BlockWriter

if TYPE_CHECKING:
    from pipeline.flow.retry import Retry, RetryPolicy
    from stages.store.nbd import NbdClient, NbdUrl, Patience

# What is flushed at once, so that no more has to be compared after a restart of the server.
_FLUSH_EVERY = 256 * MiB
# Requests under way, and what is compared of them.
_OWN_BYTES = 16 * MiB


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of write.nbd."""

    url: str = option(
        doc="Where the disk goes: nbd://HOST:PORT/EXPORT, nbds:// with ?tls-certificates=FOLDER, or "
        "nbd+unix:///EXPORT?socket=PATH.",
        example='"nbd://nas.example.com/web01"',
    )
    overwrite: bool = option(False, doc="Write although the export holds data, which is lost.")
    ca_file: Path | None = option(None, doc="PEM certificates to trust for nbds://, instead of the system's.")
    connections: int = option(
        4, doc="At most; a server that does not allow several gets one.", may_change=True, minimum=1
    )
    attempts: int = option(6, doc="How often a request is sent when server or line fail.", may_change=True, minimum=1)
    rate_limit: Size | None = option(
        None, doc='Send at most this much a second, as in "40 MiB".', may_change=True, minimum=RATE_MIN
    )


class NbdTarget:
    """An export that is written in place."""

    option = "write.nbd"

    def __init__(
        self, options: Options, context: StageContext, *, patience: Patience | None, policy: RetryPolicy | None
    ) -> None:
        self._options = options
        self._context = context
        self._patience = patience
        self._policy = policy
        self._where: NbdUrl | None = None
        self._found: NbdClient | None = None
        self.reads_zero = False
        self._losses = 0
        # What was acknowledged since the last flush: offset, length, and a checksum; None: zeros.
        self._unsure: deque[tuple[int, int, int | None]] = deque()
        self._unsure_bytes = 0
        self._comparing = anyio.Lock()

    @property
    def uri(self) -> str:
        """The export's URL."""
        return str(self._where) if self._where is not None else self._options.url

    async def open(self, request: SinkRequest) -> int:
        """Connect and look what the export can do. Raises PlanError or StoreError."""
        from pipeline.flow.retry import Retry, RetryPolicy
        from stages.store import nbd_wire as wire
        from stages.store.nbd import NbdClient, NbdUrl

        options = self._options
        self._where = NbdUrl.parse(options.url)
        policy = self._policy or RetryPolicy(attempts=options.attempts)
        retry: Retry = Retry(policy, clock=self._context.clock, emit=self._context.emit, stage=self._context.name)
        await self.close()
        self._found = client = NbdClient(
            self._where, retry, ca_file=options.ca_file, patience=self._patience, connections=options.connections
        )
        try:
            info = await client.open()
        except StoreError as error:
            if error.temporary:
                raise
            raise PlanError(error.message, operation="plan", hint=error.hint, **error.context) from None
        if info.can(wire.READ_ONLY):
            raise PlanError(
                "the export is read-only", operation="plan", url=self.uri, hint="Let the server allow writing."
            )
        self.reads_zero = client.knows_status and await self._is_all_zero(client, request.layout.image_bytes_max)
        return info.size

    async def _is_all_zero(self, client: NbdClient, size: int) -> bool:
        """Whether the server calls all of it zero; ends at the first place that is not."""
        from stages.store.nbd_wire import STATE_ZERO

        position, size = 0, min(size, client.info.size)
        while position < size:
            for length, flags in await client.status(position, size - position):
                if not flags & STATE_ZERO:
                    return False
                position += length
        return True

    async def write(self, parts: Sequence[tuple[int, memoryview]]) -> None:
        """Send it over all connections. Raises StoreError."""
        import xxhash

        client = self._client
        await self._surely(lambda: client.write(parts))
        for offset, view in parts:
            await self._note(offset, view.nbytes, xxhash.xxh3_64_intdigest(view))

    async def zero(self, offset: int, length: int) -> None:
        """By its length, where the server knows how. Raises StoreError."""
        client = self._client
        await self._surely(lambda: client.zero(offset, length))
        await self._note(offset, length, None)

    async def _surely(self, send: Callable[[], Awaitable[None]]) -> None:
        """Send again what was under way when a connection was lost.

        A part of it may have been acknowledged before the loss while the rest waited for the server to come back. It is
        noted only when all of it is through, so the comparison after that loss would not have known it. A server that
        is lost every time is given up after as many times as a request is sent.
        """
        times = max(2, self._options.attempts)  # the loss may have been that of a connection that had nothing to do
        for _ in range(times):
            losses = self._client.losses
            await send()
            if self._client.losses == losses:
                return
        raise StoreError(
            f"connections were lost each of the {times} times that this was sent",
            operation="write",
            url=self.uri,
            hint="Look at the server's log: is it restarted again and again, does it run out of memory?",
        )

    async def _note(self, offset: int, length: int, checksum: int | None) -> None:
        self._unsure.append((offset, length, checksum))
        self._unsure_bytes += length if checksum is not None else 0
        await self._check_losses()
        if self._unsure_bytes >= _FLUSH_EVERY:
            await self.flush()

    async def flush(self) -> None:
        """Everything on stable storage. Raises StoreError."""
        count = len(self._unsure)
        self._unsure_bytes = 0
        await self._client.flush()
        await self._check_losses()
        for _ in range(min(count, len(self._unsure))):
            self._unsure.popleft()

    async def _check_losses(self) -> None:
        """After a lost connection, which may have been a restart: is what was acknowledged still there?

        Raises:
            StoreError: the server forgot some of it.
        """
        client = self._client
        # One at a time: who flushes or notes a mark meanwhile waits for what is found.
        async with self._comparing:
            if client.losses == self._losses:
                return
            self._losses = client.losses
            await self._compare(client)

    async def _compare(self, client: NbdClient) -> None:
        import xxhash

        for offset, length, checksum in list(self._unsure):
            if checksum is None:
                await client.zero(offset, length)
                continue
            data = await client.read(offset, length)
            if xxhash.xxh3_64_intdigest(data) != checksum:
                raise StoreError(
                    "the server lost bytes that it had acknowledged",
                    operation="write",
                    url=self.uri,
                    offset=offset,
                    hint="It was restarted meanwhile. Run the export again.",
                )

    def forget(self) -> None:
        """Compare nothing of it after a lost connection."""
        self._unsure.clear()
        self._unsure_bytes = 0

    @asynccontextmanager
    async def open_reader(self, size: int) -> AsyncIterator[RangeReader]:
        """What the server has, over the same connections."""
        from stages.store.nbd import NbdReader

        yield NbdReader(self._client, size)

    def wipe_command(self) -> str:
        """With qemu-io, which speaks NBD."""
        return shlex.join(["qemu-io", "-f", "raw", "-c", "write -z 0 1M", self.uri])

    async def close(self) -> None:
        """Take leave of the server; idempotent."""
        found, self._found = self._found, None
        if found is not None:
            await found.close()

    @property
    def _client(self) -> NbdClient:
        if self._found is None:
            raise StageError("write.nbd works only after its planning", operation="write.nbd")
        return self._found


class NbdWriter(BlockWriter):
    """One export, written in place."""

    def __init__(
        self,
        options: Options,
        context: StageContext,
        *,
        patience: Patience | None = None,
        retry_policy: RetryPolicy | None = None,
    ) -> None:
        """Prepare it; nothing is sent. `patience` and `retry_policy` are for tests, instead of the usual ones."""
        super().__init__(
            NbdTarget(options, context, patience=patience, policy=retry_policy),
            context,
            overwrite=options.overwrite,
            rate_limit=options.rate_limit,
            own_bytes=_OWN_BYTES,
        )


def open_reader(url: str, *, endpoint: str = "", ca_file: Path | None = None) -> Any:
    """Open `nbd://...` for random reads. Entering it raises PlanError or StoreError.

    Args:
        endpoint: ignored; every opener takes it.
        ca_file: for nbds, instead of the certificates that the URL names and the system's.
    """
    from stages.store.nbd import open_nbd_reader

    return open_nbd_reader(url, ca_file=ca_file)


SPEC = StageSpec(
    name="write.nbd",
    summary="Write the disk to an NBD server, in place: several connections, zeros by their length, flushed.",
    options=Options,
    takes=pieces(Order.SPARSE),
    gives=STORED_IMAGE,
    build=NbdWriter,
    sink=SPARSE_SINK,
    resumable=True,
    schemes=("nbd", "nbds", "nbd+unix", "nbds+unix"),
    open_reader=open_reader,
)
