"""HTTP/1.1 messages on a wire: heads whole, bodies span by span, passed on byte for byte.

Source: RFC 9112, sections 2 (message format), 6.3 (message body length) and 7.1 (chunked).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from functools import cached_property
from typing import Literal

from tests.stores.wire import CHUNK, Wire, WireLost

_HEAD_MAX = 64 * 1024
_LINE_MAX = 8 * 1024


class MessageError(Exception):
    """Bytes that are not HTTP/1.1; a bug of the client or the server under test."""


@dataclass(frozen=True, kw_only=True)  # Without slots: `headers` is worked out once, when first asked for.
class Head:
    """The start line and the headers of a request or a response; `raw` ends with the blank line."""

    raw: bytes

    @property
    def start(self) -> tuple[str, str, str]:
        """The three words of the start line: method, target, version, or version, status, reason."""
        words = self.raw.partition(b"\r\n")[0].decode("latin-1").split(" ", 2)
        if len(words) < 2:
            raise MessageError(f"not a start line: {self.raw[:80]!r}")
        return words[0], words[1], words[2] if len(words) > 2 else ""

    @property
    def status(self) -> int:
        """The status of a response."""
        return int(self.start[1])

    @cached_property
    def headers(self) -> Mapping[str, str]:
        """Headers with their names in lower case; of a repeated one the last."""
        found = {}
        for line in self.raw.split(b"\r\n")[1:]:
            name, colon, value = line.decode("latin-1").partition(":")
            if colon:
                found[name.strip().lower()] = value.strip()
        return found

    def wants_close(self) -> bool:
        """True when the sender will not use the connection again."""
        tokens = self.headers.get("connection", "").lower()
        return "close" in tokens or (b"HTTP/1.0" in self.raw.partition(b"\r\n")[0] and "keep-alive" not in tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Framing:
    """Where a body ends.

    Attributes:
        length: bytes; None where chunks say it, or the end of the connection.
    """

    kind: Literal["length", "chunked", "until close"]
    length: int | None = None

    @classmethod
    def of_request(cls, head: Head) -> Framing:
        """A request without a length and without chunks has no body."""
        return cls._declared(head) or cls(kind="length", length=0)

    @classmethod
    def of_response(cls, head: Head, method: str) -> Framing:
        """An answer to HEAD, 1xx, 204 and 304 have no body, whatever their headers say."""
        if method == "HEAD" or head.status < 200 or head.status in (204, 304):
            return cls(kind="length", length=0)
        return cls._declared(head) or cls(kind="until close")

    @classmethod
    def _declared(cls, head: Head) -> Framing | None:
        if "chunked" in head.headers.get("transfer-encoding", "").lower():
            return cls(kind="chunked")
        if (length := head.headers.get("content-length")) is not None:
            return cls(kind="length", length=int(length))
        return None


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive bytes of a message: payload of the body, or framing around it."""

    raw: bytes
    is_payload: bool


class MessageReader:
    """Reads one message after another from a wire."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self._held = b""

    async def head(self) -> Head | None:
        """Read the next head; None when the wire ended between two messages.

        Raises:
            WireLost: it ended within the head, or was reset.
        """
        while b"\r\n\r\n" not in self._held:
            if len(self._held) > _HEAD_MAX:
                raise MessageError(f"no end of the head in {_HEAD_MAX} bytes: {self._held[:200]!r}")
            more = await self.wire.receive(_HEAD_MAX)
            if not more and not self._held:
                return None
            self._held += self._not_empty(more)
        raw, _, self._held = self._held.partition(b"\r\n\r\n")
        return Head(raw=raw + b"\r\n\r\n")

    async def some(self, limit: int) -> bytes:
        """Read what is there, at most `limit` bytes; empty at the end of the wire."""
        if self._held:
            taken, self._held = self._held[:limit], self._held[limit:]
            return taken
        return await self.wire.receive(limit)

    async def line(self) -> bytes:
        """Read up to and with the next line end."""
        while b"\r\n" not in self._held:
            if len(self._held) > _LINE_MAX:
                raise MessageError(f"no line end in {_LINE_MAX} bytes: {self._held[:80]!r}")
            self._held += self._not_empty(await self.wire.receive(_LINE_MAX))
        line, _, self._held = self._held.partition(b"\r\n")
        return line + b"\r\n"

    def _not_empty(self, more: bytes) -> bytes:
        if not more:
            raise WireLost(self.wire, by_reset=False)
        return more


class _Place(Enum):
    SIZE = auto()
    PAYLOAD = auto()
    LINE_END = auto()
    TRAILER = auto()
    END = auto()


class Body:
    """The body of one message, read span by span."""

    def __init__(self, reader: MessageReader, framing: Framing) -> None:
        self._reader = reader
        self.framing = framing
        self._left = framing.length or 0  # Payload bytes until the end of the body, or of the chunk.
        self._place = {"chunked": _Place.SIZE, "until close": _Place.PAYLOAD}.get(
            framing.kind, _Place.PAYLOAD if self._left else _Place.END
        )

    @property
    def is_complete(self) -> bool:
        """True once all of it was read."""
        return self._place is _Place.END

    async def next(self, limit: int = CHUNK) -> Span | None:
        """Read the next span, of at most `limit` payload bytes; None after the last.

        Raises:
            WireLost: the wire ended within the body.
        """
        match self._place:
            case _Place.END:
                return None
            case _Place.PAYLOAD:
                return await self._payload(limit)
            case _Place.SIZE:
                line = await self._reader.line()
                self._left = int(line.partition(b";")[0], 16)
                self._place = _Place.PAYLOAD if self._left else _Place.TRAILER
            case _Place.LINE_END:
                line = await self._reader.line()
                self._place = _Place.SIZE
            case _Place.TRAILER:
                line = await self._reader.line()
                if line == b"\r\n":
                    self._place = _Place.END
        return Span(line, False)

    async def _payload(self, limit: int) -> Span | None:
        if self.framing.kind == "until close":
            data = await self._reader.some(limit)
            if not data:
                self._place = _Place.END
                return None
            return Span(data, True)
        data = await self._reader.some(min(limit, self._left))
        if not data:
            raise WireLost(self._reader.wire, by_reset=False)
        self._left -= len(data)
        if not self._left:
            self._place = _Place.LINE_END if self.framing.kind == "chunked" else _Place.END
        return Span(data, True)
