"""TCP connections on loopback, held by their plain sockets: what a proxy needs to break them at a chosen byte.

asyncio's transports cannot reset a connection (they send FIN first), and read ahead on their own.
"""

from __future__ import annotations

import fcntl
import socket
import struct
import termios
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Literal, Self

import anyio
import anyio.lowlevel

from tests.stores.process import free_ports

LOOPBACK = "127.0.0.1"
# A proxy carried 0.6 to 1.1 GiB/s with 64, 128, 256 and 512 KiB alike (2 busy cores).
CHUNK = 256 * 1024
# How much a sender can hand to a wire that nobody reads. The default grows to 6 MiB, and a whole part would vanish in
# it.
_SOCKET_BUFFER = 256 * 1024
_DRAIN_DEADLINE_S = 2.0
_LINGER_DEADLINE_S = 2.0


class WireLost(Exception):
    """The other end of a wire is gone, or the wire was reset under whoever used it."""

    def __init__(self, wire: Wire, *, by_reset: bool) -> None:
        super().__init__("reset" if by_reset else "closed")
        self.wire = wire
        self.by_reset = by_reset


class Gate:
    """A switch on many wires: while it is shut nothing passes, and nobody is told."""

    def __init__(self) -> None:
        self._opened: anyio.Event | None = None

    @property
    def is_shut(self) -> bool:
        """True while nothing passes."""
        return self._opened is not None

    def shut(self) -> None:
        """Let nothing pass from now on."""
        if self._opened is None:
            self._opened = anyio.Event()

    def open(self) -> None:
        """Let pass what waits, and what comes."""
        if self._opened is not None:
            self._opened.set()
            self._opened = None

    async def passed(self) -> None:
        """Wait until the gate is open."""
        while self._opened is not None:
            await self._opened.wait()


class Wire:
    """One TCP connection."""

    def __init__(self, connection: socket.socket, gate: Gate) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connection
        self._gate = gate

    async def receive(self, limit: int = CHUNK) -> bytes:
        """Read what is there, at most `limit` bytes; empty at the end of the stream.

        Raises:
            WireLost: the other side reset the connection, or `reset` was called here.
        """
        await anyio.lowlevel.checkpoint()
        while True:
            if self._gate.is_shut:
                await self._gate.passed()
            try:
                return self._socket.recv(limit)
            except BlockingIOError:
                await self._wait(anyio.wait_readable)
            except OSError:
                raise WireLost(self, by_reset=True) from None

    async def send(self, data: bytes | bytearray | memoryview) -> None:
        """Hand all of these bytes to the kernel.

        Raises:
            WireLost: the other side does not take them any more.
        """
        rest = memoryview(data)
        while rest:
            if self._gate.is_shut:
                await self._gate.passed()
            try:
                rest = rest[self._socket.send(rest) :]
            except BlockingIOError:
                await self._wait(anyio.wait_writable)
            except OSError:
                raise WireLost(self, by_reset=True) from None

    def end(self) -> None:
        """Send no more (FIN); the other side may go on."""
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # It is gone already.

    async def finish(self) -> None:
        """Send no more, take what still comes for a while so that our last bytes are not lost to a reset, and close."""
        self.end()
        with anyio.move_on_after(_LINGER_DEADLINE_S):
            try:
                while await self.receive():
                    pass
            except WireLost:
                pass
        self.close()

    async def delivered(self) -> None:
        """Wait until the other side's kernel has all that was sent, because a reset throws away the rest."""
        with anyio.move_on_after(_DRAIN_DEADLINE_S):
            while self._unsent():  # Only the kernel knows, and it does not tell.
                await anyio.sleep(0.001)

    def reset(self) -> None:
        """Break the connection with RST; whoever waits on the wire gets WireLost."""
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        except OSError:
            pass  # Closed already.
        self.close()

    def close(self) -> None:
        """Close the connection; twice does no harm."""
        if self._socket.fileno() >= 0:
            anyio.notify_closing(self._socket)
            self._socket.close()

    def is_at_end(self) -> bool:
        """True when the other side has closed and nothing is left to read."""
        try:
            return not self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _unsent(self) -> int:
        try:
            (count,) = struct.unpack("i", fcntl.ioctl(self._socket, termios.TIOCOUTQ, b"\0" * 4))
        except (OSError, ValueError):
            return 0
        return int(count)

    async def _wait(self, readiness: Callable[[socket.socket], Awaitable[None]]) -> None:
        try:
            await readiness(self._socket)
        except (anyio.ClosedResourceError, OSError, ValueError):
            raise WireLost(self, by_reset=True) from None


class Relay(ABC):
    """Something that listens on a free loopback port and passes on to a server; the parts that every kind shares.

    As an asynchronous context manager, inside a test's body: it works from `async with` to its end, where every
    connection is dropped. All methods are for the event loop's thread.
    """

    def __init__(self, upstream_port: int) -> None:
        self._upstream_port = upstream_port
        self._gate = Gate()
        self._listener: socket.socket | None = None
        self._listening = anyio.Event()
        self._wires: set[Wire] = set()
        (self._port,) = free_ports(1)
        self._connections = 0

    @property
    def port(self) -> int:
        """Where clients connect; the same after `cut` and `mend`."""
        return self._port

    @property
    def url(self) -> str:
        """The http endpoint for clients."""
        return f"http://{LOOPBACK}:{self._port}"

    @property
    def connections(self) -> int:
        """How many connections were accepted so far."""
        return self._connections

    def cut(self, how: Literal["refuse", "blackhole"] = "refuse") -> None:
        """Break the network.

        Args:
            how: `refuse` resets every connection and refuses new ones, as a dead server's machine does; `blackhole`
                lets no byte pass and says nothing, as a dead network does: new connections are made by the kernel and
                then stay silent.
        """
        if how == "blackhole":
            self._gate.shut()
            return
        for wire in list(self._wires):
            wire.reset()
        if self._listener is not None:
            self._listening = anyio.Event()
            anyio.notify_closing(self._listener)
            self._listener.close()
            self._listener = None

    def mend(self) -> None:
        """Undo `cut`: what a blackhole held goes on where it stopped, and the same port accepts again."""
        self._gate.open()
        if self._listener is None:
            self._listen()

    async def __aenter__(self) -> Self:
        self._listen()
        self._group = anyio.create_task_group()
        await self._group.__aenter__()
        self._group.start_soon(self._accept_all)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        self._group.cancel_scope.cancel()
        try:
            return await self._group.__aexit__(kind, error, trace)
        finally:
            for wire in list(self._wires):
                wire.close()
            if self._listener is not None:
                self._listener.close()

    @abstractmethod
    async def _serve(self, client: Wire, number: int) -> None:
        """Handle one connection, the number-th; its wires are dropped when this returns."""

    async def _connect(self) -> Wire:
        """Make a connection to the server.

        Raises:
            ConnectionRefusedError: nothing listens there now.
        """
        connection = socket.socket()
        wire = self._hold(connection)
        try:
            connection.connect((LOOPBACK, self._upstream_port))
        except BlockingIOError:
            await anyio.wait_writable(connection)
            if connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise ConnectionRefusedError from None
        return wire

    def _drop(self, wire: Wire) -> None:
        self._wires.discard(wire)
        wire.close()

    def _hold(self, connection: socket.socket) -> Wire:
        wire = Wire(connection, self._gate)
        self._wires.add(wire)
        return wire

    def _listen(self) -> None:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BUFFER)  # Accepted connections inherit it.
        listener.setblocking(False)
        listener.bind((LOOPBACK, self._port))
        listener.listen(1024)
        self._listener = listener
        self._listening.set()

    async def _accept_all(self) -> None:
        while True:
            await self._listening.wait()
            await self._gate.passed()
            if (listener := self._listener) is None:
                continue
            try:
                connection, _ = listener.accept()
            except BlockingIOError:
                try:
                    await anyio.wait_readable(listener)
                except (anyio.ClosedResourceError, ValueError):
                    pass  # Cut while it waited.
                continue
            self._connections += 1
            self._group.start_soon(self._serve_one, self._hold(connection), self._connections)

    async def _serve_one(self, client: Wire, number: int) -> None:
        try:
            await self._serve(client, number)
        finally:
            self._drop(client)
