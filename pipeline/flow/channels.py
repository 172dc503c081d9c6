"""Bounded channels that carry items by reference, time their waits and count guest bytes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Generic, Protocol, TypeVar

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from pipeline.flow.meter import StageMeter


class Counted(Protocol):
    """Anything that accounts for guest bytes."""

    @property
    def guest_bytes(self) -> int: ...


T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
T_contra = TypeVar("T_contra", contravariant=True)


class Inlet(Protocol[T_co]):
    """Where a stage takes its items from: `async for item in inlet`. Ends when the sender returned normally."""

    def __aiter__(self) -> AsyncIterator[T_co]: ...


class Outlet(Protocol[T_contra]):
    """Where a stage puts its items. The engine ends the stream; a stage never does."""

    async def send(self, item: T_contra) -> None:
        """Hand the item, and its slice, on; waits while the channel is full."""
        ...


class Channel(Generic[T]):
    """One edge of the chain: both ends, with the waits of either side booked on its meter.

    Attributes:
        guest_bytes: the sum over the items sent, for the conservation check.
    """

    def __init__(self, *, depth: int, sender: StageMeter, receiver: StageMeter) -> None:
        send: MemoryObjectSendStream[T]
        receive: MemoryObjectReceiveStream[T]
        send, receive = anyio.create_memory_object_stream[T](depth)
        self._send = send
        self._receive = receive
        self._sender = sender
        self._receiver = receiver
        self.guest_bytes = 0
        self.ended = False

    async def send(self, item: T) -> None:
        """Outlet side."""
        with self._sender.waiting("out"):
            await self._send.send(item)
        self.guest_bytes += getattr(item, "guest_bytes", 0)

    def __aiter__(self) -> AsyncIterator[T]:
        return self._items()

    async def _items(self) -> AsyncIterator[T]:
        while True:
            with self._receiver.waiting("in"):
                try:
                    item = await self._receive.receive()
                except anyio.EndOfStream:
                    return
            yield item

    def end(self) -> None:
        """Say that the stream is complete. Called by the engine when the sending stage returned normally."""
        self.ended = True
        self._send.close()

    def discard(self) -> None:
        """Close both ends after every task is gone; not an end of stream."""
        self._send.close()
        self._receive.close()
