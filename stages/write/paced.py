"""An upload whose bodies go out at the pace of the store."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing

from pipeline.errors import StoreError
from pipeline.flow.pacing import Flight, Pacer
from stages.store.digests import Algorithm, Buffer, Sums
from stages.write.shapes import Body, PartUpload, Sealed, StoredPart


class Paced:
    """Wraps a PartUpload: parts wait for their turn, bytes for theirs, and every refusal slows all of it down."""

    def __init__(self, upload: PartUpload, pacer: Pacer) -> None:
        self._upload = upload
        self._pacer = pacer

    @property
    def uri(self) -> str:
        """As wrapped."""
        return self._upload.uri

    @property
    def algorithms(self) -> Algorithm:
        """As wrapped."""
        return self._upload.algorithms

    async def open(self) -> str:
        """As wrapped; a refusal counts."""
        begun = self._pacer.now()
        try:
            return await self._upload.open()
        except StoreError as error:
            self._note(error, begun)
            raise

    async def put_part(self, number: int, body: Body) -> StoredPart:
        """As wrapped."""
        # A part that is sent while it arrives must not wait here: the chain waits for it, and parts that are complete
        # hold the memory that the chain needs.
        if body.sums is None:
            return await self._put_part(number, body, self._pacer.now())
        async with self._pacer.request(body.length) as begun:
            return await self._put_part(number, body, begun)

    async def _put_part(self, number: int, body: Body, begun: float) -> StoredPart:
        with self._pacer.flight() as flight:
            try:
                stored = await self._upload.put_part(number, _PacedBody(body, self._pacer, flight))
            except StoreError as error:
                self._note(error, begun, body.length)
                raise
            self._pacer.taken(stored.length, flight)
        return stored

    async def put_whole(self, body: Body) -> Sealed:
        """As wrapped."""
        async with self._pacer.request(body.length) as begun:
            with self._pacer.flight() as flight:
                try:
                    sealed = await self._upload.put_whole(_PacedBody(body, self._pacer, flight))
                except StoreError as error:
                    self._note(error, begun, body.length)
                    raise
                self._pacer.taken(sealed.size, flight)
        return sealed

    async def seal(self, parts: Sequence[StoredPart]) -> Sealed:
        """As wrapped; a refusal counts."""
        begun = self._pacer.now()
        try:
            return await self._upload.seal(parts)
        except StoreError as error:
            self._note(error, begun)
            raise

    async def abort(self) -> None:
        """As wrapped, never held up."""
        await self._upload.abort()

    def leftovers(self) -> tuple[str, ...]:
        """As wrapped."""
        return self._upload.leftovers()

    def _note(self, error: StoreError, begun: float, length: int = 0) -> None:
        if error.throttled:
            self._pacer.refused(begun, length, error.retry_after_s)


class _PacedBody:
    """A body whose chunks come when they may go."""

    def __init__(self, body: Body, pacer: Pacer, flight: Flight) -> None:
        self._body = body
        self._pacer = pacer
        self._flight = flight

    @property
    def length(self) -> int:
        """As wrapped."""
        return self._body.length

    @property
    def sums(self) -> Sums | None:
        """As wrapped."""
        return self._body.sums

    async def chunks(self) -> AsyncIterator[Buffer]:
        """As wrapped, in smaller chunks where the rate is low."""
        async with aclosing(self._body.chunks()) as chunks:  # type: ignore[type-var]  # a generator in all cases
            async for chunk in chunks:
                rest = memoryview(chunk)
                while rest.nbytes:
                    bite = rest[: self._pacer.bite]
                    await self._pacer.wait(bite.nbytes, self._flight)
                    yield bite
                    rest = rest[bite.nbytes :]
