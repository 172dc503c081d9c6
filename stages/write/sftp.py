"""Write the image to an SFTP server: temporary name, many requests under way, fsync, rename.

Bytes that are never written read as zero (the file is new), so zeros are not sent. A server that takes writes in order
only is found out before the first byte of the image: it gets every byte in order, and what has a head that comes last
is refused.
"""

from __future__ import annotations

import secrets
import shlex
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from pipeline.config.options import Secret
from pipeline.errors import LeftBehindError, PlanError, StageError, StoreError
from pipeline.events import FallbackTaken, LeftoverFound, UploadRemoved
from pipeline.flow.buffers import Pool
from pipeline.flow.channels import Inlet, Outlet
from pipeline.flow.items import Piece, RangeReader, Receipt, StoredImage
from pipeline.flow.manifest import MANIFEST_SUFFIX
from pipeline.flow.orders import SPARSE_SINK, Order
from pipeline.flow.pacing import RATE_MIN, RateLimit
from pipeline.flow.stage import (
    STORED_IMAGE,
    SinkPlan,
    SinkRequest,
    StageContext,
    StageSpec,
    UploadJournal,
    option,
    pieces,
)
from pipeline.units import MiB, Size, format_size
from stages.write.partial import partial_name
from stages.write.ranges import RangeDriver

# asyncssh is an extra, and is imported where a server is really talked to.
if TYPE_CHECKING:
    from pipeline.flow.retry import RetryPolicy
    from stages.store.sftp import FileState, Patience, RemoteFile, Session, SftpClient

_STAGING = 2 * MiB
_STAGINGS = 4  # one is filled while three are sent: together more than the requests that may be under way
_IN_FLIGHT = 4
# What asyncssh holds of requests that are under way: 32 of 255 KiB.
_REQUESTS_HELD = 8 * MiB
# Cleaning up after a failure may take this long; see stages/write/driver.py.
ABORT_DEADLINE_S = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of write.sftp."""

    url: str = option(
        doc="Where the image goes: sftp://USER@HOST[:PORT]/PATH/NAME; /~/NAME begins at the login's folder.",
        example='"sftp://backup@nas.example.com/images/web01.qcow2"',
    )
    overwrite: bool = option(
        False, doc="Replace an image that is there already, at the end and in one step.", may_change=True
    )
    identity_files: tuple[Path, ...] = option(
        (), doc="Private keys to log in with; else the usual ones in ~/.ssh.", may_change=True
    )
    passphrase: Secret | None = option(None, doc='Of the private keys, as { env = "NAME" }.', may_change=True)
    password: Secret | None = option(None, doc='Log in with a password, as { env = "NAME" }.', may_change=True)
    agent: bool = option(True, doc="Also log in with the keys of the agent that SSH_AUTH_SOCK names.", may_change=True)
    known_hosts: Path | None = option(
        None,
        doc="Host keys to trust, instead of those in ~/.ssh/known_hosts. An unknown server is always refused.",
        may_change=True,
    )
    attempts: int = option(
        6, doc="How often a request is sent when the server or the line fails for a moment.", may_change=True, minimum=1
    )
    rate_limit: Size | None = option(
        None, doc='Send at most this much a second, as in "40 MiB".', may_change=True, minimum=RATE_MIN
    )


class SftpWriter:
    """One new remote file, written at any offset, renamed when it is published."""

    def __init__(
        self,
        options: Options,
        context: StageContext,
        *,
        patience: Patience | None = None,
        retry_policy: RetryPolicy | None = None,
    ) -> None:
        """Prepare it; nothing is sent. `patience` and `retry_policy` are for tests, instead of the usual ones."""
        self._options = options
        self._context = context
        self._patience = patience
        self._retry_policy = retry_policy
        self._limit = RateLimit(context.clock, options.rate_limit)
        self._staging = Pool(_STAGING, _STAGINGS)
        self._journal = context.journal
        self._goes_on = False  # with a file that an earlier process began
        self._found: SftpClient | None = None
        self._path = ""
        self._partial = ""
        self._file: RemoteFile | None = None
        self._in_order = False
        self._is_begun = anyio.Event()  # it is known how the server takes writes
        self._reached = 0  # behind the last byte that was acknowledged
        self._is_published = False
        # Every name that this run may have given to a file, and what that file is; None: nobody else has the name.
        self._made: dict[str, FileState | None] = {}

    # -- planning --------------------------------------------------------------------------------------------------

    async def plan(self, request: SinkRequest) -> SinkPlan:
        """Log in, and look at folder, target and free space. Raises PlanError or StoreError."""
        self._connect()
        self._name_partial()
        before = self._path.removesuffix(self._path.rpartition("/")[2])
        folder = before.rstrip("/") or before or "."
        try:
            resume_at = await self._go_on(self._journal) if self._journal is not None and self._journal.upload else 0
            free = await self._look(folder)
        except StoreError as error:
            if error.temporary:
                raise
            raise PlanError(error.message, operation="plan", hint=error.hint, **error.context) from None
        where = self._client.where
        room = f"{format_size(free)} in {where.at(folder)}" if free is not None else "the server does not say"
        return SinkPlan(
            own_bytes=_STAGING * _STAGINGS + _REQUESTS_HELD,
            summary=(("free space", room),),
            resume_at=resume_at,
        )

    async def find_leftovers(self) -> Sequence[LeftoverFound]:
        """Temporary files of the same target. Raises StoreError."""
        from stages.write.leftovers import RemoteFolder, found_beside

        return await found_beside(RemoteFolder(self._client, self._path, False), str(self._client.where))

    def _connect(self) -> SftpClient:
        """The client of the target; nothing is sent. Raises PlanError."""
        from pipeline.flow.retry import Retry, RetryPolicy

        if self._found is not None:
            return self._found
        sftp = client_library()
        options = self._options
        where = sftp.SftpUrl.parse(options.url)
        policy = self._retry_policy or RetryPolicy(attempts=options.attempts)
        retry = Retry(policy, clock=self._context.clock, emit=self._context.emit, stage=self._context.name)
        login = sftp.Login(
            identity_files=options.identity_files,
            passphrase=options.passphrase,
            password=options.password,
            agent=options.agent,
            known_hosts=options.known_hosts,
        )
        self._found = sftp.SftpClient(where, login, retry, self._patience)
        self._path = where.path
        return self._found

    def _name_partial(self) -> None:
        # The journal's id: every process of an export writes the same file. Else a random part: pids of different
        # machines meet on a server.
        token = self._journal.id if self._journal is not None else secrets.token_hex(4)
        name = self._path.rpartition("/")[2]
        self._partial = self._path.removesuffix(name) + partial_name(name, self._context.export_name, token)

    async def _go_on(self, journal: UploadJournal) -> int:
        """Find the file that an earlier process wrote, and take it over or remove it; returns how far it is durable.

        Raises:
            StoreError: it can't be removed, or not be given its temporary name back.
        """
        client, upload = self._client, journal.upload
        await self._take_name_back(upload)
        await client.remove(self._partial + MANIFEST_SUFFIX)
        found = await client.state(self._partial)
        if found is None:
            reason = "the file that was begun is not there any more"
        elif journal.discards:
            reason = "what was written before has been removed"
        elif not journal.mark:
            reason = "nothing of it was durable"
        elif found.size < upload.get("written", 0):
            reason = f"the server lost what it had made durable: {found.size} of {upload['written']} bytes are there"
        else:
            self._goes_on = True
            return journal.mark
        await client.remove(self._partial)  # nobody else's has the id of our journal in its name
        journal.begin_anew(reason)
        self._name_partial()
        return 0

    async def _take_name_back(self, upload: Mapping[str, Any]) -> None:
        """Undo a renaming that was not followed by the manifest, which is what publishes an image."""
        client = self._client
        if not upload.get("renaming"):
            return
        there = await client.state(self._path)
        if there is None or {"size": there.size, "modified": there.modified} != upload["renaming"]:
            return
        if await client.state(self._partial) is not None:
            await client.remove(self._path)  # a second name of the same file: the server renames by a hard link
        elif not await client.rename(self._path, self._partial, replace=False):
            raise StoreError(
                "the finished image can't be given its temporary name back",
                operation="resume",
                uri=client.where.at(self._path),
            )

    async def _look(self, folder: str) -> int | None:
        client = self._client
        found = await client.state(folder)
        if found is None or not found.is_folder:
            raise PlanError(
                "the target's folder does not exist",
                uri=client.where.at(folder),
                hint=f"Make it: {client.command('mkdir', folder)}",
            )
        for path in (self._path, self._path + MANIFEST_SUFFIX):
            there = await client.state(path)
            if there is not None and there.is_folder:
                raise PlanError("the target is a folder", uri=client.where.at(path), hint="Name the image file itself.")
            if there is not None and not self._options.overwrite:
                raise PlanError(
                    "the target exists",
                    uri=client.where.at(path),
                    size=there.size,
                    hint="Choose another name, or set overwrite = true in write.sftp.",
                )
        return await client.free_bytes(folder)

    @property
    def _client(self) -> SftpClient:
        if self._found is None:
            raise StageError("write.sftp works only after its planning", operation="write.sftp")
        return self._found

    # -- writing ---------------------------------------------------------------------------------------------------

    async def run(self, inlet: Inlet[Piece], outlet: Outlet[StoredImage]) -> None:
        """Write every piece, make the file complete and durable, hand it on.

        Raises:
            PlanError: the file can't be made, or the server can't take this format; no byte has moved.
            StoreError: the server failed for good; the temporary file is gone.
            LeftBehindError: it failed, and the file may be left.
        """
        driver = RangeDriver(
            self,
            self._context,
            staging=self._staging,
            in_flight=_IN_FLIGHT,
            limit=self._limit,
            journal=self._journal,
            make_durable=self._make_durable,
        )
        size = await driver.store(inlet)
        await outlet.send(StoredImage(str(self._client.where), size, self._open_reader, self._fetch_receipt))

    @property
    def partial_uri(self) -> str:
        """The temporary file's URL."""
        return self._client.where.at(self._partial)

    @property
    def in_order(self) -> bool:
        """Whether the server takes writes in order only, as it turned out."""
        return self._in_order

    async def can_rewrite(self) -> bool:
        """Unless the server takes writes in order only. Waits until the file was made."""
        await self._is_begun.wait()
        return not self._in_order

    async def create(self) -> None:
        """Make the temporary file and see how the server takes writes. Raises PlanError or StoreError."""
        await self._make()
        self._is_begun.set()

    async def _make(self) -> None:
        sftp = client_library()
        self._file = sftp.RemoteFile(self._client, self._partial, sftp.READ | sftp.WRITE)
        self._file.reopened = self._check_reopened
        self._made[self._partial] = None  # before the answer: it may have to be removed
        journal = self._journal
        if journal is not None and self._goes_on:
            self._reached = journal.start.position
            journal.note_mark(self._reached)
            self._note(written=0)
            # What lies behind is written again, except for zeros, which are left out.
            await self._file.resize(self._reached)
            return
        self._note()  # first: a file that nobody knows of would stay
        try:
            await self._file.create()
        except sftp.SftpError as error:
            del self._made[self._partial]
            raise PlanError(
                f"the image file can't be made: {error.message}", operation="create", hint=error.hint, **error.context
            ) from None
        await self._probe()

    def _note(self, **state: Any) -> None:
        if self._journal is not None:
            self._journal.note_upload({"commands": [self._client.command("rm", self._partial)], **state})

    async def _make_durable(self) -> bool:
        """Bring what was acknowledged to stable storage; False where the server can't."""
        written = self._reached
        if self._in_order or not await self._opened_file().flush():
            return False
        self._note(written=written)
        return True

    async def _probe(self) -> None:
        """Write behind the end and then before it, as an image with holes or a late head would be."""
        file, sftp = self._opened_file(), client_library()
        try:
            for offset in (1, 0):
                await file.write([(offset, memoryview(b"\0"))])
            await file.resize(0)
        except sftp.SftpError as error:
            if self._context.order not in (Order.SPARSE, Order.SEQUENTIAL):
                raise PlanError(
                    "this server takes writes in order only, and the image's format writes its head last",
                    operation="create",
                    host=self._client.where.host,
                    reason=error.message,
                    hint='Use encode.raw, encode.vhd with variant = "fixed" or encode.vmdk with variant = '
                    '"streamOptimized"; or write to a server that takes writes at any offset, as OpenSSH does.',
                ) from None
            self._in_order = True
            self._context.emit(
                FallbackTaken(
                    stage=self._context.name,
                    what="every byte in order, zeros too"
                    + ("; a killed run can't be resumed" if self._journal is not None else ""),
                    reason=f"the server takes writes in order only ({error.message})",
                )
            )
            await file.begin_again()

    async def write(self, parts: Sequence[tuple[int, memoryview]]) -> None:
        """Send it in requests as long as the server takes them. Raises StoreError."""
        sftp = client_library()
        try:
            await self._opened_file().write(parts)
        except sftp.SftpError as error:
            raise await self._explained(error, parts) from None
        self._reached = max(self._reached, *(offset + view.nbytes for offset, view in parts))

    async def _explained(self, error: StoreError, parts: Sequence[tuple[int, memoryview]]) -> StoreError:
        """SFTP says "failure" for a full disk, too: find out."""
        folder = self._path.rpartition("/")[0] or "."
        free = await self._client.free_bytes(folder)
        if free is not None and free < sum(view.nbytes for _, view in parts) + MiB:
            return StoreError(
                "the image file could not be written: No space left on the server",
                operation="write",
                free=free,
                uri=self.partial_uri,
                hint="The target is full. Free space there, compress (encode.qcow2), or choose another target.",
            )
        return StoreError(
            f"the image file could not be written: {error.message}",
            operation="write",
            uri=self.partial_uri,
            offset=parts[0][0],
            hint="Is there a quota, or a limit on the size of a file, on the server?",
        )

    async def _check_reopened(self, session: Session, file: Any) -> None:
        """A server that crashed may have lost what it acknowledged: then the file is shorter than it was."""
        found = await self._client.request(session, "look", file.stat)
        if (found.size or 0) < self._reached:
            raise StoreError(
                "the server lost bytes that it had acknowledged",
                operation="write",
                uri=self.partial_uri,
                expected=self._reached,
                got=found.size,
                hint="It was restarted meanwhile. Run the export again.",
            )

    async def seal(self, size: int) -> None:
        """Full length, on stable storage, closed. Raises StoreError."""
        file = self._opened_file()
        if not self._in_order:
            await file.resize(size)
        if not await file.flush():
            self._context.emit(
                FallbackTaken(
                    stage=self._context.name, what="no fsync on the server", reason="it does not know fsync@openssh.com"
                )
            )
        await file.close()
        found = await self._client.state(self._partial)
        if found is None or found.size != size:
            raise StoreError(
                "the stored file has another size than the image",
                operation="seal",
                uri=self.partial_uri,
                expected=size,
                got=found.size if found else None,
            )
        self._note(written=size)

    async def abort(self, cause: BaseException) -> None:
        """Remove the temporary file, shielded, within ABORT_DEADLINE_S. Raises LeftBehindError."""
        await self._take_back(cause)

    def _opened_file(self) -> RemoteFile:
        if self._file is None:
            raise StageError("write.sftp writes only into a file that it made", operation="write.sftp")
        return self._file

    # -- verify, publish, withdraw ---------------------------------------------------------------------------------

    @asynccontextmanager
    async def _open_reader(self) -> AsyncIterator[RangeReader]:
        path = self._path if self._is_published else self._partial
        async with client_library().reading(self._client, path) as reader:
            yield reader

    @asynccontextmanager
    async def _fetch_receipt(self) -> AsyncIterator[Receipt]:
        found = await self._client.state(self._path if self._is_published else self._partial)
        if found is None:
            raise StoreError("the stored image is gone", operation="receipt", uri=str(self._client.where))
        yield Receipt(found.size, note="SFTP has no checksums of files")

    async def fetch_manifest(self) -> bytes | None:
        """The manifest that stands beside the target; None where there is none. Raises StoreError."""
        client = self._connect()
        path = self._path + MANIFEST_SUFFIX
        found = await client.state(path)
        if found is None or found.is_folder:
            return None
        async with client_library().reading(client, path) as reader:
            manifest: bytes = await reader.read(0, reader.size)
        return manifest

    async def publish(self, manifest: bytes) -> str:
        """Rename the image into place, then write the manifest. Raises StoreError when somebody took the name."""
        sftp = client_library()
        before = await self._client.state(self._partial)
        renaming = {"size": before.size, "modified": before.modified} if before is not None else {}
        self._note(written=self._reached, renaming=renaming)
        await self._move(self._partial, self._path)
        self._is_published = True
        self._note(written=self._reached, renaming=renaming, commands=[self._client.command("rm", self._path)])
        partial, path = self._partial + MANIFEST_SUFFIX, self._path + MANIFEST_SUFFIX
        file = sftp.RemoteFile(self._client, partial, sftp.READ | sftp.WRITE)
        self._made[partial] = None
        await file.create()
        await file.write([(0, memoryview(manifest))])
        await file.flush()
        await file.close()
        await self._move(partial, path)
        return self._client.where.at(path)

    async def _move(self, source: str, target: str) -> None:
        """Rename; without `overwrite` never over a file that appeared meanwhile."""
        client = self._client
        before = await client.state(source)
        if before is not None:
            self._made[target] = before
        if await client.rename(source, target, replace=self._options.overwrite):
            del self._made[source]
            return
        self._made.pop(target, None)
        if not self._options.overwrite and await client.state(target) is not None:
            raise StoreError(
                "the target appeared while the image was written",
                operation="publish",
                uri=client.where.at(target),
                hint="Somebody else wrote it; it was left alone. Choose another name.",
            )
        raise StoreError(
            "the server refuses to rename the finished file",
            operation="publish",
            source=source,
            uri=client.where.at(target),
        )

    async def withdraw(self) -> None:
        """Remove what this run wrote, under whatever name; never somebody else's file. Raises LeftBehindError."""
        await self._take_back(None)

    async def _take_back(self, cause: BaseException | None) -> None:
        from pipeline.flow.retry import CLEANUP

        client, failure = self._client, f"the server did not answer within {ABORT_DEADLINE_S:.0f} s"
        with anyio.move_on_after(ABORT_DEADLINE_S, shield=True):
            try:
                with client.spending(CLEANUP):
                    for path in reversed(list(self._made)):
                        await self._remove(path)
                return
            except StoreError as error:
                failure = str(error)
        raise LeftBehindError(
            f"removing what was stored failed: {failure}",
            cause=cause or StoreError(failure),
            commands=tuple(
                command
                for path in self._made
                for command in (client.command("rm", path), f"pipeline uploads abort {shlex.quote(str(client.where))}")
            ),
            uri=str(client.where),
        )

    async def _remove(self, path: str) -> None:
        """Remove a file of ours; under a name that others may use, only the very file that we put there."""
        client, made = self._client, self._made[path]
        found = await client.state(path)
        if found is not None and made in (None, found) and await client.remove(path):
            self._context.emit(UploadRemoved(uri=client.where.at(path), how="removed"))
        del self._made[path]

    async def close(self) -> None:
        """Hang up; idempotent."""
        await self._hang_up()
        self._staging.close()

    async def _hang_up(self) -> None:
        found, self._found = self._found, None
        if found is not None:
            await found.close()


def client_library() -> Any:
    """The module that needs asyncssh. Raises PlanError where that is not installed."""
    try:
        from stages.store import sftp
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "asyncssh":
            raise
        raise PlanError(
            "SFTP needs the package asyncssh, which is not installed",
            operation="plan",
            hint="pip install 'disk-pipeline[sftp]'",
        ) from None
    return sftp


@asynccontextmanager
async def open_reader(url: str, *, endpoint: str = "", ca_file: Path | None = None) -> AsyncIterator[RangeReader]:
    """Open `sftp://...` for random reads. Raises PlanError or StoreError.

    Args:
        endpoint, ca_file: ignored; every opener takes them.
    """
    opened: Callable[[str], Any] = client_library().open_reader
    async with opened(url) as reader:
        yield reader


SPEC = StageSpec(
    name="write.sftp",
    summary="Write the image to an SFTP server: temporary name, fsync, atomic rename, sparse. Needs the extra sftp.",
    options=Options,
    takes=pieces(Order.SPARSE, Order.RANDOM, Order.HEAD_LAST, Order.SEQUENTIAL),
    gives=STORED_IMAGE,
    build=SftpWriter,
    sink=SPARSE_SINK,
    resumable=True,
    schemes=("sftp",),
    open_reader=open_reader,
)
