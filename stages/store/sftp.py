"""A client of SFTP servers: one connection that is made again when it was lost, many requests under way at once.

Source: SSH File Transfer Protocol, draft-ietf-secsh-filexfer-02 (version 3), and OpenSSH's PROTOCOL, section 4
(limits@, fsync@, posix-rename@, statvfs@).

asyncssh's exceptions end here; everything above sees StoreErrors. This module is the only one that imports it.
"""

from __future__ import annotations

import base64
import os
import shlex
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, unquote, urlsplit

import anyio
import anyio.to_thread
import asyncssh

from pipeline.errors import FormatError, PlanError, StoreError, first_error
from pipeline.flow.retry import Retry, RetryPolicy
from pipeline.flow.stage import RealClock
from pipeline.units import KiB, format_duration

if TYPE_CHECKING:
    from pipeline.config.options import Secret

T = TypeVar("T")

# AES-GCM first: the usual default, chacha20-poly1305, costs 1.7 times the processor time (5.9 s against 3.5 s for
# 512 MiB). What has no modern cipher is not spoken to.
_CIPHERS = (
    "aes128-gcm@openssh.com",
    "aes256-gcm@openssh.com",
    "aes128-ctr",
    "aes192-ctr",
    "aes256-ctr",
    "chacha20-poly1305@openssh.com",
)
_MSG_IGNORE = 2  # RFC 4253, section 12
# The longest request, OpenSSH's limit of 255 KiB: requests of 32 KiB reach less than half the rate at twice the cost.
REQUEST_MAX = 255 * KiB
# Requests under way: 8 MiB of the longest fill a line of 1.3 Gbit/s at 50 ms. More is only more memory.
REQUESTS = 32
READ, WRITE = asyncssh.FXF_READ, asyncssh.FXF_WRITE
_KNOWN_HOSTS = (Path("~/.ssh/known_hosts"), Path("/etc/ssh/ssh_known_hosts"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """When a server is given up. Seconds.

    Attributes:
        connect_s: name lookup and TCP.
        login_s: key exchange and login after that.
        progress_s: no request that is under way was answered for so long.
        flush_s: as long may making a whole file durable take.
    """

    connect_s: float = 10.0
    login_s: float = 20.0
    progress_s: float = 30.0
    flush_s: float = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SftpUrl:
    """`sftp://[user@]host[:port]/path`; `/~/` in front of the path is the folder that the login leads to."""

    user: str
    host: str
    port: int
    path: str

    @classmethod
    def parse(cls, url: str, *, folder: bool = False) -> SftpUrl:
        """Take a URL apart.

        Args:
            folder: the path may name a folder.
        Raises:
            PlanError: it is not one, names no file, or has a password in it.
        """
        try:
            parts = urlsplit(url)
            port = parts.port or 22
        except ValueError:
            parts, port = urlsplit(""), 0
        path = unquote(parts.path)
        named = path.strip("/") and not path.endswith("/")
        if parts.scheme != "sftp" or not parts.hostname or parts.query or parts.fragment or not (named or folder):
            raise PlanError(
                f'"{url}" does not name a file on an SFTP server',
                operation="plan",
                hint="Write sftp://USER@HOST/PATH/NAME, with the image's name.",
            )
        if parts.password is not None:
            raise PlanError(
                "a password must not be in the URL",
                operation="plan",
                hint='Set password = { env = "NAME" }, or use a key.',
            )
        path = path[3:] or "." if path.startswith("/~/") else path or "/"
        return cls(user=unquote(parts.username or ""), host=parts.hostname, port=port, path=path)

    def at(self, path: str) -> str:
        """The URL of another path on the same server."""
        user = f"{quote(self.user)}@" if self.user else ""
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = f":{self.port}" if self.port != 22 else ""
        return f"sftp://{user}{host}{port}{quote(path if path.startswith('/') else '/~/' + path)}"

    def __str__(self) -> str:
        return self.at(self.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Login:
    """How to prove who we are, and that the server is who it should be.

    Attributes:
        identity_files: private keys; the usual ones in ~/.ssh where none is given.
        agent: also ask the agent that SSH_AUTH_SOCK names.
        known_hosts: instead of the user's and the system's.
    """

    identity_files: tuple[Path, ...] = ()
    passphrase: Secret | None = None
    password: Secret | None = None
    agent: bool = True
    known_hosts: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FileState:
    """What the server says about a path. Bytes, and seconds since 1970."""

    size: int
    modified: float
    is_folder: bool


@dataclass(frozen=True, slots=True)
class _HostKey:
    """The key that a server showed and that is not trusted."""

    line: str
    fingerprint: str


class _Caller(asyncssh.SSHClient):
    """Remembers the key of a server that is not known."""

    def __init__(self) -> None:
        self.refused: _HostKey | None = None

    def validate_host_public_key(self, host: str, addr: str, port: int, key: asyncssh.SSHKey) -> bool:
        """Never trust what known_hosts does not have."""
        name = host if port == 22 else f"[{host}]:{port}"
        text = f"{key.get_algorithm()} {base64.b64encode(key.public_data).decode()}"
        self.refused = _HostKey(f"{name} {text}", str(key.get_fingerprint()))
        return False


@dataclass(slots=True, eq=False)
class Session:
    """One connection with its SFTP channel. Never mends itself.

    Attributes:
        lost: an answer is missing or the connection broke; nothing more can be asked.
        patient_until: a request that takes long is under way until then at most; servers answer in turn.
    """

    connection: asyncssh.SSHClientConnection
    sftp: asyncssh.SFTPClient
    lost: bool = False
    patient_until: float = 0.0
    waiting: set[anyio.CancelScope] = field(default_factory=set)


class SftpClient:
    """One server. Every call has the whole budget of `retry`, on a new connection where the old one was lost."""

    def __init__(self, where: SftpUrl, login: Login, retry: Retry, patience: Patience | None = None) -> None:
        """Prepare it; nothing is sent."""
        self.where = where
        self.retry = retry
        self.connections = 0
        self._login = login
        self.patience = patience or Patience()
        self._session: Session | None = None
        self._connecting = anyio.Lock()
        self._policy: RetryPolicy | None = None
        self.room = anyio.Semaphore(REQUESTS)

    def command(self, order: str, path: str) -> str:
        """A command line that gives the server one order about a path, with OpenSSH's own client."""
        where, login = self.where, self._login
        words = ["sftp", "-b", "-", *(("-P", str(where.port)) if where.port != 22 else ())]
        words += [word for identity in login.identity_files for word in ("-i", str(identity))]
        if login.known_hosts is not None:
            words += ["-o", f"UserKnownHostsFile={login.known_hosts}"]
        words.append(f"{where.user}@{where.host}" if where.user else where.host)
        escaped = path.replace("\\", "\\\\").replace('"', '\\"')
        line = f'{order} "{escaped}"'
        return f"echo {shlex.quote(line)} | {shlex.join(words)}"

    # ---- connecting ------------------------------------------------------------------------------------------------

    async def session(self) -> Session:
        """The connection, made when there is none that works. Raises StoreError."""
        async with self._connecting:
            session = self._session
            if session is None or session.lost or session.connection.is_closed():
                await self._drop()
                self._session = await self._connect()
                self.connections += 1
            assert self._session is not None
            return self._session

    async def _connect(self) -> Session:
        where, login, patience = self.where, self._login, self.patience
        files, known = await anyio.to_thread.run_sync(self._known_hosts)
        caller = _Caller()
        try:
            # A deadline of our own around all of it: name lookups have none in asyncssh.
            with anyio.fail_after(patience.connect_s + patience.login_s):
                connection = await asyncssh.connect(
                    where.host,
                    where.port,
                    config=None,
                    client_factory=lambda: caller,
                    known_hosts=known,
                    username=where.user or (),
                    client_keys=[str(path) for path in login.identity_files] or (),
                    passphrase=login.passphrase.reveal() if login.passphrase else None,
                    password=login.password.reveal() if login.password else None,
                    agent_path=() if login.agent else None,
                    encryption_algs=_CIPHERS,
                    compression_algs=None,
                    connect_timeout=patience.connect_s,
                    login_timeout=patience.login_s,
                    # Twice unanswered is a dead line, also while nothing else is asked.
                    keepalive_interval=patience.progress_s / 2,
                    keepalive_count_max=2,
                )
                _send_no_padding(connection)
                try:
                    sftp = await connection.start_sftp_client()
                except BaseException:
                    connection.abort()
                    raise
        except (asyncssh.Error, asyncssh.KeyImportError, OSError, EOFError) as error:
            raise self._not_connected(error, caller, files, known) from None
        return Session(connection, sftp)

    def _known_hosts(self) -> tuple[tuple[Path, ...], asyncssh.SSHKnownHosts]:
        chosen = self._login.known_hosts
        files = (chosen,) if chosen is not None else tuple(path.expanduser() for path in _KNOWN_HOSTS)
        known = asyncssh.SSHKnownHosts()
        for path in files:
            try:
                known.load(path.read_text(errors="replace"))
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as error:
                raise StoreError(f"known_hosts can't be read: {error}", operation="connect", path=path) from None
        return files, known

    def _not_connected(
        self, error: Exception, caller: _Caller, files: Sequence[Path], known: asyncssh.SSHKnownHosts
    ) -> StoreError:
        where = {"operation": "connect", "host": self.where.host, "port": self.where.port}
        if isinstance(error, asyncssh.HostKeyNotVerifiable):
            return self._stranger(error, caller, files, known)
        if isinstance(error, asyncssh.PermissionDenied):
            ways = "keys in ~/.ssh and agent" if not self._login.identity_files else "the identity files"
            return StoreError(
                f"the server refuses the login: {error.reason}",
                **where,  # type: ignore[arg-type]  # operation, and context
                user=self.where.user or None,
                hint=f"Tried: {ways}{', password' if self._login.password else ''}. Try it by hand: "
                f"sftp -P {self.where.port} {self.where.user + '@' if self.where.user else ''}{self.where.host}",
            )
        if isinstance(error, (asyncssh.KeyImportError, FileNotFoundError, PermissionError)):
            return StoreError(
                f"a private key can't be used: {error}",
                **where,  # type: ignore[arg-type]  # as above
                hint='Check "identity_files" and "passphrase".',
            )
        if isinstance(error, (asyncssh.KeyExchangeFailed, asyncssh.ProtocolError, asyncssh.ProtocolNotSupported)):
            return StoreError(
                f"no common language with this server: {error.reason}",
                **where,  # type: ignore[arg-type]  # as above
                hint="Is it an SSH server, and not too old?",
            )
        if isinstance(error, (asyncssh.ChannelOpenError, asyncssh.SFTPError)) and not _is_lost(error):
            return StoreError(
                f"the server gives no SFTP: {error}",
                **where,  # type: ignore[arg-type]  # as above
                hint="Enable its sftp subsystem for this user.",
            )
        reason = "no answer in time" if isinstance(error, TimeoutError) else _reason(error)
        return StoreError(
            f"can't connect: {reason}",
            temporary=True,
            **where,  # type: ignore[arg-type]  # as above
            hint="Check host name and port in the URL, that the server runs, and that no firewall is in between.",
        )

    def _stranger(
        self, error: Exception, caller: _Caller, files: Sequence[Path], known: asyncssh.SSHKnownHosts
    ) -> StoreError:
        """Nobody said that this server is the right one: say how to."""
        shown = caller.refused
        if shown is None:
            return StoreError(f"the server's host key is not trusted: {error}", operation="connect")
        trusted = known.match(self.where.host, "", self.where.port)[0]
        add = f"echo {shlex.quote(shown.line)} >> {shlex.quote(str(files[0]))}"
        context = {"host": self.where.host, "port": self.where.port, "fingerprint": shown.fingerprint}
        if trusted:
            return StoreError(
                "the server's host key is NOT the one in known_hosts: somebody may be in between",
                operation="connect",
                **context,  # type: ignore[arg-type]  # context
                hint=f"Ask who runs the server. If the key was changed on purpose, remove the old line from "
                f"{files[0]} (ssh-keygen -R), then: {add}",
            )
        return StoreError(
            "the server's host key is not known",
            operation="connect",
            **context,  # type: ignore[arg-type]  # context
            hint="Compare the fingerprint with the server's own (ssh-keygen -lf on its *.pub). "
            f"If it is the same: {add}",
        )

    async def _drop(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.lost = True
            session.connection.abort()

    async def close(self) -> None:
        """Say goodbye, or hang up; idempotent."""
        session, self._session = self._session, None
        if session is None:
            return
        with anyio.move_on_after(2.0, shield=True):
            session.sftp.exit()
            session.connection.close()
            await session.connection.wait_closed()
        session.connection.abort()

    # ---- asking ----------------------------------------------------------------------------------------------------

    async def call(self, operation: str, ask: Callable[[Session], Awaitable[T]]) -> T:
        """Await `ask(session)`, again on a new connection where the old one was lost. Raises StoreError."""

        async def attempt() -> T:
            return await ask(await self.session())

        return await self.retry.call(operation, attempt, self._policy)

    async def request(
        self,
        session: Session,
        operation: str,
        send: Callable[[], Awaitable[T]],
        *,
        path: str = "",
        patience_s: float | None = None,
    ) -> T:
        """Send one request and wait for its answer.

        Raises:
            StoreError: the server refused (with its words), or is gone (temporary).
        Cancellation: the server may or may not have done it.
        """
        if session.lost:
            raise self._gone(operation, "the connection was lost")
        patience = patience_s or self.patience.progress_s
        now = anyio.current_time()
        if patience_s:
            session.patient_until = now + patience_s
            for other in session.waiting:
                other.deadline = max(other.deadline, session.patient_until)
        with anyio.CancelScope(deadline=max(now + patience, session.patient_until)) as scope:
            session.waiting.add(scope)
            try:
                answer = await send()
            except (asyncssh.Error, OSError, EOFError) as error:
                raise self._converted(session, error, operation, path) from None
            finally:
                session.waiting.discard(scope)
                if patience_s:
                    session.patient_until = 0.0
            # Requests are answered in turn: while any is answered, those behind it are not forgotten.
            again = anyio.current_time() + self.patience.progress_s
            for other in session.waiting:
                other.deadline = max(again, session.patient_until) if patience_s else max(other.deadline, again)
            self.retry.alive()
            return answer
        session.lost = True
        session.connection.abort()
        raise self._gone(operation, f"no answer for {format_duration(patience)}")

    def _gone(self, operation: str, reason: str) -> StoreError:
        # 0: the first retry, on a new connection, need not wait.
        return StoreError(
            reason, temporary=True, retry_after_s=0.0, operation=operation, host=self.where.host, port=self.where.port
        )

    def _converted(self, session: Session, error: Exception, operation: str, path: str) -> StoreError:
        if not isinstance(error, asyncssh.SFTPError) or _is_lost(error):
            session.lost = True
            return self._gone(operation, f"the connection was lost: {_reason(error)}")
        return SftpError(error, operation=operation, path=path, host=self.where.host)

    # ---- orders ----------------------------------------------------------------------------------------------------

    async def state(self, path: str) -> FileState | None:
        """What is there; None where nothing is. Raises StoreError."""

        return await self.call("look", lambda session: self._state(session, path))

    async def _state(self, session: Session, path: str) -> FileState | None:
        try:
            found = await self.request(session, "look", lambda: session.sftp.stat(path), path=path)
        except SftpError as error:
            if error.is_absent:
                return None
            raise
        return _state_of(found)

    async def free_bytes(self, path: str) -> int | None:
        """Free space for this user; None where the server does not say. Raises StoreError."""

        async def ask(session: Session) -> int | None:
            try:
                found = await self.request(session, "look", lambda: session.sftp.statvfs(path), path=path)
            except SftpError:
                return None
            return int(found.bavail * found.frsize)

        return await self.call("look", ask)

    async def names(self, folder: str) -> list[tuple[str, FileState]]:
        """What lies in a folder. Raises StoreError."""

        async def ask(session: Session) -> list[tuple[str, FileState]]:
            found = await self.request(session, "list", lambda: session.sftp.readdir(folder), path=folder)
            return [(str(one.filename), _state_of(one.attrs)) for one in found]

        return await self.call("list", ask)

    async def rename(self, source: str, target: str, *, replace: bool) -> bool:
        """Rename in one step; False where the server refuses. Raises StoreError.

        Without `replace` a target that is there is never replaced (OpenSSH renames by a hard link then).
        """
        before = await self.state(source)

        async def ask(session: Session) -> bool:
            sftp = session.sftp
            try:
                if replace:
                    await self.request(session, "rename", lambda: sftp.posix_rename(source, target), path=target)
                else:
                    await self.request(session, "rename", lambda: sftp.rename(source, target), path=target)
            except SftpError:
                return await self._was_renamed(session, source, target, before)
            return True

        done = await self.call("rename", ask)
        if not done and replace and before is not None and await self.state(target) is not None:
            # A server without posix-rename: for a moment there is neither the old nor the new one.
            await self.remove(target)
            return await self.rename(source, target, replace=False)
        return done

    async def _was_renamed(self, session: Session, source: str, target: str, before: FileState | None) -> bool:
        """Whether an earlier request did it, whose answer was lost."""
        gone = await self._state(session, source) is None
        return gone and before is not None and await self._state(session, target) == before

    @contextmanager
    def spending(self, policy: RetryPolicy) -> Iterator[None]:
        """Inside, every call has this budget instead of the usual one."""
        before, self._policy = self._policy, policy
        try:
            yield
        finally:
            self._policy = before

    async def remove(self, path: str) -> bool:
        """Remove a file; False where there was none. Raises StoreError."""

        async def ask(session: Session) -> bool:
            try:
                await self.request(session, "remove", lambda: session.sftp.remove(path), path=path)
            except SftpError as error:
                if error.is_absent:
                    return False
                raise
            return True

        return await self.call("remove", ask)


class SftpError(StoreError):
    """The server said no. Permanent.

    Attributes:
        code: the status, by its number in the protocol.
    """

    def __init__(self, error: asyncssh.SFTPError, *, operation: str, path: str, host: str) -> None:
        words = {2: "no such file", 3: "permission denied", 4: "failure, for a reason that SFTP does not tell"}
        message = words.get(error.code, error.reason or f"status {error.code}")
        hints = {
            2: "Check the path; a relative one begins with /~/.",
            3: "The login may not do this: change the owner or the permissions on the server.",
        }
        super().__init__(
            f"the server refuses: {message}",
            operation=operation,
            status=error.code,
            hint=hints.get(error.code, ""),
            path=path or None,
            host=host,
        )
        self.code = error.code

    @property
    def is_absent(self) -> bool:
        """There is no such file or folder."""
        return self.code in (2, 10)


class RemoteFile:
    """A file that is open on whatever connection there is, and opened again after that was lost."""

    def __init__(self, client: SftpClient, path: str, flags: int) -> None:
        """Describe it; nothing is opened.

        Args:
            flags: READ, WRITE or both.
        """
        self._client = client
        self._path = path
        self._flags = flags
        self._opening = anyio.Lock()
        self._opened: tuple[Session, asyncssh.SFTPClientFile] | None = None
        self.reopened: Callable[[Session, asyncssh.SFTPClientFile], Awaitable[None]] | None = None

    async def create(self) -> None:
        """Make the file, which must not exist, and open it. Raises StoreError."""
        flags = self._flags | asyncssh.FXF_CREAT | asyncssh.FXF_EXCL

        attempts = 0

        async def ask(session: Session) -> None:
            nonlocal attempts
            attempts += 1
            try:
                file = await self._open(session, flags)
            except SftpError as error:
                if error.code not in (4, 11) or attempts == 1:
                    raise
                # An earlier attempt made it, whose answer was lost: nobody else knows the name.
                file = await self._open(session, self._flags)
            self._opened = session, file

        await self._client.call("create", ask)

    async def _open(self, session: Session, flags: int) -> asyncssh.SFTPClientFile:
        # block_size 0: each call is one request; without an encoding, or bytes are refused.
        return await self._client.request(
            session,
            "open",
            lambda: session.sftp.open(self._path, flags, encoding=None, block_size=0),
            path=self._path,
        )

    async def on(self, session: Session) -> asyncssh.SFTPClientFile:
        """The file as this connection has it open. Raises StoreError."""
        async with self._opening:
            if self._opened is None or self._opened[0] is not session:
                was_open = self._opened is not None
                file = await self._open(session, self._flags)
                if was_open and self.reopened is not None:
                    await self.reopened(session, file)
                self._opened = session, file
            return self._opened[1]

    async def ask(
        self,
        operation: str,
        what: Callable[[asyncssh.SFTPClientFile], Awaitable[T]],
        *,
        patience_s: float | None = None,
    ) -> T:
        """One request about the open file. Raises StoreError."""

        async def ask(session: Session) -> T:
            file = await self.on(session)
            return await self._client.request(
                session, operation, lambda: what(file), path=self._path, patience_s=patience_s
            )

        return await self._client.call(operation, ask)

    async def write(self, parts: Sequence[tuple[int, memoryview]]) -> None:
        """Write bytes at their offsets, with many requests under way, sent in the order given.

        Raises:
            StoreError: for good.
        """

        async def ask(session: Session) -> None:
            file = await self.on(session)
            longest = min(REQUEST_MAX, session.sftp.limits.max_write_len or REQUEST_MAX)

            async def send(offset: int, view: memoryview) -> None:
                async with self._client.room:
                    await self._client.request(
                        session, "write", lambda: file.write(bytes(view), offset), path=self._path
                    )

            await _all(
                partial(send, offset + start, view[start : start + longest])
                for offset, view in parts
                for start in range(0, view.nbytes, longest)
            )

        await self._client.call("write", ask)

    async def resize(self, size: int) -> None:
        """Cut it or lengthen it with zeros. Raises StoreError."""
        await self.ask("resize", lambda file: file.truncate(size))

    async def flush(self) -> bool:
        """Put it on stable storage; False where the server can't. Raises StoreError."""
        try:
            await self.ask("flush", lambda file: file.fsync(), patience_s=self._client.patience.flush_s)
        except SftpError as error:
            if error.code == asyncssh.FX_OP_UNSUPPORTED:
                return False
            raise
        return True

    async def begin_again(self) -> None:
        """Close it and open it empty: a server that takes writes in order only starts at 0 again. Raises StoreError."""
        await self.close()

        async def ask(session: Session) -> None:
            self._opened = session, await self._open(session, self._flags | asyncssh.FXF_TRUNC)

        await self._client.call("open", ask)

    async def read(self, offset: int, length: int) -> bytes:
        """The bytes of a range, fewer where the file ends before. Raises StoreError."""

        async def ask(session: Session) -> bytes:
            file = await self.on(session)
            longest = min(REQUEST_MAX, session.sftp.limits.max_read_len or REQUEST_MAX)
            found: dict[int, bytes] = {}

            async def fetch(start: int, end: int) -> None:
                made = bytearray()
                while len(made) < end - start and (some := await once(start + len(made), end)):
                    made += some
                found[start] = bytes(made)

            async def once(start: int, end: int) -> bytes:
                async with self._client.room:
                    ask: Callable[[], Awaitable[bytes]] = lambda: file.read(end - start, start)  # noqa: E731
                    return await self._client.request(session, "read", ask, path=self._path)

            await _all(
                partial(fetch, start, min(start + longest, offset + length))
                for start in range(offset, offset + length, longest)
            )
            return b"".join(found[start] for start in sorted(found))

        return await self._client.call("read", ask)

    async def close(self) -> None:
        """Close it where it is open and the connection works. Raises StoreError."""
        opened, self._opened = self._opened, None
        if opened is not None and not opened[0].lost:
            await self._client.request(opened[0], "close", opened[1].close, path=self._path)


async def _all(calls: Iterable[Callable[[], Awaitable[None]]]) -> None:
    """Await all of these at once, begun in their order."""

    async def run(call: Callable[[], Awaitable[None]]) -> None:
        await call()

    try:
        async with anyio.create_task_group() as tasks:
            for call in calls:
                tasks.start_soon(run, call)
    except BaseExceptionGroup as group:
        raise first_error(group) from group


class SftpReader:
    """Random reads of one remote file. Safe to call from many tasks at once."""

    def __init__(self, file: RemoteFile, path: str, size: int) -> None:
        self._file = file
        self._path = path
        self._size = size

    @property
    def size(self) -> int:
        """Bytes, when it was opened."""
        return self._size

    async def read(self, offset: int, length: int) -> bytes:
        """Exactly these bytes. Raises StoreError, or FormatError beyond the end."""
        data = await self._file.read(offset, length) if offset >= 0 and offset + length <= self._size else b""
        if len(data) != length:
            raise FormatError(
                "the image ends before this range",
                operation="read",
                path=self._path,
                offset=offset,
                expected=length,
                got=len(data),
            )
        return data


@asynccontextmanager
async def reading(client: SftpClient, path: str) -> AsyncIterator[SftpReader]:
    """Open a remote file for random reads. Raises StoreError."""
    state = await client.state(path)
    if state is None or state.is_folder:
        raise StoreError("there is no such file", operation="read", uri=client.where.at(path), status=404)
    file = RemoteFile(client, path, asyncssh.FXF_READ)
    try:
        yield SftpReader(file, path, state.size)
    finally:
        with anyio.move_on_after(5.0, shield=True):
            await _quietly(file.close)


async def _quietly(close: Callable[[], Awaitable[None]]) -> None:
    try:
        await close()
    except StoreError:
        pass  # it was only read


@asynccontextmanager
async def connected(url: str, login: Login | None = None, *, folder: bool = False) -> AsyncIterator[SftpClient]:
    """A client for one URL, closed at the end. Raises PlanError for a URL that is none."""
    retry = Retry(RetryPolicy(), clock=RealClock(), emit=lambda event: None, stage="sftp")
    client = SftpClient(SftpUrl.parse(url, folder=folder), login or Login(), retry)
    try:
        yield client
    finally:
        await client.close()


@asynccontextmanager
async def open_reader(url: str, login: Login | None = None) -> AsyncIterator[SftpReader]:
    """Open `sftp://...` for random reads, with the usual keys and known hosts. Raises PlanError or StoreError."""
    async with connected(url, login) as client, reading(client, client.where.path) as reader:
        yield reader


def _send_no_padding(connection: asyncssh.SSHClientConnection) -> None:
    """Leave out the empty packet that asyncssh sends ahead of each packet: it doubles their number.

    It hides the last block of the packet before from an attack on ciphers in CBC mode, which are not in _CIPHERS.
    Source: RFC 4251, section 9.3.1.
    """
    send = connection.send_packet

    def send_but_ignore(kind: int, *args: bytes, **named: Any) -> None:
        if kind != _MSG_IGNORE:
            send(kind, *args, **named)

    connection.send_packet = send_but_ignore  # type: ignore[method-assign, assignment]  # there is no option


def _state_of(attributes: asyncssh.SFTPAttrs) -> FileState:
    is_folder = (attributes.permissions or 0) & 0o170000 == 0o040000
    return FileState(size=attributes.size or 0, modified=attributes.mtime or 0.0, is_folder=is_folder)


def _is_lost(error: Exception) -> bool:
    """Whether the connection is gone, and not just one request refused."""
    return isinstance(error, (asyncssh.SFTPConnectionLost, asyncssh.SFTPNoConnection, asyncssh.SFTPBadMessage))


def _reason(error: BaseException) -> str:
    # Name lookups have numbers of their own, which are negative, and words of their own.
    if isinstance(error, OSError) and error.errno and error.errno > 0:
        return os.strerror(error.errno)
    return str(getattr(error, "reason", "") or getattr(error, "strerror", "") or error) or type(error).__name__
