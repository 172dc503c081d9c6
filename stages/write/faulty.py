"""Faults as a wrapper of the upload shape: this call, at this time, goes wrong in this way."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Literal, TypeVar

from stages.store.digests import Algorithm, Buffer
from stages.write.shapes import Body, PartUpload, Sealed, StoredPart

T = TypeVar("T")

Operation = Literal["open", "put_part", "put_whole", "seal", "abort", "any"]


class Faulty:
    """Wraps a PartUpload and lets chosen calls fail.

    Attributes:
        calls: how many calls came in all, of any kind.
        fired: how many of them went wrong.
    """

    def __init__(
        self,
        upload: PartUpload,
        *,
        on: Operation,
        error: BaseException | None = None,
        act: Callable[[], None] | None = None,
        number: int | None = None,
        call: int | None = None,
        times: int = 1,
        when: Literal["before", "after"] = "before",
        after_bytes: int | None = None,
    ) -> None:
        """Choose the calls and the fault.

        Args:
            on: the kind of call.
            error: raised from it; None for none.
            act: done just before; to cancel a scope, to damage a store.
            number: only the part of this number.
            call: only the call-th call of that kind, from 1; None: the first ones.
            times: how many calls go wrong at most.
            when: `after`: the wrapped call was done, and its answer is lost.
            after_bytes: the fault comes when this much of the body was taken, instead of before the call.
        """
        self._upload = upload
        self._on = on
        self._error = error
        self._act = act
        self._number = number
        self._call = call
        self._times = times
        self._when = when
        self._after_bytes = after_bytes
        self._matched = 0
        self.calls = 0
        self.fired = 0

    @property
    def uri(self) -> str:
        """As wrapped."""
        return self._upload.uri

    @property
    def algorithms(self) -> Algorithm:
        """As wrapped."""
        return self._upload.algorithms

    async def open(self) -> str:
        """As wrapped, or the fault."""
        return await self._run("open", self._upload.open)

    async def put_part(self, number: int, body: Body) -> StoredPart:
        """As wrapped, or the fault."""
        return await self._run("put_part", lambda: self._upload.put_part(number, body), number, body)

    async def put_whole(self, body: Body) -> Sealed:
        """As wrapped, or the fault."""
        return await self._run("put_whole", lambda: self._upload.put_whole(body), body=body)

    async def seal(self, parts: Sequence[StoredPart]) -> Sealed:
        """As wrapped, or the fault."""
        return await self._run("seal", lambda: self._upload.seal(parts))

    async def abort(self) -> None:
        """As wrapped, or the fault."""
        await self._run("abort", self._upload.abort)

    def leftovers(self) -> tuple[str, ...]:
        """As wrapped."""
        return self._upload.leftovers()

    async def _run(
        self,
        operation: Operation,
        call: Callable[[], Awaitable[T]],
        number: int | None = None,
        body: Body | None = None,
    ) -> T:
        self.calls += 1
        if not self._fires(operation, number):
            return await call()
        if self._after_bytes is not None and body is not None:
            async for _ in _first(body, self._after_bytes):
                pass
        elif self._when == "after":
            result = await call()
            self._go_wrong()
            return result
        self._go_wrong()
        return await call()

    def _go_wrong(self) -> None:
        self.fired += 1
        if self._act is not None:
            self._act()
        if self._error is not None:
            raise self._error

    def _fires(self, operation: Operation, number: int | None) -> bool:
        if self._on not in ("any", operation) or (self._number is not None and number != self._number):
            return False
        self._matched += 1
        if self._call is not None and self._matched < self._call:
            return False
        return self.fired < self._times


async def _first(body: Body, count: int) -> AsyncIterator[Buffer]:
    """The chunks of one attempt that is given up after `count` bytes."""
    taken = 0
    chunks = body.chunks()
    async for chunk in chunks:
        yield chunk
        taken += len(chunk)
        if taken >= count:
            break
