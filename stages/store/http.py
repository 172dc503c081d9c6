"""HTTP requests to a store: bodies streamed without copies, no silent second sending, nothing waits for ever.

aiohttp's exceptions end here; everything above sees replies and StoreErrors.
"""

from __future__ import annotations

import urllib.request
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Protocol
from urllib.parse import urlsplit

import aiohttp
import anyio
import yarl

from pipeline import __version__
from pipeline.errors import StoreError
from pipeline.units import KiB, MiB, format_duration
from stages.store.digests import Buffer
from stages.store.trust import trusting


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """When a request is given up. Seconds, and bytes a second.

    Attributes:
        connect_s: name lookup, TCP and TLS.
        progress_s: without one byte going out or coming in. Waiting for the chain's next bytes does not count.
        floor_bytes_per_s: a server that takes bytes more slowly than this on average, over `progress_s` and what the
            bytes sent so far may take, counts as stalled too; the same for those that it gives.
        reply_s: from the last byte of the request to the last of the reply, beside what its bytes may take. Completing
            a large upload takes minutes, during which a store sends a space now and then.
    """

    connect_s: float = 10.0
    progress_s: float = 30.0
    floor_bytes_per_s: float = 16 * KiB
    reply_s: float = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a server answered.

    Attributes:
        headers: names in lower case.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes

    def header(self, name: str) -> str:
        """A header by its lower-case name; empty where it is missing."""
        return self.headers.get(name, "")


class SendBody(Protocol):
    """What `request` sends: a length (None: sent in chunks, RFC 9112 section 7.1), and chunks for one attempt."""

    @property
    def length(self) -> int | None: ...

    def chunks(self) -> AsyncIterator[Buffer]: ...


class BytesBody:
    """A short body that is in memory."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    @property
    def length(self) -> int:
        """Bytes."""
        return len(self._data)

    async def chunks(self) -> AsyncIterator[Buffer]:
        """All of it."""
        yield self._data


# Bytes that a server's and our socket buffers swallow without the server doing anything; only more are a sign of life.
_SOCKET_BUFFERS = 16 * MiB
# The longest reply that is read where the caller names no limit: error messages, listings.
REPLY_MAX = MiB


class HttpClient:
    """Connections to one origin. Made and used on one event loop; `close` it in the end.

    HTTP proxies are taken from the environment (`https_proxy`, `no_proxy` ...). Redirects are never followed.
    """

    def __init__(
        self,
        origin: str,
        *,
        connections: int,
        ca_file: Path | None = None,
        timeouts: Timeouts | None = None,
        on_alive: Callable[[], None] = lambda: None,
        told_by: str = '"endpoint"',
    ) -> None:
        """Prepare it; nothing is sent.

        Args:
            origin: `scheme://host[:port]`.
            told_by: where the user wrote the origin, for hints.
            ca_file: PEM certificates to trust instead of the system's.
            on_alive: called whenever the server gives a sign of life.
        Raises:
            PlanError: the CA file can't be used.
            StoreError: the environment names what is no proxy.
        """
        self.origin = origin
        self._timeouts = timeouts or Timeouts()
        self._on_alive = on_alive
        self._connections = connections
        self._told_by = told_by
        self._tls = trusting(ca_file) if origin.startswith("https:") else None
        self._proxy = _proxy_for(origin)
        self._session: aiohttp.ClientSession | None = None

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=self._connections, ssl=self._tls if self._tls is not None else True)
            self._session = aiohttp.ClientSession(
                connector=connector,
                timeout=aiohttp.ClientTimeout(
                    total=None,
                    connect=None,  # would count waiting for a free connection of the pool, as long as a part takes
                    sock_connect=self._timeouts.connect_s,
                    sock_read=self._timeouts.progress_s,
                ),
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
                trace_configs=[_watching()],
                skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
            )
        return self._session

    async def request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: SendBody | None = None,
        *,
        operation: str,
        reply_max: int = REPLY_MAX,
        cut: bool = False,
    ) -> Reply:
        """Send one request, once, and read the reply to its end.

        Args:
            url: of the client's origin, quoted already; sent as it is.
            body: its chunks are taken once. An error that they raise comes out of here unchanged.
            operation: the verb for errors.
            reply_max: a longer reply is an error.
            cut: no error, but a body that ends after `reply_max` bytes; the connection is given up.
        Raises:
            StoreError: no reply came; temporary, with `retry_after_s=0` where a new connection may help at once.
                A reply of any status is returned, not raised.
        Cancellation: the connection is closed; the server may have got everything.
        """
        session = self._opened()
        begun = anyio.current_time()
        watch = _Watch(self._timeouts)
        sender = _Sender(body, watch, self._on_alive) if body is not None else None
        sent = dict(headers)
        if body is not None and body.length is not None:
            sent["Content-Length"] = str(body.length)
        sent.setdefault("User-Agent", f"disk-pipeline/{__version__}")
        sent.setdefault("Accept-Encoding", "identity")
        try:
            with watch.scope:
                async with session.request(
                    method,
                    yarl.URL(url, encoded=True),
                    headers=sent,
                    data=sender.chunks() if sender is not None else None,
                    proxy=self._proxy,
                    allow_redirects=False,
                    middlewares=(_Once(),),
                    trace_request_ctx=watch,
                ) as response:
                    received = bytearray()
                    if method != "HEAD":
                        while chunk := await response.content.readany():
                            received += chunk
                            watch.received(len(chunk))
                            if len(received) > reply_max:
                                if cut:
                                    del received[reply_max:]
                                    response.close()
                                    break
                                raise StoreError("the reply is too long", operation=operation, limit=reply_max)
                    self._on_alive()
                    if sender is not None and response.status < 300 and not sender.is_complete:
                        raise StoreError("the server answered before it had all of the body", operation=operation)
                    return Reply(
                        status=response.status,
                        headers={name.lower(): value for name, value in response.headers.items()},
                        body=bytes(received),
                    )
            raise self._stalled(operation, watch, anyio.current_time() - begun)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            if sender is not None and sender.error is not None:
                raise sender.error from None
            raise self._converted(error, operation) from None

    def _stalled(self, operation: str, watch: _Watch, after_s: float) -> StoreError:
        return StoreError(
            watch.complaint,
            temporary=True,
            operation=operation,
            endpoint=self.origin,
            after=format_duration(after_s),
        )

    def _converted(self, error: Exception, operation: str) -> StoreError:
        if isinstance(error, aiohttp.ClientConnectorCertificateError):
            return StoreError(
                f"the certificate of the store is not trusted: {error.certificate_error}",
                operation=operation,
                endpoint=self.origin,
                hint='Set "ca_file" to the PEM file of the authority that signed it.',
            )
        if isinstance(error, (aiohttp.ClientConnectorDNSError, aiohttp.ClientConnectorSSLError)):
            return StoreError(
                f"can't connect: {error}",
                temporary=isinstance(error, aiohttp.ClientConnectorDNSError),
                operation=operation,
                endpoint=self.origin,
                hint=f"Check {self._told_by}: host name, port, and https or http.",
            )
        if isinstance(error, aiohttp.ClientHttpProxyError):  # its status is not the store's
            hint = "Name the store in no_proxy, or have the proxy let it through."
            if error.status == 407:
                hint = "Set https_proxy=http://USER:PASSWORD@HOST:PORT, with what is special in them as %XX."
            return StoreError(
                f"the proxy answered {error.status} {error.message}".rstrip(),
                temporary=error.status == 429 or error.status >= 500,
                operation=operation,
                endpoint=self.origin,
                proxy=_place(self._proxy),
                hint=hint,
            )
        if isinstance(error, aiohttp.ClientProxyConnectionError):
            return StoreError(
                f"can't connect to the proxy: {_reason(error)}",
                temporary=True,
                operation=operation,
                endpoint=self.origin,
                proxy=_place(self._proxy),
                hint="Check https_proxy and http_proxy, or name the store in no_proxy.",
            )
        if isinstance(error, (aiohttp.ConnectionTimeoutError, aiohttp.ClientConnectorError)):
            reason = "no connection in time" if isinstance(error, TimeoutError) else _reason(error)
            return StoreError(
                f"can't connect: {reason}",
                temporary=True,
                operation=operation,
                endpoint=self.origin,
                hint=f"Check {self._told_by}, that the store runs, and that no firewall is in between.",
            )
        if isinstance(error, (aiohttp.InvalidURL, aiohttp.ClientPayloadError)) and not isinstance(error, OSError):
            cut = isinstance(error, aiohttp.ClientPayloadError)
            message = "the reply was cut short" if cut else f"not a URL: {error}"
            return StoreError(message, temporary=cut, operation=operation, endpoint=self.origin)
        if isinstance(error, TimeoutError):
            return StoreError(
                f"no answer for {format_duration(self._timeouts.progress_s)}",
                temporary=True,
                operation=operation,
                endpoint=self.origin,
            )
        if isinstance(error, aiohttp.ClientResponseError):
            return StoreError(f"not an HTTP reply: {error.message}", operation=operation, endpoint=self.origin)
        # 0: the first retry need not wait, a reused connection is often closed just when it is used again.
        return StoreError(
            f"the connection was lost: {_reason(error)}",
            temporary=True,
            retry_after_s=0.0,
            operation=operation,
            endpoint=self.origin,
        )

    async def close(self) -> None:
        """Close every connection; idempotent."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()


class _Once:
    """Middleware that lets a request out a single time.

    aiohttp sends idempotent requests again by itself when a reused connection turns out to be closed. Here a retry is
    counted, told and signed anew, so it has to be ours.
    """

    def __init__(self) -> None:
        self._sent = False

    async def __call__(
        self, request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        if self._sent:
            raise aiohttp.ServerDisconnectedError("the connection was closed before it was used again")
        self._sent = True
        return await handler(request)


class _Watch:
    """The deadlines of one request, one after the other; none while it waits for a free connection or for the chain.

    aiohttp's own know neither name lookups nor proxies nor a server that takes nothing, and start anew with every byte.
    """

    def __init__(self, timeouts: Timeouts) -> None:
        self.scope = anyio.CancelScope()
        self.complaint = ""
        self.timeouts = timeouts
        self._reply_ends = float("inf")

    def connecting(self) -> None:
        """A connection is being made: name lookup, proxy, TCP, TLS."""
        patience = self.timeouts.connect_s
        self._until(anyio.current_time() + patience, f"no connection within {format_duration(patience)}")

    def connected(self) -> None:
        """It is made, or was there."""
        self.scope.deadline = float("inf")

    def sending(self, patience_s: float) -> None:
        """Bytes were handed on; the next ones should be asked for before long."""
        patience = max(0.0, min(self.timeouts.progress_s, patience_s))
        text = f"the store stopped taking data for {format_duration(self.timeouts.progress_s)}"
        self._until(anyio.current_time() + patience, text)

    def taken(self) -> None:
        """They were asked for; now it is the chain that takes its time."""
        self.scope.deadline = float("inf")

    def sent(self) -> None:
        """The whole request is on its way."""
        self._reply_ends = anyio.current_time() + self.timeouts.reply_s
        self._until(self._reply_ends, f"the reply did not end within {format_duration(self.timeouts.reply_s)}")

    def received(self, count: int) -> None:
        """Some of the reply's body came."""
        self._reply_ends += count / self.timeouts.floor_bytes_per_s
        self.scope.deadline = self._reply_ends

    def _until(self, deadline: float, complaint: str) -> None:
        self.complaint = complaint
        self.scope.deadline = deadline


def _watching() -> aiohttp.TraceConfig:
    """Tells each request's watch where aiohttp is with it."""

    async def connecting(session: object, context: SimpleNamespace, params: object) -> None:
        context.trace_request_ctx.connecting()

    async def connected(session: object, context: SimpleNamespace, params: object) -> None:
        context.trace_request_ctx.connected()

    async def head_sent(
        session: object, context: SimpleNamespace, params: aiohttp.TraceRequestHeadersSentParams
    ) -> None:
        if params.headers.get("Content-Length", "0") == "0" and "Transfer-Encoding" not in params.headers:
            context.trace_request_ctx.sent()

    trace = aiohttp.TraceConfig()
    trace.on_connection_create_start.append(connecting)
    trace.on_connection_create_end.append(connected)
    trace.on_request_headers_sent.append(head_sent)
    return trace


class _Sender:
    """Takes a body's chunks for aiohttp, remembers an error of theirs, and watches that the server takes them.

    Its watch ends the request when nothing went out for too long; aiohttp itself watches only what comes in.
    """

    def __init__(self, body: SendBody, watch: _Watch, on_alive: Callable[[], None]) -> None:
        self._body = body
        self._watch = watch
        self._on_alive = on_alive
        self.error: Exception | None = None
        self.is_complete = body.length == 0

    async def chunks(self) -> AsyncIterator[Buffer]:
        sent, sending_s = 0, 0.0
        length = self._body.length
        timeouts = self._watch.timeouts
        try:
            async with aclosing(self._body.chunks()) as chunks:  # type: ignore[type-var]  # a generator in all cases
                async for chunk in chunks:
                    begun = anyio.current_time()
                    self._watch.sending(timeouts.progress_s + sent / timeouts.floor_bytes_per_s - sending_s)
                    # Before the last byte goes: its answer may be here before this runs again.
                    self.is_complete = length == sent + len(chunk)
                    yield chunk
                    sending_s += anyio.current_time() - begun
                    self._watch.taken()
                    sent += len(chunk)
                    if sent > _SOCKET_BUFFERS:
                        self._on_alive()
            if length is not None and sent != length:
                raise ValueError(f"the body has {sent} of {length} bytes")
            self.is_complete = True
            self._watch.sent()
        except Exception as error:
            self.error = error
            raise


def _reason(error: BaseException) -> str:
    inner = error.__cause__ if isinstance(error.__cause__, OSError) else error
    os_error = getattr(inner, "os_error", inner)
    text = getattr(os_error, "strerror", None) or str(os_error) or type(os_error).__name__
    return str(text)


def _proxy_for(origin: str) -> str | None:
    parts = urlsplit(origin)
    if urllib.request.proxy_bypass(parts.netloc):
        return None
    told = urllib.request.getproxies().get(parts.scheme)
    if not told:
        return None
    proxy = told if "://" in told else f"http://{told}"  # as curl and wget take it
    try:
        where = urlsplit(proxy)
        is_usable = where.scheme in ("http", "https") and bool(where.hostname) and where.port != 0
    except ValueError:
        is_usable = False
    if not is_usable:  # its value is not shown: it may hold a password
        raise StoreError(
            f"what {parts.scheme}_proxy says is not the URL of an HTTP proxy",
            operation="connect",
            endpoint=origin,
            hint=f"Write {parts.scheme}_proxy=http://HOST:PORT, or name the store in no_proxy.",
        )
    return proxy


def _place(proxy: str | None) -> str:
    """Host and port, without user and password."""
    return urlsplit(proxy or "").netloc.rpartition("@")[2]
