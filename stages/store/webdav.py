"""A client of web servers that take files: PUT and DELETE, and WebDAV's MOVE and PROPFIND where they are known.

Source: RFC 9110, sections 9.3 (methods) and 13.1.2 (If-None-Match); RFC 4918, sections 9.1 (PROPFIND), 9.7 (PUT),
9.9 (MOVE), 10.1 (DAV) and 11.5 (507).
"""

from __future__ import annotations

import email.utils
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import quote, unquote, urljoin, urlsplit
from xml.etree import ElementTree

from pipeline.config.options import without_secrets
from pipeline.errors import PlanError, StoreError
from stages.store.http import HttpClient, Reply, SendBody
from stages.store.web import WebAddress

_TEMPORARY = frozenset({408, 425, 429, 500, 502, 503, 504})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
# A listing of a folder with some ten thousand files.
_LISTING_MAX = 16 << 20


class WebError(StoreError):
    """An answer that is not 2xx.

    Attributes:
        headers: of the answer, names in lower case.
    """

    def __init__(self, message: str, *, status: int, headers: Mapping[str, str], **more: object) -> None:
        super().__init__(message, status=status, **more)  # type: ignore[arg-type]  # passed through
        self.headers = headers


@dataclass(frozen=True, slots=True, kw_only=True)
class WebFile:
    """One state of a file, as far as the server tells.

    Attributes:
        size: bytes; -1 where it does not say.
        modified: seconds since 1970; 0 where it does not say.
    """

    size: int
    etag: str
    modified: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WebTarget:
    """A file on a web server, by its URL.

    Attributes:
        scheme: of the URL as it was given: http, https, dav or davs.
        address: what is asked for, and the login that the URL held.
        is_signed: the URL has a query, which as a rule is a signature for this one file and method.
    """

    scheme: str
    address: WebAddress

    @classmethod
    def parse(cls, url: str) -> WebTarget:
        """Take a URL apart. Raises PlanError."""
        address = WebAddress.parse(url)
        if address.url.partition("?")[0].endswith("/") or not urlsplit(address.url).path:
            raise PlanError(
                f'"{without_secrets(url)}" does not name a file',
                operation="plan",
                hint="Write the name of the image at the end: https://HOST/FOLDER/web01.qcow2.",
            )
        return cls(scheme=urlsplit(url).scheme, address=address)

    @property
    def is_signed(self) -> bool:
        return "?" in self.address.url

    @property
    def name(self) -> str:
        """The file's name, unquoted."""
        return unquote(urlsplit(self.address.url).path.rpartition("/")[2])

    @property
    def folder(self) -> str:
        """URL of the folder, with a slash at the end."""
        return self.address.url.partition("?")[0].rpartition("/")[0] + "/"

    def beside(self, name: str) -> str:
        """URL of another file in its folder."""
        return self.folder + quote(name, safe="~-._")

    def shown(self, url: str) -> str:
        """A URL for people, with the scheme that was given, without secrets."""
        return without_secrets(f"{self.scheme}:{url.partition(':')[2]}")


class WebClient:
    """Files on one web server. Every call is one request, never repeated here."""

    def __init__(self, http: HttpClient, headers: Mapping[str, str], stage: str = "write.http") -> None:
        """Use connections and the headers (a login, say) that every request gets."""
        self._http = http
        self._headers = headers
        self._stage = stage

    async def close(self) -> None:
        """Close every connection; idempotent."""
        await self._http.close()

    async def send(
        self,
        operation: str,
        method: str,
        url: str,
        headers: Mapping[str, str] | None = None,
        body: SendBody | None = None,
        *,
        reply_max: int = 1 << 20,
        cut: bool = False,
    ) -> Reply:
        """Send one request.

        Raises:
            WebError: any answer that is not 2xx. StoreError: none.
        """
        reply = await self._http.request(
            method, url, {**self._headers, **(headers or {})}, body, operation=operation, reply_max=reply_max, cut=cut
        )
        if not 200 <= reply.status < 300:
            raise self._refused(reply, operation, method, url)
        return reply

    def _refused(self, reply: Reply, operation: str, method: str, url: str) -> WebError:
        status, wait = reply.status, reply.header("retry-after")
        return WebError(
            f"the server answered {status} to {method}",
            status=status,
            headers=reply.headers,
            temporary=status in _TEMPORARY,
            throttled=status in (429, 503),
            retry_after_s=float(wait) if wait.isdigit() else None,
            operation=operation,
            hint=self._hint(reply, method, url),
            url=without_secrets(url),
        )

    def _hint(self, reply: Reply, method: str, url: str) -> str:
        status, asks = reply.status, reply.header("www-authenticate")
        if status in _REDIRECTS:
            target = without_secrets(urljoin(url, reply.header("location")))
            return f"The server redirects to {target}; what is sent is not sent twice: name that address yourself."
        if status == 401 and asks and not asks.lower().startswith(("basic", "bearer")):
            return f"It wants {asks.partition(' ')[0]} authentication; {self._stage} knows Basic and Bearer."
        hints = {
            400: "A presigned URL may want headers that were signed with it: set headers.",
            401: f"It wants a login: set user and password, or token, in {self._stage}; what was sent is not right.",
            403: "It does not let us do this; a presigned URL may have expired or be for another method.",
            404: "Check the URL; the folder has to exist.",
            405: "Is it a WebDAV server, or one that takes files at this address? Reading alone is not enough.",
            409: f"The folder does not exist: {self.command('MKCOL', url.rpartition('/')[0] + '/')}",
            411: 'The server wants to know the length first: use encode.raw, or encode.vhd with variant = "fixed".',
            412: "Something of that name appeared meanwhile; it was left alone.",
            413: "The server limits the length of files (nginx: client_max_body_size). Compress, or have it raised.",
            501: "The server does not know this request; where it wants a length first, use encode.raw.",
            507: "The target is full. Free space there, compress (encode.qcow2), or choose another target.",
        }
        return hints.get(status, "")

    def command(self, method: str, url: str) -> str:
        """A `curl` command line; logins have to be added by whoever runs it."""
        login = ["--user", "USER"] if any(name.lower() == "authorization" for name in self._headers) else []
        return shlex.join(["curl", "--fail", *login, "--request", method, without_secrets(url)])

    async def state(self, url: str, operation: str = "look") -> WebFile | None:
        """What a file is now; None where there is none. Raises WebError, StoreError."""
        try:
            try:
                reply = await self.send(operation, "HEAD", url)
            except WebError as error:
                if error.status not in (405, 501):
                    raise
                reply = await self.send(operation, "GET", url, {"Range": "bytes=0-0"}, reply_max=1, cut=True)
        except WebError as error:
            if error.status in (404, 410):
                return None
            if error.status == 416:  # an empty file has no first byte
                return WebFile(size=0, etag=error.headers.get("etag", ""), modified=0.0)
            raise
        total = reply.header("content-range").rpartition("/")[2] or reply.header("content-length")
        return WebFile(
            size=int(total) if total.isdigit() else -1,
            etag=reply.header("etag"),
            modified=date_s(reply.header("last-modified")),
        )

    async def put(self, url: str, body: SendBody, headers: Mapping[str, str], operation: str = "put") -> Reply:
        """Store a file."""
        return await self.send(operation, "PUT", url, headers, body)

    async def delete(self, url: str, condition: Mapping[str, str] | None = None) -> None:
        """Remove a file; one that is not there is fine.

        Args:
            condition: headers such as If-Match, for servers that heed them. Raises WebError 412 where it is not met.
        """
        try:
            await self.send("delete", "DELETE", url, condition)
        except WebError as error:
            if error.status not in (404, 410):
                raise

    async def move(self, source: str, target: str, *, replace: bool) -> None:
        """Rename within the server, in one step. Raises WebError: 412 where the target exists."""
        await self.send("move", "MOVE", source, {"Destination": target, "Overwrite": "T" if replace else "F"})

    async def knows_move(self, url: str) -> bool:
        """Whether the server says that it is a WebDAV server, and can move what is here."""
        try:
            reply = await self.send("look", "OPTIONS", url)
        except WebError as error:
            if error.status in (401, 403) or error.temporary:
                raise
            return False
        allowed = {method.strip().upper() for method in reply.header("allow").split(",")}
        return bool(reply.header("dav")) and ("MOVE" in allowed or allowed == {""})

    async def has_folder(self, url: str) -> bool | None:
        """Whether a folder is there; None where the server does not tell."""
        try:
            await self.send("look", "PROPFIND", url, {"Depth": "0"}, reply_max=_LISTING_MAX, cut=True)
        except WebError as error:
            if error.status in (401, 403) or error.temporary:
                raise
            return False if error.status in (404, 409, 410) else None
        return True

    async def names(self, folder: str) -> list[tuple[str, WebFile]]:
        """The files of a folder, by name. Raises WebError, StoreError."""
        reply = await self.send("list", "PROPFIND", folder, {"Depth": "1"}, reply_max=_LISTING_MAX)
        # No listing has a document type; one that has could make the parser grow without bound.
        if b"<!DOCTYPE" in reply.body or b"<!ENTITY" in reply.body:
            raise StoreError("the listing has a document type", operation="list", url=without_secrets(folder))
        try:
            root = ElementTree.fromstring(reply.body)
        except ElementTree.ParseError:
            raise StoreError("the listing is not WebDAV's", operation="list", url=without_secrets(folder)) from None
        found = []
        for entry in root.iter("{DAV:}response"):
            path = unquote(urlsplit(entry.findtext("{DAV:}href") or "").path)
            if entry.find(".//{DAV:}collection") is not None or path.endswith("/"):
                continue
            size = entry.findtext(".//{DAV:}getcontentlength") or ""
            file = WebFile(
                size=int(size) if size.isdigit() else -1,
                etag=entry.findtext(".//{DAV:}getetag") or "",
                modified=date_s(entry.findtext(".//{DAV:}getlastmodified") or ""),
            )
            found.append((path.rpartition("/")[2], file))
        return found


def date_s(text: str) -> float:
    """Seconds since 1970 of an HTTP date; 0 where there is none."""
    try:
        return email.utils.parsedate_to_datetime(text).timestamp() if text else 0.0
    except (TypeError, ValueError):
        return 0.0
