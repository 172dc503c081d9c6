"""A store that keeps nothing but checksums: for uploads that are too large to be kept.

It speaks just the requests of one multipart upload, with threads and blocking sockets, and takes bytes as fast as one
core can: `python -m tests.stores.sink PORT_FILE [--fail-from BYTES]`. What it was sent it knows by length and
CRC64NVME, and tells when the object is looked at, so that a receipt proves that every byte arrived.
"""

from __future__ import annotations

import argparse
import base64
import socket
import socketserver
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from awscrt import checksums

_CHUNK = 1 << 20


@dataclass(slots=True)
class Kept:
    """What is known of the one object."""

    parts: dict[int, tuple[int, int]] = field(default_factory=dict)  # number -> (length, crc64nvme)
    attempts: dict[int, int] = field(default_factory=dict)
    size: int = -1
    crc: int = 0
    fail_from: int = 0  # the first part of at least this length is refused once
    failed: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    rbufsize = 0  # bodies are read straight from the socket
    kept: Kept

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if self.command != "HEAD" or "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _take_body(self) -> tuple[int, int]:
        """Read the body; returns its length and CRC64NVME."""
        left = length = int(self.headers.get("Content-Length", 0))
        buffer = memoryview(bytearray(_CHUNK))
        crc = 0
        while left:
            # Whole chunks: a call for each little that has arrived costs more than all else here.
            wanted = min(left, _CHUNK)
            if self.connection.recv_into(buffer, wanted, socket.MSG_WAITALL) < wanted:
                raise ConnectionError("the client went away")
            crc = checksums.crc64nvme(buffer[:wanted], crc)
            left -= wanted
        return length, crc

    def do_HEAD(self) -> None:
        """The object, once it is complete."""
        kept = self.kept
        if kept.size < 0 or self.path.partition("?")[0].endswith(".json"):
            self._answer(404)
            return
        self._answer(
            200,
            Content_Length=str(kept.size),
            ETag='"sink"',
            x_amz_checksum_crc64nvme=_text(kept.crc),
            x_amz_checksum_type="FULL_OBJECT",
        )

    def do_GET(self) -> None:
        """No uploads are open but ours."""
        self._answer(200, b"<ListMultipartUploadsResult></ListMultipartUploadsResult>")

    def do_POST(self) -> None:
        """Open or complete the upload."""
        query = parse_qs(urlsplit(self.path).query, keep_blank_values=True)
        self._take_body()
        kept = self.kept
        if "uploads" in query:
            body = b"<InitiateMultipartUploadResult><UploadId>one</UploadId></InitiateMultipartUploadResult>"
            self._answer(200, body, x_amz_checksum_algorithm="CRC64NVME", x_amz_checksum_type="FULL_OBJECT")
            return
        crc = size = 0
        for number in sorted(kept.parts):
            length, part = kept.parts[number]
            crc = checksums.combine_crc64nvme(crc, part, length) if size else part
            size += length
        kept.size, kept.crc = size, crc
        body = b'<CompleteMultipartUploadResult><ETag>"sink"</ETag></CompleteMultipartUploadResult>'
        self._answer(200, body, x_amz_checksum_crc64nvme=_text(crc), x_amz_checksum_type="FULL_OBJECT")

    def do_PUT(self) -> None:
        """A part, or the manifest."""
        query = parse_qs(urlsplit(self.path).query)
        length, crc = self._take_body()
        if "partNumber" not in query:
            self._answer(200, ETag='"text"')
            return
        number = int(query["partNumber"][0])
        kept = self.kept
        with kept.lock:
            kept.attempts[number] = kept.attempts.get(number, 0) + 1
            # Once, after all of its bytes. Not with 503: that would slow the whole run down, and this is about memory.
            if kept.fail_from and length >= kept.fail_from and not kept.failed:
                kept.failed = True
                self._answer(500, b"<Error><Code>InternalError</Code><Message>again</Message></Error>")
                return
            kept.parts[number] = (length, crc)
        self._answer(200, ETag=f'"{number}"', x_amz_checksum_crc64nvme=_text(crc))

    def do_DELETE(self) -> None:
        """Abort."""
        self.kept.parts.clear()
        self._answer(204)


def _text(crc: int) -> str:
    return base64.b64encode(crc.to_bytes(8, "big")).decode()


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


def main(arguments: list[str]) -> int:
    """Serve until killed; the port is written into a file when it listens."""
    parser = argparse.ArgumentParser(prog="python -m tests.stores.sink")
    parser.add_argument("port_file", type=Path)
    parser.add_argument("--fail-from", type=int, default=0, help="refuse the first part of at least so many bytes once")
    given = parser.parse_args(arguments)
    Handler.kept = Kept(fail_from=given.fail_from)
    with _Server(("127.0.0.1", 0), Handler) as server:
        waiting = given.port_file.with_suffix(".writing")
        waiting.write_text(str(server.server_address[1]))
        waiting.rename(given.port_file)
        server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
