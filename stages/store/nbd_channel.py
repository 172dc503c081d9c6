"""A byte stream between NBD client and server: a socket, plain or with TLS, without copies where it is plain.

Source: RFC 8446 by way of Python's ssl module. Data goes out of and into the caller's buffers: asyncio's own streams
copy it twice, which is as much work as the kernel's side of it.
"""

from __future__ import annotations

import os
import select
import socket
import ssl
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import anyio
import anyio.lowlevel

from pipeline.units import KiB, MiB
from stages.store.trust import trusting

Buffer = bytes | bytearray | memoryview

_AHEAD = 64 * KiB
# Bytes that may come or go without the other tasks getting a turn.
_TURN = 2 * MiB
_TLS_RECORDS = 256 * KiB


class ChannelClosed(Exception):
    """The other side closed the stream, or the connection broke."""


class Channel:
    """One connected stream socket. One task may receive and one may send at a time. Owns the socket."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # What the kernel takes at once: with its default, every answer of 256 KiB waits for the client twice.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * MiB)
        self._sock = sock
        self._ahead = memoryview(bytearray(_AHEAD))
        self._begin = self._end = 0
        self._unshared = 0
        self._tls: _Tls | None = None

    @property
    def is_secure(self) -> bool:
        """Whether TLS is spoken."""
        return self._tls is not None

    async def start_tls(self, context: ssl.SSLContext, *, host: str) -> None:
        """Speak TLS from here on, as the client.

        Raises:
            ssl.SSLError: no common language, or a certificate that is not trusted.
            ChannelClosed: the other side hung up instead.
        """
        if self._begin != self._end:
            raise ChannelClosed("bytes came before TLS began")  # somebody in between put them there
        tls = _Tls(context, host)
        while True:
            try:
                tls.engine.do_handshake()
                break
            except ssl.SSLWantReadError:
                await self._send_all(tls.outgoing())
                await self._feed(tls)
            except ssl.SSLError:
                await self._send_all(tls.outgoing())  # the alert says why
                raise
        await self._send_all(tls.outgoing())
        self._tls = tls

    async def receive(self, length: int) -> bytes:
        """Exactly `length` bytes. Raises ChannelClosed."""
        if self._end - self._begin >= length:
            self._begin += length
            return bytes(self._ahead[self._begin - length : self._begin])
        made = bytearray(length)
        await self.receive_into(memoryview(made))
        return bytes(made)

    async def receive_into(self, view: memoryview) -> None:
        """Fill the view. Raises ChannelClosed.

        Cancellation: some bytes are lost; the stream can't be used any more.
        """
        done = min(view.nbytes, self._end - self._begin)
        view[:done] = self._ahead[self._begin : self._begin + done]
        self._begin += done
        while done < view.nbytes:
            rest = view[done:]
            if rest.nbytes >= _AHEAD:
                done += await self._some_into(rest)
                continue
            self._begin, self._end = 0, await self._some_into(self._ahead)
            count = min(rest.nbytes, self._end)
            rest[:count] = self._ahead[:count]
            self._begin = count
            done += count

    async def send(self, *buffers: Buffer) -> None:
        """Send all of it, in this order. Raises ChannelClosed.

        Cancellation: some of it was sent; the stream can't be used any more.
        """
        if self._tls is None:
            await self._send_all(buffers)
            return
        for buffer in buffers:
            view = memoryview(buffer)
            for start in range(0, view.nbytes, _TLS_RECORDS):
                self._tls.engine.write(view[start : start + _TLS_RECORDS])
                if view.nbytes > _TLS_RECORDS:
                    await self._send_all(self._tls.outgoing())
        await self._send_all(self._tls.outgoing())

    def send_stored(self, fd: int, pieces: Sequence[tuple[bytes, int, int]], *, patience_s: float) -> None:
        """Send messages whose bytes lie in a file, without taking them into this process. Not with TLS.

        Args:
            pieces: (what comes first, offset in the file, length there; 0 for none).
            patience_s: how long the other side may take nothing.
        Raises:
            ChannelClosed: the other side is gone, takes nothing, or the file ends early.
        Threads: one at a time, while nobody else sends. `shut_down` ends it.
        """
        # All that is asked for is fetched at once: sendfile alone waits for the disk piece by piece.
        for _, offset, length in pieces:
            if length:
                os.posix_fadvise(fd, offset, length, os.POSIX_FADV_WILLNEED)
        for head, offset, length in pieces:
            view = memoryview(head)
            flags = socket.MSG_MORE if length else 0
            while view.nbytes:
                view = view[self._attempt(partial(self._sock.send, view, flags), patience_s) :]
            while length:
                count = self._attempt(partial(os.sendfile, self._sock.fileno(), fd, offset, length), patience_s)
                if not count:
                    raise ChannelClosed("the file ends early")
                offset, length = offset + count, length - count

    def _attempt(self, send: Callable[[], int], patience_s: float) -> int:
        while True:
            try:
                return send()
            except (BlockingIOError, InterruptedError):
                waiting = select.poll()
                waiting.register(self._sock.fileno(), select.POLLOUT)
                if not waiting.poll(1000 * patience_s):
                    raise ChannelClosed("the other side takes nothing") from None
            except OSError as error:
                raise ChannelClosed(error.strerror or str(error)) from None

    def shut_down(self) -> None:
        """Let every call that is under way fail, also in threads; `close` comes after."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    def close(self) -> None:
        """Hang up; idempotent. Whoever waits on the stream gets ChannelClosed."""
        if self._sock.fileno() >= 0:
            anyio.notify_closing(self._sock)
        self._sock.close()

    async def _some_into(self, view: memoryview) -> int:
        if self._tls is None:
            return await self._receive_plain(view)
        while True:
            try:
                count = self._tls.engine.read(view.nbytes, view)
            except ssl.SSLWantReadError:
                await self._feed(self._tls)
                continue
            except ssl.SSLError as error:
                raise ChannelClosed(f"TLS failed: {error.reason}") from None
            if not count:
                raise ChannelClosed("the other side closed the connection")
            return int(count)

    async def _feed(self, tls: _Tls) -> None:
        count = await self._receive_plain(tls.records)
        tls.incoming.write(tls.records[:count])

    async def _receive_plain(self, view: memoryview) -> int:
        while True:
            try:
                count = self._sock.recv_into(view)
            except (BlockingIOError, InterruptedError):
                await self._wait(anyio.wait_readable)
                continue
            except OSError as error:
                raise ChannelClosed(error.strerror or str(error)) from None
            if not count:
                raise ChannelClosed("the other side closed the connection")
            await self._share(count)
            return count

    async def _send_all(self, buffers: Sequence[Buffer]) -> None:
        waiting = [memoryview(one) for one in buffers if len(one)]
        while waiting:
            try:
                count = self._sock.sendmsg(waiting)
            except (BlockingIOError, InterruptedError):
                await self._wait(anyio.wait_writable)
                continue
            except OSError as error:
                raise ChannelClosed(error.strerror or str(error)) from None
            await self._share(count)
            while waiting and count >= waiting[0].nbytes:
                count -= waiting.pop(0).nbytes
            if count:
                waiting[0] = waiting[0][count:]

    async def _wait(self, until: object) -> None:
        self._unshared = 0
        try:
            await until(self._sock)  # type: ignore[operator]  # anyio.wait_readable or anyio.wait_writable
        except (OSError, ValueError, anyio.ClosedResourceError):
            raise ChannelClosed("the connection was closed") from None

    async def _share(self, count: int) -> None:
        """Let the other tasks run now and then, however fast the other side is."""
        self._unshared += count + KiB
        if self._unshared >= _TURN:
            self._unshared = 0
            await anyio.lowlevel.checkpoint()


class _Tls:
    """The state of TLS on a channel."""

    def __init__(self, context: ssl.SSLContext, host: str) -> None:
        self.incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.engine = context.wrap_bio(self.incoming, self._outgoing, server_hostname=host)
        self.records = memoryview(bytearray(_TLS_RECORDS))

    def outgoing(self) -> tuple[Buffer, ...]:
        """What has to be sent now."""
        return (self._outgoing.read(),)


async def connect(address: tuple[str, int] | str) -> Channel:
    """Connect to (host, port), or to a Unix socket by its path. Raises OSError."""
    if isinstance(address, str):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        return await _connected(sock, address)
    failure: OSError | None = None
    for family, kind, protocol, _, where in await anyio.getaddrinfo(*address, type=socket.SOCK_STREAM):
        try:
            return await _connected(socket.socket(family, kind, protocol), where)
        except OSError as error:
            failure = error
    raise failure or OSError("no address")


async def _connected(sock: socket.socket, address: object) -> Channel:
    try:
        sock.setblocking(False)
        try:
            sock.connect(address)  # type: ignore[arg-type]  # of its family
        except BlockingIOError:
            await anyio.wait_writable(sock)
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise OSError(code, os.strerror(code)) from None
        return Channel(sock)
    except BaseException:
        sock.close()
        raise


def client_tls(folder: Path | None, ca_file: Path | None = None) -> ssl.SSLContext:
    """A client's side of TLS: trusts `ca_file`, else `ca-cert.pem` of the folder, else the system; shows the
    folder's `client-cert.pem` where there is one.

    Raises:
        PlanError: what is to be trusted can't be used.
        OSError, ssl.SSLError: the client's own certificate can't.
    """
    trusted = ca_file or (folder / "ca-cert.pem" if folder is not None else None)
    context = trusting(trusted)
    if folder is not None and (folder / "client-cert.pem").exists():
        context.load_cert_chain(folder / "client-cert.pem", folder / "client-key.pem")
    return context
