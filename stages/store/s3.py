"""A client of S3-compatible stores: one bucket, the few requests that images need, and what each error means.

Source: Amazon S3 API Reference, API version 2006-03-01; every request and reply field is named as there.
"""

from __future__ import annotations

import base64
import datetime
import email.utils
import hashlib
import ipaddress
import re
import shlex
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NoReturn
from urllib.parse import quote, urlsplit
from xml.etree import ElementTree

from pipeline.errors import FormatError, PlanError, StoreError
from pipeline.flow.orders import PartLimits
from pipeline.flow.retry import Retry, RetryPolicy
from pipeline.flow.stage import RealClock
from stages.store.digests import Buffer
from stages.store.http import BytesBody, HttpClient, Reply, SendBody, Timeouts
from stages.store.ranged import read_ranged
from stages.store.s3_signing import RequestSigner, find_signer, look_around

Addressing = Literal["auto", "path", "virtual"]

# The longest range that one GET asks for; a failed one costs at most this much again.
_RANGE_MAX = 16 << 20
_TEMPORARY_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504, 509})
_TEMPORARY_CODES = frozenset(
    {"InternalError", "RequestTimeout", "ServiceUnavailable", "SlowDown", "Throttling", "ThrottlingException"}
    | {"OperationAborted", "RequestLimitExceeded", "TooManyRequests"}
)
_THROTTLED_CODES = frozenset({"SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded"})
_XML_SPACE = re.compile(r"\{[^}]*\}")


# A session token that has ended, or was withdrawn. Source: Amazon S3 API Reference, "List of error codes".
_ENDED_CODES = frozenset({"ExpiredToken", "InvalidToken", "TokenRefreshRequired"})


class S3Error(StoreError):
    """An error reply.

    Attributes:
        code: of the reply's XML; empty where it had none (HEAD).
    """

    def __init__(self, message: str, *, code: str, temporary: bool, status: int, **more: object) -> None:
        super().__init__(message, temporary=temporary, status=status, **more)  # type: ignore[arg-type]  # passed through
        self.code = code


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Url:
    """`s3://bucket/key`."""

    bucket: str
    key: str

    @classmethod
    def parse(cls, url: str, scheme: str = "s3") -> S3Url:
        """Take a URL apart. Raises PlanError."""
        given, found, rest = url.partition("://")
        bucket, _, key = rest.partition("/")
        if not found or given != scheme or not bucket or not key or key.endswith("/"):
            raise PlanError(
                f'"{url}" does not name an object',
                operation="plan",
                hint=f"Write {scheme}://BUCKET/NAME, with the image's name.",
            )
        return cls(bucket=bucket, key=key)

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """What a store that speaks S3 says in its own way.

    Attributes:
        scheme: of URLs.
        absent: headers that make a PUT, or completing an upload, fail where the object exists.
        google: checksums are in `x-goog-hash`, and the ETag of an object made of parts is no MD5.
        sends_hash: ours may go out there too.
    """

    scheme: str = "s3"
    absent: Mapping[str, str] = field(default_factory=lambda: {"If-None-Match": "*"})
    google: bool = False
    sends_hash: bool = False


S3_DIALECT = Dialect()


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectState:
    """What HEAD says about an object.

    Attributes:
        etag: without quotes.
        crc64nvme, crc32c: base64, as the store keeps them; empty where it keeps none.
        encrypted: with a key of the store's key service, or in another way that makes the ETag no MD5.
    """

    size: int
    etag: str
    version: str
    crc64nvme: str
    crc32c: str
    modified: str
    encrypted: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenUpload:
    """A multipart upload that is neither completed nor aborted.

    Attributes:
        initiated: seconds since 1970 by the store's clock.
    """

    upload_id: str
    initiated: float


def limits_at(endpoint: str) -> PartLimits:
    """What the store at an endpoint wants of parts, as far as its name tells."""
    host = urlsplit(endpoint).hostname or ""
    # Cloudflare R2: all parts but the last have the same length (R2 documentation, "Multipart objects").
    return PartLimits(equal=host.endswith(".r2.cloudflarestorage.com"))


class S3Client:
    """One bucket of an S3-compatible store. Every call is one request, never repeated here."""

    def __init__(
        self,
        http: HttpClient,
        signer: RequestSigner,
        *,
        bucket: str,
        base: str,
        endpoint: str,
        dialect: Dialect = S3_DIALECT,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Use `connect` instead.

        Args:
            base: URL of the bucket, without a slash at the end.
            endpoint: as the user gave it; empty for AWS itself.
            headers: of every request.
        """
        self.dialect = dialect
        self._headers = dict(headers or {})
        self.bucket = bucket
        self.signer = signer
        self.endpoint = endpoint
        self.skew_s = 0.0
        self._http = http
        self._base = base

    @classmethod
    async def connect(
        cls,
        bucket: str,
        *,
        endpoint: str = "",
        region: str = "",
        ca_file: Path | None = None,
        addressing: Addressing = "auto",
        connections: int = 8,
        timeouts: Timeouts | None = None,
        on_alive: Callable[[], None] = lambda: None,
        signer: RequestSigner | None = None,
        dialect: Dialect = S3_DIALECT,
        headers: Mapping[str, str] | None = None,
    ) -> S3Client:
        """Find credentials, endpoint and region. Sends nothing to the store.

        Args:
            signer: instead of the AWS chain's credentials.
            headers: of every request.
            endpoint: `https://host[:port]`; else AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, else AWS in `region`.
            connections: how many requests may be under way at once.
        Raises:
            PlanError: no credentials, or an endpoint that is not a URL.
            PlanError: the CA file can't be used.
        """
        around = await look_around()
        region = region or around.region or "us-east-1"
        given = endpoint or around.endpoint
        origin = given.rstrip("/") or _aws_endpoint(region)
        parts = urlsplit(origin)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.path:
            raise PlanError(
                f'"{given}" is not the URL of a store',
                operation="plan",
                hint="Write https://HOST or http://HOST:PORT, without bucket or path.",
            )
        signer = signer or await find_signer(region)
        if _is_virtual(addressing, parts.hostname, bucket, parts.scheme):
            origin = f"{parts.scheme}://{bucket}.{parts.netloc}"
            base = origin
        else:
            base = f"{origin}/{quote(bucket, safe='-_.~')}"
        trusted = ca_file or (Path(around.ca_file) if around.ca_file else None)
        http = HttpClient(origin, connections=connections + 2, ca_file=trusted, timeouts=timeouts, on_alive=on_alive)
        return cls(http, signer, bucket=bucket, base=base, endpoint=given, dialect=dialect, headers=headers)

    def uri(self, key: str) -> str:
        """Of an object."""
        return f"{self.dialect.scheme}://{self.bucket}/{key}"

    @property
    def limits(self) -> PartLimits:
        """What the store wants of parts, as far as its name tells."""
        return limits_at(self.endpoint)

    def command(self, verb: str, key: str, *more: str) -> str:
        """An `aws s3api` command line about an object."""
        words = ["aws", "s3api", verb, "--bucket", self.bucket, *(("--key", key) if key else ()), *more]
        if self.endpoint:
            words += ["--endpoint-url", self.endpoint]
        return shlex.join(words)

    async def close(self) -> None:
        """Close every connection; idempotent."""
        await self._http.close()

    async def send(
        self,
        operation: str,
        method: str,
        key: str = "",
        *,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: SendBody | bytes | None = None,
        reply_max: int = 1 << 20,
    ) -> Reply:
        """Sign and send one request.

        Args:
            key: of the object; empty for the bucket.
            body: bytes are part of the signature, a SendBody is not.
        Raises:
            S3Error: any reply that is not 2xx.
            StoreError: no reply, or one that is no S3 reply.
        """
        url = self._base + ("/" + quote(key, safe="/-_.~") if key else "/")
        if query:
            url += "?" + "&".join(f"{quote(k, safe='-_.~')}={quote(v, safe='-_.~')}" for k, v in sorted(query.items()))
        plain = body if isinstance(body, bytes) else b"" if body is None else None
        signed = await self.signer.sign(method, url, {**self._headers, **(headers or {})}, plain)
        sent = BytesBody(body) if isinstance(body, bytes) else body
        reply = await self._http.request(method, url, signed, sent, operation=operation, reply_max=reply_max)
        self._note_time(reply)
        if not 200 <= reply.status < 300:
            try:
                self._refuse(reply, operation, key)
            except S3Error as error:
                # HEAD is answered without a code.
                has_ended = error.code in _ENDED_CODES or (not error.code and error.status in (400, 403))
                if has_ended and await self.signer.renew(signed):
                    error.temporary, error.retry_after_s = True, 0.0
                raise
        return reply

    def _note_time(self, reply: Reply) -> None:
        told = _date_s(reply.header("date"))
        if told is not None:
            self.skew_s = told - time.time()

    def _refuse(self, reply: Reply, operation: str, key: str) -> NoReturn:
        root = _parse(reply.body, operation, strict=False)
        self.raise_error(root, reply, operation, key)

    def raise_error(self, root: ElementTree.Element | None, reply: Reply, operation: str, key: str) -> NoReturn:
        """Raise what an `<Error>` document means."""
        code = _text(root, "Code") if root is not None else ""
        message = _text(root, "Message") if root is not None else ""
        region = reply.header("x-amz-bucket-region") or (_text(root, "Region") if root is not None else "")
        # An error that comes with 200 (Complete, after the status line was sent) is judged by its code alone.
        status = reply.status
        temporary = code in _TEMPORARY_CODES or (status in _TEMPORARY_STATUS and code != "NotImplemented")
        raise S3Error(
            ": ".join(text for text in (code or f"HTTP {status}", " ".join(message.split())[:300]) if text),
            code=code,
            temporary=temporary,
            status=status,
            throttled=code in _THROTTLED_CODES or status in (429, 503),
            retry_after_s=_retry_after_s(reply.header("retry-after")) if temporary else None,
            operation=operation,
            hint=self._hint(code, status, region),
            bucket=self.bucket,
            key=key or None,
            http=status,
            request_id=reply.header("x-amz-request-id") or None,
        )

    def _hint(self, code: str, status: int, region: str) -> str:
        who = f"The credentials are from {self.signer.source}."
        if code in _ENDED_CODES:
            return f"{who} They have ended: get new ones, then go on with --resume where it is offered."
        if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch"):
            return f"{who} Check key, secret, and that they belong to this store."
        if code == "RequestTimeTooSkewed":
            return f"The clock of this machine is {abs(self.skew_s):.0f} s away from the store's: set it."
        if code == "NoSuchBucket":
            return f'Create the bucket "{self.bucket}", or correct "url".'
        if status in (301, 307) or code in (
            "AuthorizationHeaderMalformed",
            "PermanentRedirect",
            "IllegalLocationConstraint",
        ):
            wanted = f'Set region = "{region}".' if region and region != self.signer.region else 'Check "region".'
            return f'{wanted} The request was made for "{self.signer.region}" at {self._http.origin}.'
        if status == 507 or "quota" in code.lower() or "StorageFull" in code:
            return "The store is full, or a quota is used up. Free space there, compress, or choose another bucket."
        if status in (401, 403):
            return f"{who} They need to list the bucket, and to read, put and delete this object."
        if code in ("BadDigest", "InvalidDigest", "XAmzContentChecksumMismatch"):
            return (
                "What arrived is not what was sent: suspect memory or network of this machine, or a proxy in between."
            )
        return ""

    async def head(self, key: str, version: str = "") -> ObjectState | None:
        """The state of an object; None where there is no such key (or no such bucket)."""
        query = {"versionId": version} if version else None
        try:
            mode = {} if self.dialect.google else {"x-amz-checksum-mode": "ENABLED"}
            reply = await self.send("head", "HEAD", key, query=query, headers=mode)
        except S3Error as error:
            if error.status == 404:
                return None
            raise
        return ObjectState(
            size=int(reply.header("content-length") or 0),
            etag=reply.header("etag").strip('"'),
            version="" if self.dialect.google else reply.header("x-amz-version-id").replace("null", ""),
            crc64nvme=reply.header("x-amz-checksum-crc64nvme"),
            crc32c=reply.header("x-amz-checksum-crc32c") or google_hash(reply, "crc32c"),
            modified=reply.header("last-modified"),
            encrypted=self.dialect.google or reply.header("x-amz-server-side-encryption") not in ("", "AES256"),
        )

    async def look(self) -> None:
        """See that the bucket is there and the credentials may list it. Raises S3Error with the real reason."""
        await self.send("list", "GET", query={"list-type": "2", "max-keys": "1"})

    async def put(
        self, key: str, body: SendBody | bytes, headers: Mapping[str, str], operation: str = "put_whole"
    ) -> Reply:
        """PutObject."""
        return await self.send(operation, "PUT", key, headers=headers, body=body)

    async def put_text(self, key: str, data: bytes, headers: Mapping[str, str]) -> None:
        """PutObject of a small document, with its MD5."""
        await self.send("put_manifest", "PUT", key, headers={**headers, "Content-MD5": md5_text(data)}, body=data)

    async def delete(self, key: str, *, version: str = "", etag: str = "") -> None:
        """DeleteObject; only that version, or only while it has that ETag (where the store knows If-Match)."""
        query = {"versionId": version} if version else None
        headers = {"If-Match": f'"{etag}"'} if etag and not version else {}
        try:
            await self.send("delete", "DELETE", key, query=query, headers=headers)
        except S3Error as error:
            if error.status == 404:
                return
            unknown = error.status == 501 or error.code in ("NotImplemented", "InvalidRequest", "InvalidArgument")
            if not headers or not (unknown or error.status == 412):
                raise
            # Some stores compare If-Match with another tag than they tell (Swift: that of the list of segments).
            now = await self.head(key)
            if now is not None and now.etag == etag:
                await self.delete(key)

    async def create_upload(self, key: str, headers: Mapping[str, str]) -> tuple[str, Reply]:
        """CreateMultipartUpload: the upload's id, and the reply."""
        reply = await self.send("open", "POST", key, query={"uploads": ""}, headers=headers)
        upload_id = _text(_parsed(reply, "open"), "UploadId")
        if not upload_id:
            raise StoreError("the store named no upload id", operation="open", key=key)
        return upload_id, reply

    async def put_part(
        self, key: str, upload_id: str, number: int, body: SendBody, headers: Mapping[str, str]
    ) -> Reply:
        """UploadPart."""
        query = {"partNumber": str(number), "uploadId": upload_id}
        return await self.send("put_part", "PUT", key, query=query, headers=headers, body=body)

    async def complete_upload(
        self, key: str, upload_id: str, parts: Sequence[Mapping[str, str]], headers: Mapping[str, str]
    ) -> Reply:
        """CompleteMultipartUpload, with the fields of each `<Part>`; an error inside a 200 reply is raised too."""
        root = ElementTree.Element("CompleteMultipartUpload", xmlns="http://s3.amazonaws.com/doc/2006-03-01/")
        for part in parts:
            element = ElementTree.SubElement(root, "Part")
            for name, value in part.items():
                ElementTree.SubElement(element, name).text = value
        body = ElementTree.tostring(root)
        query = {"uploadId": upload_id}
        reply = await self.send(
            "seal", "POST", key, query=query, headers={**headers, "Content-Type": "application/xml"}, body=body
        )
        parsed = _parsed(reply, "seal")
        if _name(parsed) == "Error":
            self.raise_error(parsed, reply, "seal", key)
        return reply

    async def abort_upload(self, key: str, upload_id: str) -> None:
        """AbortMultipartUpload; an upload that is gone is fine."""
        try:
            await self.send("abort", "DELETE", key, query={"uploadId": upload_id})
        except S3Error as error:
            if error.status != 404:
                raise

    async def parts_of(self, key: str, upload_id: str) -> int | None:
        """How many parts an upload has (1 for several), None where there is no such upload."""
        try:
            reply = await self.send("list_parts", "GET", key, query={"uploadId": upload_id, "max-parts": "1"})
        except S3Error as error:
            if error.status == 404:
                return None
            raise
        return sum(1 for element in _parsed(reply, "list_parts") if _name(element) == "Part")

    async def list_parts(self, key: str, upload_id: str) -> dict[int, tuple[int, str]] | None:
        """(length, ETag without quotes) of every part by number, None where there is no such upload."""
        found: dict[int, tuple[int, str]] = {}
        marker = ""
        while True:
            query = {"uploadId": upload_id, "max-parts": "1000", **({"part-number-marker": marker} if marker else {})}
            try:
                reply = await self.send("list_parts", "GET", key, query=query, reply_max=4 << 20)
            except S3Error as error:
                if error.status == 404:
                    return None
                raise
            root = _parsed(reply, "list_parts")
            for element in root:
                if _name(element) == "Part":
                    size, etag = int(_text(element, "Size") or 0), _text(element, "ETag").strip('"')
                    found[int(_text(element, "PartNumber"))] = (size, etag)
            following = _text(root, "NextPartNumberMarker")
            if _text(root, "IsTruncated") != "true" or not following or following == marker:
                return found
            marker = following

    async def open_uploads(self, key: str) -> list[OpenUpload]:
        """The open uploads of exactly this key, the first thousand."""
        reply = await self.send("list_uploads", "GET", query={"uploads": "", "prefix": key, "max-uploads": "1000"})
        return [
            OpenUpload(upload_id=_text(element, "UploadId"), initiated=_iso_s(_text(element, "Initiated")))
            for element in _parsed(reply, "list_uploads")
            if _name(element) == "Upload" and _text(element, "Key") == key
        ]

    async def uploads_below(self, prefix: str) -> list[tuple[str, OpenUpload]]:
        """Every open upload whose key begins so: (key, upload), over as many requests as it takes."""
        found: list[tuple[str, OpenUpload]] = []
        query = {"uploads": "", "prefix": prefix, "max-uploads": "1000"}
        while True:
            root = _parsed(await self.send("list_uploads", "GET", query=query), "list_uploads")
            for element in root:
                if _name(element) == "Upload":
                    upload = OpenUpload(
                        upload_id=_text(element, "UploadId"), initiated=_iso_s(_text(element, "Initiated"))
                    )
                    found.append((_text(element, "Key"), upload))
            markers = {
                "key-marker": _text(root, "NextKeyMarker"),
                "upload-id-marker": _text(root, "NextUploadIdMarker"),
            }
            if _text(root, "IsTruncated") != "true" or not markers["key-marker"] or markers.items() <= query.items():
                return found
            query |= markers

    async def parts_held(self, key: str, upload_id: str) -> tuple[int, int]:
        """How many parts an open upload has, and their bytes; none where it is gone."""
        count = size = 0
        query = {"uploadId": upload_id}
        while True:
            try:
                root = _parsed(await self.send("list_parts", "GET", key, query=query), "list_parts")
            except S3Error as error:
                if error.status == 404:
                    return 0, 0
                raise
            for element in root:
                if _name(element) == "Part":
                    count += 1
                    size += int(_text(element, "Size") or 0)
            marker = _text(root, "NextPartNumberMarker")
            if _text(root, "IsTruncated") != "true" or query.get("part-number-marker") == marker:
                return count, size
            query["part-number-marker"] = marker

    async def get_range(self, key: str, offset: int, length: int, *, etag: str, version: str) -> bytes:
        """GetObject of some bytes of one state of an object. Raises FormatError where it ends before them."""
        query = {"versionId": version} if version else None
        headers = {"Range": f"bytes={offset}-{offset + length - 1}", "If-Match": f'"{etag}"'}
        try:
            reply = await self.send("read", "GET", key, query=query, headers=headers, reply_max=max(length, 1 << 20))
        except S3Error as error:
            if error.status == 412:
                raise StoreError(
                    "the object was replaced while it was read", operation="read", bucket=self.bucket, key=key
                ) from None
            if error.status == 416:
                raise FormatError("the object ends before this range", operation="read", offset=offset) from None
            raise
        if len(reply.body) != length:
            raise StoreError(
                "the store gave fewer bytes than were asked for",
                temporary=True,
                operation="read",
                key=key,
                offset=offset,
                expected=length,
                got=len(reply.body),
            )
        if reply.status != 206 and (offset or reply.header("content-range")):
            raise StoreError("the store does not know ranges", operation="read", key=key, http=reply.status)
        return reply.body


class S3RangeReader:
    """Random reads of one state of an object: pinned to the ETag, and version, seen when it was opened."""

    def __init__(self, client: S3Client, key: str, state: ObjectState, retry: Retry) -> None:
        self._client = client
        self._key = key
        self._state = state
        self._retry = retry

    @property
    def size(self) -> int:
        """Length of the object in bytes."""
        return self._state.size

    @property
    def attested(self) -> Mapping[str, str]:
        """The store's checksums of the whole object, by the names that receipts use; empty where it has none."""
        state = self._state
        return {
            "CRC64NVME": state.crc64nvme,
            "CRC32C": state.crc32c,
            "ETag (MD5)": "" if state.encrypted else state.etag.lower(),
        }

    async def read(self, offset: int, length: int) -> bytes:
        """Exactly these bytes. Raises StoreError, or FormatError for a range beyond the end."""
        return await read_ranged(self._read, offset, length, size=self.size, range_max=_RANGE_MAX)

    async def _read(self, offset: int, length: int) -> bytes:
        state = self._state
        return await self._retry.call(
            "read",
            lambda: self._client.get_range(self._key, offset, length, etag=state.etag, version=state.version),
        )


@asynccontextmanager
async def open_reader(
    url: str,
    *,
    endpoint: str = "",
    region: str = "",
    ca_file: Path | None = None,
    addressing: Addressing = "auto",
    timeouts: Timeouts | None = None,
    signer: RequestSigner | None = None,
    dialect: Dialect = S3_DIALECT,
) -> AsyncIterator[S3RangeReader]:
    """Open a stored object for random reads.

    Args:
        url: `s3://bucket/key`.
        endpoint, region, ca_file, addressing: as for `S3Client.connect`.
    Raises:
        PlanError: no credentials, or not such a URL.
        StoreError: there is no such object, or the store does not let us see it.
    """
    where = S3Url.parse(url, dialect.scheme)
    retry = Retry(RetryPolicy(), clock=RealClock(), emit=lambda event: None, stage="read")
    client = await S3Client.connect(
        where.bucket,
        endpoint=endpoint,
        region=region,
        ca_file=ca_file,
        addressing=addressing,
        timeouts=timeouts,
        on_alive=retry.alive,
        signer=signer,
        dialect=dialect,
    )
    try:
        state = await retry.call("head", lambda: head_or_reason(client, where.key))
        if state is None:
            raise StoreError(
                "there is no such object", operation="read", bucket=where.bucket, key=where.key, status=404
            )
        yield S3RangeReader(client, where.key, state, retry)
    finally:
        await client.close()


async def head_or_reason(client: S3Client, key: str) -> ObjectState | None:
    """HEAD, and where that fails the reason in the store's words: replies to HEAD have none."""
    try:
        found = await client.head(key)
    except S3Error as error:
        if error.temporary:
            raise
        await client.look()
        raise
    if found is None:
        await client.look()
    return found


def google_hash(reply: Reply, name: str) -> str:
    """A value of `x-goog-hash: crc32c=...,md5=...`, base64; empty where it is missing."""
    pairs = (pair.strip().partition("=") for pair in reply.header("x-goog-hash").split(","))
    return next((value for key, _, value in pairs if key == name), "")


def md5_text(data: Buffer) -> str:
    """The Content-MD5 header of some bytes."""
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def md5_hex(data: Buffer) -> str:
    """The ETag of an object with these bytes, put in one request and not encrypted with a key of its own."""
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def _aws_endpoint(region: str) -> str:
    domain = "amazonaws.com.cn" if region.startswith("cn-") else "amazonaws.com"
    return f"https://s3.{region}.{domain}"


def _is_virtual(addressing: Addressing, host: str, bucket: str, scheme: str) -> bool:
    """Whether the bucket goes into the host name. A dot in it would not match a wildcard certificate."""
    if addressing != "auto":
        return addressing == "virtual"
    try:
        ipaddress.ip_address(host)
    except ValueError:
        named = "." in host and not host.endswith(".localhost")
        fits = re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", bucket) is not None
        return named and fits and not ("." in bucket and scheme == "https")
    return False


def _parse(body: bytes, operation: str, *, strict: bool) -> ElementTree.Element | None:
    # No S3 reply has a document type; one that has could make the parser grow without bound.
    if b"<!DOCTYPE" in body or b"<!ENTITY" in body:
        raise StoreError("the reply is not an S3 reply: it has a document type", operation=operation)
    try:
        return ElementTree.fromstring(body)
    except ElementTree.ParseError:
        if strict:
            raise StoreError("the reply is not an S3 reply", operation=operation, reply=repr(body[:80])) from None
        return None


def _parsed(reply: Reply, operation: str) -> ElementTree.Element:
    root = _parse(reply.body.lstrip(), operation, strict=True)
    assert root is not None
    return root


def _name(element: ElementTree.Element) -> str:
    return _XML_SPACE.sub("", element.tag)


def _text(root: ElementTree.Element, name: str) -> str:
    return next((element.text or "" for element in root.iter() if _name(element) == name), "")


def reply_text(reply: Reply, name: str) -> str:
    """A field of a reply's XML; empty where it is missing."""
    root = _parse(reply.body.lstrip(), "reply", strict=False)
    return _text(root, name) if root is not None else ""


def _retry_after_s(text: str) -> float | None:
    """Source: RFC 9110, section 10.2.3: seconds, or a date."""
    if text.isdigit():
        return float(text)
    told = _date_s(text)
    return max(0.0, told - time.time()) if told is not None else None


def _date_s(text: str) -> float | None:
    try:
        return email.utils.parsedate_to_datetime(text).timestamp() if text else None
    except (TypeError, ValueError):
        return None


def _iso_s(text: str) -> float:
    try:
        return datetime.datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
    except ValueError:
        return 0.0
