"""The shapes of an upload: made of numbered parts, or of ranges of one file. A driver each drives all that have it.

Retry, pacing and fault injection wrap a shape and have it too: `Retrying(Paced(Faulty(S3Upload(...))))`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from stages.store.digests import Algorithm, Buffer, Sums


class Body(Protocol):
    """The bytes of one request, which can be produced again for every attempt."""

    @property
    def length(self) -> int:
        """Bytes that `chunks` gives, exactly."""
        ...

    @property
    def sums(self) -> Sums | None:
        """The checksums; None as long as not all bytes were seen (a streamed part, before its first attempt ended)."""
        ...

    def chunks(self) -> AsyncIterator[Buffer]:
        """The bytes from the beginning, for one attempt, in chunks of at most 1 MiB.

        Each chunk is borrowed, and valid until the attempt ended. One iterator at a time.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPart:
    """A part that the store acknowledged.

    Attributes:
        tag: what the store calls it (an ETag, a block id), for `seal`.
        sums: ours.
    """

    number: int
    length: int
    tag: str
    sums: Sums


@dataclass(frozen=True, slots=True, kw_only=True)
class Sealed:
    """An object that is complete and readable."""

    size: int
    tag: str


class PartUpload(Protocol):
    """One object being written in numbered parts, or at once. Used by one run, then done with.

    It ends in exactly one of `seal` or `put_whole`, or in `abort`. `open` comes first, but for `put_whole`.
    """

    @property
    def uri(self) -> str:
        """The object's URI, for people and events."""
        ...

    @property
    def algorithms(self) -> Algorithm:
        """Which sums a body needs for the next request; `open` may narrow them down to what the store knows."""
        ...

    async def open(self) -> str:
        """Make the upload in the store; returns its id there. Called again it is the same one. Raises StoreError."""
        ...

    async def put_part(self, number: int, body: Body) -> StoredPart:
        """Store one part.

        Args:
            number: from 1; parts may come in any order. The same number again replaces the part.
            body: borrowed; its chunks are taken once. An error that its iterator raises comes out of here unchanged.
        Raises:
            StoreError: `temporary` where the same call may succeed later; never for a checksum that did not match.
        Cancellation: the part may or may not have reached the store.
        """
        ...

    async def put_whole(self, body: Body) -> Sealed:
        """Store the object in one request, without `open`.

        Raises:
            StoreError: also where the target exists and may not be replaced.
        Cancellation: the object may be there; `abort` finds out, and removes it.
        """
        ...

    async def seal(self, parts: Sequence[StoredPart]) -> Sealed:
        """Put the parts together, ascending by number. A lost answer is resolved before this fails.

        Raises:
            StoreError: as for `put_whole`; the target of somebody else is left alone.
        Cancellation: as for `put_whole`.
        """
        ...

    async def abort(self) -> None:
        """Remove everything that was stored, whatever state the upload is in, and see that it is gone. Idempotent.

        Raises:
            StoreError: something may be left; `leftovers` says how to remove it.
        """
        ...

    def leftovers(self) -> tuple[str, ...]:
        """The shell commands that remove whatever this upload may have left behind."""
        ...


class RangeUpload(Protocol):
    """One new file being written at any offset under a temporary name. Used by one run, then done with."""

    @property
    def partial_uri(self) -> str:
        """Where it is written, for people and events."""
        ...

    @property
    def in_order(self) -> bool:
        """Known after `create`: every byte has to be written, one after the other, by one `write` at a time."""
        ...

    async def create(self) -> None:
        """Make the file, which must not exist. Raises StoreError, or PlanError where it can't be made at all."""
        ...

    async def write(self, parts: Sequence[tuple[int, memoryview]]) -> None:
        """Write these bytes at their image offsets; several calls at once.

        Args:
            parts: borrowed until this returns.
        Raises:
            StoreError: for good.
        Cancellation: some of it may have been written.
        """
        ...

    async def seal(self, size: int) -> None:
        """Give the file its length, make it durable, and close it. Raises StoreError."""
        ...

    async def abort(self, cause: BaseException) -> None:
        """Remove the file, shielded and with a deadline. Raises LeftBehindError where that failed."""
        ...
