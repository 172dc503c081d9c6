"""Read an object from a web server by ranges, pinned to the state that it had when it was opened.

Source: RFC 9110, sections 13.1.5 (If-Range), 14.2 (Range), 14.4 (Content-Range) and 15.4 (redirections).
"""

from __future__ import annotations

import base64
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, urljoin, urlsplit

from pipeline.config.options import without_secrets
from pipeline.errors import PlanError, StoreError
from pipeline.units import KiB, MiB
from stages.store.ranged import read_ranged

if TYPE_CHECKING:
    from pipeline.flow.retry import Retry, RetryPolicy
from stages.store.http import HttpClient, Reply, Timeouts

# What a URL may begin with, and how that is asked for: dav is WebDAV, whose files are read like any other.
SCHEMES = {"http": "http", "https": "https", "dav": "http", "davs": "https"}
# One request. Larger ones gain nothing and cost more when they have to be sent again.
_RANGE_MAX = 8 * MiB
# What is read of a reply that is not a range: an error page, or the begin of the whole object.
_REPLY_KEPT = 4 * KiB
_REDIRECTS_MAX = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_CONNECTIONS = 8
_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class WebState:
    """One state of an object on a web server.

    Attributes:
        etag: with its quotes; empty where the server has none.
        modified: the Last-Modified header.
    """

    size: int
    etag: str
    modified: str

    @property
    def validator(self) -> str:
        """What If-Range may carry: a strong ETag, else the date; empty where there is neither."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.modified


class WebReader:
    """Random reads of one state of an object. Made by `open_web_reader`."""

    def __init__(self, place: _Place, state: WebState, retry: Retry) -> None:
        self._place = place
        self._state = state
        self._retry = retry

    @property
    def size(self) -> int:
        """Length of the object in bytes."""
        return self._state.size

    @property
    def state(self) -> WebState:
        """What the object was when it was opened."""
        return self._state

    async def read(self, offset: int, length: int) -> bytes:
        """Exactly these bytes.

        Raises:
            FormatError: the object ends before.
            StoreError: the server failed, or the object was replaced since it was opened.
        """
        return await read_ranged(self._read, offset, length, size=self.size, range_max=_RANGE_MAX)

    async def _read(self, offset: int, length: int) -> bytes:
        return await self._retry.call("read", lambda: self._get(offset, length))

    async def _get(self, offset: int, length: int) -> bytes:
        reply = await self._place.get(offset, length, if_range=self._state.validator)
        first, total = _content_range(reply)
        is_same = reply.status == 206 and total == self.size and reply.header("etag") == self._state.etag
        if not is_same or (not self._state.etag and reply.header("last-modified") != self._state.modified):
            raise StoreError("the object was replaced while it was read", operation="read", url=self._place.shown)
        if first != offset or len(reply.body) != length:
            raise StoreError(
                "the server gave other bytes than were asked for",
                temporary=True,
                operation="read",
                url=self._place.shown,
                offset=offset,
                expected=length,
                got=len(reply.body),
            )
        return reply.body


@dataclass(frozen=True, slots=True, kw_only=True)
class WebAddress:
    """An object on a web server, taken out of a URL with one of `SCHEMES`.

    Attributes:
        origin: `http(s)://host[:port]`.
        url: without user, password and fragment; what is asked for.
        authorization: of the user and password in the URL, as a header has it; empty where there were none.
    """

    origin: str
    url: str
    authorization: str

    @classmethod
    def parse(cls, url: str) -> WebAddress:
        """Take a URL apart. Raises PlanError."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port, parts = None, None, urlsplit("")
        scheme = SCHEMES.get(parts.scheme)
        if scheme is None or not host or re.search(r"[\s\x00-\x1f]", url):
            raise PlanError(
                f'"{without_secrets(url)}" does not name an object',
                operation="plan",
                hint="Write http://HOST/PATH or https://HOST/PATH.",
            )
        host = f"[{host}]" if ":" in host else host
        origin = f"{scheme}://{host}" + (f":{port}" if port else "")
        # The path as the URL has it, but for what no request may hold.
        path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
        authorization = ""
        if parts.username is not None:
            authorization = basic(unquote(parts.username), unquote(parts.password or ""))
        return cls(
            origin=origin,
            url=origin + path + (f"?{parts.query}" if parts.query else ""),
            authorization=authorization,
        )


def basic(user: str, password: str) -> str:
    """An Authorization header. Source: RFC 7617, section 2."""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


class _Place:
    """Where the object really is, after redirections, and the connections to it."""

    def __init__(self, client: HttpClient, url: str, headers: Mapping[str, str]) -> None:
        self._client = client
        self._url = url
        self._headers = headers
        self.shown = without_secrets(url)

    async def get(self, offset: int, length: int, *, if_range: str = "") -> Reply:
        """One range request. Raises StoreError for what is neither a range, the whole object nor a redirection."""
        headers = {**self._headers, "Range": f"bytes={offset}-{offset + length - 1}"}
        if if_range:
            headers["If-Range"] = if_range
        reply = await self._client.request(
            "GET", self._url, headers, operation="read", reply_max=max(length, _REPLY_KEPT), cut=True
        )
        if reply.status in (200, 206, 416, *_REDIRECTS):
            if reply.header("content-encoding") not in ("", "identity"):
                raise StoreError(
                    "the server changes the bytes on the way (Content-Encoding)", operation="read", url=self.shown
                )
            return reply
        raise self._refused(reply)

    def _refused(self, reply: Reply) -> StoreError:
        hints = {
            401: "It wants a user: write https://USER:PASSWORD@HOST/...",
            403: "It does not let us read this; a signed URL may have expired.",
            404: "Check the URL.",
        }
        wait = reply.header("retry-after")
        return StoreError(
            f"the server answered {reply.status}",
            temporary=reply.status in (408, 425, 429) or reply.status >= 500,
            status=reply.status,
            throttled=reply.status in (429, 503),
            retry_after_s=float(wait) if wait.isdigit() else None,
            operation="read",
            hint=hints.get(reply.status, ""),
            url=self.shown,
        )


@asynccontextmanager
async def open_web_reader(
    url: str,
    *,
    endpoint: str = "",
    ca_file: Path | None = None,
    headers: Mapping[str, str] | None = None,
    timeouts: Timeouts | None = None,
    policy: RetryPolicy | None = None,
) -> AsyncIterator[WebReader]:
    """Open `http(s)://...`, or `dav(s)://...`, for random reads.

    Args:
        url: a user and password in it go out as Basic authentication, to its own host only.
        headers: for every request to the origin of `url`, and to no other.
        endpoint: ignored; every opener takes it.
    Raises:
        PlanError: not such a URL.
        StoreError: it can't be reached or read, or the server does not know ranges.
    """
    from pipeline.flow.retry import Retry, RetryPolicy
    from pipeline.flow.stage import RealClock
    from stages.store.http import HttpClient

    retry = Retry(policy or RetryPolicy(), clock=RealClock(), emit=lambda event: None, stage="read")
    first = ""
    for _ in range(_REDIRECTS_MAX + 1):
        address = WebAddress.parse(url)
        first = first or address.origin
        sent = dict(headers or {}) if address.origin == first else {}
        if address.authorization:
            sent["Authorization"] = address.authorization
        client = HttpClient(
            address.origin,
            connections=_CONNECTIONS,
            ca_file=ca_file,
            timeouts=timeouts,
            on_alive=retry.alive,
            told_by="the URL",
        )
        try:
            place = _Place(client, address.url, sent)
            reply = await retry.call("read", lambda place=place: place.get(0, 1))  # type: ignore[misc]  # a default
            if reply.status not in _REDIRECTS:
                yield WebReader(place, _state_of(reply, place.shown), retry)
                return
            url = _redirected(url, address.url, reply, place.shown)
        finally:
            await client.close()
    raise StoreError(f"more than {_REDIRECTS_MAX} redirections", operation="open", url=without_secrets(url))


def _redirected(url: str, address: str, reply: Reply, shown: str) -> str:
    """Where the server says that the object is. Never from https to http, and never with the user's password."""
    target = urljoin(address, reply.header("location"))
    scheme = urlsplit(target).scheme
    if not reply.header("location") or scheme not in ("http", "https"):
        raise StoreError("the server redirects to nowhere", operation="open", url=shown, http=reply.status)
    if SCHEMES[urlsplit(url).scheme] == "https" and scheme != "https":
        raise StoreError(
            "the server redirects from https to http",
            operation="open",
            url=shown,
            hint="Name the http:// address yourself if that is what you want.",
        )
    before, after = urlsplit(url), urlsplit(target)
    if before.username is not None and (SCHEMES[before.scheme], before.hostname, before.port) == (
        after.scheme,
        after.hostname,
        after.port,
    ):
        user = before.netloc.rpartition("@")[0]
        target = after._replace(netloc=f"{user}@{after.netloc}").geturl()
    return target


def _state_of(reply: Reply, shown: str) -> WebState:
    _, total = _content_range(reply)
    if reply.status == 200 or total is None:
        raise StoreError(
            "the server does not know ranges",
            operation="open",
            url=shown,
            hint="Images are read by ranges. Fetch it into a file first, or ask a server that knows them.",
        )
    return WebState(size=total, etag=reply.header("etag"), modified=reply.header("last-modified"))


def _content_range(reply: Reply) -> tuple[int | None, int | None]:
    """(first byte, whole length) as the reply says; None where it does not. An empty object has no first byte."""
    match = _CONTENT_RANGE.fullmatch(reply.header("content-range").strip())
    if match is None:
        return None, None
    return int(match[1]) if match[1] else None, int(match[3])
