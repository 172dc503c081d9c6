"""One object being written to Google Cloud Storage through a resumable session: bytes in order, each range once.

Source: Google Cloud Storage, "Performing resumable uploads": chunks in units of 256 KiB but for the last, `bytes */*`
asks how much the store has, `bytes */TOTAL` ends an upload whose bytes are all there.

What was sent is asked for before anything is sent again, so a lost connection costs only what the store did not get.
The last bytes that are not a whole unit wait for `seal`: with them the object would be complete.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

from pipeline.errors import StoreError
from pipeline.flow.grace import with_grace
from pipeline.flow.items import Receipt
from stages.store.digests import Algorithm, Buffer, Sums, combined_crc32c
from stages.store.gcs import CHUNK_UNIT, GcsClient, GcsState
from stages.store.gcs_access import lock_session
from stages.store.http import BytesBody
from stages.write.s3_upload import GRACE_S
from stages.write.shapes import Body, Sealed, StoredPart


class GcsUpload:
    """Has the shape PartUpload; parts come one at a time, ascending."""

    def __init__(self, client: GcsClient, name: str, *, overwrite: bool) -> None:
        """Prepare it; nothing is sent."""
        self._client = client
        self._name = name
        self._overwrite = overwrite
        self._session = ""
        self._begins: dict[int, int] = {}  # image offset of each part
        self._end = 0
        self._tail = b""
        self._expected: tuple[Sums, ...] = ()
        self._maybe_visible = False
        self.sealed_state: GcsState | None = None

    @property
    def uri(self) -> str:
        """`gs://bucket/name`."""
        return self._client.uri(self._name)

    @property
    def algorithms(self) -> Algorithm:
        """The store keeps a CRC32C of the whole object."""
        return Algorithm.CRC32C

    # -- in a journal ------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What a later process needs to find the session again."""
        access = self._client.access
        return {
            "bucket": self._client.bucket,
            "name": self._name,
            "endpoint": access.endpoint,
            "session": lock_session(access, self._session),
            "commands": self.leftovers(),
        }

    async def ask(self, session: str) -> tuple[int, GcsState | None]:
        """Take over the session of an earlier process: how much the store has, and the object where it is complete.

        Raises:
            StoreError: 404, 410: the store does not have it any more.
        """
        reached, complete = await self._client.send_chunk(session, None, "bytes */*", "resume")
        self._session = session
        self._maybe_visible = complete is not None
        return reached, complete

    def go_on(self, number: int, begin: int) -> None:
        """The part of this number, at this offset of the image, is the next; some of it may be in the store."""
        self._begins[number] = self._end = begin

    def recognise(self, found: GcsState | None, sent: Sequence[Sums]) -> bool:
        """Whether an object is the one that an earlier process made of these parts; then nothing is sent any more."""
        self._expected = tuple(sent)
        ours = self._crc32c()
        length = sum(one.length for one in sent)
        if found is None or not ours or (found.size, found.crc32c) != (length, ours):
            return False
        self.sealed_state, self._maybe_visible, self._session = found, True, ""
        return True

    # -- parts -------------------------------------------------------------------------------------------------------

    async def open(self) -> str:
        """Begin a session. One whose answer is lost holds nothing, and ends by itself after a week."""
        self._session = await self._client.open_session(self._name, replace=self._overwrite)
        return "resumable session"

    async def put_part(self, number: int, body: Body) -> StoredPart:
        """Send what the store does not have of the part. Raises StoreError."""
        is_again = number in self._begins
        begin = self._begins.setdefault(number, self._end)
        done = 0
        if is_again:
            reached, _ = await self._client.send_chunk(self._session, None, "bytes */*", "put_part")
            done = reached - begin
            if done < 0:
                raise StoreError(
                    "the store lost bytes that it had acknowledged",
                    operation="put_part",
                    number=number,
                    expected=begin,
                    got=reached,
                    hint="Run the export again.",
                )
        rest = _Rest(body, done)
        if rest.length or not done:
            span = f"bytes {begin + done}-{begin + done + rest.length - 1}/*" if rest.length else "bytes */*"
            reached, _ = await self._client.send_chunk(self._session, rest, span, "put_part")
        else:  # all of it was there; its end is needed for `seal`
            reached = begin + done
            async with aclosing(rest.chunks()) as chunks:  # type: ignore[type-var]  # a generator
                async for _ in chunks:
                    pass
        sums = body.sums
        assert sums is not None  # every byte was seen
        if reached != begin + sums.length - len(rest.tail):
            raise StoreError(
                "the store did not take all of a chunk",
                temporary=True,
                operation="put_part",
                number=number,
                expected=begin + sums.length - len(rest.tail),
                got=reached,
            )
        self._end, self._tail = begin + sums.length, rest.tail
        return StoredPart(number=number, length=sums.length, tag="", sums=sums)

    async def put_whole(self, body: Body) -> Sealed:
        """A session of one chunk. Raises StoreError."""
        sums = body.sums
        assert sums is not None  # it was kept
        self._expected = (sums,)
        if not self._session:
            await self.open()
        span = f"bytes 0-{body.length - 1}/{body.length}" if body.length else "bytes */0"
        return await self._finish(body, span, sums.length, "put_whole")

    async def seal(self, parts: Sequence[StoredPart]) -> Sealed:
        """Send the end, which completes the object. Raises StoreError."""
        self._expected = tuple(part.sums for part in parts)
        size = sum(part.length for part in parts)
        if self.sealed_state is not None:  # by an earlier process
            return self._compared(self.sealed_state, size, "seal")
        if self._tail:
            begin = size - len(self._tail)
            return await self._finish(BytesBody(self._tail), f"bytes {begin}-{size - 1}/{size}", size, "seal")
        return await self._finish(None, f"bytes */{size}", size, "seal")

    async def _finish(self, body: Body | BytesBody | None, span: str, size: int, operation: str) -> Sealed:
        was_asked, self._maybe_visible = self._maybe_visible, True

        async def send() -> GcsState | None:
            if was_asked:  # an answer was lost: the object may be complete
                reached, state = await self._client.send_chunk(self._session, None, f"bytes */{size}", operation)
                if state is not None or (reached and body is not None and operation == "put_whole"):
                    return state
            return (await self._client.send_chunk(self._session, body, span, operation))[1]

        state = await with_grace(send, GRACE_S)
        if state is None:
            raise StoreError("the store did not complete the object", temporary=True, operation=operation)
        self._session, self.sealed_state = "", state
        return self._compared(state, size, operation)

    def _compared(self, state: GcsState, size: int, operation: str) -> Sealed:
        ours = self._crc32c()
        if state.size != size or (ours and state.crc32c and ours != state.crc32c):
            raise StoreError(
                f"the store got other bytes than were sent: its CRC32C is {state.crc32c}, ours is {ours}",
                operation=operation,
                expected=size,
                got=state.size,
                hint="Suspect memory or network of this machine, or a proxy in between.",
            )
        return Sealed(size=state.size, tag=state.generation)

    def _crc32c(self) -> str:
        whole = combined_crc32c(self._expected)
        return Sums(length=0, crc32c=whole).crc32c_text if whole is not None else ""

    @asynccontextmanager
    async def fetch_receipt(self) -> AsyncIterator[Receipt]:
        """What the store says of the sealed object. Raises StoreError."""
        found = await self._client.state(self._name)
        if found is None:
            raise StoreError("the stored image is gone", operation="receipt", uri=self.uri)
        ours = self._crc32c()
        proofs = (("CRC32C", ours, found.crc32c),) if ours and found.crc32c else ()
        yield Receipt(found.size, proofs, "" if proofs else "the store keeps no checksum that can be compared")

    async def abort(self) -> None:
        """End the session and remove the object that it made. Raises StoreError."""
        if self._maybe_visible and self.sealed_state is None and self._session:
            _, self.sealed_state = await self._client.send_chunk(self._session, None, "bytes */*", "abort")
        if self.sealed_state is not None:
            await self._client.delete(self._name, self.sealed_state.generation)
            self._session = ""
        if self._session:
            await self._client.cancel_session(self._session)
        self._session, self.sealed_state, self._maybe_visible = "", None, False

    def leftovers(self) -> tuple[str, ...]:
        """Commands for whatever may be left. An open session is invisible, free, and ends by itself after a week."""
        return (f"gcloud storage rm {self.uri}",) if self._maybe_visible or self.sealed_state else ()


class _Rest:
    """The bytes of a body behind the first `done`, without those at its end that are no whole unit."""

    def __init__(self, body: Body, done: int) -> None:
        self._body = body
        self._done = done
        self._whole = body.length - body.length % CHUNK_UNIT
        self.tail = b""

    @property
    def length(self) -> int:
        return self._whole - self._done

    async def chunks(self) -> AsyncIterator[Buffer]:
        """In order."""
        position, tail = 0, bytearray()
        async with aclosing(self._body.chunks()) as chunks:  # type: ignore[type-var]  # a generator in all cases
            async for chunk in chunks:
                view = memoryview(chunk)
                begin, end = max(0, self._done - position), min(view.nbytes, max(0, self._whole - position))
                if begin < end:
                    yield view[begin:end]
                tail += view[max(0, self._whole - position) :]
                position += view.nbytes
        self.tail = bytes(tail)
