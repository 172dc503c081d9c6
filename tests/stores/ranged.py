"""A small web server that knows ranges, and the ways in which web servers go wrong. For reading only.

Every answer is decided by what the test sets; each request is kept.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

_RANGE = re.compile(r"bytes=(\d+)-(\d+)")


@dataclass(frozen=True, slots=True)
class Asked:
    """One request."""

    path: str
    headers: dict[str, str]


@dataclass(slots=True)
class RangedServer:
    """What the server has and how it behaves.

    Attributes:
        files: by path, with the leading slash; a path's content is read when it is asked for.
        redirects: path to the Location of a 302.
        knows_ranges: False: it always sends the whole file.
        has_etags: False: it sends neither ETag nor Last-Modified.
        knows_conditions: False: it sends ranges of whatever there is, whatever If-Range says.
        cuts: so many of the next bodies end 1 byte early, and say so in their length.
        fails: so many of the next requests are answered with 503.
        password: `USER:PASSWORD` in Base64, as Basic authentication sends it; empty: none is wanted.
        sent_bytes: of all bodies.
    """

    url: str = ""
    files: dict[str, bytes | Path] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    knows_ranges: bool = True
    has_etags: bool = True
    knows_conditions: bool = True
    cuts: int = 0
    fails: int = 0
    password: str = ""
    asked: list[Asked] = field(default_factory=list)
    sent_bytes: int = 0


@contextmanager
def ranged_server(**files: bytes | Path) -> Iterator[RangedServer]:
    """Serve files on a free port of this machine, `name=...` as `/name`, until the end of the block."""
    state = RangedServer(files={f"/{name}": data for name, data in files.items()})
    server = _Server(("127.0.0.1", 0), type("Bound", (_Handler,), {"state": state}))
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.02))
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _part(data: bytes | Path, start: int, stop: int) -> bytes:
    if isinstance(data, bytes):
        return data[start:stop]
    with data.open("rb") as file:
        file.seek(start)
        return file.read(stop - start)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Quiet: a client may hang up at any time."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: RangedServer

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:  # the library's name
        state = self.state
        state.asked.append(Asked(self.path, {name.lower(): value for name, value in self.headers.items()}))
        path = self.path.partition("?")[0]
        if state.fails:
            state.fails -= 1
            return self._answer(503, b"busy")
        if path in state.redirects:
            return self._answer(302, b"", Location=state.redirects[path])
        # `password` is what comes after "Basic ", in Base64.
        if state.password and self.headers.get("Authorization") != f"Basic {state.password}":
            return self._answer(401, b"who are you?")
        if path not in state.files:
            return self._answer(404, b"not here")
        return self._send(state.files[path])

    def _send(self, data: bytes | Path) -> None:
        state = self.state
        headers = {}
        size = len(data) if isinstance(data, bytes) else data.stat().st_size
        mark = hashlib.md5(data).hexdigest() if isinstance(data, bytes) else f"{data.stat().st_mtime_ns:x}"
        etag = f'"{mark}"'
        if state.has_etags:
            headers["ETag"] = etag
        wanted = _RANGE.fullmatch(self.headers.get("Range", ""))
        is_same = self.headers.get("If-Range", etag) == etag or not state.knows_conditions
        if not state.knows_ranges or wanted is None or not is_same:
            return self._answer(200, _part(data, 0, size), **headers)
        first, last = int(wanted[1]), min(int(wanted[2]), size - 1)
        if first >= size:
            return self._answer(416, b"", Content_Range=f"bytes */{size}", **headers)
        body = _part(data, first, last + 1)
        if state.cuts and len(body) > 1:
            state.cuts -= 1
            body = body[:-1]
        return self._answer(206, body, Content_Range=f"bytes {first}-{last}/{size}", **headers)

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        try:
            self.wfile.write(body)
            self.state.sent_bytes += len(body)
        except OSError:
            pass  # whoever asked has gone away
