"""A client of Azure Blob Storage: one container, the few requests that images need, and what each error means.

Source: Azure Storage REST API, Blob service; every request and reply field is named as there.
"""

from __future__ import annotations

import base64
import hashlib
import re
import shlex
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, urlsplit
from xml.etree import ElementTree

from pipeline.errors import PlanError, StoreError
from pipeline.flow.orders import PartLimits
from pipeline.flow.retry import Retry, RetryPolicy
from pipeline.flow.stage import RealClock
from pipeline.units import MiB
from stages.store.azure_access import AzureAccess, find_access
from stages.store.http import BytesBody, HttpClient, Reply, SendBody, Timeouts
from stages.store.ranged import read_ranged
from stages.store.webdav import date_s

# Source: "Scalability and performance targets for Blob storage"; block sizes of API version 2019-12-12 and later.
BLOCK_LIMITS = PartLimits(part_min=1, part_max=4000 * MiB, parts_max=50_000, object_max=50_000 * 4000 * MiB)
# Source: "Put Page".
PAGE, PAGES_MAX = 512, 4 * MiB
# The metadata by which a blob is known as ours.
TOKEN = "pipelineupload"
STATE = "pipelinestate"
# One read. Larger ones gain nothing and cost more when they have to be sent again.
_RANGE_MAX = 16 * MiB
_LISTING_MAX = 32 * MiB
_TEMPORARY = frozenset({408, 429, 500, 502, 503, 504})
# Source: "Naming and referencing containers, blobs, and metadata".
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9]|-(?=[a-z0-9])){2,62}|\$root|\$web")


class AzureError(StoreError):
    """An error reply. `code` is its x-ms-error-code."""

    def __init__(self, message: str, *, code: str, status: int, **more: object) -> None:
        super().__init__(message, status=status, **more)  # type: ignore[arg-type]  # passed through
        self.code = code


@dataclass(frozen=True, slots=True, kw_only=True)
class AzureUrl:
    """`az://container/name`."""

    container: str
    name: str

    @classmethod
    def parse(cls, url: str) -> AzureUrl:
        """Take a URL apart. Raises PlanError."""
        scheme, _, rest = url.partition("://")
        container, _, name = rest.partition("/")
        if scheme != "az" or not container or not name or name.endswith("/"):
            raise PlanError(
                f'"{url}" does not name a blob',
                operation="plan",
                hint="Write az://CONTAINER/NAME, with the image's name; the account is told by the credentials.",
            )
        if not _NAME.fullmatch(container):
            raise PlanError(
                f'"{container}" is not the name of a container',
                operation="plan",
                url=url,
                hint="Container names have 3 to 63 lower-case letters, digits and single hyphens between them.",
            )
        return cls(container=container, name=name)

    def __str__(self) -> str:
        return f"az://{self.container}/{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobState:
    """What Get Blob Properties says.

    Attributes:
        kind: BlockBlob, PageBlob or AppendBlob.
        md5: of the whole blob, as hex, where it was stored with one.
        metadata: names in lower case.
        modified: seconds since 1970.
    """

    size: int
    etag: str
    kind: str
    md5: str
    modified: float
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedBlob:
    """One blob of a listing; `etag` is empty where it has nothing but blocks that were not committed."""

    name: str
    size: int
    etag: str
    modified: float
    metadata: Mapping[str, str]


class AzureClient:
    """One container. Every call is one request, never repeated here."""

    def __init__(self, http: HttpClient, access: AzureAccess, container: str) -> None:
        """Use `connect` instead."""
        self.container = container
        self.access = access
        self._http = http
        self._base = f"{access.endpoint}/{quote(container, safe='$')}"

    @classmethod
    def connect(
        cls,
        container: str,
        access: AzureAccess,
        *,
        ca_file: Path | None = None,
        connections: int = 8,
        timeouts: Timeouts | None = None,
        on_alive: Callable[[], None] = lambda: None,
    ) -> AzureClient:
        """Prepare connections; sends nothing. Raises PlanError where the CA file can't be used."""
        parts = urlsplit(access.endpoint)
        http = HttpClient(
            f"{parts.scheme}://{parts.netloc}",
            connections=connections + 2,
            ca_file=ca_file,
            timeouts=timeouts,
            on_alive=on_alive,
        )
        return cls(http, access, container)

    def uri(self, name: str) -> str:
        """Of a blob."""
        return f"az://{self.container}/{name}"

    def command(self, verb: str, name: str) -> str:
        """An `az storage blob` command line; credentials come from the environment there too."""
        words = ["az", "storage", "blob", verb, "--container-name", self.container, "--name", name]
        return shlex.join([*words, "--blob-endpoint", self.access.endpoint])

    async def close(self) -> None:
        """Close every connection; idempotent."""
        await self._http.close()

    async def send(
        self,
        operation: str,
        method: str,
        name: str = "",
        *,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: SendBody | bytes | None = None,
        reply_max: int = MiB,
    ) -> Reply:
        """Sign and send one request.

        Args:
            name: of the blob; empty for the container.
        Raises:
            AzureError: any reply that is not 2xx. StoreError: none.
        """
        url = self._base + (f"/{quote(name, safe='/-_.~')}" if name else "")
        if query:
            url += "?" + "&".join(f"{key}={quote(value, safe='-_.~')}" for key, value in query.items())
        if body is None and method == "PUT":
            body = b""
        sent = BytesBody(body) if isinstance(body, bytes) else body
        given = {**(headers or {}), **({"Content-Length": str(sent.length)} if sent is not None else {})}
        signed_url, signed = self.access.sign(method, url, given)
        reply = await self._http.request(method, signed_url, signed, sent, operation=operation, reply_max=reply_max)
        if not 200 <= reply.status < 300:
            raise self._refused(reply, operation, name)
        return reply

    def _refused(self, reply: Reply, operation: str, name: str) -> AzureError:
        status, code = reply.status, reply.header("x-ms-error-code")
        root = _parsed(reply, operation, strict=False)
        message = (root.findtext("Message") or "").split("\n")[0][:300] if root is not None else ""
        code = code or (root.findtext("Code") or "" if root is not None else "")
        wait = reply.header("retry-after")
        return AzureError(
            ": ".join(text for text in (code or f"HTTP {status}", message) if text),
            code=code,
            status=status,
            temporary=status in _TEMPORARY,
            throttled=status in (429, 503) or code == "ServerBusy",
            retry_after_s=float(wait) if wait.isdigit() else None,
            operation=operation,
            hint=self._hint(code, status),
            container=self.container,
            name=name or None,
            http=status,
            request_id=reply.header("x-ms-request-id") or None,
        )

    def _hint(self, code: str, status: int) -> str:
        if code == "ContainerNotFound":
            return f"Create it: az storage container create --name {self.container}, or correct the URL."
        if code in ("Md5Mismatch", "Crc64Mismatch"):
            return "What arrived is not what was sent: suspect memory or network of this machine, or a proxy."
        if code == "InvalidBlobOrBlock":
            return "Another tool left uncommitted blocks under this name: remove them, or choose another name."
        if status in (401, 403):
            return f"Used was the {self.access.source}. It has to read, create, write and delete; clocks count too."
        return ""

    # -- blobs -------------------------------------------------------------------------------------------------------

    async def head(self, name: str) -> BlobState | None:
        """The state of a blob, None where there is none. A missing container is an AzureError."""
        try:
            reply = await self.send("head", "HEAD", name)
        except AzureError as error:
            if error.status == 404 and error.code != "ContainerNotFound":
                return None
            raise
        md5 = reply.header("content-md5")
        return BlobState(
            size=int(reply.header("content-length") or 0),
            etag=reply.header("etag"),
            kind=reply.header("x-ms-blob-type"),
            md5=base64.b64decode(md5).hex() if md5 else "",
            modified=date_s(reply.header("last-modified")),
            metadata={
                key.removeprefix("x-ms-meta-"): value
                for key, value in reply.headers.items()
                if key.startswith("x-ms-meta-")
            },
        )

    async def put_blob(self, name: str, body: SendBody | bytes, headers: Mapping[str, str], operation: str) -> Reply:
        """Put Blob of a block blob, whole."""
        return await self.send(operation, "PUT", name, headers={"x-ms-blob-type": "BlockBlob", **headers}, body=body)

    async def delete(self, name: str, etag: str = "") -> None:
        """Delete Blob, only while it has that ETag; one that is gone is fine."""
        try:
            await self.send("delete", "DELETE", name, headers={"If-Match": etag} if etag else {})
        except AzureError as error:
            if error.status != 404:
                raise

    async def get_range(self, name: str, offset: int, length: int, etag: str) -> bytes:
        """Get Blob, some bytes of one state of it. Raises StoreError where it was replaced."""
        headers = {"x-ms-range": f"bytes={offset}-{offset + length - 1}", "If-Match": etag}
        try:
            reply = await self.send("read", "GET", name, headers=headers, reply_max=max(length, MiB))
        except AzureError as error:
            if error.status == 412:
                raise StoreError(
                    "the blob was replaced while it was read", operation="read", uri=self.uri(name)
                ) from None
            raise
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

    async def listed(self, prefix: str) -> list[ListedBlob]:
        """List Blobs whose name begins so, those of uncommitted blocks alone too."""
        found: list[ListedBlob] = []
        query = {"restype": "container", "comp": "list", "include": "metadata,uncommittedblobs", "prefix": prefix}
        while True:
            reply = await self.send("list", "GET", query=query, reply_max=_LISTING_MAX)
            root = _parsed(reply, "list")
            assert root is not None  # strict
            found += [
                ListedBlob(
                    name=blob.findtext("Name") or "",
                    size=int(blob.findtext("Properties/Content-Length") or 0),
                    etag=blob.findtext("Properties/Etag") or "",
                    modified=date_s(blob.findtext("Properties/Last-Modified") or ""),
                    metadata={one.tag.lower(): one.text or "" for one in blob.iterfind("Metadata/*")},
                )
                for blob in root.iter("Blob")
            ]
            marker = root.findtext("NextMarker") or ""
            if not marker or marker == query.get("marker"):
                return found
            query["marker"] = marker

    # -- blocks ------------------------------------------------------------------------------------------------------

    async def put_block(self, name: str, block_id: str, body: SendBody, headers: Mapping[str, str]) -> Reply:
        """Put Block."""
        query = {"comp": "block", "blockid": block_id}
        return await self.send("put_part", "PUT", name, query=query, headers=headers, body=body)

    async def commit(self, name: str, block_ids: Sequence[str], headers: Mapping[str, str]) -> Reply:
        """Put Block List, of blocks that were not committed yet."""
        root = ElementTree.Element("BlockList")
        for block_id in block_ids:
            ElementTree.SubElement(root, "Uncommitted").text = block_id
        body = b'<?xml version="1.0" encoding="utf-8"?>' + ElementTree.tostring(root)
        sent = {"Content-Type": "application/xml", **headers}
        return await self.send("seal", "PUT", name, query={"comp": "blocklist"}, headers=sent, body=body)

    async def blocks(self, name: str, *, committed: bool) -> list[tuple[str, int]] | None:
        """(id, length) of a blob's blocks; None where there is no such blob, committed or not."""
        query = {"comp": "blocklist", "blocklisttype": "committed" if committed else "uncommitted"}
        try:
            reply = await self.send("list_parts", "GET", name, query=query, reply_max=_LISTING_MAX)
        except AzureError as error:
            if error.status == 404:
                return None
            raise
        root = _parsed(reply, "list_parts")
        assert root is not None  # strict
        return [(block.findtext("Name") or "", int(block.findtext("Size") or 0)) for block in root.iter("Block")]

    # -- pages -------------------------------------------------------------------------------------------------------

    async def create_pages(self, name: str, size: int, headers: Mapping[str, str]) -> Reply:
        """Put Blob of a page blob: `size` zero bytes, a multiple of PAGE."""
        made = {"x-ms-blob-type": "PageBlob", "x-ms-blob-content-length": str(size), **headers}
        return await self.send("create", "PUT", name, headers=made)

    async def put_pages(self, name: str, offset: int, body: SendBody, headers: Mapping[str, str]) -> Reply:
        """Put Page: whole pages, at most PAGES_MAX bytes."""
        placed = {
            "x-ms-page-write": "update",
            "x-ms-range": f"bytes={offset}-{offset + (body.length or 0) - 1}",
            **headers,
        }
        return await self.send("write", "PUT", name, query={"comp": "page"}, headers=placed, body=body)

    async def set_metadata(self, name: str, metadata: Mapping[str, str]) -> Reply:
        """Set Blob Metadata: all of it."""
        headers = {f"x-ms-meta-{key}": value for key, value in metadata.items()}
        return await self.send("seal", "PUT", name, query={"comp": "metadata"}, headers=headers)


class BlobReader:
    """Random reads of one state of a blob."""

    def __init__(
        self, client: AzureClient, name: str, state: BlobState, retry: Retry, attested: Mapping[str, str]
    ) -> None:
        self._client = client
        self._name = name
        self._state = state
        self._retry = retry
        self.attested = attested

    @property
    def size(self) -> int:
        """Length of the blob in bytes."""
        return self._state.size

    @property
    def state(self) -> BlobState:
        """What the blob was when it was opened."""
        return self._state

    async def read(self, offset: int, length: int) -> bytes:
        """Exactly these bytes. Raises StoreError, or FormatError for a range beyond the end."""
        return await read_ranged(self._read, offset, length, size=self.size, range_max=_RANGE_MAX, what="blob")

    async def _read(self, offset: int, length: int) -> bytes:
        return await self._retry.call(
            "read", lambda: self._client.get_range(self._name, offset, length, self._state.etag)
        )


async def read_state(client: AzureClient, name: str, retry: Retry) -> BlobReader:
    """Open a blob as it is now. Raises StoreError where there is none."""
    state = await retry.call("head", lambda: client.head(name))
    if state is None:
        raise StoreError("there is no such blob", operation="read", status=404, uri=client.uri(name))
    attested = await retry.call("head", lambda: attested_of(client, name, state))
    return BlobReader(client, name, state, retry, attested)


async def attested_of(client: AzureClient, name: str, state: BlobState) -> Mapping[str, str]:
    """What the store says of a blob's content, by the names that receipts use."""
    if state.md5:
        return {"Content-MD5": state.md5}
    blocks = await client.blocks(name, committed=True) if state.kind == "BlockBlob" else None
    return {"block list": block_list_digest(blocks)} if blocks else {}


def block_list_digest(blocks: Sequence[tuple[str, int]]) -> str:
    """One value for a list of (id, length). Our ids hold the MD5 that Azure compared each block with."""
    return hashlib.sha256("\n".join(f"{name} {size}" for name, size in blocks).encode()).hexdigest()


@asynccontextmanager
async def open_reader(url: str, *, endpoint: str = "", ca_file: Path | None = None) -> AsyncIterator[BlobReader]:
    """Open `az://container/name` for random reads, with the credentials of the environment.

    Raises:
        PlanError: no credentials, or not such a URL. StoreError: there is no such blob, or we may not see it.
    """
    where = AzureUrl.parse(url)
    retry = Retry(RetryPolicy(), clock=RealClock(), emit=lambda event: None, stage="read")
    access = find_access(endpoint=endpoint)
    client = AzureClient.connect(where.container, access, ca_file=ca_file, on_alive=retry.alive)
    try:
        yield await read_state(client, where.name, retry)
    finally:
        await client.close()


def _parsed(reply: Reply, operation: str, *, strict: bool = True) -> ElementTree.Element | None:
    # No reply has a document type; one that has could make the parser grow without bound.
    text = reply.body.removeprefix(b"\xef\xbb\xbf").lstrip()
    if b"<!DOCTYPE" in text or b"<!ENTITY" in text:
        raise StoreError("the reply has a document type", operation=operation)
    try:
        return ElementTree.fromstring(text)
    except ElementTree.ParseError:
        if strict:
            raise StoreError("the reply is not Azure's", operation=operation, reply=repr(text[:80])) from None
        return None
