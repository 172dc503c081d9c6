"""One object being written to an S3-compatible store: multipart, or in one request.

Source: Amazon S3 API Reference: CreateMultipartUpload, UploadPart, CompleteMultipartUpload, PutObject and the rest.

Requests whose fate has to be known (opening an upload, making an object visible) come to their end even when the run is
cancelled meanwhile; where an answer is lost all the same, the store is asked what happened.
"""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal

from pipeline.errors import StoreError
from pipeline.events import Event, FallbackTaken
from pipeline.flow.grace import with_grace
from pipeline.flow.items import Receipt
from pipeline.flow.stage import Clock
from stages.store.digests import (
    Algorithm,
    Sums,
    combined_crc32c,
    combined_crc64nvme,
    composite_crc32c,
    composite_md5,
)
from stages.store.http import Reply
from stages.store.s3 import ObjectState, OpenUpload, S3Client, S3Error, google_hash, reply_text
from stages.write.shapes import Body, Sealed, StoredPart

Checksum = Literal["auto", "crc64nvme", "crc32c", "md5"]

# How long a request whose fate matters may go on after the run was cancelled.
GRACE_S = 10.0
# An object whose PUT lost its answer may become visible a moment later: how often, and how far apart, it is looked for.
_LOOKS = 3
_LOOK_EVERY_S = 1.0
# Clocks of a store's machines differ a little; an upload of ours may be dated this much before we asked for it.
_CLOCK_TOLERANCE_S = 5.0
_UNKNOWN_HEADER_CODES = frozenset({"NotImplemented", "InvalidRequest", "InvalidArgument", "UnsupportedHeader"})


class S3Upload:
    """Has the shape PartUpload, and knows afterwards what the store should say of the object."""

    def __init__(
        self,
        client: S3Client,
        key: str,
        *,
        overwrite: bool,
        checksum: Checksum,
        clock: Clock,
        emit: Callable[[Event], None],
        stage: str,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Prepare it; nothing is sent.

        Args:
            overwrite: replace whatever has the key when the object is sealed.
            headers: that the object is made with: encryption, class, tags.
        """
        self._object_headers = dict(headers or {})
        self._client = client
        self._key = key
        self._overwrite = overwrite
        self._checksum = checksum
        self._clock = clock
        self._emit = emit
        self._stage = stage
        self._algorithms = {
            "auto": Algorithm.CRC64NVME | Algorithm.MD5,
            "crc64nvme": Algorithm.CRC64NVME,
            "crc32c": Algorithm.CRC32C,
            "md5": Algorithm.MD5,
        }[checksum]
        if client.dialect.google:  # each part by its MD5, the whole by its CRC32C
            self._algorithms = Algorithm.MD5 | Algorithm.CRC32C
        self._full_object = False
        self._conditional = not overwrite
        self.known_uploads: frozenset[str] | None = None
        self.replaced: ObjectState | None = None
        self._upload_id = ""
        self._asked_at: float | None = None  # when an open was sent that may have been done without our knowing
        self._maybe_visible = False
        self.sealed_state: Sealed | None = None
        self._version = ""
        self._expected: tuple[Sums, ...] = ()
        self._in_parts = False

    @property
    def uri(self) -> str:
        """`s3://bucket/key`, or as its dialect has it."""
        return self._client.uri(self._key)

    @property
    def algorithms(self) -> Algorithm:
        """Both CRC64NVME and MD5 until the store has said what it knows."""
        return self._algorithms

    # ---- in a journal ----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What a later process needs to find this upload again."""
        return {
            "bucket": self._client.bucket,
            "key": self._key,
            "endpoint": self._client.endpoint,
            "upload_id": self._upload_id,
            "asked_at": self._asked_at or (0.0 if self._upload_id else self._clock_of_store()),
            "known_uploads": sorted(self.known_uploads) if self.known_uploads is not None else None,
            "algorithms": [one.name for one in self._algorithms],
            "full_object": self._full_object,
            "commands": self.leftovers(),
        }

    def go_on(self, state: Mapping[str, Any], sent: Sequence[Sums], *, in_parts: bool) -> None:
        """Take over the upload of an earlier process.

        Args:
            sent: the checksums of the object that was about to be made visible; empty where none was.
        """
        self._upload_id = str(state["upload_id"])
        known = state["known_uploads"]
        self.known_uploads = frozenset(known) if known is not None else None
        self._asked_at = None if self._upload_id or "whole" in state else float(state["asked_at"])
        if self._upload_id:
            self._algorithms = Algorithm(0)
            for name in state["algorithms"]:
                self._algorithms |= Algorithm[name]
        self._full_object = bool(state["full_object"])
        self._expected, self._in_parts = tuple(sent), in_parts
        self._maybe_visible = bool(sent)

    def recognise(self, found: ObjectState | None) -> bool:
        """Whether the object under our key is what the earlier process made; else it is somebody else's."""
        self._maybe_visible = found is not None and self._maybe_visible and self._is_ours(found)
        return self._maybe_visible

    async def settle_open(self) -> None:
        """Remove an upload that the earlier process opened, and never learned of. Raises StoreError."""
        if self._asked_at is not None:
            await self._reap()
            self._asked_at = None

    def forget_upload(self) -> None:
        """The store does not have it any more."""
        self._upload_id = ""

    # ---- parts -----------------------------------------------------------------------------------------------------

    async def open(self) -> str:
        """CreateMultipartUpload; once, however often it is called. Raises StoreError."""
        if self._upload_id:
            return self._upload_id
        headers = {"Content-Type": "application/octet-stream", **self._object_headers}
        if self._client.dialect.google:
            pass
        elif Algorithm.CRC64NVME in self._algorithms:
            headers |= {"x-amz-checksum-algorithm": "CRC64NVME", "x-amz-checksum-type": "FULL_OBJECT"}
        elif Algorithm.CRC32C in self._algorithms:
            headers |= {"x-amz-checksum-algorithm": "CRC32C"}
        lost = self._asked_at is not None
        if self._asked_at is None:
            self._asked_at = self._clock_of_store()
        try:
            reply = await with_grace(lambda: self._create(headers, lost=lost), GRACE_S)
        except S3Error as error:
            if not lost and (not error.temporary or error.throttled):
                self._asked_at = None  # refused: there is nothing
            if self._checksum == "auto" and Algorithm.CRC64NVME in self._algorithms and is_unknown_header(error):
                self._use_md5(str(error))
                return await self.open()
            raise
        if self._checksum == "auto" and not self._client.dialect.google:
            if reply.header("x-amz-checksum-algorithm").upper() == "CRC64NVME":
                self._algorithms = Algorithm.CRC64NVME
            else:
                self._algorithms = Algorithm.MD5
        self._full_object = reply.header("x-amz-checksum-type").upper() == "FULL_OBJECT"
        if lost:
            await self._reap()
            self._asked_at = None
        return self._upload_id

    async def _create(self, headers: dict[str, str], *, lost: bool) -> Reply:
        self._upload_id, reply = await self._client.create_upload(self._key, headers)
        if not lost:
            self._asked_at = None
        return reply

    def _use_md5(self, reason: str) -> None:
        self._algorithms = Algorithm.MD5
        self._emit(FallbackTaken(stage=self._stage, what="MD5 instead of CRC64NVME checksums", reason=reason))

    def _clock_of_store(self) -> float:
        return time.time() + self._client.skew_s - _CLOCK_TOLERANCE_S

    async def _reap(self) -> None:
        """Abort the upload whose open lost its answer.

        It is told from somebody else's by three signs: it was not there when the run was planned, it is not older than
        our first request, and it has no part (ours can't have any, nobody knew its id).
        """
        if self.known_uploads is None:
            self._emit(
                FallbackTaken(
                    stage=self._stage,
                    what="an upload that was opened without an answer may be left",
                    reason="the store did not let us list its uploads",
                )
            )
            return
        for upload in await self._client.open_uploads(self._key):
            if self._may_be_ours(upload) and await self._client.parts_of(self._key, upload.upload_id) == 0:
                await self._client.abort_upload(self._key, upload.upload_id)

    def _may_be_ours(self, upload: OpenUpload) -> bool:
        is_new = upload.upload_id not in (self.known_uploads or ()) and upload.upload_id != self._upload_id
        return is_new and self._asked_at is not None and upload.initiated >= self._asked_at

    async def put_part(self, number: int, body: Body) -> StoredPart:
        """UploadPart. Raises StoreError."""
        reply = await self._client.put_part(self._key, self._upload_id, number, body, self._sum_headers(body.sums))
        sums = body.sums
        assert sums is not None  # every byte was sent
        self._compare(reply, sums, operation="put_part", number=number)
        return StoredPart(number=number, length=sums.length, tag=reply.header("etag"), sums=sums)

    def _sum_headers(self, sums: Sums | None) -> dict[str, str]:
        if sums is None:
            return {}
        if self._client.dialect.google:
            hashed = {"x-goog-hash": f"crc32c={sums.crc32c_text}"} if self._client.dialect.sends_hash else {}
            return {"Content-MD5": sums.md5_text, **hashed}
        headers = {
            "x-amz-checksum-crc64nvme": sums.crc64nvme_text,
            "x-amz-checksum-crc32c": sums.crc32c_text,
            "Content-MD5": sums.md5_text,
        }
        return {name: value for name, value in headers.items() if value}

    def _compare(self, reply: Reply, sums: Sums, *, operation: str, number: int | None = None) -> None:
        """Look at what the store says that it got. Raises StoreError where that is not what was sent."""
        etag = reply.header("etag").strip('"').lower()
        is_md5 = (
            len(etag) == 32
            and not self._client.dialect.google
            and reply.header("x-amz-server-side-encryption") in ("", "AES256")
        )
        pairs = (
            ("CRC64NVME", sums.crc64nvme_text, reply.header("x-amz-checksum-crc64nvme")),
            ("CRC32C", sums.crc32c_text, reply.header("x-amz-checksum-crc32c") or google_hash(reply, "crc32c")),
            ("MD5", sums.md5.hex() if sums.md5 else "", etag if is_md5 else ""),
        )
        for name, ours, theirs in pairs:
            if ours and theirs and ours != theirs:
                raise StoreError(
                    f"the store got other bytes than were sent: its {name} is {theirs}, ours is {ours}",
                    operation=operation,
                    number=number,
                    hint="Suspect memory or network of this machine, or a proxy in between.",
                )

    # ---- making it visible -----------------------------------------------------------------------------------------

    async def put_whole(self, body: Body) -> Sealed:
        """PutObject. Raises StoreError."""
        sums = body.sums
        assert sums is not None  # it was kept
        self._expected, self._in_parts = (sums,), False

        async def put() -> Reply:
            headers = {
                "Content-Type": "application/octet-stream",
                **self._object_headers,
                **self._sum_headers(sums),
                **self._condition(),
            }
            if self._algorithms == Algorithm.MD5:
                headers.pop("x-amz-checksum-crc64nvme", None)
            return await self._client.put(self._key, body, headers)

        return await self._publish(put, "put_whole", sums.length)

    async def seal(self, parts: Sequence[StoredPart]) -> Sealed:
        """CompleteMultipartUpload. Raises StoreError."""
        self._expected, self._in_parts = tuple(part.sums for part in parts), True
        size = sum(part.length for part in parts)
        crc64nvme = combined_crc64nvme(self._expected)

        async def complete() -> Reply:
            headers = self._condition()
            if crc64nvme is not None and self._full_object:
                whole = Sums(length=size, crc64nvme=crc64nvme)
                headers |= {"x-amz-checksum-crc64nvme": whole.crc64nvme_text, "x-amz-checksum-type": "FULL_OBJECT"}
            return await self._client.complete_upload(
                self._key, self._upload_id, [_fields(part) for part in parts], headers
            )

        return await self._publish(complete, "seal", size)

    def _condition(self) -> dict[str, str]:
        return dict(self._client.dialect.absent) if self._conditional else {}

    async def _publish(self, request: Callable[[], Awaitable[Reply]], operation: str, size: int) -> Sealed:
        """Send the request that makes the object visible, and find out what became of it when that is not clear."""
        if not self._overwrite:
            # Old stores ignore If-None-Match and overwrite, so look first; what is left is the moment in between.
            found = await self._client.head(self._key)
            if found is not None:
                return self._take_as_ours(found, operation)
        was_visible = self._maybe_visible

        async def publish() -> tuple[Reply, Sealed]:
            reply = await request()
            tag = reply.header("etag") if operation == "put_whole" else reply_text(reply, "ETag")
            return reply, self._remember(size, tag.strip('"'), reply.header("x-amz-version-id").replace("null", ""))

        try:
            self._maybe_visible = True  # from here on; also where the answer is lost
            reply, sealed = await with_grace(publish, GRACE_S)
        except StoreError as error:
            if isinstance(error, S3Error) and (not error.temporary or error.throttled):
                self._maybe_visible = was_visible  # refused
            if isinstance(error, S3Error) and is_unknown_header(error) and self._drop_headers(error):
                return await self._publish(request, operation, size)
            found = await self._look_for_ours(error)
            if found is not None:
                return self._remember(size, found.etag, found.version)
            if isinstance(error, S3Error) and error.status in (409, 412) and not error.temporary and self._conditional:
                raise self._exists(operation) from None
            raise
        if operation == "put_whole":
            self._compare(reply, self._expected[0], operation=operation)
        return sealed

    def _take_as_ours(self, found: ObjectState, operation: str) -> Sealed:
        """An object is there before the request: from an attempt of ours whose answer was lost, or somebody else's."""
        if self._maybe_visible and self._is_ours(found):
            return self._remember(found.size, found.etag, found.version)
        raise self._exists(operation)

    async def _look_for_ours(self, error: StoreError) -> ObjectState | None:
        """After an answer that leaves it open whether the object was made: our object, if it is there."""
        refused = isinstance(error, S3Error) and not error.temporary and error.status not in (404, 409, 412)
        if refused:
            return None
        with contextlib.suppress(StoreError):  # the first error is the one to tell, and to retry on
            found = await self._client.head(self._key)
            if found is not None and self._is_ours(found):
                return found
        return None

    def _drop_headers(self, error: S3Error) -> bool:
        """Give up one thing that a store may not know; False where there is nothing left to give up."""
        if self._conditional:
            self._conditional = False
            self._emit(
                FallbackTaken(
                    stage=self._stage, what="no If-None-Match: the target is only looked for first", reason=str(error)
                )
            )
            return True
        if not self._in_parts and self._checksum == "auto" and self._algorithms != Algorithm.MD5:
            self._use_md5(str(error))
            return True
        return False

    def _exists(self, operation: str) -> StoreError:
        self._maybe_visible = False
        return StoreError(
            "the target appeared while the image was written",
            operation=operation,
            uri=self.uri,
            hint="Somebody else wrote it; it was left alone. Choose another name.",
        )

    def _remember(self, size: int, etag: str, version: str) -> Sealed:
        self._version = version
        self._upload_id = ""  # it has become the object
        self.sealed_state = Sealed(size=size, tag=etag)
        return self.sealed_state

    def _is_ours(self, found: ObjectState) -> bool:
        """Whether an object is the one that this upload made: nothing contradicts, and a checksum or tag agrees."""
        if found.size != sum(sums.length for sums in self._expected):
            return False
        before = self.replaced
        if before is not None and (found.etag, found.modified, found.version) == (
            before.etag,
            before.modified,
            before.version,
        ):
            return False  # the one that was there before, whatever it holds
        if self.sealed_state is not None and self.sealed_state.tag:
            return found.etag == self.sealed_state.tag
        proofs = self._proofs(found)
        return bool(proofs) and all(ours == theirs for _, ours, theirs in proofs)

    def _proofs(self, found: ObjectState) -> tuple[tuple[str, str, str], ...]:
        """(what, ours, theirs) for every checksum of the whole object that both sides have."""
        proofs = []
        crc64nvme = combined_crc64nvme(self._expected)
        if found.crc64nvme and crc64nvme is not None and "-" not in found.crc64nvme:
            proofs.append(("CRC64NVME", Sums(length=0, crc64nvme=crc64nvme).crc64nvme_text, found.crc64nvme))
        crc32c = combined_crc32c(self._expected)
        if found.crc32c and crc32c is not None:
            whole = Sums(length=0, crc32c=crc32c).crc32c_text
            composite = composite_crc32c(self._expected) or ""
            proofs.append(("CRC32C", composite if "-" in found.crc32c else whole, found.crc32c))
        if all(sums.md5 is not None for sums in self._expected) and not found.encrypted and self._expected:
            ours = composite_md5(self._expected) if self._in_parts else (self._expected[0].md5 or b"").hex()
            proofs.append(("ETag (MD5)", ours or "", found.etag.lower()))
        return tuple(proofs)

    # ---- afterwards ------------------------------------------------------------------------------------------------

    @property
    def version(self) -> str:
        """The object's version, where the bucket keeps versions."""
        return self._version

    @asynccontextmanager
    async def fetch_receipt(self) -> AsyncIterator[Receipt]:
        """What the store says of the sealed object. Raises StoreError."""
        found = await self._client.head(self._key, self._version)
        if found is None:
            raise StoreError("the stored image is gone", operation="receipt", uri=self.uri)
        proofs = self._proofs(found)
        note = "" if proofs else "the store keeps no checksum of the object that can be compared"
        yield Receipt(found.size, proofs, note)

    async def abort(self) -> None:
        """Remove the open upload, and the object if it became visible. Raises StoreError."""
        # First the upload, so that no object can come of it any more; then the object; and only then a look whether
        # the upload is gone: some stores list the parts of a completed one as long as its object is there (Swift).
        if self._upload_id:
            await self._client.abort_upload(self._key, self._upload_id)
        if self.sealed_state is not None or self._maybe_visible:
            await self.remove_object()
        if self._upload_id:
            await self._see_upload_gone()
        if self._asked_at is not None:
            await self._reap()
            if self.known_uploads is None:
                raise StoreError(
                    "an upload that was opened without an answer may be left", operation="abort", uri=self.uri
                )
            self._asked_at = None

    async def _see_upload_gone(self) -> None:
        # A part that was on its way may have been stored after the abort (API reference, AbortMultipartUpload).
        try:
            left = await self._client.parts_of(self._key, self._upload_id)
        except S3Error as error:
            if error.temporary:
                raise
            left = None  # the store can't list parts; the abort itself was answered
        if left is not None:
            raise StoreError(
                "the upload is still there after its abort", temporary=True, operation="abort", uri=self.uri
            )
        self._upload_id = ""

    async def remove_object(self) -> None:
        """Delete the object that this upload made, that version or that ETag; one of somebody else is left alone."""
        for look in range(_LOOKS):
            found = await self._client.head(self._key, self._version)
            if found is not None or self.sealed_state is not None:
                break
            if look < _LOOKS - 1:
                await self._clock.sleep(_LOOK_EVERY_S)
        if found is not None and (self._version or self._is_ours(found)):
            await self._client.delete(self._key, version=found.version or self._version, etag=found.etag)
        self.sealed_state = None
        self._maybe_visible = False

    def leftovers(self) -> tuple[str, ...]:
        """Commands for whatever may be left: of the usual client, and ours."""
        commands = []
        if self._upload_id:
            commands.append(self._client.command("abort-multipart-upload", self._key, "--upload-id", self._upload_id))
            commands.append(self._our_command("abort", "--upload-id", self._upload_id))
        if self._asked_at is not None:
            commands.append(self._client.command("list-multipart-uploads", "", "--prefix", self._key))
            commands.append(self._our_command("list"))
        if self.sealed_state is not None or self._maybe_visible:
            version = ("--version-id", self._version) if self._version else ()
            commands.append(self._client.command("delete-object", self._key, *version))
        return tuple(commands)

    def _our_command(self, verb: str, *more: str) -> str:
        endpoint = ("--endpoint", self._client.endpoint) if self._client.endpoint else ()
        return shlex.join(["pipeline", "uploads", verb, self.uri, *more, *endpoint])


def _fields(part: StoredPart) -> dict[str, str]:
    fields = {"PartNumber": str(part.number), "ETag": part.tag}
    if part.sums.crc64nvme is not None:
        fields["ChecksumCRC64NVME"] = part.sums.crc64nvme_text
    if part.sums.crc32c is not None:
        fields["ChecksumCRC32C"] = part.sums.crc32c_text
    return fields


def is_unknown_header(error: S3Error) -> bool:
    """Whether a store refused a request because it does not know one of its headers."""
    return error.status == 501 or (error.status == 400 and error.code in _UNKNOWN_HEADER_CODES)
