"""A proxy that passes HTTP/1.1 between a client and a store, breaks it where its rules say, and remembers what it saw.

The request head is passed on unchanged, with the Host header that the client signed, so SigV4 signatures stay valid.
Each client connection has one connection to the server, made when it is first needed and kept as long as both sides
keep it.
"""

from __future__ import annotations

import http
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum, auto

import anyio

from tests.stores.faults import (
    ArmedRule,
    Delay,
    Fault,
    FlipReply,
    FlipRequest,
    LimitRate,
    LoseReply,
    Reply,
    ResetReply,
    ResetRequest,
    Rule,
    Stall,
    StallRequest,
    TruncateReply,
)
from tests.stores.messages import Body, Framing, Head, MessageReader
from tests.stores.wire import CHUNK, Relay, Wire, WireLost

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_FLIPPED_BITS = 0x55


@dataclass(slots=True, kw_only=True)
class Seen:
    """One request, as far as it came. Changes until `is_done`.

    Attributes:
        connection: the how-manieth accepted connection it came on, from 1; a client's silent retry shows here.
        headers: the request's, names in lower case.
        fault: what was done to it.
        body_bytes: payload of the request that was handed to the server's kernel.
        upstream_status: what the server answered; None while or where it did not.
        status: what the client was given; None where it was given nothing.
        reply_bytes: payload of the reply that was handed to the client's kernel.
        is_stalled: it waits for `FaultProxy.release`.
    """

    connection: int
    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    fault: Fault | None
    body_bytes: int = 0
    upstream_status: int | None = None
    status: int | None = None
    reply_bytes: int = 0
    is_stalled: bool = False
    is_done: bool = False


class FaultProxy(Relay):
    """A proxy with faults: `async with FaultProxy(server.port, rules=[...]) as proxy: ...` with clients at `proxy.url`.

    The first rule that fires for a request is the fault that it meets; a request that no rule wants passes untouched.
    """

    def __init__(self, upstream_port: int, *, rules: Iterable[Rule] = ()) -> None:
        super().__init__(upstream_port)
        self._rules = [ArmedRule(rule) for rule in rules]
        self._released = anyio.Event()
        self._changed = anyio.Event()
        self.seen: list[Seen] = []

    def set_rules(self, *rules: Rule) -> None:
        """Replace the rules, for requests that come from now on; counting starts anew."""
        self._rules = [ArmedRule(rule) for rule in rules]

    def release(self) -> None:
        """Let every stalled request go on. Requests that stall later wait for the next call."""
        self._released.set()
        self._released = anyio.Event()

    def requests(self, method: str | None = None, *, path: str = "", query: str = "") -> list[Seen]:
        """What was seen of these requests, by the same patterns as in a rule, in the order in which they came."""
        pattern = Rule(LoseReply(), method=method, path=path, query=query)
        return [seen for seen in self.seen if ArmedRule(pattern).fires(seen.method, seen.path, seen.query)]

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until this holds; looked at whenever the proxy saw or passed something. Wrap in `fail_after`."""
        while not condition():
            await self._changed.wait()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    def _onward(self, head: Head) -> bytes:
        """The head as the server gets it."""
        return head.raw

    async def _stall(self, seen: Seen) -> None:
        seen.is_stalled = True
        released = self._released
        self._notify()
        try:
            await released.wait()
        finally:
            seen.is_stalled = False

    async def _serve(self, client: Wire, number: int) -> None:
        reader = MessageReader(client)
        upstream = _Upstream(self)
        ending = _Ending.RESET
        try:
            while (head := await reader.head()) is not None:
                seen = self._see(head, number)
                try:
                    ending = await _Exchange(self, reader, upstream, head, seen).run()
                finally:
                    seen.is_done = True
                    self._notify()
                if ending is not _Ending.KEEP:
                    break
            else:
                ending = _Ending.FINISH
        except WireLost:
            ending = _Ending.RESET
        finally:
            upstream.drop(by_reset=ending is _Ending.RESET)
        if ending is _Ending.RESET:
            client.reset()
        else:
            await client.finish()

    def _see(self, head: Head, connection: int) -> Seen:
        method, target, _ = head.start
        path, _, query = target.partition("?")
        firing = [armed.rule.fault for armed in self._rules if armed.fires(method, path, query)]
        seen = Seen(
            connection=connection,
            method=method,
            path=path,
            query=query,
            headers=head.headers,
            fault=firing[0] if firing else None,
        )
        self.seen.append(seen)
        self._notify()
        return seen


class _Ending(Enum):
    """What becomes of the client's connection after an exchange."""

    KEEP = auto()
    FINISH = auto()
    RESET = auto()


class _Upstream:
    """The connection to the server that belongs to one client connection."""

    def __init__(self, proxy: FaultProxy) -> None:
        self._proxy = proxy
        self._reader: MessageReader | None = None

    async def reader(self) -> MessageReader:
        """The connection, made anew where there is none or the server closed it."""
        if self._reader is not None and self._reader.wire.is_at_end():
            self.drop(by_reset=False)
        if self._reader is None:
            self._reader = MessageReader(await self._proxy._connect())
        return self._reader

    def drop(self, *, by_reset: bool) -> None:
        if self._reader is not None:
            if by_reset:
                self._reader.wire.reset()
            self._proxy._drop(self._reader.wire)
            self._reader = None


class _Fired(Exception):
    """The fault's moment has come: reset the client."""


class _Exchange:
    """One request and its reply."""

    def __init__(self, proxy: FaultProxy, reader: MessageReader, upstream: _Upstream, head: Head, seen: Seen) -> None:
        self._proxy = proxy
        self._client = reader.wire
        self._upstream = upstream
        self._head = head
        self._seen = seen
        self._body = Body(reader, Framing.of_request(head))
        self._ending = _Ending.KEEP

    async def run(self) -> _Ending:
        match self._seen.fault:
            case Reply(when="head") as reply:
                await self._answer(reply, closing=True)
                return _Ending.FINISH
            case Reply() as reply:
                await self._swallow_request()
                await self._answer(reply, closing=False)
                return _Ending.KEEP
            case ResetRequest(after_bytes=0):
                return _Ending.RESET
            case Stall(at="head"):
                await self._proxy._stall(self._seen)
        try:
            server = await self._upstream.reader()
        except ConnectionRefusedError:
            return _Ending.RESET
        async with anyio.create_task_group() as group:
            self._scope = group.cancel_scope
            group.start_soon(self._send, server.wire)
            await self._receive(server)
        return self._ending

    def _break(self, ending: _Ending) -> None:
        self._ending = ending
        self._scope.cancel()

    # --- answering in the server's place

    async def _answer(self, reply: Reply, *, closing: bool) -> None:
        headers = {"Content-Length": str(len(reply.body)), **reply.headers}
        if closing:
            headers["Connection"] = "close"
        lines = [f"HTTP/1.1 {reply.status} {http.HTTPStatus(reply.status).phrase}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        body = b"" if self._seen.method == "HEAD" else reply.body
        await self._client.send("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
        self._seen.status = reply.status
        self._seen.reply_bytes = len(body)

    async def _swallow_request(self) -> None:
        if self._head.headers.get("expect", "").lower() == "100-continue":
            await self._client.send(_CONTINUE)
        while await self._body.next():
            pass

    # --- client to server

    async def _send(self, server: Wire) -> None:
        try:
            await self._pass_request(server)
        except _Fired:
            self._break(_Ending.RESET)
        except WireLost as lost:
            if lost.wire is self._client:
                self._break(_Ending.RESET)
            # A server that takes no more may have answered why: `_receive` finds out.

    async def _pass_request(self, server: Wire) -> None:
        seen, fault = self._seen, self._seen.fault
        await server.send(self._proxy._onward(self._head))
        limit = max(1024, min(CHUNK, int(fault.bytes_per_s / 20))) if isinstance(fault, LimitRate) else CHUNK
        due = anyio.current_time()
        while span := await self._body.next(limit):
            data = span.raw
            if span.is_payload:
                match fault:
                    case ResetRequest(after_bytes=count) if seen.body_bytes + len(data) >= count:
                        await self._pass(server, data[: count - seen.body_bytes])
                        raise _Fired
                    case StallRequest(after_bytes=count) if seen.body_bytes <= count < seen.body_bytes + len(data):
                        cut = count - seen.body_bytes
                        await self._pass(server, data[:cut])
                        await self._proxy._stall(seen)
                        data = data[cut:]
                    case FlipRequest(offset=offset):
                        data = _flipped(data, offset - seen.body_bytes)
                    case LimitRate(bytes_per_s=rate):
                        due = max(due, anyio.current_time()) + len(data) / rate
                        await anyio.sleep_until(due)
                await self._pass(server, data)
            else:
                await server.send(data)
        if isinstance(fault, ResetRequest):
            raise _Fired

    async def _pass(self, server: Wire, data: bytes) -> None:
        await server.send(data)
        self._seen.body_bytes += len(data)
        self._proxy._notify()

    # --- server to client

    async def _receive(self, server: MessageReader) -> None:
        try:
            ending = await self._pass_reply(server)
        except WireLost as lost:
            # The client sees what the proxy saw: a reset, or an orderly end where a reply should have been.
            ending = _Ending.RESET if lost.by_reset or lost.wire is self._client else _Ending.FINISH
        if ending is not _Ending.KEEP:
            self._break(ending)

    async def _pass_reply(self, server: MessageReader) -> _Ending:
        seen, fault = self._seen, self._seen.fault
        head = await self._final_head(server)
        seen.upstream_status = head.status
        self._proxy._notify()
        body = Body(server, Framing.of_response(head, seen.method))
        match fault:
            case LoseReply():
                while await body.next():
                    pass
                return _Ending.RESET
            case Stall(at="reply"):
                await self._proxy._stall(seen)
            case Delay(seconds=seconds):
                await anyio.sleep(seconds)
        await self._client.send(head.raw)
        seen.status = head.status
        stops_after = fault.after_bytes if isinstance(fault, ResetReply | TruncateReply) else None
        while stops_after != seen.reply_bytes and (span := await body.next()):
            data = span.raw
            if span.is_payload:
                if stops_after is not None:
                    data = data[: stops_after - seen.reply_bytes]
                elif isinstance(fault, FlipReply):
                    data = _flipped(data, fault.offset - seen.reply_bytes)
                seen.reply_bytes += len(data)
            await self._client.send(data)
            self._proxy._notify()
        if isinstance(fault, ResetReply):
            await self._client.delivered()
            return _Ending.RESET
        closes = self._head.wants_close() or head.wants_close() or not body.is_complete
        return _Ending.FINISH if closes or body.framing.kind == "until close" else _Ending.KEEP

    async def _final_head(self, server: MessageReader) -> Head:
        while True:
            head = await server.head()
            if head is None:
                raise WireLost(server.wire, by_reset=False)
            if head.status >= 200:
                return head
            await self._client.send(head.raw)


def _flipped(data: bytes, offset: int) -> bytes:
    """The same bytes with one changed, where the offset lies within them."""
    if not 0 <= offset < len(data):
        return data
    changed = bytearray(data)
    changed[offset] ^= _FLIPPED_BITS
    return bytes(changed)
