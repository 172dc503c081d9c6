"""A client of Google Cloud Storage: its JSON interface, and how its XML interface differs from S3.

Source: Google Cloud Storage, "JSON API reference" (Objects, resumable uploads), "XML API multipart uploads",
"x-goog-hash", "Performing resumable uploads" (308, Range, chunks in units of 256 KiB).
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

from pipeline.errors import StoreError
from pipeline.flow.items import RangeReader
from pipeline.flow.retry import Retry, RetryPolicy
from pipeline.flow.stage import RealClock
from pipeline.units import KiB, MiB
from stages.store.gcs_access import BearerSigner, GcsAccess, find_access
from stages.store.http import BytesBody, HttpClient, Reply, SendBody, Timeouts
from stages.store.ranged import read_ranged
from stages.store.s3 import Dialect, S3Client, S3Url
from stages.store.s3 import open_reader as open_s3_reader
from stages.store.s3_signing import RequestSigner, key_signer

# With a generation of 0 as the condition, an object that exists is not replaced. A request that AWS's rules sign has
# x-amz-* headers, and x-goog-* ones do not belong beside them: with an HMAC key the target is only looked for first.
BEARER_DIALECT = Dialect(scheme="gs", absent={"x-goog-if-generation-match": "0"}, google=True, sends_hash=True)
HMAC_DIALECT = Dialect(scheme="gs", absent={}, google=True)
# A resumable upload's chunks are multiples of this, but for the last.
CHUNK_UNIT = 256 * KiB
_RANGE_MAX = 16 * MiB
_TEMPORARY = frozenset({408, 429, 500, 502, 503, 504})
_PERSISTED = re.compile(r"bytes=0-(\d+)")


def signer_of(access: GcsAccess, ca_file: Path | None = None) -> RequestSigner:
    """For the XML interface: HMAC signatures, or a service account's token."""
    if access.hmac is not None:
        return key_signer(*access.hmac, region="auto", source=access.source)
    return BearerSigner(access, ca_file)


async def connect_parts(bucket: str, endpoint: str, on_alive: Callable[[], None]) -> S3Client:
    """The XML interface of a bucket, with the credentials of the environment. Raises PlanError without any."""
    access = find_access(endpoint=endpoint)
    return await S3Client.connect(
        bucket,
        endpoint=access.endpoint,
        addressing="path",
        signer=signer_of(access),
        dialect=dialect_of(access),
        on_alive=on_alive,
    )


def dialect_of(access: GcsAccess) -> Dialect:
    """Of the XML interface, for these credentials."""
    return HMAC_DIALECT if access.hmac is not None else BEARER_DIALECT


@dataclass(frozen=True, slots=True, kw_only=True)
class GcsState:
    """An object's metadata.

    Attributes:
        crc32c, md5: base64; empty where there is none.
    """

    size: int
    generation: str
    crc32c: str
    md5: str

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> GcsState:
        """From an Objects resource."""
        return cls(
            size=int(told.get("size", 0)),
            generation=str(told.get("generation", "")),
            crc32c=str(told.get("crc32c", "")),
            md5=str(told.get("md5Hash", "")),
        )


class GcsClient:
    """One bucket by the JSON interface. Every call is one request, never repeated here."""

    def __init__(
        self,
        bucket: str,
        access: GcsAccess,
        *,
        ca_file: Path | None = None,
        timeouts: Timeouts | None = None,
        on_alive: Callable[[], None] = lambda: None,
    ) -> None:
        """Prepare connections; sends nothing. Raises PlanError where the CA file can't be used."""
        self.bucket = bucket
        self.access = access
        self._signer = BearerSigner(access, ca_file)
        self._http = HttpClient(access.endpoint, connections=6, ca_file=ca_file, timeouts=timeouts, on_alive=on_alive)

    def uri(self, name: str) -> str:
        """Of an object."""
        return f"gs://{self.bucket}/{name}"

    async def close(self) -> None:
        """Close every connection; idempotent."""
        await self._http.close()

    async def send(
        self,
        operation: str,
        method: str,
        target: str,
        headers: Mapping[str, str] | None = None,
        body: SendBody | bytes | None = None,
        *,
        also: tuple[int, ...] = (),
        reply_max: int = MiB,
    ) -> Reply:
        """Send one request with our token.

        Args:
            target: path and query, or a whole URL of this store.
            also: statuses that are no error besides 2xx.
        Raises:
            StoreError: any other reply, or none.
        """
        url = urljoin(self.access.endpoint, target)
        if urlsplit(url)[:2] != urlsplit(self.access.endpoint)[:2]:
            raise StoreError("the store sends us to another host", operation=operation, host=urlsplit(url).hostname)
        sent = BytesBody(body) if isinstance(body, bytes) else body
        signed = await self._signer.sign(method, url, headers or {}, None)
        reply = await self._http.request(method, url, signed, sent, operation=operation, reply_max=reply_max)
        if not 200 <= reply.status < 300 and reply.status not in also:
            raise self._refused(reply, operation)
        return reply

    def _refused(self, reply: Reply, operation: str) -> StoreError:
        status, wait = reply.status, reply.header("retry-after")
        hints = {
            401: f"Used was: {self.access.source}.",
            403: f"Used was: {self.access.source}. It has to create, read and delete objects of this bucket.",
            404: f'Create the bucket "{self.bucket}", or correct "url".',
            412: "An object of that name appeared meanwhile; it was left alone.",
        }
        return StoreError(
            f"the store answered {status}" + (f": {reason}" if (reason := _reason(reply)) else ""),
            status=status,
            temporary=status in _TEMPORARY,
            throttled=status in (429, 503),
            retry_after_s=float(wait) if wait.isdigit() else None,
            operation=operation,
            hint=hints.get(status, ""),
            bucket=self.bucket,
        )

    def _object(self, name: str) -> str:
        return f"/storage/v1/b/{quote(self.bucket, safe='')}/o/{quote(name, safe='')}"

    async def state(self, name: str) -> GcsState | None:
        """The state of an object; None where there is none (or no bucket: see `look`)."""
        reply = await self.send("head", "GET", self._object(name), also=(404,))
        return None if reply.status == 404 else GcsState.of(_json(reply, "head"))

    async def look(self) -> None:
        """See that the bucket is there and may be listed. Raises StoreError."""
        await self.send("list", "GET", f"/storage/v1/b/{quote(self.bucket, safe='')}/o?maxResults=1")

    async def put(self, name: str, data: bytes, *, replace: bool) -> GcsState:
        """A small object, by a session of one chunk."""
        session = await self.open_session(name, replace=replace)
        span = f"bytes 0-{len(data) - 1}/{len(data)}"
        _, state = await self.send_chunk(session, BytesBody(data), span, "put_manifest")
        if state is None:
            raise StoreError("the store did not take all of it", temporary=True, operation="put_manifest")
        return state

    async def delete(self, name: str, generation: str) -> None:
        """Delete one state of an object; one that is gone is fine."""
        condition = f"?ifGenerationMatch={generation}" if generation else ""
        await self.send("delete", "DELETE", self._object(name) + condition, also=(404,))

    async def get_range(self, name: str, offset: int, length: int, generation: str) -> bytes:
        """Some bytes of one state of an object. Raises StoreError."""
        headers = {"Range": f"bytes={offset}-{offset + length - 1}"}
        target = f"{self._object(name)}?alt=media" + (f"&generation={generation}" if generation else "")
        reply = await self.send("read", "GET", target, headers, reply_max=max(length, MiB))
        if len(reply.body) != length:
            raise StoreError(
                "the store gave other bytes than were asked for",
                temporary=True,
                operation="read",
                uri=self.uri(name),
                offset=offset,
                expected=length,
                got=len(reply.body),
            )
        return reply.body

    # -- resumable uploads -------------------------------------------------------------------------------------------

    async def open_session(self, name: str, *, replace: bool) -> str:
        """Begin an upload; its URL below the endpoint, which is as good as a password for a week."""
        query = f"uploadType=resumable&name={quote(name, safe='')}" + ("" if replace else "&ifGenerationMatch=0")
        headers = {"Content-Type": "application/json", "X-Upload-Content-Type": "application/octet-stream"}
        target = f"/upload/storage/v1/b/{quote(self.bucket, safe='')}/o?{query}"
        reply = await self.send("open", "POST", target, headers, b"{}")
        if not reply.header("location"):
            raise StoreError("the store named no upload session", operation="open")
        # Without the origin, which is the endpoint's: a later process may reach the store by another way.
        found = urlsplit(urljoin(self.access.endpoint, reply.header("location")))
        if found[:2] != urlsplit(self.access.endpoint)[:2]:
            raise StoreError("the store sends us to another host", operation="open", host=found.hostname)
        return f"{found.path}?{found.query}"

    async def send_chunk(
        self, session: str, body: SendBody | None, span: str, operation: str
    ) -> tuple[int, GcsState | None]:
        """Send some bytes, or ask with `body` None.

        Args:
            span: Content-Range: `bytes 0-262143/*`, `bytes */*`, `bytes */1000`.
        Returns:
            how many bytes the store has, and the object once it is complete.
        """
        reply = await self.send(operation, "PUT", session, {"Content-Range": span}, body or b"", also=(308,))
        if reply.status == 308:
            found = _PERSISTED.fullmatch(reply.header("range"))
            reached = int(found[1]) + 1 if found else 0
            # "bytes=0-0" is how an emulator says that it has nothing; GCS has whole units, or no Range at all.
            return (reached if reached > 1 else 0), None
        state = GcsState.of(_json(reply, operation))
        return state.size, state

    async def cancel_session(self, session: str) -> None:
        """End an upload and drop what was sent; 499 is how the store says that it did."""
        await self.send("abort", "DELETE", session, also=(404, 410, 499, 501))


class GcsReader:
    """Random reads of one generation of an object."""

    def __init__(self, client: GcsClient, name: str, state: GcsState, retry: Retry) -> None:
        self._client = client
        self._name = name
        self._state = state
        self._retry = retry

    @property
    def size(self) -> int:
        """Length of the object in bytes."""
        return self._state.size

    @property
    def state(self) -> GcsState:
        """What the object was when it was opened."""
        return self._state

    @property
    def attested(self) -> Mapping[str, str]:
        """The store's checksum of the whole object, by the name that receipts use."""
        return {"CRC32C": self._state.crc32c}

    async def read(self, offset: int, length: int) -> bytes:
        """Exactly these bytes. Raises StoreError, or FormatError for a range beyond the end."""
        return await read_ranged(self._read, offset, length, size=self.size, range_max=_RANGE_MAX)

    async def _read(self, offset: int, length: int) -> bytes:
        return await self._retry.call(
            "read", lambda: self._client.get_range(self._name, offset, length, self._state.generation)
        )


async def read_state(client: GcsClient, name: str, retry: Retry) -> GcsReader:
    """Open an object as it is now. Raises StoreError where there is none."""
    state = await retry.call("head", lambda: client.state(name))
    if state is None:
        raise StoreError("there is no such object", operation="read", status=404, uri=client.uri(name))
    return GcsReader(client, name, state, retry)


@asynccontextmanager
async def open_reader(url: str, *, endpoint: str = "", ca_file: Path | None = None) -> AsyncIterator[RangeReader]:
    """Open `gs://bucket/name` for random reads, with the credentials of the environment.

    Raises:
        PlanError: no credentials, or not such a URL. StoreError: there is no such object, or we may not see it.
    """
    where, access = S3Url.parse(url, "gs"), find_access(endpoint=endpoint)
    if access.hmac is not None:
        async with open_s3_reader(
            url,
            endpoint=access.endpoint,
            ca_file=ca_file,
            addressing="path",
            signer=signer_of(access, ca_file),
            dialect=dialect_of(access),
        ) as reader:
            yield reader
        return
    retry = Retry(RetryPolicy(), clock=RealClock(), emit=lambda event: None, stage="read")
    client = GcsClient(where.bucket, access, ca_file=ca_file, on_alive=retry.alive)
    try:
        yield await read_state(client, where.key, retry)
    finally:
        await client.close()


def _json(reply: Reply, operation: str) -> Mapping[str, Any]:
    try:
        told = json.loads(reply.body)
    except ValueError:
        told = None
    if not isinstance(told, dict):
        raise StoreError("the reply is not GCS's", operation=operation, reply=repr(reply.body[:80]))
    return told


def _reason(reply: Reply) -> str:
    try:
        return " ".join(str(json.loads(reply.body)["error"]["message"]).split())[:300]
    except (ValueError, KeyError, TypeError):
        return ""
