"""Write the image to Azure as a block blob: many blocks at once, the head last, visible only when it is complete."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from anyio import move_on_after

from pipeline.errors import LeftBehindError, PlanError, StageError, StoreError
from pipeline.flow.channels import Inlet, Outlet
from pipeline.flow.items import Piece, StoredImage
from pipeline.flow.orders import HEAD_LAST_SINK, Order
from pipeline.flow.stage import (
    STORED_IMAGE,
    SinkPlan,
    SinkRequest,
    StageContext,
    StageSpec,
    UploadJournal,
    option,
    pieces,
)
from stages.write.azure import AzureOptions, BlobPlace

# aiohttp is imported where a store is really talked to.
if TYPE_CHECKING:
    from pipeline.flow.pacing import Pacer
    from pipeline.flow.retry import RetryPolicy
    from stages.store.http import Timeouts
    from stages.write.azure_upload import AzureUpload
    from stages.write.driver import DriverPlan
    from stages.write.shapes import PartUpload


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(AzureOptions):
    """Options of write.azure_block."""

    overwrite: bool = option(
        False, doc="Replace a blob that has the name already. It stays until the new one is complete.", may_change=True
    )
    parts_in_flight: int = option(
        8,
        doc="How many blocks are on their way at once, as far as memory allows. More helps on long lines only.",
        may_change=True,
        minimum=1,
    )
    checksum: Literal["md5", "crc64"] = option(
        "md5", doc="What Azure checks each block with; crc64 costs a tenth, and emulators do not check it."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Planned:
    place: BlobPlace
    pacer: Pacer
    upload: AzureUpload
    plan: DriverPlan


class AzureBlockWriter:
    """Plans, drives and ends one upload."""

    def __init__(
        self,
        options: Options,
        context: StageContext,
        *,
        timeouts: Timeouts | None = None,
        retry_policy: RetryPolicy | None = None,
        wrap: Callable[[PartUpload], PartUpload] = lambda upload: upload,
    ) -> None:
        """Prepare it; nothing is sent. What has a name is for tests, as for write.s3."""
        self._options = options
        self._context = context
        self._timeouts = timeouts
        self._retry_policy = retry_policy
        self._wrap = wrap
        self._planned: _Planned | None = None

    async def plan(self, request: SinkRequest) -> SinkPlan:
        """Look at container and target, and lay out the blocks. Raises PlanError or StoreError."""
        from pipeline.flow.pacing import Pacer
        from stages.store.azure import BLOCK_LIMITS
        from stages.write.driver import plan_driver

        options = self._options
        pacer = Pacer(
            self._context.clock,
            requests=options.parts_in_flight,
            limit=options.rate_limit,
            emit=self._context.emit,
            stage=self._context.name,
        )
        await self.close()
        place = self._place()
        plan = plan_driver(BLOCK_LIMITS, request, parts_in_flight=options.parts_in_flight)
        sink = plan.sink
        planned = _Planned(place=place, pacer=pacer, upload=self._make_upload(place), plan=plan)
        self._planned = planned
        resume_at, journal = 0, self._context.journal
        if journal is not None and journal.upload:
            resume_at = await self._go_on(planned, journal)
        if journal is None or not journal.upload:
            self._planned = planned = replace(planned, upload=self._make_upload(place))
            planned.upload.replaced = await place.look_at_target()
        return SinkPlan(
            boundaries=sink.boundaries,
            held_bytes=sink.held_bytes,
            own_bytes=sink.own_bytes,
            summary=(
                *sink.summary,
                ("checksum of each block", options.checksum.upper()),
                ("credentials", place.client.access.source),
            ),
            resume_at=resume_at,
        )

    def _place(self) -> BlobPlace:
        return BlobPlace(
            self._options,
            self._context,
            overwrite=self._options.overwrite,
            connections=self._options.parts_in_flight,
            timeouts=self._timeouts,
            policy=self._retry_policy,
        )

    def _make_upload(self, place: BlobPlace) -> AzureUpload:
        from stages.write.azure_upload import AzureUpload

        return AzureUpload(
            place.client,
            place.name,
            overwrite=self._options.overwrite,
            checksum=self._options.checksum,
            emit=self._context.emit,
            stage=self._context.name,
        )

    async def _go_on(self, planned: _Planned, journal: UploadJournal) -> int:
        """Find out what is left of the upload of an earlier process, and take it over or remove it.

        Returns:
            image bytes below this, behind the head, are stored.
        Raises:
            PlanError: the target is somebody else's by now.
        """
        from pipeline.flow.retry import CLEANUP
        from stages.write.kept import fitting, resume_offset

        place, upload, parts = planned.place, planned.upload, planned.plan.parts
        client, name, call = place.client, place.name, place.retry.call
        state = journal.upload
        upload.go_on(state)
        found = await call("head", lambda: client.head(name))
        is_ours = found is not None and upload.is_ours(found)
        if found is not None and not is_ours and not self._options.overwrite and not journal.discards:
            raise PlanError(
                "the target appeared since this export was begun",
                operation="resume",
                uri=upload.uri,
                size=found.size,
                hint="Somebody else wrote it. Move it away, or set overwrite = true in write.azure_block.",
            )
        if journal.discards or "whole" in state:
            await call("abort", upload.abort, CLEANUP)
            journal.begin_anew("what was sent before has been removed")
            return 0
        if is_ours:  # complete and visible already: nothing is to be sent, it only has to be verified
            return resume_offset(parts, journal.parts)
        stored = dict(await call("list_parts", lambda: client.blocks(name, committed=False)) or ())
        if not stored and journal.parts:
            if state["endpoint"] != client.access.endpoint:
                raise PlanError(
                    "the upload that was begun is not in this store",
                    operation="resume",
                    was=state["endpoint"],
                    now=client.access.endpoint,
                    hint="Resume with the endpoint that it was begun with, or start anew: --discard.",
                )
            journal.begin_anew("the store does not have what was sent any more; Azure keeps it for a week")
            return 0
        fits = fitting(parts, journal.parts)
        journal.drop_parts(
            [
                number
                for number, part in journal.parts.items()
                if number not in fits or stored.get(part.tag) != part.length
            ]
        )
        return resume_offset(parts, journal.parts)

    # -- writing -----------------------------------------------------------------------------------------------------

    async def run(self, inlet: Inlet[Piece], outlet: Outlet[StoredImage]) -> None:
        """Store, seal and hand on.

        Raises:
            StoreError, StageError: it failed, and what was stored is gone again.
            LeftBehindError: it failed, and something may be left.
        """
        from stages.write.driver import PartDriver, abort_upload
        from stages.write.kept import PartJournal
        from stages.write.paced import Paced
        from stages.write.retrying import Retrying

        planned = self._after_planning()
        upload, kept = planned.upload, self._context.journal
        driven = Retrying(Paced(self._wrap(upload), planned.pacer), planned.place.retry)
        journal = PartJournal(kept, upload.state) if kept is not None else None
        sealed = await PartDriver(driven, self._context, planned.plan, journal).store(inlet)
        if kept is not None:  # what removes it now is another command than before
            kept.note_upload({**kept.upload, "commands": upload.leftovers()})
        try:
            await outlet.send(StoredImage(upload.uri, sealed.size, planned.place.reader, upload.fetch_receipt))
        except BaseException as error:
            if journal is None or not journal.keeps(error):
                await abort_upload(driven, self._context, error)
            raise

    async def fetch_manifest(self) -> bytes | None:
        """The manifest that stands beside the target; None where there is none. Raises StoreError."""
        from stages.store.azure import AzureError

        place = self._place()

        async def fetch() -> bytes | None:
            found = await place.client.head(place.manifest_name)
            if found is None:
                return None
            return await place.client.get_range(place.manifest_name, 0, found.size, found.etag)

        try:
            return await place.retry.call("read_manifest", fetch)
        except AzureError as error:
            if error.temporary:
                raise
            return None  # planning says what is wrong
        finally:
            await place.close()

    async def publish(self, manifest: bytes) -> str:
        """Put the manifest beside the image. Raises StoreError, also where somebody else put one meanwhile."""
        return await self._after_planning().place.publish(manifest)

    async def withdraw(self) -> None:
        """Delete the blob that this run sealed, and the manifest that it put. Raises LeftBehindError."""
        from pipeline.flow.retry import CLEANUP
        from stages.write.driver import ABORT_DEADLINE_S

        planned = self._after_planning()
        place, upload = planned.place, planned.upload
        failure = StoreError(f"the store did not answer within {ABORT_DEADLINE_S:.0f} s", operation="withdraw")
        with move_on_after(ABORT_DEADLINE_S):
            try:
                await place.retry.call("withdraw", place.remove_manifest, CLEANUP)
                await place.retry.call("withdraw", upload.abort, CLEANUP)
            except StoreError as error:
                failure = error
            else:
                return
        commands = upload.leftovers() + place.manifest_commands
        raise LeftBehindError(
            f"the image could not be removed: {failure}", cause=failure, commands=commands, uri=upload.uri
        ) from failure

    async def close(self) -> None:
        """Close connections; idempotent."""
        if self._planned is not None:
            await self._planned.place.close()

    def _after_planning(self) -> _Planned:
        if self._planned is None:
            raise StageError("write.azure_block works only after its planning", operation="write.azure_block")
        return self._planned


def open_reader(url: str, *, endpoint: str = "", ca_file: Path | None = None) -> object:
    """Open `az://container/name` for random reads, with the credentials of the environment."""
    from stages.store import azure

    return azure.open_reader(url, endpoint=endpoint, ca_file=ca_file)


SPEC = StageSpec(
    name="write.azure_block",
    summary="Write the image to Azure as a block blob: many blocks at once, the head last, an MD5 on every block.",
    options=Options,
    takes=pieces(Order.HEAD_LAST, Order.SEQUENTIAL),
    gives=STORED_IMAGE,
    build=AzureBlockWriter,
    sink=HEAD_LAST_SINK,
    resumable=True,
    schemes=("az",),
    open_reader=open_reader,
)
