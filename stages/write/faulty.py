"""Faults as wrappers of the upload shapes: this call, at this time, goes wrong in this way.

For tests of drivers and stores; the contract suite (tests/contracts/test_faults.py) runs them over every store of the
catalog. What goes wrong is a `Fault`; when, is for `Faulty` and `FaultyRanges`, which have the shapes they wrap.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import anyio

from pipeline.errors import StoreError
from stages.store.digests import Algorithm, Buffer
from stages.write.shapes import Body, PartUpload, RangeUpload, Sealed, StoredPart

T = TypeVar("T")

Operation = Literal["open", "put_part", "put_whole", "create", "write", "seal", "abort", "any"]


@dataclass(frozen=True, slots=True)
class Fails:
    """The call is not made, and this is raised."""

    error: BaseException


@dataclass(frozen=True, slots=True)
class Delays:
    """The call is made after a while."""

    seconds: float
    sleep: Callable[[float], Awaitable[None]] = anyio.sleep


@dataclass(frozen=True, slots=True)
class CutsShort:
    """The connection breaks when so many bytes of the body were taken; calls without a body break at once."""

    after_bytes: int


@dataclass(frozen=True, slots=True)
class IsBusy:
    """503: the store does not do it, and wants fewer requests."""

    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class LosesReply:
    """The store does it, and the connection breaks before the answer."""


@dataclass(frozen=True, slots=True)
class RepliesTwice:
    """The store gets the call twice, one after the other, and the second answer is the one that comes."""


@dataclass(frozen=True, slots=True)
class Stalls:
    """No answer ever comes, and the call is not made. Ends by cancellation only.

    Attributes:
        begun: set when it stalls.
    """

    begun: anyio.Event


Fault = Fails | Delays | CutsShort | IsBusy | LosesReply | RepliesTwice | Stalls


def lost_connection(operation: str) -> StoreError:
    """What a client makes of a connection that broke."""
    return StoreError("the connection was lost", operation=operation, temporary=True, retry_after_s=0.0)


class _Striker:
    """Decides which calls go wrong, and lets them.

    Attributes:
        calls: how many calls came in all, of any kind.
        fired: how many of them went wrong.
    """

    def __init__(
        self,
        *,
        on: Operation,
        fault: Fault | None = None,
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
            fault: what goes wrong; or, for finer work:
            error: raised from it; None for none.
            act: done just before; to cancel a scope, to damage a store.
            number: only the part of this number.
            call: only the call-th call of that kind, from 1; None: the first ones.
            times: how many calls go wrong at most.
            when: `after`: the wrapped call was done, and its answer is lost.
            after_bytes: the fault comes when this much of the body was taken, instead of before the call.
        """
        self._on = on
        self._fault = fault
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
        if self._fault is not None:
            self.fired += 1
            return await self._strike(self._fault, operation, call, body)
        if self._after_bytes is not None and body is not None:
            await _take(body, self._after_bytes)
        elif self._when == "after":
            result = await call()
            self._go_wrong()
            return result
        self._go_wrong()
        return await call()

    async def _strike(
        self, fault: Fault, operation: Operation, call: Callable[[], Awaitable[T]], body: Body | None
    ) -> T:
        match fault:
            case Fails(error=error):
                raise error
            case Delays(seconds=seconds, sleep=sleep):
                await sleep(seconds)
            case CutsShort(after_bytes=count):
                if body is not None:
                    await _take(body, count)
                raise lost_connection(operation)
            case IsBusy(retry_after_s=after_s):
                raise StoreError(
                    "503 SlowDown",
                    operation=operation,
                    temporary=True,
                    throttled=True,
                    status=503,
                    retry_after_s=after_s,
                )
            case LosesReply():
                await call()
                raise lost_connection(operation)
            case RepliesTwice():
                await call()
            case Stalls(begun=begun):
                begun.set()
                await anyio.sleep_forever()
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


class Faulty(_Striker):
    """Wraps a PartUpload and lets chosen calls fail. Takes the same choices as `_Striker`, behind the upload."""

    def __init__(
        self,
        upload: PartUpload,
        *,
        on: Operation,
        fault: Fault | None = None,
        error: BaseException | None = None,
        act: Callable[[], None] | None = None,
        number: int | None = None,
        call: int | None = None,
        times: int = 1,
        when: Literal["before", "after"] = "before",
        after_bytes: int | None = None,
    ) -> None:
        """Choose the calls and the fault, see `_Striker`."""
        super().__init__(
            on=on,
            fault=fault,
            error=error,
            act=act,
            number=number,
            call=call,
            times=times,
            when=when,
            after_bytes=after_bytes,
        )
        self._upload = upload

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


class FaultyRanges(_Striker):
    """Wraps a RangeUpload and lets chosen calls fail: `create`, `write`, `seal` and `abort`."""

    def __init__(
        self, upload: RangeUpload, *, on: Operation, fault: Fault, call: int | None = None, times: int = 1
    ) -> None:
        """Choose the calls and the fault, see `_Striker`."""
        super().__init__(on=on, fault=fault, call=call, times=times)
        self._upload = upload

    @property
    def partial_uri(self) -> str:
        """As wrapped."""
        return self._upload.partial_uri

    @property
    def in_order(self) -> bool:
        """As wrapped."""
        return self._upload.in_order

    async def create(self) -> None:
        """As wrapped, or the fault."""
        await self._run("create", self._upload.create)

    async def write(self, parts: Sequence[tuple[int, memoryview]]) -> None:
        """As wrapped, or the fault; what cuts it short writes half of the ranges first."""
        if isinstance(self._fault, CutsShort) and self._on == "write" and self.fired < self._times:
            self.fired += 1
            offset, view = parts[0]
            await self._upload.write([(offset, view[: self._fault.after_bytes])])
            raise lost_connection("write")
        await self._run("write", lambda: self._upload.write(parts))

    async def seal(self, size: int) -> None:
        """As wrapped, or the fault."""
        await self._run("seal", lambda: self._upload.seal(size))

    async def abort(self, cause: BaseException) -> None:
        """As wrapped, or the fault."""
        await self._run("abort", lambda: self._upload.abort(cause))


async def _take(body: Body, count: int) -> None:
    async for _ in _first(body, count):
        pass


async def _first(body: Body, count: int) -> AsyncIterator[Buffer]:
    """The chunks of one attempt that is given up after `count` bytes."""
    taken = 0
    chunks = body.chunks()
    async for chunk in chunks:
        yield chunk
        taken += len(chunk)
        if taken >= count:
            break
