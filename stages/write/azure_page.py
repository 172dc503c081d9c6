"""Write the image to Azure as a page blob, which a managed disk is made of: fixed VHD, zeros are never sent.

Source: Azure Storage REST API: Put Blob (page blob), Put Page.

The blob is made with its whole size, reads as zero, and has its own name from the beginning; until it was verified its
metadata say that it is being written, and the VHD's footer, without which Azure refuses it, is its last page.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import anyio

from pipeline.errors import LeftBehindError, PlanError, StageError, StoreError
from pipeline.events import UploadRemoved
from pipeline.flow.buffers import Pool
from pipeline.flow.channels import Inlet, Outlet
from pipeline.flow.items import Piece, Receipt, StoredImage
from pipeline.flow.orders import SPARSE_SINK, Order
from pipeline.flow.pacing import RateLimit
from pipeline.flow.parallel import in_thread
from pipeline.flow.stage import STORED_IMAGE, SinkPlan, SinkRequest, StageContext, StageSpec, option, pieces
from pipeline.units import MiB, format_exact
from stages.write.azure import AzureOptions, BlobPlace
from stages.write.ranges import RangeDriver

# aiohttp is imported where a store is really talked to.
if TYPE_CHECKING:
    from pipeline.flow.retry import RetryPolicy
    from stages.store.digests import Buffer
    from stages.store.http import Timeouts

_STAGING = 4 * MiB
_STAGINGS = 4
# Batches at once, of a window each. A page blob takes 60 MiB/s; 4 at once reach that at 250 ms a request.
_IN_FLIGHT = 4
# Source: "Scalability and performance targets for Blob storage".
_SIZE_MAX = 8 << 40
# Cleaning up after a failure may take this long; see stages/write/driver.py.
ABORT_DEADLINE_S = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(AzureOptions):
    """Options of write.azure_page."""

    overwrite: bool = option(
        False, doc="Replace a blob that has the name already. It is gone as soon as the new one is begun."
    )


class AzurePageWriter:
    """One new page blob, written at any offset, sealed and published in place."""

    def __init__(
        self,
        options: Options,
        context: StageContext,
        *,
        timeouts: Timeouts | None = None,
        retry_policy: RetryPolicy | None = None,
    ) -> None:
        """Prepare it; nothing is sent. `timeouts` and `retry_policy` are for tests, instead of the usual ones."""
        self._options = options
        self._context = context
        self._timeouts = timeouts
        self._retry_policy = retry_policy
        self._limit = RateLimit(context.clock, options.rate_limit)
        self._staging = Pool(_STAGING, _STAGINGS)
        self._found: BlobPlace | None = None
        self._token = secrets.token_hex(8)
        self._size = 0
        self._sent = bytearray()  # a 1 for each stretch of PAGES_MAX bytes that something was sent to
        self._is_made = False  # or may be

    # -- planning --------------------------------------------------------------------------------------------------

    async def plan(self, request: SinkRequest) -> SinkPlan:
        """Look at container and target, and at the size that the blob will have. Raises PlanError or StoreError."""
        from stages.store.azure import PAGE, PAGES_MAX

        size = request.layout.image_bytes
        if size is None or size % PAGE or size > _SIZE_MAX:
            told = "not known before its end" if size is None else f"{format_exact(size)} long"
            raise PlanError(
                f"a page blob is made with its whole size, pages of {PAGE} bytes up to 8 TiB, and this image is {told}",
                operation="plan",
                hint='Use encode.vhd with variant = "fixed", which is what Azure makes disks of; or write.azure_block.',
            )
        self._size = size
        self._sent = bytearray(-(-size // PAGES_MAX))
        await self._hang_up()
        self._found = place = BlobPlace(
            self._options,
            self._context,
            overwrite=self._options.overwrite,
            connections=_IN_FLIGHT,
            timeouts=self._timeouts,
            policy=self._retry_policy,
        )
        await place.look_at_target()
        use = "" if request.layout.format == "vhd" else ", which Azure makes no disk of: it wants a fixed VHD"
        return SinkPlan(
            own_bytes=_STAGING * _STAGINGS,
            summary=(
                ("page blob", f"{format_exact(size)}, zeros are not sent{use}"),
                ("credentials", place.client.access.source),
            ),
        )

    @property
    def _place(self) -> BlobPlace:
        if self._found is None:
            raise StageError("write.azure_page works only after its planning", operation="write.azure_page")
        return self._found

    @property
    def _uri(self) -> str:
        return self._place.client.uri(self._place.name)

    # -- writing ---------------------------------------------------------------------------------------------------

    async def run(self, inlet: Inlet[Piece], outlet: Outlet[StoredImage]) -> None:
        """Write every page that is not zero, seal, hand on.

        Raises:
            StoreError: the store failed for good; the blob is gone.
            LeftBehindError: it failed, and the blob may be left.
        """
        driver = RangeDriver(self, self._context, staging=self._staging, in_flight=_IN_FLIGHT, limit=self._limit)
        size = await driver.store(inlet)
        await outlet.send(StoredImage(self._uri, size, self._place.reader, self._fetch_receipt))

    @property
    def partial_uri(self) -> str:
        """The blob's own name."""
        return self._uri

    @property
    def in_order(self) -> bool:
        """Pages come in any order."""
        return False

    async def can_rewrite(self) -> bool:
        """Always."""
        return True

    async def create(self) -> None:
        """Make the blob, all zero. Raises StoreError."""
        place = self._place
        self._is_made = True  # before the answer: it may have to be removed
        await place.retry.call("create", self._create)

    async def _create(self) -> None:
        from stages.store.azure import STATE, TOKEN, AzureError

        place = self._place
        headers = {f"x-ms-meta-{TOKEN}": self._token, f"x-ms-meta-{STATE}": "writing"}
        if not self._options.overwrite:
            headers["If-None-Match"] = "*"
        try:
            await place.client.create_pages(place.name, self._size, headers)
        except AzureError as error:
            if error.status not in (409, 412) or not await self._is_ours():
                self._is_made = error.temporary
                raise

    async def _is_ours(self) -> bool:
        from stages.store.azure import TOKEN

        found = await self._place.client.head(self._place.name)
        return found is not None and found.metadata.get(TOKEN) == self._token

    async def write(self, parts: Sequence[tuple[int, memoryview]]) -> None:
        """Send pages, at most 4 MiB a request; leave out zeros where nothing was sent yet. Raises StoreError."""
        from stages.store.azure import PAGE, PAGES_MAX

        for offset, view in parts:
            if offset % PAGE or view.nbytes % PAGE:
                raise StageError("a piece is not made of whole pages", operation="write", offset=offset)
            for start in range(0, view.nbytes, PAGES_MAX):
                chunk = view[start : start + PAGES_MAX]
                first, last = (offset + start) // PAGES_MAX, (offset + start + chunk.nbytes - 1) // PAGES_MAX
                if any(self._sent[first : last + 1]) or not _is_zero(chunk):
                    self._sent[first : last + 1] = b"\1" * (last + 1 - first)
                    await self._put(offset + start, chunk)

    async def _put(self, offset: int, chunk: memoryview) -> None:
        place = self._place
        if chunk.nbytes < MiB:
            md5 = _md5_of(chunk)
        else:
            md5 = await in_thread(self._context.threads, partial(_md5_of, chunk))
        await place.retry.call(
            "write", lambda: place.client.put_pages(place.name, offset, _View(chunk), {"Content-MD5": md5})
        )

    async def seal(self, size: int) -> None:
        """The blob has its size since it was made. Raises StoreError where the image has another."""
        found = await self._place.retry.call("head", lambda: self._place.client.head(self._place.name))
        if size != self._size or found is None or found.size != size:
            raise StoreError(
                "the stored blob has another size than the image",
                operation="seal",
                uri=self._uri,
                expected=size,
                got=found.size if found else None,
            )

    async def abort(self, cause: BaseException) -> None:
        """Delete the blob, shielded, within ABORT_DEADLINE_S. Raises LeftBehindError."""
        await self._take_back(cause)

    # -- verify, publish, withdraw ---------------------------------------------------------------------------------

    @asynccontextmanager
    async def _fetch_receipt(self) -> AsyncIterator[Receipt]:
        yield Receipt(self._size, note="a page blob has no checksum of its own")

    async def publish(self, manifest: bytes) -> str:
        """Say in its metadata that the blob is complete, then put the manifest beside it. Raises StoreError."""
        from stages.store.azure import STATE, TOKEN

        place = self._place
        told = {TOKEN: self._token, STATE: "complete"}
        await place.retry.call("seal", lambda: place.client.set_metadata(place.name, told))
        return await place.publish(manifest)

    async def withdraw(self) -> None:
        """Delete the blob and the manifest that this run put; never somebody else's. Raises LeftBehindError."""
        await self._take_back(None)

    async def _take_back(self, cause: BaseException | None) -> None:
        from pipeline.flow.retry import CLEANUP

        place, failure = self._place, f"the store did not answer within {ABORT_DEADLINE_S:.0f} s"
        with anyio.move_on_after(ABORT_DEADLINE_S, shield=True):
            try:
                await place.retry.call("abort", place.remove_manifest, CLEANUP)
                await place.retry.call("abort", self._remove, CLEANUP)
                return
            except StoreError as error:
                failure = str(error)
        after = f"{cause}; and " if isinstance(cause, Exception) and str(cause) else ""
        raise LeftBehindError(
            f"{after}removing what was stored failed: {failure}",
            cause=cause or StoreError(failure),
            commands=(place.client.command("delete", place.name), *place.manifest_commands),
            uri=self._uri,
        ) from cause

    async def _remove(self) -> None:
        place = self._place
        if self._is_made and await self._is_ours():
            await place.client.delete(place.name)
            self._context.emit(UploadRemoved(uri=self._uri, how="removed"))
        self._is_made = False

    async def close(self) -> None:
        """Close connections; idempotent."""
        await self._hang_up()
        self._staging.close()

    async def _hang_up(self) -> None:
        found, self._found = self._found, None
        if found is not None:
            await found.close()


class _View:
    """Borrowed bytes as the body of one request."""

    def __init__(self, view: memoryview) -> None:
        self._view = view

    @property
    def length(self) -> int:
        return self._view.nbytes

    async def chunks(self) -> AsyncIterator[Buffer]:
        """1 MiB at a time: see stages/write/bodies.py."""
        for start in range(0, self._view.nbytes, MiB):
            yield self._view[start : start + MiB]


def _is_zero(view: memoryview) -> bool:
    import numpy

    return not numpy.frombuffer(view, numpy.uint8).view(bool).any()


def _md5_of(view: memoryview) -> str:
    """The Content-MD5 of some pages. Threads: any."""
    import base64
    import hashlib

    return base64.b64encode(hashlib.md5(view, usedforsecurity=False).digest()).decode()


SPEC = StageSpec(
    name="write.azure_page",
    summary="Write a fixed VHD to Azure as a page blob, which disks are made of; zeros are not sent. Not resumable.",
    options=Options,
    takes=pieces(Order.SPARSE),
    gives=STORED_IMAGE,
    build=AzurePageWriter,
    sink=SPARSE_SINK,
)
