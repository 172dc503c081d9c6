"""A client of NBD servers: several connections that are made again when they were lost, many requests under way.

Source: "The NBD protocol" (NetworkBlockDevice/nbd, doc/proto.md) and "The NBD URI format" (doc/uri.md).

There is no task behind it: of the callers that wait for answers, one receives for all. A caller that is cancelled while
it receives leaves half an answer in the stream, so that connection is given up and the others ask again.
"""

from __future__ import annotations

import errno
import ssl
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar
from urllib.parse import parse_qs, quote, unquote, urlsplit

import anyio

from pipeline.config.options import without_secrets
from pipeline.errors import FormatError, PlanError, StoreError, first_error
from pipeline.flow.retry import Retry, RetryPolicy
from pipeline.flow.stage import RealClock
from pipeline.units import MiB, format_duration
from stages.store import nbd_wire as wire
from stages.store.nbd_channel import Channel, ChannelClosed, client_tls, connect

T = TypeVar("T")

SCHEMES = ("nbd", "nbds", "nbd+unix", "nbds+unix")
# Bytes of one read or write request. Larger ones gain nothing, and more of them keep several connections busy.
REQUEST_MAX = MiB
# Requests under way on all connections: as many MiB as one batch of a writer and the next.
REQUESTS = 16
# Four connections to nbdkit are twice as fast as one (loopback); more gain nothing.
CONNECTIONS = 4
# What a server that writes zeros by itself may have to do before it answers: short enough for a slow disk.
_ZEROES_AT_ONCE = 128 * MiB
# Chunks that a structured reply may come in, however small a server cuts them.
_CHUNKS_MAX = 64 * 1024
_TEMPORARY = (errno.EIO, errno.ENOMEM, errno.ESHUTDOWN)


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """When a server is given up. Seconds.

    Attributes:
        connect_s: name lookup, connecting and agreeing on the export.
        progress_s: no byte of an answer came while requests were under way.
        slow_s: as long may a flush, a trim or writing zeros take.
    """

    connect_s: float = 15.0
    progress_s: float = 30.0
    slow_s: float = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NbdUrl:
    """`nbd[s]://host[:port]/export` or `nbd[s]+unix:///export?socket=PATH`.

    Attributes:
        address: (host, port), or the path of a Unix socket.
        certificates: folder with ca-cert.pem, client-cert.pem and client-key.pem.
        tls_host: the name that the server's certificate has to have.
    """

    address: tuple[str, int] | str
    export: str
    is_secure: bool
    certificates: Path | None = None
    tls_host: str = ""

    @classmethod
    def parse(cls, url: str) -> NbdUrl:
        """Take a URL apart. Raises PlanError where it is not one, or asks for what is not known here."""
        try:
            parts = urlsplit(url)
            port = parts.port or wire.DEFAULT_PORT
            query = {
                name: values[-1] for name, values in parse_qs(parts.query, strict_parsing=bool(parts.query)).items()
            }
        except ValueError:
            parts, port, query = urlsplit(""), 0, {}
        socket = query.pop("socket", "")
        certificates, tls_host = query.pop("tls-certificates", ""), query.pop("tls-hostname", "")
        is_unix = parts.scheme.endswith("+unix")
        if "tls-psk-file" in query:
            raise PlanError(
                "TLS with a shared secret is not spoken here",
                operation="plan",
                hint="Use certificates: nbds://HOST/EXPORT?tls-certificates=FOLDER",
            )
        unknown = ", ".join(sorted(query))
        has_place = bool(socket) and not parts.hostname if is_unix else bool(parts.hostname) and not socket
        if parts.scheme not in SCHEMES or not has_place or unknown or parts.password is not None or parts.fragment:
            raise PlanError(
                f'"{without_secrets(url)}" does not name an NBD export' + (f" (unknown: {unknown})" if unknown else ""),
                operation="plan",
                hint="Write nbd://HOST:PORT/EXPORT, nbds:// for TLS, or nbd+unix:///EXPORT?socket=PATH.",
            )
        address = socket if is_unix else (parts.hostname or "", port)
        host = tls_host or ("localhost" if is_unix else parts.hostname or "")
        return cls(
            address=address,
            export=unquote(parts.path.removeprefix("/")),
            is_secure=parts.scheme.startswith("nbds"),
            certificates=Path(certificates) if certificates else None,
            tls_host=host,
        )

    def __str__(self) -> str:
        scheme = "nbds" if self.is_secure else "nbd"
        query = {"tls-certificates": str(self.certificates)} if self.certificates is not None else {}
        if isinstance(self.address, str):
            where, query = f"{scheme}+unix://", {"socket": self.address, **query}
        else:
            host, port = self.address
            shown = f"[{host}]" if ":" in host else host
            where = f"{scheme}://{shown}" + (f":{port}" if port != wire.DEFAULT_PORT else "")
        tail = "&".join(f"{name}={quote(value)}" for name, value in query.items())
        return f"{where}/{quote(self.export)}" + (f"?{tail}" if tail else "")


class NbdError(StoreError):
    """The server answered with an error.

    Attributes:
        code: the protocol's number, which is an errno of Linux.
    """

    def __init__(self, message: str, *, code: int, **more: object) -> None:
        super().__init__(message, temporary=code in _TEMPORARY, **more)  # type: ignore[arg-type]  # context
        self.code = code


@dataclass(slots=True, eq=False)
class _Ticket:
    """A request under way.

    Attributes:
        into: where the bytes of a read go; None for other requests.
        missing: bytes of a read that have not come yet.
        chunks: of a structured reply, so far.
    """

    command: int
    offset: int
    into: memoryview | None = None
    missing: int = 0
    chunks: int = 0
    extents: tuple[tuple[int, int], ...] = ()
    error: Exception | None = None
    is_done: bool = False
    wake: anyio.Event = field(default_factory=anyio.Event)


class NbdConnection:
    """One connection to one export. Never mends itself: once `is_lost`, it stays so."""

    def __init__(self, channel: Channel, info: wire.ExportInfo, *, context: int | None, patience: Patience) -> None:
        """Take over a channel that has reached the transmission phase; see `open_connection`.

        Args:
            context: number of base:allocation; None where the server does not tell block status.
        """
        self.info = info
        self.is_lost = False
        self.uses = 0
        self._channel = channel
        self._context = context
        self._patience = patience
        self._tickets: dict[int, _Ticket] = {}
        self._next = 1
        self._sending = anyio.Lock()
        self._is_receiving = False

    @property
    def knows_status(self) -> bool:
        """Whether `block_status` can be asked."""
        return self._context is not None

    async def read(self, offset: int, into: memoryview) -> None:
        """Fill `into` from the export's bytes at `offset`. Raises StoreError."""
        ticket = _Ticket(wire.Command.READ, offset, into, into.nbytes)
        await self._ask(ticket, into.nbytes)

    async def write(self, offset: int, data: memoryview, *, fua: bool = False) -> None:
        """Write; durable when it returns where `fua`. Raises StoreError."""
        await self._ask(_Ticket(wire.Command.WRITE, offset), data.nbytes, wire.FUA if fua else 0, data)

    async def block_status(self, offset: int, length: int) -> tuple[tuple[int, int], ...]:
        """(length, flags) of extents from `offset` on; they may end before or behind the range. Raises StoreError."""
        ticket = _Ticket(wire.Command.BLOCK_STATUS, offset)
        await self._ask(ticket, length)
        if not ticket.extents:
            raise self._lose(StoreError("the server answered without a block status", operation="block status"))
        return ticket.extents

    async def command(self, command: int, offset: int = 0, length: int = 0, flags: int = 0) -> None:
        """A flush, trim or zeroing, with a longer deadline. Raises StoreError."""
        await self._ask(_Ticket(command, offset), length, flags)

    def close(self) -> None:
        """Hang up; idempotent. Requests under way fail."""
        self._lose(StoreError("the connection was closed", operation="nbd", temporary=True))

    async def say_goodbye(self) -> None:
        """End the session as the protocol wants it, then hang up."""
        if not self.is_lost and not self._tickets:
            with anyio.move_on_after(1.0):
                try:
                    await self._channel.send(wire.pack_request(wire.Command.DISC, 0))
                except ChannelClosed:
                    pass
        self.close()

    async def _ask(self, ticket: _Ticket, length: int, flags: int = 0, payload: memoryview | None = None) -> None:
        if self.is_lost:
            raise _lost("the connection is gone")
        handle, self._next = self._next, self._next + 1
        self._tickets[handle] = ticket
        self.uses += 1
        head = wire.pack_request(ticket.command, handle, ticket.offset, length, flags)
        try:
            async with self._sending:
                with self._giving_up(self._patience.progress_s):
                    await self._channel.send(*((head, payload) if payload is not None else (head,)))
            is_slow = ticket.command in (wire.Command.FLUSH, wire.Command.TRIM, wire.Command.WRITE_ZEROES)
            while not ticket.is_done:
                if self._is_receiving:
                    await ticket.wake.wait()
                    ticket.wake = anyio.Event() if not ticket.is_done else ticket.wake
                    continue
                self._is_receiving = True
                try:
                    with self._giving_up(self._patience.slow_s if is_slow else self._patience.progress_s):
                        await self._receive()
                finally:
                    self._is_receiving = False
        except BaseException as error:
            # Whatever it was, half a request or half an answer may be on its way.
            if not ticket.is_done:
                self._lose(error)
            raise
        finally:
            self._tickets.pop(handle, None)
            self.uses -= 1
            self._pass_on()
        if ticket.error is not None:
            raise ticket.error

    def _pass_on(self) -> None:
        """Somebody else has to receive now."""
        if not self._is_receiving:
            for other in self._tickets.values():
                if not other.is_done:
                    other.wake.set()
                    return

    @contextmanager
    def _giving_up(self, after_s: float) -> Iterator[None]:
        """While inside, a server that says nothing for so long, or nonsense, or hangs up, is lost."""
        try:
            with anyio.fail_after(after_s):
                yield
        except TimeoutError:
            raise self._lose(
                StoreError(f"the server did not answer for {format_duration(after_s)}", operation="nbd", temporary=True)
            ) from None
        except ChannelClosed as error:
            raise self._lose(_lost(f"the connection was lost: {error}")) from None
        except wire.NbdProtocolError as error:
            raise self._lose(
                StoreError(f"the server breaks the protocol: {error.message}", operation="nbd", **error.context)  # type: ignore[arg-type]  # context
            ) from None

    def _lose(self, error: BaseException) -> StoreError:
        """Give the connection up; everybody who waits gets the error."""
        # What is no StoreError is the end of a caller that was cancelled while it received.
        told = error if isinstance(error, StoreError) else _lost("another request was cancelled")
        if not self.is_lost:
            self.is_lost = True
            self._channel.close()
            for ticket in self._tickets.values():
                if not ticket.is_done:
                    ticket.error, ticket.is_done = told, True
                    ticket.wake.set()
        return told

    async def _receive(self) -> None:
        """One simple reply, or one chunk."""
        head = await self._channel.receive(4)
        magic = int.from_bytes(head, "big")
        if magic == wire.SIMPLE_MAGIC:
            _, code, handle = wire.SIMPLE_REPLY.unpack(head + await self._channel.receive(wire.SIMPLE_REPLY.size - 4))
            await self._simple(self._ticket(handle), code)
        elif magic == wire.CHUNK_MAGIC:
            rest = await self._channel.receive(wire.CHUNK.size - 4)
            _, flags, kind, handle, length = wire.CHUNK.unpack(head + rest)
            await self._chunk(self._ticket(handle), kind, length, is_last=bool(flags & wire.DONE))
        else:
            raise wire.NbdProtocolError(f"an answer begins with 0x{magic:08x}", operation="nbd")

    def _ticket(self, handle: int) -> _Ticket:
        ticket = self._tickets.get(handle)
        if ticket is None or ticket.is_done:
            raise wire.NbdProtocolError("there is an answer to a question that nobody asked", operation="nbd")
        return ticket

    async def _simple(self, ticket: _Ticket, code: int) -> None:
        if code:
            ticket.error = _refused(ticket, code, "")
        elif ticket.into is not None:
            await self._channel.receive_into(ticket.into)
            ticket.missing = 0
        self._end(ticket)

    async def _chunk(self, ticket: _Ticket, kind: int, length: int, *, is_last: bool) -> None:
        ticket.chunks += 1
        if ticket.chunks > _CHUNKS_MAX:
            raise wire.NbdProtocolError("an answer comes in too many chunks", operation="nbd")
        if kind == wire.Chunk.OFFSET_DATA and ticket.into is not None:
            if length <= wire.OFFSET.size:
                raise wire.NbdProtocolError("a chunk holds no data", operation="nbd", length=length)
            (offset,) = wire.OFFSET.unpack(await self._channel.receive(wire.OFFSET.size))
            await self._channel.receive_into(self._room(ticket, offset, length - wire.OFFSET.size))
        elif kind == wire.Chunk.OFFSET_HOLE and ticket.into is not None and length == wire.HOLE.size:
            offset, hole = wire.HOLE.unpack(await self._channel.receive(length))
            room = self._room(ticket, offset, hole)
            room[:] = bytes(room.nbytes)
        elif kind == wire.Chunk.BLOCK_STATUS and ticket.command == wire.Command.BLOCK_STATUS:
            if length > wire.CONTEXT.size + wire.EXTENTS_MAX * wire.EXTENT.size:
                raise wire.NbdProtocolError("a block status is too long", operation="nbd", length=length)
            number, extents = wire.unpack_extents(await self._channel.receive(length))
            if number == self._context:
                ticket.extents = extents
        elif kind & wire.CHUNK_ERROR:
            if length > wire.TEXT_MAX + 16:
                raise wire.NbdProtocolError("an error message is too long", operation="nbd", length=length)
            code, text = wire.unpack_error(await self._channel.receive(length))
            ticket.error = _refused(ticket, code, text)
        elif kind != wire.Chunk.NONE or length:
            raise wire.NbdProtocolError(f"an answer has a chunk of the unknown kind {kind}", operation="nbd")
        if is_last:
            self._end(ticket)

    def _room(self, ticket: _Ticket, offset: int, length: int) -> memoryview:
        """Where the bytes of a chunk belong."""
        assert ticket.into is not None, "only reads get data"
        start = offset - ticket.offset
        if start < 0 or start + length > ticket.into.nbytes or length > ticket.missing:
            raise wire.NbdProtocolError("there are bytes that nobody asked for", operation="nbd", offset=offset)
        ticket.missing -= length
        return ticket.into[start : start + length]

    def _end(self, ticket: _Ticket) -> None:
        if ticket.error is None and ticket.missing:
            raise wire.NbdProtocolError("bytes are missing in an answer", operation="nbd", missing=ticket.missing)
        ticket.is_done = True
        ticket.wake.set()


def _lost(reason: str) -> StoreError:
    # A new connection may work at once.
    return StoreError(reason, operation="nbd", temporary=True, retry_after_s=0)


_HINTS = {
    errno.ENOSPC: "The server's storage is full. Free space there, or choose another target.",
    errno.EPERM: "The export is read-only, or the server lets this client only read.",
    errno.EIO: "The storage behind the server failed; look at the server's log.",
}


def _refused(ticket: _Ticket, code: int, text: str) -> NbdError:
    verbs = {one.value: one.name.lower().replace("_", " ") for one in wire.Command}
    reason = wire.ERRORS.get(code, f"error {code}")
    return NbdError(
        f"the server answered: {reason}" + (f" ({_printable(text)})" if text else ""),
        code=code,
        operation=verbs.get(ticket.command, "nbd"),
        offset=ticket.offset,
        hint=_HINTS.get(code, ""),
    )


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text[:200])


# ---- the handshake ---------------------------------------------------------------------------------------------------


async def open_connection(
    url: NbdUrl, *, ca_file: Path | None = None, patience: Patience | None = None
) -> NbdConnection:
    """Connect, speak TLS where the URL says so, and agree on the export.

    Raises:
        PlanError: the certificates to trust can't be used.
        StoreError: no connection, no such export, wrong certificate; `temporary` where it may work later.
    """
    patience = patience or Patience()
    shown = str(url)
    try:
        with anyio.fail_after(patience.connect_s):
            channel = await connect(url.address)
            try:
                return await _agree(channel, url, ca_file, patience)
            except BaseException:
                channel.close()
                raise
    except TimeoutError:
        raise StoreError("can't connect: no answer in time", temporary=True, operation="connect", url=shown) from None
    except ChannelClosed as error:
        raise StoreError(f"can't connect: {error}", temporary=True, operation="connect", url=shown) from None
    except wire.NbdProtocolError as error:
        raise StoreError(
            f"this is no NBD server that is understood here: {error.message}",
            operation="connect",
            url=shown,
            hint="Check host and port. Servers of the old style are not spoken to.",
        ) from None
    except ssl.SSLCertVerificationError as error:
        raise StoreError(
            f"the certificate of the server is not trusted: {error.verify_message}",
            operation="connect",
            url=shown,
            hint="Name a folder with the authority's ca-cert.pem: ?tls-certificates=FOLDER in the URL.",
        ) from None
    except ssl.SSLError as error:
        raise StoreError(f"TLS failed: {error.reason or error}", operation="connect", url=shown) from None
    except OSError as error:
        missing = isinstance(url.address, str) and error.errno in (errno.ENOENT, errno.EACCES)
        raise StoreError(
            f"can't connect: {error.strerror or error}",
            temporary=not missing,
            operation="connect",
            url=shown,
            hint="Check host, port or socket in the URL, that the server runs, and that no firewall is in between.",
        ) from None


async def _agree(channel: Channel, url: NbdUrl, ca_file: Path | None, patience: Patience) -> NbdConnection:
    magic, options, server_flags = wire.GREETING.unpack(await channel.receive(wire.GREETING.size))
    if magic != wire.INIT_MAGIC or options != wire.OPTION_MAGIC or not server_flags & wire.FIXED_NEWSTYLE:
        raise wire.NbdProtocolError("the greeting is not that of a fixed newstyle server", operation="connect")
    no_zeroes = server_flags & wire.NO_ZEROES
    await channel.send(wire.CLIENT_FLAGS.pack(wire.FIXED_NEWSTYLE | no_zeroes))
    haggle = _Haggle(channel, url)
    if url.is_secure:
        await haggle.ask(wire.Opt.STARTTLS)
        await channel.start_tls(client_tls(url.certificates, ca_file), host=url.tls_host)
    context = None
    if await haggle.ask(wire.Opt.STRUCTURED_REPLY, optional=True) is not None:
        context = await haggle.context()
    info = await haggle.go()
    if info is None:
        # A server without GO does not answer this option: it begins, or hangs up where there is no such export.
        await channel.send(wire.pack_option(wire.Opt.EXPORT_NAME, url.export.encode()))
        size, flags = wire.EXPORT.unpack(await channel.receive(wire.EXPORT.size))
        if not no_zeroes:
            await channel.receive(wire.EXPORT_ZEROES)
        info = wire.ExportInfo(size=size, flags=flags)
    if info.size >= 2**63:
        raise wire.NbdProtocolError("the export's size makes no sense", operation="connect", size=info.size)
    return NbdConnection(channel, info, context=context, patience=patience)


class _Haggle:
    """Options and their answers."""

    def __init__(self, channel: Channel, url: NbdUrl) -> None:
        self._channel = channel
        self._url = url

    async def ask(
        self, option: wire.Opt, data: bytes = b"", *, optional: bool = False
    ) -> list[tuple[int, bytes]] | None:
        """Send an option; the answers before the final ACK. None where the server does not know an `optional` one.

        Raises:
            StoreError: the server refuses it.
        """
        await self._channel.send(wire.pack_option(option, data))
        answers: list[tuple[int, bytes]] = []
        while True:
            head = await self._channel.receive(wire.OPTION_REPLY.size)
            magic, about, kind, length = wire.OPTION_REPLY.unpack(head)
            if magic != wire.REPLY_MAGIC or about != option or length > wire.OPTION_MAX or len(answers) > 10_000:
                raise wire.NbdProtocolError("an answer to an option makes no sense", operation="connect")
            told = await self._channel.receive(length)
            if kind == wire.Rep.ACK:
                return answers
            if kind & wire.REP_ERROR:
                if optional and kind in (wire.Rep.ERR_UNSUP, wire.Rep.ERR_POLICY, wire.Rep.ERR_INVALID):
                    return None
                raise await self._refused(option, kind, told.decode(errors="replace"))
            answers.append((kind, told))

    async def context(self) -> int | None:
        """The number under which the server tells of holes; None where it does not."""
        data = wire.pack_contexts(self._url.export, [wire.ALLOCATION])
        for kind, told in await self.ask(wire.Opt.SET_META_CONTEXT, data, optional=True) or ():
            fields = wire.Fields(told)
            if kind == wire.Rep.META_CONTEXT:
                number = fields.number(wire.CONTEXT)
                if fields.text(fields.rest) == wire.ALLOCATION:
                    return number
        return None

    async def go(self) -> wire.ExportInfo | None:
        """What the server says of the export; None where it does not know this option."""
        answers = await self.ask(wire.Opt.GO, wire.pack_go(self._url.export, [wire.Info.BLOCK_SIZE]), optional=True)
        if answers is None:
            return None
        export: tuple[int, int] | None = None
        sizes = (wire.BLOCK_MIN, wire.BLOCK_PREFERRED, wire.PAYLOAD_MAX)
        for kind, told in answers:
            if kind == wire.Rep.INFO and told[:2] == wire.U16.pack(wire.Info.EXPORT):
                export = wire.unpack_export(told[2:])
            elif kind == wire.Rep.INFO and told[:2] == wire.U16.pack(wire.Info.BLOCK_SIZE):
                sizes = wire.unpack_block_sizes(told[2:])
        if export is None:
            raise wire.NbdProtocolError("the server does not say how large the export is", operation="connect")
        return wire.ExportInfo(
            size=export[0], flags=export[1], block_min=sizes[0], block_preferred=sizes[1], payload_max=sizes[2]
        )

    async def _refused(self, option: wire.Opt, kind: int, text: str) -> StoreError:
        said = f" ({_printable(text)})" if text else ""
        if kind == wire.Rep.ERR_TLS_REQD:
            return StoreError(
                f"the server wants TLS{said}",
                operation="connect",
                url=str(self._url),
                hint="Write nbds:// instead of nbd://.",
            )
        if option == wire.Opt.STARTTLS:
            return StoreError(
                f"the server does not speak TLS{said}",
                operation="connect",
                url=str(self._url),
                hint="Write nbd:// where the network in between is yours.",
            )
        if kind == wire.Rep.ERR_UNKNOWN:
            names = await self._names()
            return StoreError(
                f"the server has no such export{said}",
                operation="connect",
                url=str(self._url),
                export=self._url.export or '""',
                hint=f"It has: {', '.join(names)}." if names else "",
            )
        reasons = {one.value: one.name.removeprefix("ERR_").lower() for one in wire.Rep}
        return StoreError(
            f"the server refuses {option.name.lower()}: {reasons.get(kind, hex(kind))}{said}",
            temporary=kind == wire.Rep.ERR_SHUTDOWN,
            operation="connect",
            url=str(self._url),
        )

    async def _names(self) -> list[str]:
        """The exports that the server tells of, for a hint."""
        try:
            answers = await self.ask(wire.Opt.LIST, optional=True)
            names = [wire.Fields(told).text() for kind, told in answers or () if kind == wire.Rep.SERVER]
        except (StoreError, ChannelClosed, wire.NbdProtocolError):
            return []
        return [_printable(name) or '""' for name in names[:8]]


# ---- many connections ------------------------------------------------------------------------------------------------


class NbdClient:
    """One export, over as many connections as server and work want. Every call has the whole budget of `retry`."""

    def __init__(
        self,
        url: NbdUrl,
        retry: Retry,
        *,
        ca_file: Path | None = None,
        patience: Patience | None = None,
        connections: int = CONNECTIONS,
    ) -> None:
        """Prepare it; nothing is sent."""
        self.url = url
        self.retry = retry
        self.made = 0
        self.losses = 0  # connections that broke; behind each may be a server that was restarted
        self._ca_file = ca_file
        self._patience = patience or Patience()
        self._limit = connections
        self._connections: list[NbdConnection] = []
        self._connecting = anyio.Lock()
        self._info: wire.ExportInfo | None = None
        self.knows_status = False  # whether the server tells data from zeros
        self._room = anyio.Semaphore(REQUESTS)

    @property
    def info(self) -> wire.ExportInfo:
        """What the server said of the export when it was opened first."""
        assert self._info is not None, "open comes first"
        return self._info

    async def open(self) -> wire.ExportInfo:
        """Connect once. Raises StoreError."""
        await self.retry.call("connect", self._connection)
        return self.info

    async def close(self) -> None:
        """Take leave of the server; idempotent."""
        connections, self._connections = self._connections, []
        for one in connections:
            await one.say_goodbye()

    async def read(self, offset: int, length: int) -> bytes:
        """Exactly these bytes of the export. Raises StoreError."""
        block = self.info.block_min
        begin, end = offset - offset % block, offset + length + -(offset + length) % block
        made = bytearray(end - begin)
        view = memoryview(made)
        await self._each(
            [
                lambda at=start, part=view[start - begin : start - begin + self._request]: self._read(at, part)  # type: ignore[misc]  # defaults
                for start in range(begin, end, self._request)
            ]
        )
        return bytes(view[offset - begin : offset - begin + length])

    async def write(self, parts: Sequence[tuple[int, memoryview]], *, fua: bool = False) -> None:
        """Write these bytes at their offsets.

        Args:
            parts: borrowed until this returns.
        Raises:
            StoreError: some of it may have been written.
        """
        calls: list[Callable[[], Awaitable[None]]] = []
        for offset, view in parts:
            for at, part in await self._aligned(offset, view):
                for start in range(0, part.nbytes, self._request):
                    bite = part[start : start + self._request]
                    calls.append(lambda at=at + start, bite=bite: self._write(at, bite, fua))  # type: ignore[misc]  # as above
        await self._each(calls)

    async def zero(self, offset: int, length: int, *, keep: bool = False) -> None:
        """Make these bytes zero, by whatever way the server has; without `keep` it may give the storage back.

        Raises:
            StoreError: some of it may have been done.
        """
        block = self.info.block_min
        begin = offset + -offset % block
        end = offset + length - (offset + length) % block
        if not self.info.can(wire.SEND_WRITE_ZEROES) or begin >= end:
            for start in range(offset, offset + length, self._request):
                count = min(self._request, offset + length - start)
                await self.write([(start, memoryview(bytes(count)))])
            return
        edges = [(offset, begin - offset), (end, offset + length - end)]
        await self.write([(at, memoryview(bytes(count))) for at, count in edges if count])
        flags = wire.NO_HOLE if keep else 0
        await self._each(
            [
                lambda at=at: self._command(  # type: ignore[misc]  # as above
                    "write zeroes", wire.Command.WRITE_ZEROES, at, min(_ZEROES_AT_ONCE, end - at), flags
                )
                for at in range(begin, end, _ZEROES_AT_ONCE)
            ]
        )

    async def trim(self, offset: int, length: int) -> None:
        """Tell the server that nobody needs these bytes; what they read as afterwards is anybody's guess.

        Whole blocks only; nothing happens where the server does not know it. Raises StoreError.
        """
        block = self.info.block_min
        begin, end = offset + -offset % block, offset + length - (offset + length) % block
        if self.info.can(wire.SEND_TRIM):
            for at in range(begin, end, wire.LENGTH_MAX):
                await self._command("trim", wire.Command.TRIM, at, min(wire.LENGTH_MAX, end - at), 0)

    async def flush(self) -> None:
        """All that was acknowledged is durable when this returns, where the server knows how. Raises StoreError."""
        if self.info.can(wire.SEND_FLUSH):
            # Once is enough for all connections: more than one is made only where the server says so (CAN_MULTI_CONN).
            await self._command("flush", wire.Command.FLUSH, 0, 0, 0)

    async def status(self, offset: int, length: int) -> tuple[tuple[int, int], ...]:
        """(length, flags) of extents that cover a part of the range, from its begin on. Raises StoreError."""
        block = self.info.block_min
        begin = offset - offset % block
        end = min(self.info.size, begin + min(wire.LENGTH_MAX, offset + length - begin + -(offset + length) % block))
        found = await self._retried("block status", lambda one: one.block_status(begin, end - begin))
        cut: list[tuple[int, int]] = []
        position = begin
        for count, flags in found:
            stop = min(position + count, self.info.size)
            if stop > offset:
                cut.append((stop - max(position, offset), flags))
            position = stop
        if not cut:
            raise StoreError("the server's block status ends before it begins", operation="block status", offset=offset)
        return tuple(cut)

    # -- one request --------------------------------------------------------------------------------------------------

    @property
    def _request(self) -> int:
        """Bytes of one read or write, in whole blocks."""
        limit = min(REQUEST_MAX, self.info.payload_max)
        return max(limit - limit % self.info.block_min, self.info.block_min)

    async def _read(self, offset: int, into: memoryview) -> None:
        await self._retried("read", lambda one: one.read(offset, into))

    async def _write(self, offset: int, data: memoryview, fua: bool) -> None:
        durable = fua and self.info.can(wire.SEND_FUA)
        await self._retried("write", lambda one: one.write(offset, data, fua=durable))
        if fua and not durable:
            await self.flush()

    async def _command(self, verb: str, command: int, offset: int, length: int, flags: int) -> None:
        await self._retried(verb, lambda one: one.command(command, offset, length, flags))

    async def _aligned(self, offset: int, view: memoryview) -> list[tuple[int, memoryview]]:
        """The bytes in whole blocks: what a first or last block has beside them is read."""
        block = self.info.block_min
        head, tail = offset % block, -(offset + view.nbytes) % block
        if not head and not tail:
            return [(offset, view)]
        before = await self.read(offset - head, head)
        after = await self.read(offset + view.nbytes, tail)
        return [(offset - head, memoryview(b"".join((before, view, after))))]

    async def _retried(self, verb: str, call: Callable[[NbdConnection], Awaitable[T]]) -> T:
        async def attempt() -> T:
            return await call(await self._connection())

        async with self._room:
            return await self.retry.call(verb, attempt)

    async def _each(self, calls: Sequence[Callable[[], Awaitable[None]]]) -> None:
        if len(calls) == 1:
            await calls[0]()
            return
        waiting = deque(calls)

        async def work() -> None:
            while waiting:
                await waiting.popleft()()

        try:
            async with anyio.create_task_group() as tasks:
                for _ in range(min(len(calls), REQUESTS)):
                    tasks.start_soon(work)
        except BaseExceptionGroup as group:
            raise first_error(group) from None

    async def _connection(self) -> NbdConnection:
        """The connection with the least to do, made where there is none or all are busy. Raises StoreError."""
        if usable := self._usable():
            return usable
        async with self._connecting:
            if usable := self._usable():
                return usable
            made = await open_connection(self.url, ca_file=self._ca_file, patience=self._patience)
            if self._info is None:
                self._info, self.knows_status = made.info, made.knows_status
            elif (made.info.size, made.info.flags) != (self._info.size, self._info.flags):
                made.close()
                raise StoreError(
                    "the server has another export under this name now",
                    operation="connect",
                    url=str(self.url),
                    expected=self._info.size,
                    got=made.info.size,
                )
            self._connections.append(made)
            self.made += 1
            return made

    def _usable(self) -> NbdConnection | None:
        working = [one for one in self._connections if not one.is_lost]
        self.losses += len(self._connections) - len(working)
        self._connections = working
        best = min(self._connections, key=lambda one: one.uses, default=None)
        if best is None or self._info is None:
            return None
        limit = self._limit if self._info.can(wire.CAN_MULTI_CONN) else 1
        return best if not best.uses or len(self._connections) >= limit else None


# ---- reading ---------------------------------------------------------------------------------------------------------


class NbdReader:
    """An export, or its first `size` bytes, for random reads; knows what reads as zero where the server tells."""

    def __init__(self, client: NbdClient, size: int | None = None) -> None:
        """Borrow an opened client."""
        self._client = client
        self.size = client.info.size if size is None else size
        self._known: deque[range] = deque()  # stretches with data behind the last place that was asked for
        self._known_from = self._known_to = 0

    async def read(self, offset: int, length: int) -> bytes:
        """Exactly these bytes.

        Raises:
            FormatError: the export ends before.
            StoreError: the server failed.
        """
        if offset < 0 or length < 0 or offset + length > self.size:
            raise FormatError(
                "the export ends before this range", operation="read", offset=offset, length=length, size=self.size
            )
        return await self._client.read(offset, length)

    async def next_data(self, offset: int) -> range | None:
        """The first stretch with data that ends behind `offset`; None where zeros follow up to the end.

        A server without block status calls everything data. Raises StoreError.
        """
        if not self._client.knows_status:
            return range(offset, self.size) if offset < self.size else None
        position = offset
        while position < self.size:
            if not self._known_from <= position < self._known_to:
                await self._look(position)
            for stretch in self._known:
                if stretch.stop > position:
                    return range(stretch.start, min(stretch.stop, self.size))
            position = self._known_to
        return None

    async def _look(self, offset: int) -> None:
        extents = await self._client.status(offset, self.size - offset)
        known: deque[range] = deque()
        position = offset
        for length, flags in extents:
            if not flags & wire.STATE_ZERO:
                begin = known.pop().start if known and known[-1].stop == position else position
                known.append(range(begin, position + length))
            position += length
        self._known, self._known_from, self._known_to = known, offset, position


@asynccontextmanager
async def open_nbd_reader(
    url: str,
    *,
    endpoint: str = "",
    ca_file: Path | None = None,
    patience: Patience | None = None,
    policy: RetryPolicy | None = None,
) -> AsyncIterator[NbdReader]:
    """Open `nbd://...` for random reads.

    Args:
        endpoint: ignored; every opener takes it.
    Raises:
        PlanError: not such a URL.
        StoreError: it can't be reached, or has no such export.
    """
    retry = Retry(policy or RetryPolicy(), clock=RealClock(), emit=lambda event: None, stage="read")
    client = NbdClient(NbdUrl.parse(url), retry, ca_file=ca_file, patience=patience)
    try:
        await client.open()
        yield NbdReader(client)
    finally:
        await client.close()
