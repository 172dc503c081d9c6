"""Write the image to an S3-compatible store: multipart with the head last, or one request for a small image.

Nothing is visible in the store before the last part is there: an image that it replaces (`overwrite = true`) stays
until that moment. Afterwards the old one is gone, unless the bucket keeps versions; withdrawing the new one does not
bring it back.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import quote, urlencode

from anyio import move_on_after

from pipeline.errors import LeftBehindError, PlanError, StageError, StoreError
from pipeline.flow.channels import Inlet, Outlet
from pipeline.flow.items import Piece, RangeReader, StoredImage
from pipeline.flow.manifest import MANIFEST_SUFFIX
from pipeline.flow.orders import HEAD_LAST_SINK, Order
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
from pipeline.units import Size

# aiohttp, botocore and awscrt are imported where a store is really talked to, not for `pipeline --help`.
if TYPE_CHECKING:
    from pipeline.events import LeftoverFound
    from pipeline.flow.pacing import Pacer
    from pipeline.flow.retry import Retry, RetryPolicy
    from stages.store.http import Timeouts
    from stages.store.s3 import Dialect, ObjectState, S3Client
    from stages.store.s3_signing import RequestSigner
    from stages.write.driver import DriverPlan
    from stages.write.s3_upload import S3Upload
    from stages.write.shapes import PartUpload


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of write.s3."""

    url: str = option(doc="Where the image goes: s3://BUCKET/NAME.", example='"s3://images/web01.qcow2"')
    endpoint: str = option(
        "",
        doc="The store's address, https://HOST[:PORT]; else AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, else AWS itself. "
        "Credentials come from the standard AWS chain.",
        may_change=True,
    )
    region: str = option("", doc="Region for signatures; else AWS_REGION, the AWS profile, us-east-1.", may_change=True)
    overwrite: bool = option(
        False,
        doc="Replace an object that has the name already. It stays until the new one is complete, "
        "and is gone from then on unless the bucket keeps versions.",
        may_change=True,
    )
    ca_file: Path | None = option(None, doc="PEM certificates to trust instead of the system's.", may_change=True)
    parts_in_flight: int = option(
        8,
        doc="How many parts are on their way at once, as far as memory allows. More helps on long lines only.",
        may_change=True,
        minimum=1,
    )
    checksum: Literal["auto", "crc64nvme", "crc32c", "md5"] = option(
        "auto", doc="What the store checks each part with; auto is CRC64NVME where the store knows it, else MD5."
    )
    addressing: Literal["auto", "path", "virtual"] = option(
        "auto",
        doc="Bucket in the path or in the host name; auto is the host name except for addresses and localhost.",
        may_change=True,
    )
    part_sizes: Literal["growing", "equal"] = option(
        "growing", doc="equal: all parts but the last have one length, as some stores want it (Cloudflare R2 is known)."
    )
    storage_class: str = option("", doc='Of the object, as in "STANDARD_IA"; else the bucket\'s own.')
    encryption: Literal["", "AES256", "aws:kms"] = option(
        "", doc="On the store's side, asked for expressly; else as the bucket says."
    )
    kms_key: str = option("", doc="The key for aws:kms; else the account's own.")
    acl: str = option("", doc='A canned ACL for the object, as in "bucket-owner-full-control".')
    tags: dict[str, str] | None = option(None, doc="Tags of the object.")
    requester_pays: bool = option(False, doc="Agree to pay for requests to a bucket of somebody else.")
    attempts: int = option(
        6, doc="How often a request is sent when the store fails for a moment.", may_change=True, minimum=1
    )
    rate_limit: Size | None = option(
        None, doc='Send at most this much a second, as in "40 MiB".', may_change=True, minimum=RATE_MIN
    )

    def __post_init__(self) -> None:
        if self.kms_key and self.encryption != "aws:kms":
            raise ValueError('kms_key belongs to encryption = "aws:kms"')


@dataclass(frozen=True, slots=True, kw_only=True)
class _Planned:
    """What planning made."""

    key: str
    client: S3Client
    retry: Retry
    pacer: Pacer
    upload: S3Upload
    plan: DriverPlan


class S3Writer:
    """Plans, drives and ends one upload."""

    def __init__(
        self,
        options: Options,
        context: StageContext,
        *,
        timeouts: Timeouts | None = None,
        retry_policy: RetryPolicy | None = None,
        wrap: Callable[[PartUpload], PartUpload] = lambda upload: upload,
        dialect: Dialect | None = None,
        find_signer: Callable[[], Awaitable[RequestSigner]] | None = None,
    ) -> None:
        """Prepare it; nothing is sent.

        Args:
            dialect, find_signer: for stores whose S3 is not quite AWS's; else AWS's own.
            timeouts, retry_policy: for tests, instead of the usual ones.
            wrap: for tests: called with the upload, returns one of the same shape (`Faulty`).
        """
        self._options = options
        self._context = context
        self._timeouts = timeouts
        self._retry_policy = retry_policy
        self._wrap = wrap
        self._given_dialect = dialect
        self._find_signer = find_signer
        self._planned: _Planned | None = None
        self._manifest: bytes | None = None
        self._conditional = True  # until the store says that it does not know If-None-Match

    @property
    def _dialect(self) -> Dialect:
        from stages.store.s3 import S3_DIALECT

        return self._given_dialect or S3_DIALECT

    # -- planning --------------------------------------------------------------------------------------------------

    async def plan(self, request: SinkRequest) -> SinkPlan:
        """Look at bucket and target, and lay out the parts. Raises PlanError or StoreError."""
        from pipeline.flow.pacing import Pacer
        from stages.store.s3 import S3Url
        from stages.write.driver import plan_driver

        options = self._options
        where = S3Url.parse(options.url, self._dialect.scheme)
        pacer = Pacer(
            self._context.clock,
            requests=options.parts_in_flight,
            limit=options.rate_limit,
            emit=self._context.emit,
            stage=self._context.name,
        )
        await self.close()
        client, retry = await self._connect(where.bucket)
        limits = replace(client.limits, equal=client.limits.equal or options.part_sizes == "equal")
        plan = plan_driver(limits, request, parts_in_flight=options.parts_in_flight)
        sink = plan.sink
        if options.checksum == "crc32c" and sink.boundaries:
            raise PlanError(
                "parts that are streamed can't have a CRC32C, which is wanted before their first byte",
                operation="plan",
                hint='Set checksum = "auto", or raise "memory" in [export].',
            )
        upload = self._make_upload(client, where.key)
        self._planned = _Planned(key=where.key, client=client, retry=retry, pacer=pacer, upload=upload, plan=plan)
        resume_at = 0
        journal = self._context.journal
        if journal is not None and journal.upload:
            resume_at = await self._go_on(self._planned, journal)
            if not journal.upload:
                self._planned = replace(self._planned, upload=self._make_upload(client, where.key))
        if journal is None or not journal.upload:
            await self._look_at_target(self._planned)
        checksum = "CRC64NVME, or MD5 where the store does not know it"
        checksum = "MD5, and CRC32C of the whole" if client.dialect.google else checksum
        return SinkPlan(
            boundaries=sink.boundaries,
            held_bytes=sink.held_bytes,
            own_bytes=sink.own_bytes,
            summary=(
                *sink.summary,
                ("checksum of each part", checksum if options.checksum == "auto" else options.checksum),
                ("credentials", client.signer.source),
            ),
            resume_at=resume_at,
        )

    async def find_leftovers(self) -> Sequence[LeftoverFound]:
        """Open uploads of the same key. Raises StoreError."""
        from stages.write.leftovers import Bucket, found_beside

        planned = self._after_planning()
        place = Bucket(planned.client, planned.retry, planned.key, is_prefix=False)
        return await found_beside(place, planned.client.uri(planned.key), self._options.endpoint)

    async def _connect(self, bucket: str) -> tuple[S3Client, Retry]:
        from pipeline.flow.retry import Retry, RetryPolicy
        from stages.store.s3 import S3Client

        options = self._options
        policy = self._retry_policy or RetryPolicy(attempts=options.attempts)
        retry = Retry(policy, clock=self._context.clock, emit=self._context.emit, stage=self._context.name)
        client = await S3Client.connect(
            bucket,
            endpoint=options.endpoint,
            region=options.region,
            ca_file=options.ca_file,
            addressing=options.addressing,
            connections=options.parts_in_flight,
            timeouts=self._timeouts,
            on_alive=retry.alive,
            signer=await self._find_signer() if self._find_signer else None,
            dialect=self._dialect,
            headers={"x-amz-request-payer": "requester"} if options.requester_pays else None,
        )
        return client, retry

    def _object_headers(self) -> dict[str, str]:
        options = self._options
        headers = {
            "x-amz-storage-class": options.storage_class,
            "x-amz-server-side-encryption": options.encryption,
            "x-amz-server-side-encryption-aws-kms-key-id": options.kms_key,
            "x-amz-acl": options.acl,
            "x-amz-tagging": urlencode(options.tags or {}, quote_via=quote),
        }
        prefix = "x-goog-" if self._dialect.sends_hash else "x-amz-"
        return {name.replace("x-amz-", prefix): value for name, value in headers.items() if value}

    def _make_upload(self, client: S3Client, key: str) -> S3Upload:
        from stages.write.s3_upload import S3Upload

        return S3Upload(
            client,
            key,
            overwrite=self._options.overwrite,
            checksum=self._options.checksum,
            clock=self._context.clock,
            emit=self._context.emit,
            stage=self._context.name,
            headers=self._object_headers(),
        )

    async def _go_on(self, planned: _Planned, journal: UploadJournal) -> int:
        """Find out what is left of the upload of an earlier process, and take it over or remove it.

        Returns:
            image bytes below this, behind the head, are stored.
        Raises:
            PlanError: the upload is not there, and may be in another store; or the target is somebody else's.
        """
        from pipeline.flow.retry import CLEANUP
        from stages.store.s3 import head_or_reason
        from stages.write.kept import fitting, resume_offset, stored_part, sums_from_text

        client, retry, upload, key = planned.client, planned.retry, planned.upload, planned.key
        state = journal.upload
        sealing = [journal.parts[number] for number in state.get("sealing", ()) if number in journal.parts]
        if "whole" in state:
            sent = [sums_from_text(state["whole"]["length"], state["whole"]["sums"])]
        else:
            sent = [stored_part(part).sums for part in sealing]
        upload.go_on(state, sent, in_parts="whole" not in state)
        found = await retry.call("head", lambda: head_or_reason(client, key))
        is_ours = upload.recognise(found)
        upload.replaced = None if is_ours else found
        if found is not None and not is_ours and not self._options.overwrite and not journal.discards:
            raise PlanError(
                "the target appeared since this export was begun",
                operation="resume",
                uri=upload.uri,
                size=found.size,
                hint="Somebody else wrote it. Move it away, or set overwrite = true in write.s3.",
            )
        if journal.discards or "whole" in state or not state["upload_id"]:
            await retry.call("abort", upload.settle_open, CLEANUP)
            await retry.call("abort", upload.abort, CLEANUP)
            journal.begin_anew("what was sent before has been removed")
            return 0
        stored = await retry.call("list_parts", lambda: client.list_parts(key, str(state["upload_id"])))
        if is_ours:  # complete and visible already: nothing is to be sent, it only has to be verified
            return resume_offset(planned.plan.parts, journal.parts)
        if stored is None:
            if state["endpoint"] != client.endpoint:
                raise PlanError(
                    "the upload that was begun is not in this store",
                    operation="resume",
                    was=state["endpoint"],
                    now=client.endpoint,
                    hint="Resume with the endpoint that it was begun with, or start anew: --discard.",
                )
            upload.forget_upload()
            journal.begin_anew("the store does not have the upload any more; a rule of the bucket may have removed it")
            return 0
        fits = fitting(planned.plan.parts, journal.parts)
        journal.drop_parts(
            [
                number
                for number, part in journal.parts.items()
                if number not in fits or stored.get(number) != (part.length, part.tag.strip('"'))
            ]
        )
        return resume_offset(planned.plan.parts, journal.parts)

    async def _look_at_target(self, planned: _Planned) -> None:
        from stages.store.s3 import S3Error, head_or_reason

        client, retry = planned.client, planned.retry
        try:
            for key in (planned.key, planned.key + MANIFEST_SUFFIX):
                found = await retry.call("head", lambda key=key: head_or_reason(client, key))  # type: ignore[misc]
                if found is not None and not self._options.overwrite:
                    raise PlanError(
                        "the target exists",
                        operation="plan",
                        uri=client.uri(key),
                        size=found.size,
                        hint="Choose another name, or set overwrite = true in write.s3.",
                    )
                if key == planned.key:
                    planned.upload.replaced = found
        except S3Error as error:
            if error.temporary:
                raise
            raise PlanError(
                f"the store refuses: {error.message}", operation="plan", hint=error.hint, **error.context
            ) from None
        try:
            open_uploads = await retry.call("list_uploads", lambda: client.open_uploads(planned.key))
        except S3Error as error:
            if error.temporary:
                raise
        else:
            planned.upload.known_uploads = frozenset(found.upload_id for found in open_uploads)

    # -- writing ---------------------------------------------------------------------------------------------------

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
        upload = planned.upload
        driven = Retrying(Paced(self._wrap(upload), planned.pacer), planned.retry)
        journal = PartJournal(self._context.journal, upload.state) if self._context.journal is not None else None
        sealed = await PartDriver(driven, self._context, planned.plan, journal).store(inlet)
        if self._context.journal is not None:
            # What removes it now is another command than before.
            self._context.journal.note_upload({**self._context.journal.upload, "commands": upload.leftovers()})
        try:
            await outlet.send(StoredImage(upload.uri, sealed.size, self._open_reader, upload.fetch_receipt))
        except BaseException as error:
            if journal is None or not journal.keeps(error):
                await abort_upload(driven, self._context, error)
            raise

    @asynccontextmanager
    async def _open_reader(self) -> AsyncIterator[RangeReader]:
        from stages.store.s3 import S3RangeReader

        planned = self._after_planning()
        client, upload = planned.client, planned.upload
        state = await planned.retry.call("head", lambda: client.head(planned.key, upload.version))
        if state is None:
            raise StoreError("the stored image is gone", operation="read", uri=upload.uri)
        yield S3RangeReader(client, planned.key, state, planned.retry)

    async def fetch_manifest(self) -> bytes | None:
        """The manifest that stands beside the target; None where there is none. Raises StoreError."""
        from stages.store.s3 import S3Error, S3Url, head_or_reason

        where = S3Url.parse(self._options.url, self._dialect.scheme)
        key = where.key + MANIFEST_SUFFIX
        client, retry = await self._connect(where.bucket)

        async def fetch() -> bytes | None:
            found = await head_or_reason(client, key)
            if found is None:
                return None
            return await client.get_range(key, 0, found.size, etag=found.etag, version=found.version)

        try:
            return await retry.call("read_manifest", fetch)
        except S3Error as error:
            if error.temporary:
                raise
            return None  # planning says what is wrong
        finally:
            await client.close()

    async def publish(self, manifest: bytes) -> str:
        """Put the manifest beside the image. Raises StoreError, also where somebody else put one meanwhile."""
        planned = self._after_planning()
        self._manifest = manifest
        await planned.retry.call("put_manifest", lambda: self._put_manifest(manifest))
        return planned.client.uri(planned.key + MANIFEST_SUFFIX)

    async def _put_manifest(self, manifest: bytes) -> None:
        from pipeline.flow.grace import with_grace
        from stages.store.s3 import S3Error
        from stages.write.s3_upload import GRACE_S, is_unknown_header

        client, key = self._after_planning().client, self._after_planning().key + MANIFEST_SUFFIX
        headers = {"Content-Type": "application/json"}
        if not self._options.overwrite:
            if await self._manifest_is_there():
                return
            if self._conditional:
                headers |= client.dialect.absent
        try:
            await with_grace(lambda: client.put_text(key, manifest, headers), GRACE_S)
        except S3Error as error:
            is_conditional = bool(client.dialect.absent) and client.dialect.absent.items() <= headers.items()
            if is_conditional and is_unknown_header(error):
                self._conditional = False
                await self._put_manifest(manifest)
            elif not (error.status in (409, 412) and not error.temporary and await self._manifest_is_there()):
                raise

    async def _manifest_is_there(self) -> bool:
        """Whether an earlier request put our manifest, whose answer was lost. Raises StoreError for another one."""
        planned = self._after_planning()
        key = planned.key + MANIFEST_SUFFIX
        found = await planned.client.head(key)
        if found is None or self._is_our_manifest(found):
            return found is not None
        raise StoreError(
            "a manifest appeared beside the target while the image was written",
            operation="put_manifest",
            uri=planned.client.uri(key),
            hint="Somebody else wrote it; it was left alone. Choose another name.",
        )

    def _is_our_manifest(self, found: ObjectState) -> bool:
        from stages.store.s3 import md5_hex

        manifest = self._manifest or b""
        # An ETag that is no MD5 says nothing: then the size has to do, with a name nobody had before.
        return found.size == len(manifest) and (found.encrypted or found.etag == md5_hex(manifest))

    async def withdraw(self) -> None:
        """Delete the object that this run sealed, and the manifest that it put; never somebody else's.

        Raises:
            LeftBehindError: it could not be deleted.
        """
        from pipeline.flow.retry import CLEANUP
        from stages.write.driver import ABORT_DEADLINE_S

        planned = self._after_planning()
        upload = planned.upload
        failure = StoreError(f"the store did not answer within {ABORT_DEADLINE_S:.0f} s", operation="withdraw")
        with move_on_after(ABORT_DEADLINE_S):
            try:
                if self._manifest is not None:
                    await planned.retry.call("withdraw", self._remove_manifest, CLEANUP)
                # An upload that might have been kept is still open.
                await planned.retry.call("withdraw", upload.abort, CLEANUP)
            except StoreError as error:
                failure = error
            else:
                return
        commands = upload.leftovers()
        if self._manifest is not None:
            commands += (planned.client.command("delete-object", planned.key + MANIFEST_SUFFIX),)
        raise LeftBehindError(
            f"the image could not be removed: {failure}", cause=failure, commands=commands, uri=upload.uri
        ) from failure

    async def _remove_manifest(self) -> None:
        planned = self._after_planning()
        key = planned.key + MANIFEST_SUFFIX
        found = await planned.client.head(key)
        if found is not None and self._is_our_manifest(found):
            await planned.client.delete(key, version=found.version, etag=found.etag)
        self._manifest = None

    async def close(self) -> None:
        """Close connections; idempotent."""
        if self._planned is not None:
            await self._planned.client.close()

    def _after_planning(self) -> _Planned:
        if self._planned is None:
            raise StageError("write.s3 works only after its planning", operation="write.s3")
        return self._planned


@asynccontextmanager
async def open_reader(
    url: str, *, endpoint: str = "", region: str = "", ca_file: Path | None = None
) -> AsyncIterator[RangeReader]:
    """Open `s3://bucket/key` for random reads. Raises PlanError or StoreError."""
    from stages.store import s3

    async with s3.open_reader(url, endpoint=endpoint, region=region, ca_file=ca_file) as reader:
        yield reader


async def find_head_minimum(options: Options) -> Callable[[int], int]:
    """How long a head has to be to be a part of its own in this store."""
    from stages.store.s3 import limits_at
    from stages.store.s3_signing import look_around
    from stages.write.parts import head_minimum

    limits = limits_at(options.endpoint or (await look_around()).endpoint)
    return partial(head_minimum, limits)


SPEC = StageSpec(
    name="write.s3",
    summary="Write the image to an S3-compatible store: multipart, the head last, checksums on every part.",
    options=Options,
    takes=pieces(Order.HEAD_LAST, Order.SEQUENTIAL),
    gives=STORED_IMAGE,
    build=S3Writer,
    sink=HEAD_LAST_SINK,
    resumable=True,
    head_minimum=find_head_minimum,
    schemes=("s3",),
    open_reader=open_reader,
)
