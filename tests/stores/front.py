"""A store's front door with rules that no server here has: session tokens that end, and buckets in host names.

It stands before a real S3 server, checks each request's signature by its own reading of the rules, and signs it anew
with the server's own key. Clients reach it as their HTTP proxy, so that any host name leads to it.

Source: AWS General Reference, "Signature Version 4 signing process"; Amazon S3 User Guide, "Virtual hosting of
buckets"; Amazon S3 API Reference, "List of error codes" (ExpiredToken, SignatureDoesNotMatch).
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from tests.stores.faults import Fault, Reply
from tests.stores.messages import Head
from tests.stores.proxy import FaultProxy, Seen
from tests.stores.s3 import S3Server

_AUTHORIZATION = re.compile(
    r"AWS4-HMAC-SHA256 Credential=([^/]+)/(\d{8})/([^/]+)/s3/aws4_request, ?SignedHeaders=([^,]+), ?Signature=(\w{64})"
)


@dataclass(kw_only=True)
class Session:
    """Short-lived credentials. They end after so many requests: tests have no time to wait."""

    access_key: str
    secret_key: str = field(repr=False)
    token: str = field(repr=False)
    requests: int

    def in_a_file(self) -> str:
        """As a program that renews them writes `~/.aws/credentials`."""
        return (
            f"[default]\naws_access_key_id = {self.access_key}\naws_secret_access_key = {self.secret_key}\n"
            f"aws_session_token = {self.token}\n"
        )


class FrontDoor(FaultProxy):
    """`async with FrontDoor(server, host="s3.example", sessions=[...]) as front`; `front.url` is the client's proxy."""

    def __init__(
        self, server: S3Server, *, host: str, sessions: list[Session], on_end: Callable[[], None] = lambda: None
    ) -> None:
        """Prepare it.

        Args:
            host: that the store seems to have; a bucket's is `BUCKET.host`.
            on_end: called when a session has had its last request.
        """
        super().__init__(server.port)
        self._server = server
        self._host = host
        self._sessions = {session.access_key: session for session in sessions}
        self._on_end = on_end
        self.used: list[str] = []
        """The access key of every request that was let in."""

    def _see(self, head: Head, connection: int) -> Seen:
        seen = super()._see(head, connection)
        seen.fault = self._refusal(head)
        return seen

    def _refusal(self, head: Head) -> Fault | None:
        method, target, _ = head.start
        headers, found = head.headers, _AUTHORIZATION.fullmatch(head.headers.get("authorization", ""))
        if not headers.get("host", "").endswith("." + self._host):
            return _error(400, "InvalidRequest", "the bucket is not in the host name")
        session = self._sessions.get(found[1]) if found else None
        if found is None or session is None:
            return _error(403, "InvalidAccessKeyId", "who is that")
        names = found[4].split(";")
        if headers.get("x-amz-security-token") != session.token or "x-amz-security-token" not in names:
            return _error(400, "InvalidToken", "the token is malformed, or not signed")
        if found[5] != signature(method, target, headers, names, found[3], session.secret_key):
            return _error(403, "SignatureDoesNotMatch", "the signature is wrong")
        if session.requests <= 0:
            return _error(400, "ExpiredToken", "The provided token has expired.")
        session.requests -= 1
        self.used.append(session.access_key)
        if session.requests == 0:
            self._on_end()
        return None

    def _onward(self, head: Head) -> bytes:
        method, target, version = head.start
        parts = urlsplit(target)
        bucket = head.headers["host"].partition(".")[0]
        path = f"/{bucket}{parts.path}" + (f"?{parts.query}" if parts.query else "")
        headers = {
            name: value
            for name, value in head.headers.items()
            if name not in ("authorization", "x-amz-security-token", "host")
        }
        headers["host"] = f"127.0.0.1:{self._server.port}"
        names = sorted(name for name in headers if name == "host" or name.startswith(("x-amz-", "content-md5")))
        key, region = self._server.credentials, self._server.region
        scope = f"{key.access_key}/{headers['x-amz-date'][:8]}/{region}/s3/aws4_request"
        made = signature(method, path, headers, names, region, key.secret_key)
        headers["authorization"] = (
            f"AWS4-HMAC-SHA256 Credential={scope}, SignedHeaders={';'.join(names)}, Signature={made}"
        )
        lines = [f"{method} {path} {version}", *(f"{name}: {value}" for name, value in headers.items())]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")


def _error(status: int, code: str, message: str) -> Reply:
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
    return Reply(status=status, body=body.encode(), when="body")


def signature(
    method: str, target: str, headers: Mapping[str, str], names: list[str], region: str, secret_key: str
) -> str:
    """What a request's signature has to be.

    Args:
        names: of the signed headers, in order.
    """
    parts = urlsplit(target)
    query = "&".join(sorted(pair if "=" in pair else pair + "=" for pair in parts.query.split("&") if pair))
    lines = [f"{name}:{' '.join(headers[name].split())}" for name in names]
    canonical = [method, parts.path, query, *lines, "", ";".join(names), headers["x-amz-content-sha256"]]
    day, scope = headers["x-amz-date"][:8], f"{headers['x-amz-date'][:8]}/{region}/s3/aws4_request"
    text = "\n".join(
        ["AWS4-HMAC-SHA256", headers["x-amz-date"], scope, hashlib.sha256("\n".join(canonical).encode()).hexdigest()]
    )
    key = b"AWS4" + secret_key.encode()
    for word in (day, region, "s3", "aws4_request"):
        key = hmac.digest(key, word.encode(), "sha256")
    return hmac.digest(key, text.encode(), "sha256").hex()
