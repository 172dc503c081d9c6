"""Write the image to Google Cloud Storage: many parts at once (XML interface), or in order through a session (JSON).

The parts are those of S3, so the writer of S3 writes them, with HMAC keys or a service account's token.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from anyio import move_on_after

from pipeline.config.options import Secret
from pipeline.errors import LeftBehindError, PlanError, StageError, StoreError
from pipeline.flow.channels import Inlet, Outlet
from pipeline.flow.items import Piece, RangeReader, StoredImage
from pipeline.flow.manifest import MANIFEST_SUFFIX
from pipeline.flow.orders import HEAD_LAST_SINK, Order, PartLimits
from pipeline.flow.pacing import RATE_MIN
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
from pipeline.units import GiB, KiB, Size
from stages.write import s3

# aiohttp, botocore and cryptography are imported where a store is really talked to.
if TYPE_CHECKING:
    from pipeline.flow.pacing import Pacer
    from pipeline.flow.retry import Retry, RetryPolicy
    from stages.store.gcs import GcsClient, GcsState
    from stages.store.gcs_access import GcsAccess
    from stages.store.http import Timeouts
    from stages.store.s3_signing import RequestSigner
    from stages.write.driver import DriverPlan
    from stages.write.gcs_upload import GcsUpload

# Source: Google Cloud Storage, "Quotas and limits": 5 TiB an object; a session's chunks have no number.
_SESSION_LIMITS = PartLimits(part_min=256 * KiB, part_max=GiB, parts_max=100_000, object_max=5 * 1024 * GiB)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of write.gcs."""

    url: str = option(doc="Where the image goes: gs://BUCKET/NAME.", example='"gs://images/web01.tar.gz"')
    upload: Literal["multipart", "resumable"] = option(
        "multipart",
        doc="multipart: many parts at once, head last. resumable: one session, in order; service accounts.",
    )
    hmac_key: str = option("", doc="Access key of an HMAC pair; else GS_ACCESS_KEY_ID.", may_change=True)
    hmac_secret: Secret | None = option(
        None, doc='Its secret, as { env = "NAME" }; else GS_SECRET_ACCESS_KEY.', may_change=True
    )
    key_file: Path | None = option(
        None,
        doc="Key file of a service account; else GOOGLE_APPLICATION_CREDENTIALS. Needs the extra gcs.",
        may_change=True,
    )
    endpoint: str = option(
        "", doc="The store's address; else STORAGE_EMULATOR_HOST, https://storage.googleapis.com.", may_change=True
    )
    overwrite: bool = option(
        False,
        doc="Replace an object that has the name already. It stays until the new one is complete.",
        may_change=True,
    )
    ca_file: Path | None = option(None, doc="PEM certificates to trust instead of the system's.", may_change=True)
    parts_in_flight: int = option(
        8,
        doc="How many parts are on their way at once (multipart), as far as memory allows.",
        may_change=True,
        minimum=1,
    )
    storage_class: str = option("", doc='Of the object (multipart), as in "NEARLINE"; else the bucket\'s own.')
    attempts: int = option(
        6, doc="How often a request is sent when the store fails for a moment.", may_change=True, minimum=1
    )
    rate_limit: Size | None = option(
        None, doc='Send at most this much a second, as in "40 MiB".', may_change=True, minimum=RATE_MIN
    )

    def __post_init__(self) -> None:
        if bool(self.hmac_key) != (self.hmac_secret is not None):
            raise ValueError('an HMAC pair is hmac_key = "..." and hmac_secret = { env = "NAME" }')


def _access(options: Options) -> GcsAccess:
    from stages.store.gcs_access import find_access

    return find_access(
        hmac_key=options.hmac_key,
        hmac_secret=options.hmac_secret.reveal() if options.hmac_secret else "",
        key_file=options.key_file,
        endpoint=options.endpoint,
    )


class GcsPartsWriter(s3.S3Writer):
    """The writer of S3 in GCS's dialect."""

    def __init__(self, options: Options, context: StageContext, **more: Any) -> None:
        """Prepare it; nothing is sent. Raises PlanError without credentials. `more`: as for S3Writer."""
        from stages.store.gcs import dialect_of

        access = _access(options)
        given = s3.Options(
            url=options.url,
            endpoint=access.endpoint,
            region="auto",
            overwrite=options.overwrite,
            ca_file=options.ca_file,
            parts_in_flight=options.parts_in_flight,
            addressing="path",
            storage_class=options.storage_class,
            attempts=options.attempts,
            rate_limit=options.rate_limit,
        )

        async def signer() -> RequestSigner:
            from stages.store.gcs import signer_of

            return signer_of(access, options.ca_file)

        super().__init__(given, context, **{"dialect": dialect_of(access), "find_signer": signer, **more})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Planned:
    name: str
    client: GcsClient
    retry: Retry
    pacer: Pacer
    upload: GcsUpload
    plan: DriverPlan


class GcsSessionWriter:
    """Plans, drives and ends one resumable session."""

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
        self._planned: _Planned | None = None
        self._manifest: GcsState | None = None

    async def plan(self, request: SinkRequest) -> SinkPlan:
        """Look at bucket and target, and lay out the chunks. Raises PlanError or StoreError."""
        from pipeline.flow.pacing import Pacer
        from pipeline.flow.retry import Retry, RetryPolicy
        from stages.store.gcs import GcsClient
        from stages.store.s3 import S3Url
        from stages.write.driver import plan_driver
        from stages.write.gcs_upload import GcsUpload

        options, context = self._options, self._context
        where, access = S3Url.parse(options.url, "gs"), _access(options)
        if access.hmac is not None:
            raise PlanError(
                "a resumable session wants a service account, and there is an HMAC key",
                operation="plan",
                hint='Set upload = "multipart" in write.gcs, or key_file.',
            )
        await self.close()
        policy = self._retry_policy or RetryPolicy(attempts=options.attempts)
        retry = Retry(policy, clock=context.clock, emit=context.emit, stage=context.name)
        client = GcsClient(where.bucket, access, ca_file=options.ca_file, timeouts=self._timeouts, on_alive=retry.alive)
        plan = plan_driver(_SESSION_LIMITS, request, parts_in_flight=1)
        upload = GcsUpload(client, where.key, overwrite=options.overwrite)
        pacer = Pacer(context.clock, requests=1, limit=options.rate_limit, emit=context.emit, stage=context.name)
        self._planned = _Planned(name=where.key, client=client, retry=retry, pacer=pacer, upload=upload, plan=plan)
        journal = context.journal
        resume_at = await self._go_on(self._planned, journal) if journal is not None and journal.upload else 0
        if journal is None or not journal.upload:
            await self._look_at_target(self._planned)
        sink = plan.sink
        return replace(
            sink,
            summary=(*sink.summary, ("checksum", "CRC32C of the whole"), ("credentials", access.source)),
            resume_at=resume_at,
        )

    async def _go_on(self, planned: _Planned, journal: UploadJournal) -> int:
        """Find out how far the session of an earlier process came, and take it over or remove what it made.

        Returns:
            image bytes below this are stored.
        Raises:
            PlanError: the target is somebody else's by now, or the session was in another store.
        """
        from pipeline.flow.retry import CLEANUP
        from stages.store.gcs_access import unlock_session
        from stages.write.kept import fitting, resume_offset, stored_part, sums_from_text

        client, upload, plan, call = planned.client, planned.upload, planned.plan, planned.retry.call
        state = journal.upload
        session = unlock_session(client.access, state["session"])
        if "whole" in state:
            sent = [sums_from_text(state["whole"]["length"], state["whole"]["sums"])]
        else:
            sent = [stored_part(journal.parts[one]).sums for one in state.get("sealing", ()) if one in journal.parts]
        found = await call("head", lambda: client.state(planned.name))
        is_ours = upload.recognise(found, sent)
        reached, complete = 0, None
        if session and not is_ours:
            try:
                reached, complete = await call("resume", lambda: upload.ask(session))
            except StoreError as error:
                if error.status not in (404, 410):
                    raise
                session = ""
        if journal.discards or (is_ours and "whole" in state):
            await call("abort", upload.abort, CLEANUP)
            journal.begin_anew("what was sent before has been removed")
            return 0
        if is_ours:  # complete and visible already: nothing is to be sent, it only has to be verified
            return resume_offset(plan.parts, journal.parts)
        if found is not None and complete is None and not self._options.overwrite:
            raise PlanError(
                "the target appeared since this export was begun",
                operation="resume",
                uri=upload.uri,
                size=found.size,
                hint="Somebody else wrote it. Move it away, or set overwrite = true in write.gcs.",
            )
        if not session or "whole" in state:
            if state["endpoint"] != client.access.endpoint:
                raise PlanError(
                    "the session that was begun is not in this store",
                    operation="resume",
                    was=state["endpoint"],
                    now=client.access.endpoint,
                    hint="Resume with the endpoint that it was begun with, or start anew: --discard.",
                )
            journal.begin_anew(
                "the session can't be gone on with: a store keeps it for a week, and only the account that began it "
                "opens it again"
            )
            return 0
        fits = fitting(plan.parts, journal.parts)
        journal.drop_parts(
            [
                number
                for number, part in journal.parts.items()
                if number not in fits or part.start + part.length > reached
            ]
        )
        offset = resume_offset(plan.parts, journal.parts)
        following = next((part.number for part in plan.parts.body if part.number not in journal.parts), None)
        if following is not None:
            upload.go_on(following, offset)
        return offset

    async def _look_at_target(self, planned: _Planned) -> None:
        client = planned.client
        try:
            await planned.retry.call("list", client.look)
            for name in (planned.name, planned.name + MANIFEST_SUFFIX):
                found = await planned.retry.call("head", lambda name=name: client.state(name))  # type: ignore[misc]
                if found is not None and not self._options.overwrite:
                    raise PlanError(
                        "the target exists",
                        operation="plan",
                        uri=client.uri(name),
                        size=found.size,
                        hint="Choose another name, or set overwrite = true in write.gcs.",
                    )
        except StoreError as error:
            if error.temporary or error.status is None:
                raise
            raise PlanError(
                f"the store refuses: {error.message}", operation="plan", hint=error.hint, **error.context
            ) from None

    async def run(self, inlet: Inlet[Piece], outlet: Outlet[StoredImage]) -> None:
        """Send, seal and hand on.

        Raises:
            StoreError, StageError: it failed, and what was stored is gone again.
            LeftBehindError: it failed, and something may be left.
        """
        from stages.write.driver import PartDriver, abort_upload
        from stages.write.kept import OrderedJournal
        from stages.write.paced import Paced
        from stages.write.retrying import Retrying

        planned = self._after_planning()
        upload, kept = planned.upload, self._context.journal
        driven = Retrying(Paced(upload, planned.pacer), planned.retry)
        journal = OrderedJournal(kept, upload.state) if kept is not None else None
        sealed = await PartDriver(driven, self._context, planned.plan, journal).store(inlet)
        if kept is not None:  # what removes it now is another command than before
            kept.note_upload({**kept.upload, "commands": upload.leftovers()})
        try:
            await outlet.send(StoredImage(upload.uri, sealed.size, self._open_reader, upload.fetch_receipt))
        except BaseException as error:
            if journal is None or not journal.keeps(error):
                await abort_upload(driven, self._context, error)
            raise

    @asynccontextmanager
    async def _open_reader(self) -> AsyncIterator[RangeReader]:
        from stages.store.gcs import read_state

        planned = self._after_planning()
        yield await read_state(planned.client, planned.name, planned.retry)

    async def fetch_manifest(self) -> bytes | None:
        """The manifest that stands beside the target; None where there is none. Raises StoreError."""
        from pipeline.flow.retry import Retry, RetryPolicy
        from stages.store.gcs import GcsClient
        from stages.store.s3 import S3Url

        where, options, context = S3Url.parse(self._options.url, "gs"), self._options, self._context
        policy = self._retry_policy or RetryPolicy(attempts=options.attempts)
        retry = Retry(policy, clock=context.clock, emit=context.emit, stage=context.name)
        client = GcsClient(
            where.bucket, _access(options), ca_file=options.ca_file, timeouts=self._timeouts, on_alive=retry.alive
        )
        name = where.key + MANIFEST_SUFFIX

        async def fetch() -> bytes | None:
            found = await client.state(name)
            return await client.get_range(name, 0, found.size, found.generation) if found is not None else None

        try:
            return await retry.call("read_manifest", fetch)
        except StoreError as error:
            if error.temporary or error.status is None:
                raise
            return None  # planning says what is wrong
        finally:
            await client.close()

    async def publish(self, manifest: bytes) -> str:
        """Put the manifest beside the image. Raises StoreError, also where somebody else put one meanwhile."""
        planned = self._after_planning()
        name, replace_it = planned.name + MANIFEST_SUFFIX, self._options.overwrite
        self._manifest = await planned.retry.call(
            "put_manifest", lambda: planned.client.put(name, manifest, replace=replace_it)
        )
        return planned.client.uri(name)

    async def withdraw(self) -> None:
        """Delete the object that this run made, and its manifest. Raises LeftBehindError."""
        from pipeline.flow.retry import CLEANUP
        from stages.write.driver import ABORT_DEADLINE_S

        planned = self._after_planning()
        client, manifest = planned.client, planned.name + MANIFEST_SUFFIX
        failure = StoreError(f"the store did not answer within {ABORT_DEADLINE_S:.0f} s", operation="withdraw")
        with move_on_after(ABORT_DEADLINE_S):
            try:
                if (state := self._manifest) is not None:
                    await planned.retry.call("withdraw", lambda: client.delete(manifest, state.generation), CLEANUP)
                    self._manifest = None
                await planned.retry.call("withdraw", planned.upload.abort, CLEANUP)
            except StoreError as error:
                failure = error
            else:
                return
        commands = planned.upload.leftovers()
        if self._manifest is not None:
            commands += (f"gcloud storage rm {client.uri(manifest)}",)
        raise LeftBehindError(
            f"the image could not be removed: {failure}", cause=failure, commands=commands, uri=planned.upload.uri
        ) from failure

    async def close(self) -> None:
        """Close connections; idempotent."""
        if self._planned is not None:
            await self._planned.client.close()

    def _after_planning(self) -> _Planned:
        if self._planned is None:
            raise StageError("write.gcs works only after its planning", operation="write.gcs")
        return self._planned


def build(options: Options, context: StageContext) -> GcsPartsWriter | GcsSessionWriter:
    """The writer for the kind of upload. Raises PlanError without credentials."""
    return GcsPartsWriter(options, context) if options.upload == "multipart" else GcsSessionWriter(options, context)


def open_reader(url: str, *, endpoint: str = "", ca_file: Path | None = None) -> object:
    """Open `gs://bucket/name` for random reads, with the credentials of the environment."""
    from stages.store import gcs

    return gcs.open_reader(url, endpoint=endpoint, ca_file=ca_file)


SPEC = StageSpec(
    name="write.gcs",
    summary="Write the image to Google Cloud Storage: in parts (HMAC or service account), or in one resumable session.",
    options=Options,
    takes=pieces(Order.HEAD_LAST, Order.SEQUENTIAL),
    gives=STORED_IMAGE,
    build=build,
    orders=lambda options: (
        (Order.HEAD_LAST, Order.SEQUENTIAL) if options.upload == "multipart" else (Order.SEQUENTIAL,)
    ),
    sink=HEAD_LAST_SINK,
    resumable=True,
    schemes=("gs",),
    open_reader=open_reader,
)
