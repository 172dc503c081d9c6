"""What runs left behind in a store: open multipart uploads, and temporary files.

A URL names one target, or every one below it where it ends with a slash (or is a bucket alone, or a folder).
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import quote, unquote, urlsplit

import anyio.to_thread

from pipeline.config.continuing import uploads_command
from pipeline.config.options import without_secrets
from pipeline.errors import PlanError, StoreError
from pipeline.events import LeftoverFound
from stages.store.file import local_path
from stages.write.partial import is_partial

if TYPE_CHECKING:
    from pipeline.flow.retry import Retry
    from stages.store.azure import AzureClient, ListedBlob
    from stages.store.s3 import S3Client
    from stages.store.sftp import SftpClient
    from stages.store.webdav import WebClient, WebFile


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftover:
    """One thing that a run left.

    Attributes:
        uri: of the target for an upload, of the file itself for a temporary file.
        upload_id: the store's name of it; the file's name for a temporary file.
        started: seconds since 1970: when an upload was opened, when a file was written last.
        parts: None for a file, or where the store does not say.
        size: bytes; None where the store does not say.
        command: removes it without this program.
    """

    uri: str
    upload_id: str
    started: float
    parts: int | None
    size: int | None
    command: str
    remove: Callable[[], Awaitable[None]]

    def age_s(self, now: float) -> float:
        """How old it is, by the clock that dated it."""
        return max(0.0, now - self.started)


class Place(Protocol):
    """Where to look.

    Attributes:
        holds_many: whether it is more than one target's; certain once `find` returned.
    """

    holds_many: bool

    async def find(self) -> list[Leftover]:
        """Everything that was left, the oldest first. Raises StoreError."""
        ...

    def now(self) -> float:
        """Seconds since 1970 by the store's clock, as far as it is known."""
        ...


@asynccontextmanager
async def place_of(url: str, *, endpoint: str = "") -> AsyncIterator[Place]:
    """Where a URL or path points; connections close at the end.

    Args:
        endpoint: of an S3-compatible store.
    Raises:
        PlanError: nothing is ever left behind under such a URL.
    """
    scheme = url.partition("://")[0] if "://" in url else "file"
    async with AsyncExitStack() as stack:
        if scheme in ("s3", "gs"):
            yield await stack.enter_async_context(_bucket(url, endpoint))
        elif scheme == "sftp":
            yield await stack.enter_async_context(_remote_folder(url))
        elif scheme == "az":
            yield await stack.enter_async_context(_container(url, endpoint))
        elif scheme in ("http", "https", "dav", "davs"):
            yield await stack.enter_async_context(_web_folder(url))
        elif scheme == "file":
            yield Folder(url)
        else:
            raise PlanError(
                f"runs leave nothing behind under {scheme}: URLs",
                operation="uploads",
                url=without_secrets(url),
                hint="A path, or a URL that begins with s3://, gs://, az://, sftp://, dav(s)://, http(s):// or file://.",
            )


async def found_beside(place: Place, url: str, endpoint: str = "") -> list[LeftoverFound]:
    """What lies in a place, for a run whose target is `url`. Raises StoreError."""
    return [
        LeftoverFound(
            uri=one.uri,
            age_s=one.age_s(place.now()),
            size_bytes=one.size,
            remove=uploads_command("abort", url, endpoint, "--upload-id", one.upload_id),
        )
        for one in await place.find()
    ]


def names_many(url: str) -> bool:
    """Whether the URL stands for everything below it, as far as it can be told without asking a server."""
    if url.startswith(("s3://", "gs://", "az://")):
        return url.endswith("/") or not urlsplit(url).path
    is_local = "://" not in url or url.startswith("file:")
    return url.endswith("/") or (is_local and os.path.isdir(local_path(url)))


class Folder:
    """A local folder, or one name in it."""

    def __init__(self, url: str) -> None:
        path = local_path(url).absolute()
        self.holds_many = names_many(url)
        self._folder, self._name = (path, "") if self.holds_many else (path.parent, path.name)

    def now(self) -> float:
        """This machine's clock."""
        return time.time()

    async def find(self) -> list[Leftover]:
        """Temporary files."""
        return await anyio.to_thread.run_sync(self._find)

    def _find(self) -> list[Leftover]:
        try:
            found = [
                self._leftover(entry)
                for entry in os.scandir(self._folder)
                if is_partial(entry.name, self._name) and entry.is_file(follow_symlinks=False)
            ]
        except OSError as error:
            raise StoreError(
                f"the folder can't be read: {os.strerror(error.errno or 0)}", operation="list", path=self._folder
            ) from None
        return sorted(found, key=lambda one: one.started)

    def _leftover(self, entry: os.DirEntry[str]) -> Leftover:
        status, path = entry.stat(follow_symlinks=False), Path(entry.path)

        async def remove() -> None:
            try:
                await anyio.Path(path).unlink(missing_ok=True)
            except OSError as error:
                raise StoreError(
                    f"it can't be removed: {os.strerror(error.errno or 0)}", operation="abort", path=path
                ) from None

        return Leftover(
            uri=str(path),
            upload_id=entry.name,
            started=status.st_mtime,
            parts=None,
            size=status.st_blocks * 512,
            command=shlex.join(["rm", str(path)]),
            remove=remove,
        )


@asynccontextmanager
async def _remote_folder(url: str) -> AsyncIterator[Place]:
    from stages.write.sftp import client_library

    async with client_library().connected(url, folder=names_many(url)) as client:
        yield RemoteFolder(client, client.where.path, names_many(url))


class RemoteFolder:
    """A folder on an SFTP server, or one name in it."""

    def __init__(self, client: SftpClient, path: str, is_folder: bool) -> None:
        self._client = client
        self._path = path
        self._take(is_folder)

    def _take(self, is_folder: bool) -> None:
        path = self._path
        self.holds_many = is_folder
        self._name = "" if is_folder else path.rpartition("/")[2]
        self._before = path.removesuffix(self._name) if self._name else path.rstrip("/") + "/"

    def now(self) -> float:
        """This machine's clock: SFTP does not tell the server's."""
        return time.time()

    async def find(self) -> list[Leftover]:
        """Temporary files."""
        if not self.holds_many and (state := await self._client.state(self._path)) is not None and state.is_folder:
            self._take(True)
        names = await self._client.names(self._before.rstrip("/") or self._before or ".")
        return sorted(
            (
                self._leftover(self._before + name, name, state.modified, state.size)
                for name, state in names
                if is_partial(name, self._name) and not state.is_folder
            ),
            key=lambda one: one.started,
        )

    def _leftover(self, path: str, name: str, modified: float, size: int) -> Leftover:
        async def remove() -> None:
            await self._client.remove(path)

        where = self._client.where
        return Leftover(
            uri=where.at(path),
            upload_id=name,
            started=modified,
            parts=None,
            size=size,
            command=self._client.command("rm", path),
            remove=remove,
        )


@asynccontextmanager
async def _container(url: str, endpoint: str) -> AsyncIterator[Place]:
    from pipeline.flow.retry import Retry, RetryPolicy
    from pipeline.flow.stage import RealClock
    from stages.store.azure import AzureClient
    from stages.store.azure_access import find_access

    container, _, name = url.removeprefix("az://").partition("/")
    if not container:
        raise PlanError(f'"{url}" does not name a container', operation="uploads", hint="Write az://CONTAINER/NAME.")
    retry = Retry(RetryPolicy(), clock=RealClock(), emit=lambda event: None, stage="uploads")
    client = AzureClient.connect(container, find_access(endpoint=endpoint), on_alive=retry.alive)
    try:
        yield _Container(client, retry, name, is_prefix=names_many(url))
    finally:
        await client.close()


class _Container:
    """Blobs of one name, or with a prefix, that have blocks alone, or are pages still being written."""

    def __init__(self, client: AzureClient, retry: Retry, name: str, *, is_prefix: bool) -> None:
        self._client = client
        self._retry = retry
        self._name = name
        self.holds_many = is_prefix

    def now(self) -> float:
        """This machine's clock."""
        return time.time()

    async def find(self) -> list[Leftover]:
        """Every one, the oldest first. Raises StoreError."""
        from stages.store.azure import STATE

        blobs = await self._retry.call("list", lambda: self._client.listed(self._name))
        found = []
        for blob in blobs:
            if not self.holds_many and blob.name != self._name:
                continue
            if blob.metadata.get(STATE) == "writing":
                found.append(self._leftover(blob, None, blob.size))
            elif not blob.etag or not blob.size:
                name = blob.name
                blocks = await self._retry.call("list_parts", lambda n=name: self._client.blocks(n, committed=False))  # type: ignore[misc]
                if blocks:
                    found.append(self._leftover(blob, len(blocks), sum(size for _, size in blocks)))
        return sorted(found, key=lambda one: one.started)

    def _leftover(self, blob: ListedBlob, parts: int | None, size: int) -> Leftover:
        async def remove() -> None:
            from stages.write.azure_upload import discard_blocks

            if parts is None:
                await self._retry.call("abort", lambda: self._client.delete(blob.name, blob.etag))
            else:
                await self._retry.call("abort", lambda: discard_blocks(self._client, blob.name))

        return Leftover(
            uri=self._client.uri(blob.name),
            upload_id=blob.name,
            started=blob.modified,
            parts=parts,
            size=size,
            command=self._client.command("delete", blob.name),
            remove=remove,
        )


@asynccontextmanager
async def _web_folder(url: str) -> AsyncIterator[Place]:
    from pipeline.flow.retry import Retry, RetryPolicy
    from pipeline.flow.stage import RealClock
    from stages.store.http import HttpClient
    from stages.store.web import WebAddress
    from stages.store.webdav import WebClient

    address = WebAddress.parse(url)
    login = {"Authorization": address.authorization} if address.authorization else {}
    retry = Retry(RetryPolicy(), clock=RealClock(), emit=lambda event: None, stage="uploads")
    http = HttpClient(address.origin, connections=2, on_alive=retry.alive, told_by="the URL")
    client = WebClient(http, login, "the URL")
    try:
        yield _WebFolder(client, retry, address.url, scheme=urlsplit(url).scheme)
    finally:
        await client.close()


class _WebFolder:
    """A folder on a WebDAV server, or one name in it."""

    def __init__(self, client: WebClient, retry: Retry, url: str, *, scheme: str) -> None:
        self._client = client
        self._retry = retry
        self._scheme = scheme
        folder, _, name = url.partition("?")[0].rpartition("/")
        self._folder, self._name = folder + "/", unquote(name)
        self.holds_many = not name

    def now(self) -> float:
        """This machine's clock: listings do not tell the server's."""
        return time.time()

    async def find(self) -> list[Leftover]:
        """Temporary files. Raises StoreError: also where the server lists no folders."""
        names = await self._retry.call("list", lambda: self._client.names(self._folder))
        return sorted(
            (self._leftover(name, file) for name, file in names if is_partial(name, self._name)),
            key=lambda one: one.started,
        )

    def _leftover(self, name: str, file: WebFile) -> Leftover:
        url = self._folder + quote(name, safe="~-._")

        async def remove() -> None:
            await self._retry.call("abort", lambda: self._client.delete(url))

        return Leftover(
            uri=f"{self._scheme}:{url.partition(':')[2]}",
            upload_id=name,
            started=file.modified,
            parts=None,
            size=file.size if file.size >= 0 else None,
            command=self._client.command("DELETE", url),
            remove=remove,
        )


@asynccontextmanager
async def _bucket(url: str, endpoint: str) -> AsyncIterator[Place]:
    from pipeline.flow.retry import Retry, RetryPolicy
    from pipeline.flow.stage import RealClock
    from stages.store.s3 import S3Client

    scheme, _, rest = url.partition("://")
    bucket, _, key = rest.partition("/")
    if not bucket:
        raise PlanError(f'"{url}" does not name a bucket', operation="uploads", hint=f"Write {scheme}://BUCKET/NAME.")
    retry = Retry(RetryPolicy(), clock=RealClock(), emit=lambda event: None, stage="uploads")
    if scheme == "gs":
        from stages.store.gcs import connect_parts

        client = await connect_parts(bucket, endpoint, on_alive=retry.alive)
    else:
        client = await S3Client.connect(bucket, endpoint=endpoint, on_alive=retry.alive)
    try:
        yield Bucket(client, retry, key, is_prefix=names_many(url))
    finally:
        await client.close()


class Bucket:
    """Open multipart uploads of one key, or of every key with a prefix."""

    def __init__(self, client: S3Client, retry: Retry, key: str, *, is_prefix: bool) -> None:
        self._client = client
        self._retry = retry
        self._key = key
        self.holds_many = is_prefix

    def now(self) -> float:
        """The store's clock."""
        return time.time() + self._client.skew_s

    async def find(self) -> list[Leftover]:
        """Every open upload, with what it holds."""
        client = self._client
        uploads = await self._retry.call("list_uploads", lambda: client.uploads_below(self._key))
        found = []
        for key, upload in uploads:
            if not self.holds_many and key != self._key:
                continue
            parts, size = await self._held(key, upload.upload_id)
            found.append(
                Leftover(
                    uri=client.uri(key),
                    upload_id=upload.upload_id,
                    started=upload.initiated,
                    parts=parts,
                    size=size,
                    command=client.command("abort-multipart-upload", key, "--upload-id", upload.upload_id),
                    remove=self._remover(key, upload.upload_id),
                )
            )
        return sorted(found, key=lambda one: one.started)

    async def _held(self, key: str, upload_id: str) -> tuple[int | None, int | None]:
        from stages.store.s3 import S3Error

        try:
            return await self._retry.call("list_parts", lambda: self._client.parts_held(key, upload_id))
        except S3Error as error:
            if error.temporary:
                raise
            return None, None  # this store does not list parts, or not for us

    def _remover(self, key: str, upload_id: str) -> Callable[[], Awaitable[None]]:
        async def remove() -> None:
            await self._retry.call("abort", lambda: self._client.abort_upload(key, upload_id))

        return remove
