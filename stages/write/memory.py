"""A store in memory that takes numbered parts: small, strict, and honest about what is left in it. For tests.

It keeps every promise of the PartUpload shape that a real store may break, so what fails against it is the driver.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import anyio.lowlevel

from pipeline.errors import FormatError, StoreError
from pipeline.flow.orders import PartLimits
from stages.store.digests import Algorithm, RunningSums
from stages.write.shapes import Body, Sealed, StoredPart


class MemoryStore:
    """Objects by key.

    Attributes:
        objects: sealed bytes by key.
        open_uploads: ids of uploads that are neither sealed nor aborted.
        requests: (operation, part number or 0) in the order in which they arrived.
    """

    def __init__(self, limits: PartLimits | None = None) -> None:
        self.limits = limits or PartLimits()
        self.objects: dict[str, bytes] = {}
        self.open_uploads: set[str] = set()
        self.requests: list[tuple[str, int]] = []
        self._uploads = 0

    def upload(self, key: str) -> MemoryUpload:
        """A new upload to `key`, not opened yet."""
        self._uploads += 1
        return MemoryUpload(self, key, f"upload-{self._uploads}")

    @asynccontextmanager
    async def open_reader(self, key: str) -> AsyncIterator[MemoryReader]:
        """Read a sealed object."""
        yield MemoryReader(self.objects[key])


class MemoryReader:
    """Random reads of bytes."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self._data)

    async def read(self, offset: int, length: int) -> bytes:
        """Exactly these bytes. Raises FormatError beyond the end."""
        if offset + length > len(self._data):
            raise FormatError("the object ends before this range", operation="read", offset=offset, length=length)
        return self._data[offset : offset + length]


class MemoryUpload:
    """One upload to a MemoryStore."""

    def __init__(self, store: MemoryStore, key: str, upload_id: str) -> None:
        self._store = store
        self._key = key
        self._id = upload_id
        self._parts: dict[int, bytes] = {}
        self._sealed: bytes | None = None

    @property
    def uri(self) -> str:
        """`memory:KEY`."""
        return f"memory:{self._key}"

    @property
    def algorithms(self) -> Algorithm:
        """MD5, which needs no library."""
        return Algorithm.MD5

    async def open(self) -> str:
        """As the shape says."""
        await self._arrive("open", 0)
        self._store.open_uploads.add(self._id)
        return self._id

    async def put_part(self, number: int, body: Body) -> StoredPart:
        """As the shape says; a part whose MD5 or length is not the announced one is refused."""
        await self._arrive("put_part", number)
        if self._id not in self._store.open_uploads:
            raise StoreError("there is no such upload", operation="put_part", status=404)
        if not 1 <= number <= self._store.limits.parts_max or body.length > self._store.limits.part_max:
            raise StoreError("the part is against the limits", operation="put_part", number=number, length=body.length)
        data = await self._received(body)
        self._parts[number] = data
        sums = body.sums
        assert sums is not None
        return StoredPart(number=number, length=len(data), tag=hashlib.md5(data).hexdigest(), sums=sums)

    async def _received(self, body: Body) -> bytes:
        announced = body.sums
        received = bytearray()
        sums = RunningSums(Algorithm.MD5)
        async for chunk in body.chunks():
            received += chunk
            sums.update(chunk)
            await anyio.lowlevel.checkpoint()
        if len(received) != body.length:
            raise StoreError("the body has another length than announced", expected=body.length, got=len(received))
        for known in (announced, body.sums):
            if known is not None and known.md5 != sums.value().md5:
                raise StoreError("BadDigest", operation="put_part", status=400)
        return bytes(received)

    async def put_whole(self, body: Body) -> Sealed:
        """As the shape says."""
        await self._arrive("put_whole", 0)
        self._refuse_existing()
        return self._make_visible(await self._received(body))

    async def seal(self, parts: Sequence[StoredPart]) -> Sealed:
        """As the shape says; every part but the last is at least `part_min` long."""
        await self._arrive("seal", 0)
        if self._sealed is not None:
            return Sealed(size=len(self._sealed), tag="sealed")
        self._refuse_existing()
        if [part.number for part in parts] != sorted(self._parts):
            raise StoreError("InvalidPart", operation="seal", status=400)
        if any(part.length < self._store.limits.part_min for part in parts[:-1]):
            raise StoreError("EntityTooSmall", operation="seal", status=400)
        self._store.open_uploads.discard(self._id)
        return self._make_visible(b"".join(self._parts[part.number] for part in parts))

    def _refuse_existing(self) -> None:
        if self._key in self._store.objects:
            raise StoreError("the target exists", operation="seal", status=412)

    def _make_visible(self, data: bytes) -> Sealed:
        self._store.objects[self._key] = self._sealed = data
        return Sealed(size=len(data), tag="sealed")

    async def abort(self) -> None:
        """As the shape says."""
        await self._arrive("abort", 0)
        self._store.open_uploads.discard(self._id)
        if self._sealed is not None and self._store.objects.get(self._key) is self._sealed:
            del self._store.objects[self._key]

    def leftovers(self) -> tuple[str, ...]:
        """Not a command of any shell; it has the form of one."""
        return (f"memory-store abort {self._id}",)

    async def _arrive(self, operation: str, number: int) -> None:
        await anyio.lowlevel.checkpoint()
        self._store.requests.append((operation, number))
