"""An upload whose calls are made again when the store failed for a moment."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.flow.retry import CLEANUP, Retry
from stages.store.digests import Algorithm
from stages.write.shapes import Body, PartUpload, Sealed, StoredPart


class Retrying:
    """Wraps a PartUpload: every call has the whole budget of `retry`, and cleaning up a small one of its own."""

    def __init__(self, upload: PartUpload, retry: Retry) -> None:
        self._upload = upload
        self._retry = retry

    @property
    def uri(self) -> str:
        """As wrapped."""
        return self._upload.uri

    @property
    def algorithms(self) -> Algorithm:
        """As wrapped."""
        return self._upload.algorithms

    async def open(self) -> str:
        """As wrapped."""
        return await self._retry.call("open", self._upload.open)

    async def put_part(self, number: int, body: Body) -> StoredPart:
        """As wrapped; each attempt takes the body's chunks from the beginning."""
        return await self._retry.call("put_part", lambda: self._upload.put_part(number, body))

    async def put_whole(self, body: Body) -> Sealed:
        """As wrapped."""
        return await self._retry.call("put_whole", lambda: self._upload.put_whole(body))

    async def seal(self, parts: Sequence[StoredPart]) -> Sealed:
        """As wrapped."""
        return await self._retry.call("seal", lambda: self._upload.seal(parts))

    async def abort(self) -> None:
        """As wrapped."""
        await self._retry.call("abort", self._upload.abort, CLEANUP)

    def leftovers(self) -> tuple[str, ...]:
        """As wrapped."""
        return self._upload.leftovers()
