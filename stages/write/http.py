"""Write the image to a web server in one PUT: WebDAV, a plain server that takes files, or a presigned URL.

A WebDAV server gets it under a temporary name, and a MOVE makes it the result in one step. Elsewhere the PUT goes to
the name itself: what lies there after a PUT that broke off is removed only where it is proven to be ours, by the
server's word on the state we made or by its bytes. One PUT can't be gone on with: where the line fails, it is sent
again from its first byte, which is read from the disk once more.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import anyio

from pipeline.config.options import Secret, without_secrets
from pipeline.errors import FormatError, LeftBehindError, PlanError, StageError, StoreError, first_error
from pipeline.events import PartReplayed, UploadOpened, UploadRemoved
from pipeline.flow.channels import Inlet, Outlet
from pipeline.flow.items import Piece, RangeReader, Receipt, StoredImage
from pipeline.flow.manifest import MANIFEST_SUFFIX
from pipeline.flow.orders import SEQUENTIAL_SINK, Order
from pipeline.flow.pacing import RATE_MIN, RateLimit
from pipeline.flow.parallel import in_thread
from pipeline.flow.stage import STORED_IMAGE, SinkPlan, SinkRequest, StageContext, StageSpec, option, pieces
from pipeline.units import MiB, Size, format_exact
from stages.write.partial import partial_name

# aiohttp is imported where a server is really talked to.
if TYPE_CHECKING:
    from pipeline.flow.retry import Retry, RetryPolicy
    from stages.store.digests import Buffer, Sums
    from stages.store.http import Timeouts
    from stages.store.webdav import WebClient, WebFile, WebTarget
    from stages.write.bodies import StreamedBody

# Cleaning up after a failure may take this long; see stages/write/driver.py.
ABORT_DEADLINE_S = 15.0
# How long a MOVE may go on after the run was cancelled: its fate has to be known.
_GRACE_S = 10.0
# A PUT that lost its answer may become visible a moment later: how often, and how far apart, it is looked for.
_LOOKS = 3
_LOOK_EVERY_S = 1.0
# Zeros that are sent, and counted, at once.
_ZEROS_AT_ONCE = 64 * MiB
# Windows between the chain and the connection: one is sent, one waits, one comes.
_HELD = 12 * MiB
# A file whose bytes are compared with what was sent is read in such pieces.
_COMPARED_AT_ONCE = 4 * MiB
_FRAMING = frozenset({"content-length", "transfer-encoding", "host", "connection", "expect"})
# A header's name. Source: RFC 9110, section 5.6.2 (tchar).
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of write.http."""

    url: str | Secret = option(
        doc="Where the image goes: http(s)://HOST/PATH/NAME, dav(s):// for WebDAV; a presigned URL as a secret.",
        example='"davs://nas.example.com/images/web01.raw"',
    )
    user: str = option("", doc="Log in with this name and password (Basic authentication).")
    password: Secret | None = option(None, doc='Of the user, as { env = "NAME" }.')
    token: Secret | None = option(None, doc='Log in with a bearer token, as { env = "NAME" }.')
    headers: dict[str, str | Secret] | None = option(
        None, doc="Headers of every request, as a presigned URL or a server of your own may want them."
    )
    overwrite: bool = option(
        False, doc="Replace a file that is there. With WebDAV it stays until the new one is complete and verified."
    )
    read_url: str | Secret | None = option(
        None, doc="Where verify.* reads the image, where url only lets it be written (a presigned URL for GET)."
    )
    length: Literal["auto", "chunked"] = option(
        "auto", doc="auto announces the length where the format knows it (raw, fixed VHD); chunked never does."
    )
    ca_file: Path | None = option(None, doc="PEM certificates to trust instead of the system's.")
    attempts: int = option(
        3, doc="How often the PUT, and any other request, is sent when server or line fail.", minimum=1
    )
    rate_limit: Size | None = option(None, doc='Send at most this much a second, as in "40 MiB".', minimum=RATE_MIN)

    def __post_init__(self) -> None:
        if self.token is not None and (self.user or self.password is not None):
            raise ValueError("token and password are two logins; one is wanted")
        if bool(self.user) != (self.password is not None):
            raise ValueError('a login is user = "NAME" and password = { env = "NAME" }')
        for name, value in (self.headers or {}).items():
            if not _TOKEN.fullmatch(name):
                raise ValueError(f'headers: "{name}" is not the name of a header')
            if name.lower() in _FRAMING or "\n" in _revealed(value) or "\r" in _revealed(value):
                raise ValueError(f'headers can\'t have "{name}"')


@dataclass(frozen=True, slots=True, kw_only=True)
class _Planned:
    """What planning made.

    Attributes:
        writing: the URL that the PUT goes to: the target's own, or a temporary one that is moved.
        before: what the target was.
        length: of the image, where it is announced.
    """

    target: WebTarget
    client: WebClient
    headers: dict[str, str]
    retry: Retry
    writing: str
    before: WebFile | None
    length: int | None

    @property
    def moves(self) -> bool:
        return self.writing != self.target.address.url

    @property
    def manifest(self) -> str:
        return self.target.beside(self.target.name + MANIFEST_SUFFIX)


class HttpWriter:
    """One PUT, from the first piece to the file in its place, or to its removal."""

    def __init__(
        self,
        options: Options,
        context: StageContext,
        *,
        timeouts: Timeouts | None = None,
        retry_policy: RetryPolicy | None = None,
    ) -> None:
        """Prepare it; nothing is sent. `timeouts` and `retry_policy` are for tests, instead of the usual ones."""
        self._options = options
        self._context = context
        self._timeouts = timeouts
        self._retry_policy = retry_policy
        self._limit = RateLimit(context.clock, options.rate_limit)
        self._planned: _Planned | None = None
        self._position = 0
        self._guest_bytes = 0
        self._is_ended = False  # the image is complete, and was checked
        self._attempts = 0
        self._stored = anyio.Event()
        self._md5 = ""
        self._etag = ""
        self._sums: Sums | None = None  # of the image, once all of it came
        self._manifest = b""
        self._is_published = False
        # Every URL under which this run may have left a file, and its state; None: not known, or nobody else's name.
        self._made: dict[str, WebFile | None] = {}

    # -- planning --------------------------------------------------------------------------------------------------

    async def plan(self, request: SinkRequest) -> SinkPlan:
        """Find out how the server takes files, and look at target and folder. Raises PlanError or StoreError."""
        from pipeline.flow.retry import Retry, RetryPolicy
        from stages.store.http import HttpClient
        from stages.store.webdav import WebClient, WebError, WebTarget

        options = self._options
        target = WebTarget.parse(_revealed(options.url))
        headers = self._login(target)
        policy = self._retry_policy or RetryPolicy(attempts=options.attempts)
        retry = Retry(policy, clock=self._context.clock, emit=self._context.emit, stage=self._context.name)
        await self.close()
        http = HttpClient(
            target.address.origin,
            connections=2,  # the PUT, and a look beside it; all of them are lost with a server that is killed
            ca_file=options.ca_file,
            timeouts=self._timeouts,
            on_alive=retry.alive,
            told_by='"url"',
        )
        client = WebClient(http, headers, self._context.name)
        planned = _Planned(
            target=target,
            client=client,
            headers=headers,
            retry=retry,
            writing=target.address.url,
            before=None,
            length=request.layout.image_bytes if options.length == "auto" else None,
        )
        self._planned = planned
        if not target.is_signed:
            try:
                self._planned = await self._look(planned)
            except WebError as error:
                if error.temporary:
                    raise
                raise PlanError(
                    f"the server refuses: {error.message}", operation="plan", hint=error.hint, **error.context
                ) from None
        return SinkPlan(
            boundaries=(0,),
            held_bytes=min(request.memory, _HELD),
            summary=tuple(self._summary(self._planned)),
        )

    def _login(self, target: WebTarget) -> dict[str, str]:
        from stages.store.web import basic

        options, headers = self._options, {}
        if target.address.authorization:
            headers["Authorization"] = target.address.authorization
        if options.password is not None:
            headers["Authorization"] = basic(options.user, options.password.reveal())
        if options.token is not None:
            headers["Authorization"] = f"Bearer {options.token.reveal()}"
        return headers | {name: _revealed(value) for name, value in (options.headers or {}).items()}

    async def _look(self, planned: _Planned) -> _Planned:
        from dataclasses import replace

        target, client, call = planned.target, planned.client, planned.retry.call
        url = target.address.url
        moves = await call("look", lambda: client.knows_move(target.folder))
        if not moves and target.scheme.startswith("dav"):
            moves = await self._can_move(planned)
        if moves and await call("look", lambda: client.has_folder(target.folder)) is False:
            raise PlanError(
                "the target's folder does not exist",
                operation="plan",
                uri=target.shown(target.folder),
                hint=f"Make it: {client.command('MKCOL', target.folder)}",
            )
        before = await call("look", lambda: client.state(url))
        for one, found in ((url, before), (planned.manifest, None)):
            there = found or await call("look", partial(client.state, one))
            if there is not None and not self._options.overwrite:
                raise PlanError(
                    "the target exists",
                    operation="plan",
                    uri=target.shown(one),
                    size=there.size if there.size >= 0 else None,
                    hint="Choose another name, or set overwrite = true in write.http.",
                )
        # A random part: pids of different machines meet on a server.
        name = partial_name(target.name, self._context.export_name, secrets.token_hex(4), hidden=False)
        return replace(planned, before=before, writing=target.beside(name) if moves else url)

    async def _can_move(self, planned: _Planned) -> bool:
        """Ask for a MOVE of what is not there: a server that says nothing of itself may know it all the same."""
        from stages.store.webdav import WebError

        nowhere = planned.target.beside(partial_name(planned.target.name, "probe", secrets.token_hex(4), hidden=False))
        try:
            await planned.client.move(nowhere, nowhere + "2", replace=False)
        except WebError as error:
            if error.status in (404, 409, 412):
                return True
            if error.status not in (400, 405, 501):
                raise
        raise PlanError(
            "this is not a WebDAV server: it can't move a finished file into its place",
            operation="plan",
            uri=planned.target.shown(planned.target.folder),
            hint="Write http:// or https:// instead: then the PUT goes to the name itself.",
        )

    def _summary(self, planned: _Planned) -> list[tuple[str, str]]:
        length = (
            f"announced, {format_exact(planned.length)}" if planned.length is not None else "in chunks, not announced"
        )
        way = "temporary name, then MOVE" if planned.moves else "one PUT to the name itself"
        told = [("sending", way), ("length", length), ("resume", "not possible: a PUT starts again")]
        if planned.target.is_signed:
            told.append(("target", "signed URL: not looked at before; the manifest stays here"))
        has_login = "Authorization" in planned.headers
        if has_login and planned.target.address.origin.startswith("http:"):
            told.append(("login", "travels unencrypted"))
        return told

    # -- writing ---------------------------------------------------------------------------------------------------

    async def run(self, inlet: Inlet[Piece], outlet: Outlet[StoredImage]) -> None:
        """Send every piece, see that the server has all of it, hand it on.

        Raises:
            StoreError: the server refused, or failed for good; what it kept is removed.
            StageError: guest bytes are missing; nothing was published.
            LeftBehindError: it failed, and something may be left.
        Cancellation: the connection is cut, and what the server kept is removed within ABORT_DEADLINE_S.
        """
        from stages.store.digests import Algorithm
        from stages.write.bodies import StreamedBody
        from stages.write.parts import PlannedPart

        planned, layout = self._after_planning(), self._context.layout
        # One more than the longest image: only the check at the end says that it is complete.
        longest = planned.length if planned.length is not None else (layout.image_bytes_max if layout else 0) + 1
        # An object store answers a PUT with the MD5 as the ETag; everywhere else the CRC finds a disk that changed.
        algorithms = Algorithm.CRC64NVME | (Algorithm.MD5 if planned.target.is_signed else Algorithm(0))
        body = StreamedBody(
            PlannedPart(1, 0, longest),
            algorithms,
            replay=self._context.replay,
            in_thread=self._in_thread,
            on_replay=lambda start, end: self._context.emit(
                PartReplayed(stage=self._context.name, number=1, from_bytes=start, to_bytes=end)
            ),
        )
        self._made[planned.writing] = None
        shown = planned.target.shown(planned.writing)
        self._context.emit(UploadOpened(stage=self._context.name, uri=shown))
        try:
            try:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(body.serve)
                    tasks.start_soon(self._send, body)
                    await self._feed(inlet, body)
                    with self._context.meter.working():
                        await self._stored.wait()
                    tasks.cancel_scope.cancel()
            except BaseExceptionGroup as group:
                raise first_error(group) from group
            finally:
                body.discard()
            self._md5 = self._sums.md5.hex() if self._sums is not None and self._sums.md5 else ""
            await self._see_stored(planned)
        except BaseException as error:
            await self._take_back(error)
            raise
        uri = planned.target.shown(planned.target.address.url)
        await outlet.send(StoredImage(uri, self._position, self._open_reader, self._fetch_receipt))

    async def _in_thread(self, work: Callable[[], None]) -> None:
        await in_thread(self._context.threads, work)

    async def _feed(self, inlet: Inlet[Piece], body: StreamedBody) -> None:
        async for piece in inlet:
            if piece.length and piece.offset != self._position:
                piece.release()
                raise StageError(
                    "a piece came out of order", operation="write", offset=piece.offset, expected=self._position
                )
            guest_bytes = piece.guest_bytes
            await self._feed_piece(piece, body)
            self._guest_bytes += guest_bytes
        layout, size = self._context.layout, self._context.disk_size
        if self._guest_bytes != size or (layout and layout.image_bytes not in (None, self._position)):
            raise StageError(
                f"{self._guest_bytes} of {size} guest bytes were written; nothing was committed",
                operation="seal",
                image_bytes=self._position,
            )
        self._is_ended = True
        body.finish()
        self._sums = body.sums

    async def _feed_piece(self, piece: Piece, body: StreamedBody) -> None:
        from stages.write.bodies import Segment

        rest, counted, length = Segment.of(piece), 0, piece.length
        if not length:
            piece.release()
            self._context.progress.acknowledge(guest_bytes=piece.guest_bytes, image_bytes=0)
            return
        done = 0
        while done < length:
            step = min(_ZEROS_AT_ONCE, length - done) if rest.data is None else length
            now = Segment(step, rest.data)
            try:
                await self._limit.wait(step)
            except BaseException:
                now.release()
                raise
            await body.feed(now)
            done += step
            self._position += step
            share = piece.guest_bytes * done // length
            self._context.progress.acknowledge(guest_bytes=share - counted, image_bytes=step)
            counted = share

    async def _send(self, body: StreamedBody) -> None:
        await self._after_planning().retry.call("put", lambda: self._put(body))
        self._stored.set()

    async def _put(self, body: StreamedBody) -> None:
        from stages.store.webdav import WebError

        planned = self._after_planning()
        client, url = planned.client, planned.writing
        is_again, is_signed = self._attempts > 0, planned.target.is_signed
        look = partial(self._is_stored_already, planned, body)
        if is_again and not is_signed and await planned.retry.call("look", look):
            return
        self._attempts += 1
        headers = {} if is_signed else {"Content-Type": "application/octet-stream"}
        if not planned.moves and not self._options.overwrite:
            headers["If-None-Match"] = "*"
        announced = planned.length is not None
        try:
            reply = await client.put(url, _Whole(body, lambda: announced or self._is_ended), headers)
        except WebError as error:
            if error.status != 412 or is_again or is_signed:
                raise
            del self._made[url]  # the server stored nothing of ours
            raise self._appeared(url) from None
        self._etag = reply.header("etag").strip('"').lower()

    async def _is_stored_already(self, planned: _Planned, body: StreamedBody) -> bool:
        """Whether the attempt before this one made it after all. Raises StoreError where the name may not be ours."""
        found = await planned.client.state(planned.writing)
        if found is None or found == planned.before:
            return False
        is_whole = self._is_ended and found.size == body.length
        if is_whole and (planned.moves or await self._has_our_bytes(planned.writing, found)):
            return True
        if planned.moves:  # a name of ours alone
            await planned.client.delete(planned.writing)
        elif not self._options.overwrite:
            raise self._unclear(planned.writing, found)
        return False

    def _unclear(self, url: str, found: WebFile) -> StoreError:
        """Nothing tells whether a file is what the server kept of our PUT, or somebody else's."""
        planned = self._after_planning()
        return StoreError(
            "a file came under the target's name while the PUT was under way; it is what the server kept of it, "
            "or somebody else's, and was left alone",
            operation="put",
            uri=planned.target.shown(url),
            size=found.size if found.size >= 0 else None,
            hint=f"Look at it; if nobody misses it: {planned.client.command('DELETE', url)}",
        )

    async def _has_our_bytes(self, url: str, found: WebFile) -> bool:
        """Whether a file is, byte by byte, what this run sent. Raises StoreError: the server failed for a moment."""
        from stages.store.digests import Algorithm, RunningSums
        from stages.store.web import open_web_reader

        planned = self._after_planning()
        if url == planned.manifest:
            expected = RunningSums(Algorithm.CRC64NVME)
            expected.update(self._manifest)
            length, wanted = len(self._manifest), expected.value().crc64nvme
        else:
            length, wanted = self._position, self._sums.crc64nvme if self._sums is not None else None
        if wanted is None or found.size != length:
            return False
        running = RunningSums(Algorithm.CRC64NVME)
        try:
            async with open_web_reader(
                url, ca_file=self._options.ca_file, headers=planned.headers, timeouts=self._timeouts
            ) as reader:
                for offset in range(0, length, _COMPARED_AT_ONCE):
                    data = await reader.read(offset, min(_COMPARED_AT_ONCE, length - offset))
                    await self._in_thread(partial(running.update, data))
        except (PlanError, FormatError):
            return False  # one that can't be read by ranges, or changes meanwhile
        except StoreError as error:
            if error.temporary:
                raise
            return False
        return running.value().crc64nvme == wanted

    async def _see_stored(self, planned: _Planned) -> None:
        """The server says that it has the whole file. Raises StoreError."""
        if planned.target.is_signed:
            return
        found = await planned.retry.call("look", lambda: planned.client.state(planned.writing))
        if found is None or found.size not in (-1, self._position):
            raise StoreError(
                "the server answered that it stored the image, and has another length",
                operation="seal",
                uri=planned.target.shown(planned.writing),
                expected=self._position,
                got=found.size if found else None,
                hint="Does it take a PUT of this length? It may have a quota.",
            )
        self._made[planned.writing] = found

    # -- verify, publish, withdraw ---------------------------------------------------------------------------------

    @asynccontextmanager
    async def _open_reader(self) -> AsyncIterator[RangeReader]:
        from stages.store.web import open_web_reader

        planned, options = self._after_planning(), self._options
        headers: dict[str, str] | None = planned.headers
        if options.read_url is not None:
            url, headers = _revealed(options.read_url), None
        elif planned.target.is_signed:
            raise StoreError(
                "a URL that is signed for writing can't be read, so the image can't be verified",
                operation="verify",
                hint="Set read_url in write.http (a presigned URL for GET), or use verify.receipt.",
            )
        else:
            url = planned.target.address.url if self._is_published else planned.writing
        async with open_web_reader(url, ca_file=options.ca_file, headers=headers, timeouts=self._timeouts) as reader:
            yield reader

    @asynccontextmanager
    async def _fetch_receipt(self) -> AsyncIterator[Receipt]:
        is_md5 = self._md5 and len(self._etag) == len(self._md5)
        proofs = (("ETag (MD5)", self._md5, self._etag),) if is_md5 else ()
        yield Receipt(self._position, proofs, "" if proofs else "a web server keeps no checksum of a file")

    async def publish(self, manifest: bytes) -> str:
        """Move the image into its place, then write the manifest. Raises StoreError when somebody took the name."""
        planned = self._after_planning()
        if planned.moves:
            await self._move(planned.writing, planned.target.address.url)
        self._is_published = True
        if planned.target.is_signed:
            return ""
        await planned.retry.call("put_manifest", lambda: self._put_manifest(planned, manifest))
        return planned.target.shown(planned.manifest)

    async def _put_manifest(self, planned: _Planned, manifest: bytes) -> None:
        from stages.store.http import BytesBody

        body, headers = BytesBody(manifest), {"Content-Type": "application/json"}
        self._manifest = manifest
        if planned.moves:
            partial_url = planned.writing + MANIFEST_SUFFIX
            if not await self._is_there(partial_url, len(manifest)):
                self._made[partial_url] = None
                await planned.client.put(partial_url, body, headers, "put_manifest")
            await self._move(partial_url, planned.manifest)
            return
        is_first = planned.manifest not in self._made and not self._options.overwrite
        if is_first and await planned.client.state(planned.manifest) is not None:
            raise self._appeared(planned.manifest)
        if is_first:
            headers["If-None-Match"] = "*"
        if not await self._is_there(planned.manifest, len(manifest)):
            self._made[planned.manifest] = None
            await planned.client.put(planned.manifest, body, headers, "put_manifest")
        self._made[planned.manifest] = await planned.client.state(planned.manifest)

    async def _is_there(self, url: str, size: int) -> bool:
        """Whether an attempt of ours that lost its answer stored this small file."""
        if url not in self._made:
            return False
        found = await self._after_planning().client.state(url)
        return found is not None and found.size == size

    async def _move(self, source: str, target: str) -> None:
        from pipeline.flow.grace import with_grace

        planned, replace = self._after_planning(), self._options.overwrite
        client = planned.client
        expected = await planned.retry.call("look", lambda: client.state(source))

        async def move() -> None:
            try:
                await with_grace(lambda: client.move(source, target, replace=replace), _GRACE_S)
            except StoreError as error:
                # This attempt, or one before it, may have lost its answer: then the source is gone.
                if (error.temporary or error.status in (404, 412)) and await client.state(source) is None:
                    return
                if error.status == 412:
                    raise self._appeared(target) from None
                raise

        # Before it is asked for: a run that is cancelled meanwhile finds it there.
        self._made[target] = expected
        try:
            await planned.retry.call("move", move)
        except StoreError as error:
            if not error.temporary:
                del self._made[target]
            raise
        del self._made[source]
        found = await planned.retry.call("look", lambda: client.state(target))
        if found is None or (expected is not None and found.size != expected.size):
            raise StoreError("the moved file is not there", operation="move", uri=planned.target.shown(target))
        self._made[target] = found

    def _appeared(self, url: str) -> StoreError:
        return StoreError(
            "the target appeared while the image was written",
            operation="publish",
            uri=self._after_planning().target.shown(url),
            hint="Somebody else wrote it; it was left alone. Choose another name.",
        )

    async def withdraw(self) -> None:
        """Remove what this run wrote, under whatever name; never somebody else's file. Raises LeftBehindError."""
        await self._take_back(None)

    async def _take_back(self, cause: BaseException | None) -> None:
        from pipeline.flow.retry import CLEANUP

        planned = self._after_planning()
        failure = f"the server did not answer within {ABORT_DEADLINE_S:.0f} s"
        with anyio.move_on_after(ABORT_DEADLINE_S, shield=True):
            try:
                for url in reversed(list(self._made)):
                    await planned.retry.call("abort", partial(self._remove, planned, url), CLEANUP)
                return
            except StoreError as error:
                failure = str(error)
        after = f"{cause}; and " if isinstance(cause, Exception) and str(cause) else ""
        raise LeftBehindError(
            f"{after}removing what was stored failed: {failure}",
            cause=cause or StoreError(failure),
            commands=tuple(planned.client.command("DELETE", url) for url in self._made),
            uri=planned.target.shown(planned.target.address.url),
        ) from cause

    async def _remove(self, planned: _Planned, url: str) -> None:
        """Delete a file that this run made, and see that it is gone. Raises StoreError."""
        client, noted = planned.client, self._made[url]
        if planned.target.is_signed:
            # What was cut short an object store never keeps; and what it has, only another URL could remove.
            if self._etag or self._stored.is_set():
                await client.delete(url)
            del self._made[url]
            return
        found = await self._found(client, url)
        is_target = url in (planned.target.address.url, planned.manifest)
        if found is not None and (not is_target or await self._is_ours(url, noted, found)):
            is_strong = bool(found.etag) and not found.etag.startswith("W/")
            await client.delete(url, {"If-Match": found.etag} if is_strong else {})
            if await client.state(url) is not None:
                raise StoreError("the file is still there", temporary=True, operation="abort", url=without_secrets(url))
            self._context.emit(UploadRemoved(uri=planned.target.shown(url), how="removed"))
        del self._made[url]

    async def _is_ours(self, url: str, noted: WebFile | None, found: WebFile) -> bool:
        """Whether what has the target's name, or the manifest's, is of this run. Raises StoreError: nobody knows."""
        planned = self._after_planning()
        if noted is None and url != planned.manifest and found == planned.before:
            return False
        # A size alone says nothing: two images of one disk have the same.
        if found == noted and (noted.etag or noted.modified):
            return True
        if await self._has_our_bytes(url, found):
            return True
        if noted is None:
            raise self._unclear(url, found)
        return False

    async def _found(self, client: WebClient, url: str) -> WebFile | None:
        """The file; one whose last byte was sent may appear a moment later."""
        for look in range(_LOOKS):
            found = await client.state(url)
            if found is not None or not self._is_ended or self._stored.is_set():
                return found
            if look < _LOOKS - 1:
                await self._context.clock.sleep(_LOOK_EVERY_S)
        return None

    async def close(self) -> None:
        """Close connections; idempotent."""
        if self._planned is not None:
            await self._planned.client.close()

    def _after_planning(self) -> _Planned:
        if self._planned is None:
            raise StageError("write.http works only after its planning", operation="write.http")
        return self._planned


class _Whole:
    """The image as the body of one request: with its length as soon as that is known, in chunks before."""

    def __init__(self, body: StreamedBody, is_known: Callable[[], bool]) -> None:
        self._body = body
        self._length = body.length if is_known() else None

    @property
    def length(self) -> int | None:
        return self._length

    def chunks(self) -> AsyncIterator[Buffer]:
        """All of it, from the beginning."""
        return self._body.chunks()


def _revealed(value: str | Secret) -> str:
    return value.reveal() if isinstance(value, Secret) else value


def open_reader(url: str, *, endpoint: str = "", ca_file: Path | None = None) -> object:
    """Open `http(s)://...` or `dav(s)://...` for random reads; see `open_web_reader`."""
    from stages.store.web import open_web_reader

    return open_web_reader(url, endpoint=endpoint, ca_file=ca_file)


SPEC = StageSpec(
    name="write.http",
    summary="Write the image to a WebDAV or web server, or a presigned URL. Not resumable: one PUT starts again.",
    options=Options,
    takes=pieces(Order.SEQUENTIAL),
    gives=STORED_IMAGE,
    build=HttpWriter,
    sink=SEQUENTIAL_SINK,
    schemes=("http", "https", "dav", "davs"),
    open_reader=open_reader,
)
